"""Parts of the DataLoader that reads a map-style dataset of a user's: order, samples, batches, processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset as SampleSet

from fastar.data.generators import generators_kept, seed_all
from fastar.runtime.user_code import users_code


class BatchOrder:
    """The batches of a pass, each a list of (index, seed): the batch sampler of a DataLoader that lives for all
    epochs."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class SeededSamples:
    """A dataset that is asked by (index, seed), and whose draws for a sample follow from the seed."""

    def __init__(self, samples: SampleSet[Any], name: str):
        self._samples, self._name = samples, name

    def __getitems__(self, wanted: Sequence[tuple[int, int]]) -> list[Any]:
        found = []
        with generators_kept():
            for index, seed in wanted:
                seed_all(seed)
                with users_code(f"{self._name}[{index}] ({type(self._samples).__name__})"):
                    found.append(self._samples[index])
        return found


class Collated:
    """A `collate_fn`, whose errors say that it was called."""

    def __init__(self, collate: Callable[[list[Any]], Any], name: str):
        self._collate, self._name = collate, name

    def __call__(self, samples: list[Any]) -> Any:
        with users_code(f"{self._name}: making a batch of {len(samples)} samples (collate_fn)"):
            return self._collate(samples)


class WorkerBegins:
    """A worker begins: Ctrl-C reaches all processes of a terminal; it goes on, so that the training can save,
    and ends with it.

    Args:
        users: the `worker_init_fn` of a DataLoader that was given.
    """

    def __init__(self, users: Callable[[int], None] | None):
        self._users = users

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self._users is not None:
            self._users(worker)
