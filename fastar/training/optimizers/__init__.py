"""Optimizers by the names of `train.optimizer`. To add one: docs/developers/add-an-optimizer.md."""

from __future__ import annotations

import torch
from torch import Tensor

from fastar.config import TrainSettings
from fastar.kernels import backend
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


def rows_of_an_update(optimizer: str, device: torch.device) -> int:
    """Extra copies of theta that an update on `device` takes for a moment.

    None by the Triton kernels, which a GPU that is not here is taken to have, and none on a CPU, where it is done in
    blocks.
    """
    plain = device.type == "cuda" and backend(device) == "reference"
    return OPTIMIZERS[optimizer].PLAIN_ROWS if plain else 0
