"""Learning-rate schedules."""

from __future__ import annotations

import math

from fastar.config import TrainSettings


def learning_rate(settings: TrainSettings, step: int, steps_per_epoch: int, epochs: int, base: float) -> float:
    """The learning rate of step number `step` (from 0).

    Linear warm-up over `warmup_epochs`; then `base` times: a half cosine that reaches 0 after the last step, or
    `gamma` to the power of the milestones passed, or 1. Milestones are in epochs.

    Args:
        settings: schedule, warmup_epochs, milestones, gamma.
        step: number of the step, from 0.
        steps_per_epoch: steps in an epoch.
        epochs: length of the whole training.
        base: learning rate before the schedule.
    """
    epoch = step / steps_per_epoch
    warmup = settings.warmup_epochs
    if epoch < warmup:
        return base * (step + 1) / (warmup * steps_per_epoch + 1)
    if settings.schedule == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * min((epoch - warmup) / (epochs - warmup), 1.0)))
    if settings.schedule == "step":
        return base * settings.gamma ** sum(epoch >= milestone for milestone in settings.milestones)
    return base
