"""Generators that users' code draws from: those of torch (the CPU's), NumPy and `random`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Begin the generators of torch (the CPU's), NumPy and `random` from `seed`."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # what users' transforms draw from
    random.seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Afterwards these generators are where they were."""
    before = states()
    try:
        yield
    finally:
        set_states(before)


def states() -> tuple[Any, ...]:
    """The states of all generators."""
    return torch.default_generator.get_state(), np.random.get_state(), random.getstate()  # noqa: NPY002


def set_states(states: tuple[Any, ...]) -> None:
    """Put them where they were."""
    torch.default_generator.set_state(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    random.setstate(states[2])
