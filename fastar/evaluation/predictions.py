"""Class probabilities of many networks on the same samples, a few networks at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastar.errors import FastarError
from fastar.evaluation.batch_norm import statistics_bytes
from fastar.evaluation.losses import Batches, evaluate_rows
from fastar.evaluation.paths import Endpoint
from fastar.flat import FlatLayout
from fastar.losses import Loss, find_loss
from fastar.losses.outputs import prediction
from fastar.losses.targets import target_of
from fastar.runtime.memory import resident_models

# Networks that share each batch: more save little, since data are made while networks run.
TOGETHER = 8
# Samples that the first networks are shown in all: how many classes there are is known after them.
FIRST = 2_000_000

Probabilities = dict[str, np.ndarray]
"""Split -> class probabilities float32 [samples, classes]."""


Labels = dict[str, np.ndarray]
"""Split -> labels int64 [samples], in the order of the probabilities; filled by the first networks."""


def probabilities(
    model: nn.Module,
    layout: FlatLayout,
    members: Iterable[Endpoint],
    splits: Mapping[str, Batches],
    labels: Labels,
    *,
    samples: int,
    statistics_batches: Batches | None = None,
    loss: Loss | None = None,
) -> Iterator[Probabilities]:
    """The class probabilities of each network in turn: softmax of its logits, in float64, kept as float32.

    Batch-norm statistics are re-estimated for each. Some networks share each batch, so at most `TOGETHER` times
    samples x classes are held.

    Args:
        model: gives the architecture and the device; left as it was.
        layout: where parameters lie in a row.
        members: networks; each is made when its turn comes.
        splits: name of a split to its data, in one order at every pass.
        labels: is filled.
        samples: of all splits, for the memory.
        statistics_batches, loss: as of `evaluate_rows`; cross-entropy is what makes outputs class probabilities.

    Raises:
        FastarError: outputs that are no logits of classes, one vector for each sample.
    """
    loss = find_loss() if loss is None else loss
    check_probabilities(loss)
    device, waiting = next(model.parameters()).device, iter(members)
    together = min(TOGETHER, max(FIRST // max(samples, 1), 1))
    while some := list(islice(waiting, together)):
        shown = _Shown(len(some), list(splits), whole=loss.whole)
        rows = torch.stack([member.row_on(device) for member in some])
        evaluate_rows(
            model,
            layout,
            rows,
            splits,
            statistics_batches=statistics_batches,
            loss=loss,
            called=[member.name for member in some],
            show=shown,
        )
        del rows
        for split, parts in shown.labels.items():
            labels.setdefault(split, torch.cat(parts).numpy())
        classes = shown.of[0][next(iter(splits))][0].shape[1]
        each = 4 * (layout.numel + samples * classes) + statistics_bytes(model)
        together = min(TOGETHER, resident_models(each, device, TOGETHER))
        while shown.of:  # each is let go when it is given
            yield {split: torch.cat(parts).numpy() for split, parts in shown.of.pop(0).items()}


def check_probabilities(loss: Loss) -> None:
    """Raise FastarError unless a loss makes outputs the logits of class probabilities."""
    if loss.function is not None or loss.name != "cross_entropy":
        raise FastarError(
            f"class probabilities need networks that are trained by cross_entropy; this one's loss is {loss.name}"
        )


class _Shown:
    """Probabilities of so many networks, and the labels, batch by batch."""

    def __init__(self, networks: int, splits: list[str], *, whole: bool):
        self.of: list[dict[str, list[Tensor]]] = [{split: [] for split in splits} for _ in range(networks)]
        self.labels: dict[str, list[Tensor]] = {split: [] for split in splits}
        self._whole = whole

    def __call__(self, split: str, network: int, outputs: Any, targets: Any) -> None:
        logits, labels = prediction(outputs), target_of(targets) if self._whole else targets
        if logits.ndim != 2 or not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point():
            raise FastarError(
                "class probabilities need logits [batch, classes] and a label for each sample; outputs are "
                f"{list(logits.shape)} on {split}"
            )
        self.of[network][split].append(logits.double().softmax(1).float().cpu())
        if not network:
            self.labels[split].append(labels.cpu())
