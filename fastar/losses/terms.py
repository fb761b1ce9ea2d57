"""Sums over the terms of a batch, and their number, of the losses and metrics that have names.

Terms are samples, pixels, tokens, or values: what the mean is taken over. `outputs` is what the forward returned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastar.errors import FastarError
from fastar.losses.outputs import prediction

IGNORED = -100
"""Targets of this value count nowhere, as in torch."""

Sums = tuple[Tensor, Tensor | int]
"""The sum over a batch's terms, 0-d; and their number (of weighted terms the sum of the weights, 0-d), or the targets
that it is the number of (see `number`)."""


def number(counted: Tensor | int) -> Tensor | int:
    """The number of terms: of targets, those that are not ignored."""
    return (counted != IGNORED).sum() if isinstance(counted, Tensor) and counted.ndim else counted


def class_logits(outputs: Any, targets: Tensor) -> Tensor:
    """The logits with their classes on axis 1, as torch takes them: [b, c, ...].

    They may be [b, c], [b, c, h, w] or [b, t, c] for targets [b], [b, h, w] or [b, t].

    Raises:
        FastarError: shapes or types that do not fit.
    """
    logits = prediction(outputs)
    if isinstance(targets, Tensor) and logits.ndim >= 2 and logits.is_floating_point():
        if 1 in (logits.shape[1], logits.shape[-1]) and logits.numel() == targets.numel():
            raise FastarError(
                f"cross_entropy of one class is always 0; the network gives {_shape(logits)}: take the loss mse for "
                "numbers, or bce for labels that are there or not"
            )
        if targets.is_floating_point() and targets.shape == logits.shape:  # a probability of each class
            return logits
        if not targets.is_floating_point() and targets.dtype != torch.bool:
            if (logits.shape[0], *logits.shape[2:]) == targets.shape:
                return logits
            if logits.shape[:-1] == targets.shape:
                return logits.movedim(-1, 1)
    raise FastarError(
        f"cross_entropy takes logits [batch, classes] and whole numbers [batch], or [b, c, h, w] and [b, h, w], or "
        f"[b, t, c] and [b, t]; the network gives {_shape(logits)}, the targets are {_shape(targets)}"
    )


def cross_entropy(outputs: Any, targets: Tensor, smoothing: float = 0.0) -> Sums:
    """Of each sample, pixel or token that is not ignored."""
    logits, wanted = class_logits(outputs, targets), classes(targets)
    return F.cross_entropy(logits, wanted, reduction="sum", label_smoothing=smoothing), _counted(wanted)


def classes(targets: Tensor) -> Tensor:
    """Targets as torch's losses take them: whole numbers as int64, of any type before."""
    return targets if targets.is_floating_point() else targets.long()


def right(outputs: Any, targets: Tensor) -> Sums:
    """Terms whose largest logit is that of their class."""
    found = class_logits(outputs, targets).argmax(1)
    wanted = targets.argmax(1) if targets.is_floating_point() else targets
    return (found == wanted).sum(), _counted(classes(targets))


def right_of_five(outputs: Any, targets: Tensor) -> Sums:
    """Terms whose class is among the five largest logits."""
    logits = class_logits(outputs, targets)
    wanted = targets.argmax(1) if targets.is_floating_point() else targets
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return (best == wanted.unsqueeze(1)).any(1).sum(), _counted(classes(targets))


def _counted(targets: Tensor) -> Tensor | int:
    return targets.numel() // targets.shape[1] if targets.is_floating_point() else targets


def squared(outputs: Any, targets: Tensor) -> Sums:
    """Squared errors of all values."""
    found, wanted = same_shape(outputs, targets)
    return F.mse_loss(found, wanted, reduction="sum"), wanted.numel()


def absolute(outputs: Any, targets: Tensor) -> Sums:
    """Absolute errors of all values."""
    found, wanted = same_shape(outputs, targets)
    return F.l1_loss(found, wanted, reduction="sum"), wanted.numel()


def binary(outputs: Any, targets: Tensor) -> Sums:
    """Binary cross-entropies of all labels, outputs being logits.

    Raises:
        FastarError: targets outside 0..1, of which losses have no least value (looked for on a CPU alone).
    """
    found, wanted = same_shape(outputs, targets)
    if wanted.device.type == "cpu" and wanted.numel():
        low, high = wanted.aminmax()
        if low < 0 or high > 1:
            raise FastarError(f"bce takes targets from 0 to 1; they are from {float(low):g} to {float(high):g}")
    return F.binary_cross_entropy_with_logits(found, wanted, reduction="sum"), wanted.numel()


def right_labels(outputs: Any, targets: Tensor) -> Sums:
    """Labels that the sign of their logit tells right."""
    found, wanted = same_shape(outputs, targets)
    return ((found > 0) == (wanted > 0.5)).sum(), wanted.numel()


def same_shape(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and targets of one shape, in float32; axes of length 1 at the end may be left out of either.

    Raises:
        FastarError: other shapes, which torch might stretch to a matrix without a word.
    """
    found = prediction(outputs)
    if isinstance(targets, Tensor) and found.is_floating_point():
        wanted = targets.to(found.dtype)
        if found.shape == wanted.shape:
            return found, wanted
        if (*found.shape, 1) == wanted.shape or found.shape == (*wanted.shape, 1):
            return found, wanted.reshape(found.shape)
    raise FastarError(f"the network gives {_shape(found)}, the targets are {_shape(targets)}: give one shape for both")


def shifted(outputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n, vocabulary] and the token that each is to predict [n]: at place i of a sequence, that of place i + 1.

    Raises:
        FastarError: shapes or types that do not fit.
    """
    logits = prediction(outputs)
    fits = isinstance(targets, Tensor) and not targets.is_floating_point() and logits.ndim == 3
    if not fits or logits.shape[:2] != targets.shape:
        raise FastarError(
            f"lm takes logits [batch, tokens, vocabulary] and tokens [batch, tokens]; the network gives "
            f"{_shape(logits)}, the targets are {_shape(targets)}"
        )
    return logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten().long()


def token_losses(outputs: Any, targets: Tensor) -> Sums:
    """Cross-entropies of next tokens, in nats."""
    logits, tokens = shifted(outputs, targets)
    return F.cross_entropy(logits, tokens, reduction="sum", ignore_index=IGNORED), tokens


def right_tokens(outputs: Any, targets: Tensor) -> Sums:
    """Next tokens that have the largest logit."""
    logits, tokens = shifted(outputs, targets)
    return (logits.argmax(1) == tokens).sum(), tokens


def _shape(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
