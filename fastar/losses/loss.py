"""The loss of a task: by name, or a user's function."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from fastar.errors import FastarError, did_you_mean
from fastar.losses import terms
from fastar.losses.metrics import Metric, MetricChoice, find_metrics, mean_of, per_sample
from fastar.losses.outputs import prediction
from fastar.losses.targets import target_of
from fastar.losses.terms import Sums

LossChoice = str | Callable[..., Any]
"""A loss: its name (`LOSSES`), a function f(outputs, batch) -> [batch], or a loss module of torch."""


@dataclass(frozen=True)
class Loss:
    """A loss, and the metrics beside it.

    Args:
        name: as it is recorded.
        sums: of (outputs, targets) of a batch.
        metrics: measured beside it.
        whole: the targets of it and of its metrics are whole batches, as a user's function takes them.
        training: (outputs, targets, label smoothing) -> the mean, where one operation takes it; None: of `sums`.
        function: the user's function or module; None: the loss is known by its name.
    """

    name: str
    sums: Callable[[Any, Any], Sums]
    metrics: tuple[Metric, ...] = ()
    whole: bool = False
    training: Callable[[Any, Any, float], Tensor] | None = None
    function: Callable[..., Any] | None = None

    def mean(self, outputs: Any, targets: Any, smoothing: float = 0.0) -> Tensor:
        """The mean over a batch's terms, 0-d, for gradients.

        Args:
            outputs: what the forward returned.
            smoothing: label smoothing.
        """
        if self.training is not None:
            return self.training(outputs, targets, smoothing)
        total, counted = self.sums(outputs, targets)
        return total / terms.number(counted)

    def total(self, outputs: Any, targets: Any, smoothing: float = 0.0) -> tuple[Tensor, Tensor | int]:
        """The sum over a batch's terms, 0-d, for gradients, and their number; there may be none.

        Added up over the parts of a batch, both make the `mean` of the whole.

        Args:
            outputs, smoothing: as of `mean`.
        """
        if smoothing and self.function is None and self.name == "cross_entropy":  # no other loss takes it
            sums = terms.cross_entropy(outputs, target_of(targets) if self.whole else targets, smoothing)
        else:
            sums = self.sums(outputs, targets)
        return sums[0], terms.number(sums[1])

    def classes(self, outputs: Any, targets: Any) -> int | None:
        """The number of classes that targets say one of; None: they do not."""
        if self.function is not None or self.name not in ("cross_entropy", "lm"):
            return None
        targets = target_of(targets) if self.whole else targets
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return None
        return (
            prediction(outputs) if self.name == "lm" else terms.class_logits(outputs, targets).movedim(1, -1)
        ).shape[-1]

    @property
    def names(self) -> list[str]:
        """What a model is measured by: "loss", and the metrics' names."""
        return list(self.measures())

    def measures(self) -> dict[str, Metric]:
        """The loss itself and the metrics, by name: what a model is measured by."""
        return {
            "loss": mean_of("loss", self.sums, whole=self.whole),
            **{metric.name: metric for metric in self.metrics},
        }


def _smoothed_cross_entropy(outputs: Any, targets: Tensor, smoothing: float) -> Tensor:
    logits = terms.class_logits(outputs, targets)
    return F.cross_entropy(logits, terms.classes(targets), label_smoothing=smoothing)


LOSSES: dict[str, tuple[Callable[[Any, Any], Sums], tuple[str, ...]]] = {
    "cross_entropy": (terms.cross_entropy, ("accuracy",)),
    "mse": (terms.squared, ("rmse",)),
    "bce": (terms.binary, ("label_accuracy",)),
    "lm": (terms.token_losses, ("perplexity",)),
}
"""Name of a loss -> its sums, and the metrics beside it where none are chosen."""


def find_loss(chosen: LossChoice = "cross_entropy", metrics: Sequence[MetricChoice] | None = None) -> Loss:
    """The loss that is chosen, with its metrics.

    Args:
        chosen: a name, a function f(outputs, batch) -> [batch], or a loss module of torch with reduction="none".
        metrics: beside it; None: those that belong to the loss's name.

    Raises:
        FastarError: a name that is not known.
    """
    if isinstance(chosen, str):
        if chosen not in LOSSES:
            hint = did_you_mean(chosen, LOSSES)
            raise FastarError(
                f"unknown loss {chosen!r}: {hint}choose from {', '.join(LOSSES)}, or give a function "
                "f(outputs, batch) -> [batch] (module:function on the command line)"
            )
        sums, beside = LOSSES[chosen]
        training = _smoothed_cross_entropy if chosen == "cross_entropy" else None
        return _with_metrics(Loss(chosen, sums, training=training), beside if metrics is None else metrics)
    if not callable(chosen):
        kind = type(chosen).__name__
        raise FastarError(f"the loss is a {kind}: give a name or a function f(outputs, batch) -> [batch]")
    name = getattr(chosen, "__name__", type(chosen).__name__)
    if isinstance(chosen, _Loss):
        return _with_metrics(Loss(name, _of_module(chosen, name), function=chosen), metrics or ())
    values = per_sample(f"loss {name}", chosen)

    def sums_of_samples(outputs: Any, batch: Any) -> Sums:
        found = values(outputs, batch)
        return found.sum(), len(found)

    def mean_of_samples(outputs: Any, batch: Any, smoothing: float) -> Tensor:
        return values(outputs, batch).mean()

    loss = Loss(name, sums_of_samples, whole=True, training=mean_of_samples, function=chosen)
    return _with_metrics(loss, metrics or ())


def _with_metrics(loss: Loss, chosen: Sequence[MetricChoice]) -> Loss:
    """The same with metrics beside it. Where one of them takes whole batches, all are given these."""
    metrics = find_metrics(chosen)
    if not (loss.whole or any(metric.whole for metric in metrics)):
        return replace(loss, metrics=tuple(metrics))
    sums, training = loss.sums, loss.training
    if not loss.whole:
        loss = replace(
            loss,
            sums=lambda outputs, batch: sums(outputs, target_of(batch)),
            training=training and (lambda outputs, batch, share: training(outputs, target_of(batch), share)),
        )
    return replace(loss, metrics=tuple(metric.of_batch() for metric in metrics), whole=True)


def _of_module(module: _Loss, name: str) -> Callable[[Any, Any], Sums]:
    """The terms of a loss module of torch, which takes (prediction, target). Their mean is the module's own with
    reduction="mean": targets that it ignores are none, terms of weighted classes count with the weights."""
    if module.reduction != "none":
        raise FastarError(f'loss {name} returns one number for a batch: make it with reduction="none"')

    ignored = getattr(module, "ignore_index", None)
    modules: dict[torch.device, _Loss] = {}

    def of_device(device: torch.device) -> _Loss:
        """The module, or a copy whose weights are on the device."""
        if device not in modules:
            there = all(one.device == device for one in (*module.parameters(), *module.buffers()))
            modules[device] = module if there else copy.deepcopy(module).to(device)
        return modules[device]

    def sums(outputs: Any, targets: Tensor) -> Sums:
        predicted = terms.prediction(outputs)
        here = of_device(predicted.device)
        found: Tensor = here(predicted, targets)
        if ignored is None or targets.is_floating_point():
            return found.sum(), found.numel()
        targets = targets.long()
        if isinstance(here, nn.CrossEntropyLoss | nn.NLLLoss) and here.weight is not None:
            kept = targets != ignored
            return found.sum(), (here.weight[targets.where(kept, 0)] * kept).sum()
        return found.sum(), targets if ignored == terms.IGNORED else targets.masked_fill(
            targets == ignored, terms.IGNORED
        )

    return sums
