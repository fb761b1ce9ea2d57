"""Schedules: the learning rate, and the side of the training images."""

from __future__ import annotations

import itertools
import math

from fastar.config import TrainSettings

# Sides are rounded to multiples of what the networks for large images reduce an image by.
_SIDES = 32


def learning_rate(settings: TrainSettings, step: int, steps_per_epoch: int, epochs: int, base: float) -> float:
    """The learning rate of step number `step` (from 0).

    Linear warm-up over `warmup_epochs`; then `base` times: a half cosine or a straight line that reaches 0 after the
    last step, or `gamma` to the power of the milestones passed, or 1. Milestones are in epochs. onecycle is
    torch.optim.lr_scheduler.OneCycleLR with cosine annealing (Smith and Topin 2018).

    Args:
        settings: schedule, warmup_epochs, milestones, gamma, pct_start, div_factor, final_div_factor.
        step: number of the step, from 0.
        steps_per_epoch: steps in an epoch.
        epochs: length of the whole training.
        base: learning rate before the schedule.
    """
    if settings.schedule == "onecycle":
        return base * _one_cycle(settings, step, steps_per_epoch * epochs)
    epoch = step / steps_per_epoch
    warmup = settings.warmup_epochs
    if epoch < warmup:
        return base * (step + 1) / (warmup * steps_per_epoch + 1)
    if settings.schedule in ("cosine", "linear"):
        done = min((epoch - warmup) / (epochs - warmup), 1.0)
        return base * (1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
    if settings.schedule == "step":
        return base * settings.gamma ** sum(epoch >= milestone for milestone in settings.milestones)
    return base


def _one_cycle(settings: TrainSettings, step: int, steps: int) -> float:
    """The share of the highest learning rate: from 1 / div_factor up to 1 at step `peak`, then down until the last."""
    low, last = 1 / settings.div_factor, steps - 1
    peak = settings.pct_start * steps - 1
    if step <= peak:
        return _half_cosine(low, 1.0, step / peak if peak > 0 else 1.0)
    return _half_cosine(1.0, low / settings.final_div_factor, (step - peak) / (last - peak))


def _half_cosine(begin: float, end: float, done: float) -> float:
    return end + (begin - end) / 2 * (math.cos(math.pi * min(done, 1.0)) + 1)


def resolution(settings: TrainSettings, epoch: int) -> int | None:
    """The side of the training images in epoch number `epoch` (from 0); None: as the data set has them.

    Between the [epoch, side] pairs of `resolutions` a straight line, rounded to a multiple of 32; before the first and
    after the last, theirs (FFCV's ImageNet recipe).

    >>> settings = TrainSettings(resolutions=((11, 160), (13, 192)))
    >>> [resolution(settings, epoch) for epoch in (0, 11, 12, 13, 15)]
    [160, 160, 192, 192, 192]
    """
    pairs = settings.resolutions
    if not pairs:
        return None
    if epoch <= pairs[0][0]:
        return pairs[0][1]
    for (begin, side), (end, other) in itertools.pairwise(pairs):
        if epoch < end:
            return _SIDES * round((side + (other - side) * (epoch - begin) / (end - begin)) / _SIDES)
    return pairs[-1][1]
