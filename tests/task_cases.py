"""A task of a user's own, small enough to train in a moment: a network, data, a loss, a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import fastar


class Net(nn.Module):
    """One hidden layer."""

    def __init__(self, inputs: int = 4, width: int = 6, outputs: int = 3):
        super().__init__()
        self.hidden, self.out = nn.Linear(inputs, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(x)))


class Dropping(Net):
    """The same with dropout."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.dropout(torch.relu(self.hidden(x)), 0.2, self.training))


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples whose inputs have noise, drawn each time."""

    def __init__(self, count: int = 48):
        self.x, self.y = tensors(count)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + 0.1 * torch.randn(4), self.y[index]


def build() -> nn.Module:
    return Net()


def tensors(count: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs [count, 4], and classes that follow from them."""
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return x, x[:, :3].argmax(1)


def tensors_twice() -> Any:
    """Training data and test data."""
    return tensors(), tensors(20, seed=1)


def weighted(outputs: Tensor, batch: Any) -> Tensor:
    """A loss of a user's own: cross-entropy, weighted by an input."""
    x, y = batch
    return F.cross_entropy(outputs, y, reduction="none") * (1 + x[:, 3].abs())


def recipe(**changes: Any) -> fastar.Recipe:
    """A small recipe."""
    sections: dict[str, Any] = {
        "evaluation": {"points": 3},
        "logging": {"tensorboard": False},
        "star": {"epochs": 3, "match_every_epochs": 2},
    }
    for key, value in changes.items():
        sections[key] = {**sections[key], **value} if key in sections else value
    return fastar.Recipe(**{"epochs": 2, "batch_size": 16, "device": "cpu", **sections})


def saved_run(kind: str, folder: Path) -> None:
    """A run that is saved after every step.

    Args:
        kind: of its data: tensors, samples (a dataset that draws), or workers (that read such a dataset).
    """
    train = tensors() if kind == "tensors" else Noisy()
    data = fastar.Data(train, tensors(20, seed=1), workers=int(kind == "workers"))
    small = recipe(epochs=4, star={"epochs": 7}, checkpoint={"seconds": 0, "minutes": 1e-7})
    task: dict[str, Any] = {"loss": weighted, "metrics": ["accuracy"], "out": folder, "progress": False}
    sources = fastar.train_sources(Dropping, data, small, number=2, **task)
    fastar.train_star(Dropping, sources, data, small, matching="activation", **task)
