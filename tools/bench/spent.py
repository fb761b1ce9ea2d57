"""Time spent on the parts of a whole run, by the tasks that its progress is told of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastar.runtime.progress import Advance, SilentProgress

PARTS = ("sources", "steps", "matching", "barriers", "rest")


@dataclass
class Spent:
    """Seconds, by the clock and of the processor."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Inside, time is added."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)


class Tasks(SilentProgress):
    """The time that each part of a run took, by the descriptions of its tasks."""

    def __init__(self) -> None:
        self._found = {name: Spent() for name in PARTS}
        self._open: list[str] = []
        self._star_done = False

    @contextmanager
    def task(self, description: str, total: int, unit: str = "items") -> Iterator[Advance]:
        own, spent = self._part(description), Spent()
        above = self._open[-1] if self._open else None
        self._open.append(own)
        try:
            with spent.counted():
                yield lambda count=1, note="": None
        finally:
            self._open.pop()
            self._star_done |= description == "training star"
            if own != above:
                self._found[own] += spent
                if above is not None:
                    self._found[above] -= spent

    def parts(self, whole: Spent) -> dict[str, Spent]:
        """The parts of a whole run; `rest` is what is in no task, and the reading of data."""
        known = {name: spent for name, spent in self._found.items() if name != "rest"}
        return {**known, "rest": whole - sum(known.values(), Spent())}

    def _part(self, description: str) -> str:
        above = self._open[-1] if self._open else None
        if description.startswith(("reading", "writing")):
            return "rest"
        if description == "training star":
            return "steps"
        if description.startswith("matching") and (above == "steps" or (above is None and not self._star_done)):
            return "matching"  # in training, or for where it starts
        if above is None and (not self._star_done or description.endswith(" models")):
            return "sources"  # one after the other (source models, heldout models), or many together
        return above or "barriers"
