"""Users' iterables of batches: gone through as they come."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastar.data.dataset import Dataset
from fastar.data.generators import generators_kept, seed_all, set_states, states
from fastar.errors import FastarError
from fastar.runtime.seeds import derive_seed
from fastar.runtime.user_code import users_code

BatchCheck = Callable[[Any, Sequence[int] | None], None]
"""Raises FastarError for a batch that does not fit; it is given the numbers of the samples, where they are known."""


class IterableData(Dataset):
    """Any other iterable of batches: its own order and batch sizes. A pass cannot be begun in its middle.

    Args:
        again: begins a pass.
        count: batches of a pass.
        batch_size: samples of a batch, as the recipe says.
    """

    exact = False
    digest = ""

    def __init__(
        self,
        name: str,
        again: Callable[[], Iterable[Any]],
        count: int,
        batch_size: int,
        device: torch.device,
    ):
        if not count:
            raise FastarError(f"{name}: holds no batch")
        self.name, self.device = name, device
        self._again, self._count, self._batch_size = again, count, batch_size
        self._checks = list[BatchCheck]()

    def check_batches(self, check: BatchCheck) -> None:
        """Check each batch from now on, when it comes."""
        self._checks[:] = [check]

    def __len__(self) -> int:
        return self._count * self._batch_size

    def batch_count(self, batch_size: int, drop_last: bool = True) -> int:
        return self._count

    def batches(self, batch_size: int, *, seed: int, epoch: int, begin: int = 0, **_: Any) -> Iterator[Any]:
        assert not begin, "a pass over an iterable begins at its beginning"
        assert _.get("share") is None, "its batches are not cut"
        return self._pass(derive_seed(seed, "pass", epoch))

    def sequential(self, batch_size: int) -> Iterator[Any]:
        return self._pass(0)

    def _pass(self, seed: int) -> Iterator[Any]:
        done = 0
        for batch in passed(self._again, self.name, seed):
            done += 1
            if done > self._count:
                break
            for check in self._checks:
                check(batch, None)
            yield moved_to(batch, self.device)
        if done != self._count:
            more = "more" if done > self._count else f"{done}"
            raise FastarError(f"{self.name}: had {self._count} batches and gave {more} now: a pass must not change")


def passed(again: Callable[[], Iterable[Any]], name: str, seed: int) -> Iterator[Any]:
    """A pass over a user's batches, whose draws follow from `seed`; generators are left as they were."""
    with generators_kept(), users_code(f"{name}: beginning a pass"):
        seed_all(seed)
        begun, now = iter(again()), states()
    for number in itertools.count():
        with generators_kept(), users_code(f"{name}: batch {number}"):
            set_states(now)
            batch = next(begun, None)
            now = states()
        if batch is None:
            return
        yield batch


def moved_to(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`."""
    return tree_map_only(Tensor, lambda one: one.to(device, non_blocking=True), batch)
