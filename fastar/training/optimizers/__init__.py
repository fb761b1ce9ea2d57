"""Optimizers by the names of `train.optimizer`. To add one: docs/developers/add-an-optimizer.md."""

from __future__ import annotations

from torch import Tensor

from fastar.config import TrainSettings
from fastar.training.optimizers.adam import Adam, AdamW
from fastar.training.optimizers.flat_optimizer import FlatOptimizer, Sections
from fastar.training.optimizers.sgd import Sgd

OPTIMIZERS: dict[str, type[FlatOptimizer]] = {
    "sgd": Sgd,
    "adam": Adam,
    "adamw": AdamW,
}


def flat_optimizer(settings: TrainSettings, theta: Tensor, sections: Sections, matrices: int) -> FlatOptimizer:
    """The optimizer of `train.optimizer`; arguments as of `FlatOptimizer`."""
    return OPTIMIZERS[settings.optimizer](settings, theta, sections, matrices)
