"""Data as users have them: datasets that draw, datasets that fail, loaders of their own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_cases import Heard
from task_cases import build
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

from fastar.api import Recipe
from fastar.data.user_data import UserDataset, UserSplits, user_data
from fastar.experiments.session import new_session
from fastar.experiments.task import TaskData
from fastar.experiments.user_task import PYTHON, Given
from fastar.runs import RunFolder


class Drawing(Dataset[tuple[Tensor, Tensor]]):
    """Samples whose transform draws from torch, NumPy and `random`; the first value says which sample it is."""

    def __init__(self, count: int = 13):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = [float(torch.rand(())), float(np.random.rand()), random.random()]  # noqa: NPY002
        return torch.tensor([float(index), *drawn]), torch.tensor(index % 3)


class Failing(Drawing):
    """Raises for sample number `at`."""

    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.at:
            raise OSError("no such picture")
        return super().__getitem__(index)


class Streamed(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples that come one after the other, and are drawn as they come."""

    def __init__(self, count: int = 12):
        self.count = count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(self.count):
            yield torch.cat([torch.tensor([float(index)]), torch.randn(3)]), torch.tensor(index % 3)


class Backwards(Sampler[int]):
    """An order of the user's own."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count - 1, -1, -1))

    def __len__(self) -> int:
        return self.count


def split(given: Any, batch_size: int = 4, **more: Any) -> UserDataset:
    """What a user gives, as a split on the CPU."""
    return user_data("the train data", given, torch.device("cpu"), batch_size, **more)


def epoch(data: UserDataset, number: int = 0, *, seed: int = 0, begin: int = 0, size: int = 4) -> list[Any]:
    """The batches of an epoch."""
    return list(data.batches(size, seed=seed, epoch=number, begin=begin))


def same(one: Any, other: Any) -> bool:
    """Tell whether lists of batches are the same, bit for bit."""
    first, second = (torch.utils._pytree.tree_leaves(batches) for batches in (one, other))
    return len(first) == len(second) and all(map(torch.equal, first, second))


def task_data(splits: UserSplits, **recipe: Any) -> tuple[TaskData, list[str]]:
    """The data of a run as it takes them, and the lines that it is told."""
    heard, given = Heard(), Given(build=build, data=splits)
    settings = Recipe(device="cpu", **recipe).settings(PYTHON, "task_cases:build", "cross_entropy")
    return new_session(settings, RunFolder(Path()), heard, given=given).data, heard.lines
