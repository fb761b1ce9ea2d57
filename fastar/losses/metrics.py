"""Metrics beside a loss, of models over a pass of batches: by name, by a function, or objects of torchmetrics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fastar.errors import FastarError, did_you_mean
from fastar.losses import terms
from fastar.losses.outputs import prediction
from fastar.losses.targets import sample_count, target_of
from fastar.losses.terms import Sums, number
from fastar.runtime.user_code import users_code

MetricChoice = str | Callable[..., Any]
"""A metric: its name, a function f(outputs, batch) -> [batch], or an object of torchmetrics."""


class Totals(Protocol):
    """A metric of models while a pass lasts. All of them are shown every batch."""

    def add(self, model: int, outputs: Any, targets: Any) -> None:
        """Take in what model number `model` returns for a batch."""

    def values(self) -> list[float]:
        """The metric of each model, of all batches so far."""

    def tensors(self) -> list[Tensor]:
        """All that `add` changes, for a CUDA graph."""


@dataclass(frozen=True)
class Metric:
    """A metric, and how to begin a pass with it.

    Args:
        name: as it is reported.
        begin: makes the totals of so many models on a device.
        whole: its targets are the whole batch, as a user's function takes it.
    """

    name: str
    begin: Callable[[torch.device, int], Totals] = field(repr=False)
    whole: bool = False

    def of_batch(self) -> Metric:
        """The same, given whole batches."""
        if self.whole:
            return self
        return Metric(self.name, lambda device, models: _OfBatch(self.begin(device, models)), whole=True)


def mean_of(
    name: str,
    sums: Callable[[Any, Any], Sums],
    finish: Callable[[float], float] = lambda mean: mean,
    *,
    whole: bool = False,
) -> Metric:
    """The mean over the terms of all batches.

    Args:
        sums: of a batch.
        finish: taken of the mean at the end.
        whole: as of `Metric`.
    """
    return Metric(name, lambda device, models: _Mean(sums, finish, device, models), whole)


class _Mean:
    """Sums of each model's terms in float64 on the device: nothing waits before the end. Their number is that of the
    first model."""

    def __init__(
        self, sums: Callable[[Any, Any], Sums], finish: Callable[[float], float], device: torch.device, models: int
    ):
        self._sums, self._finish = sums, finish
        self._totals = torch.zeros(models + 1, dtype=torch.float64, device=device)
        *self._of_models, self._count = self._totals.unbind()

    def add(self, model: int, outputs: Any, targets: Any) -> None:
        total, counted = self._sums(outputs, targets)
        self._of_models[model].add_(total)
        if not model:
            self._count.add_(number(counted))

    def values(self) -> list[float]:
        *totals, count = self._totals.tolist()
        return [self._finish(total / count) if count else math.nan for total in totals]

    def tensors(self) -> list[Tensor]:
        return [self._totals]


class _OfBatch:
    """Totals that are given whole batches, and take their targets."""

    def __init__(self, totals: Totals):
        self._totals = totals
        self.values, self.tensors = totals.values, totals.tensors

    def add(self, model: int, outputs: Any, batch: Any) -> None:
        self._totals.add(model, outputs, target_of(batch))


class _Kept:
    """Copies of an object of torchmetrics, or of another with `update` and `compute`, one for each model."""

    def __init__(self, given: Any, name: str, device: torch.device, models: int):
        self._name = name
        self._metrics = [copy.deepcopy(given) for _ in range(models)]
        for i, metric in enumerate(self._metrics):
            if hasattr(metric, "reset"):
                metric.reset()
            if hasattr(metric, "to"):
                self._metrics[i] = metric.to(device)

    def add(self, model: int, outputs: Any, targets: Any) -> None:
        self._metrics[model].update(prediction(outputs), targets)

    def values(self) -> list[float]:
        return [self._number(metric.compute()) for metric in self._metrics]

    def _number(self, found: Any) -> float:
        if isinstance(found, Tensor) and found.numel() != 1:
            raise FastarError(f"metric {self._name}: compute() returns {list(found.shape)}, not one number")
        return float(found)

    def tensors(self) -> list[Tensor]:
        raise FastarError(f"evaluation.graph=true: metric {self._name} cannot be captured; set it to false")


def per_sample(name: str, function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Tensor]:
    """A user's function of (outputs, batch) whose result is checked: one number for each sample."""

    def checked(outputs: Any, batch: Any) -> Tensor:
        with users_code(name):
            found = function(outputs, batch)
        count = sample_count(batch)
        if isinstance(found, Tensor) and found.shape == (count,):
            return found.float()
        shape = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        hint = ""
        if isinstance(found, Tensor) and not found.ndim:
            hint = ': take no mean over the batch, such as by reduction="none"'
        raise FastarError(f"{name} returns {shape}, and must return one number for each of {count} samples{hint}")

    return checked


NAMED: dict[str, Metric] = {
    "accuracy": mean_of("accuracy", terms.right),
    "top5": mean_of("top5", terms.right_of_five),
    "label_accuracy": mean_of("label_accuracy", terms.right_labels),
    "token_accuracy": mean_of("token_accuracy", terms.right_tokens),
    "mae": mean_of("mae", terms.absolute),
    "rmse": mean_of("rmse", terms.squared, math.sqrt),
    "perplexity": mean_of("perplexity", terms.token_losses, lambda mean: math.exp(min(mean, 700.0))),
}
"""Metrics by their names."""


def find_metrics(chosen: Sequence[MetricChoice]) -> list[Metric]:
    """The metrics that are chosen, each of one name.

    Raises:
        FastarError: a name that is not known, or is given twice; what is no metric.
    """
    if isinstance(chosen, str) or not isinstance(chosen, Sequence):
        raise FastarError(f"metrics={chosen!r}: give a list of metrics, such as ['accuracy']")
    found = [_find(one) for one in chosen]
    names = [metric.name for metric in found]
    twice = next((name for name in names if names.count(name) > 1 or name == "loss"), None)
    if twice is not None:
        raise FastarError(f"two metrics are called {twice}: give one of them another name (__name__)")
    return found


def _find(chosen: MetricChoice) -> Metric:
    if isinstance(chosen, str):
        if chosen not in NAMED:
            hint = did_you_mean(chosen, NAMED)
            raise FastarError(f"unknown metric {chosen!r}: {hint}choose from {', '.join(NAMED)}")
        return NAMED[chosen]
    name = getattr(chosen, "__name__", type(chosen).__name__)
    if isinstance(chosen, type):
        raise FastarError(f"metric {name} is a class: give an object of it, {name}(...)")
    if not callable(chosen) and not hasattr(chosen, "update"):
        raise FastarError(f"a metric is a {name}: give a name, a function f(outputs, batch) -> [batch], or an object")
    if hasattr(chosen, "update") and hasattr(chosen, "compute"):
        return Metric(name, lambda device, models: _Kept(chosen, name, device, models))
    values = per_sample(f"metric {name}", chosen)

    def sums(outputs: Any, batch: Any) -> Sums:
        found = values(outputs, batch)
        return found.double().sum(), len(found)

    return mean_of(name, sums, whole=True)
