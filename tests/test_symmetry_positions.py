"""The solver of constraints between positions, against all permutations of few of them."""

from __future__ import annotations

from itertools import permutations
from math import factorial

import numpy as np
import pytest
from numpy.typing import NDArray

from fastar.symmetry.positions import Constraints, Solution, solve

Pairs = list[tuple[NDArray[np.int64], NDArray[np.int64]]]


class Recorded(Constraints):
    """Constraints that also keep what was asked of them, to be checked one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: Pairs = []
        self.sets: list[NDArray[np.int64]] = []

    def fresh(self, shape: object) -> NDArray[np.int64]:
        found = super().fresh(shape)  # type: ignore[arg-type]
        self.sets.append(found.ravel())
        return found

    def tie(self, a: NDArray[np.int64], b: NDArray[np.int64]) -> None:
        super().tie(a, b)
        if not np.array_equal(a, b):
            self.pairs.append((a.ravel(), b.ravel()))

    def within(self, inside: NDArray[np.int64], blocks: NDArray[np.int64]) -> None:
        super().within(inside, blocks)
        self.pairs.append((inside.ravel(), np.broadcast_to(blocks, inside.shape).ravel()))

    def mark(self, at: NDArray[np.int64], labels: NDArray[np.int64] | int = 0, why: str | None = None) -> None:
        super().mark(at, labels, why)
        for label in np.unique(labels):
            self.sets.append(at[np.broadcast_to(labels, at.shape) == label])

    def allowed(self) -> set[tuple[int, ...]]:
        """All permutations of all positions that satisfy every constraint."""
        found = set()
        sets = [set(one.tolist()) for one in self.sets]
        pairs = [set(zip(a.tolist(), b.tolist(), strict=True)) for a, b in self.pairs]
        for to in permutations(range(self.count)):
            kept = all({to[i] for i in one} == one for one in sets)
            if kept and all({(to[i], to[j]) for i, j in one} == one for one in pairs):
                found.add(to)
        return found


def drawn(seed: int) -> Recorded:
    """At most 8 positions in two or three arrays, and some constraints at random."""
    random = np.random.default_rng(seed)
    known = Recorded()
    size = int(random.integers(2, 5))
    arrays = [known.fresh((size,)), known.fresh((size,))]
    if size == 2:
        arrays.append(known.fresh((size,)))
    for _ in range(int(random.integers(0, 4))):
        kind = random.integers(4)
        one, other = (arrays[int(k)] for k in random.integers(len(arrays), size=2))
        if kind == 0:
            known.tie(one, random.permutation(other) if random.random() < 0.5 else other)
        elif kind == 1:
            part = np.sort(random.permutation(size)[: int(random.integers(1, size + 1))])
            known.mark(one[part])
        elif kind == 2:
            part = random.permutation(size)[: int(random.integers(1, size + 1))]
            known.tie(one[part], other[random.permutation(part)])
        elif size == 4 and known.count + 2 <= 8:
            known.outer(one.reshape(2, size // 2), [0])
    return known


def count(solution: Solution) -> int:
    """Permutations in the group that the classes span."""
    total = 1
    for one in solution.classes:
        blocks = 1 if one.parent is None else solution.classes[one.parent].count
        total *= factorial(one.count // blocks) ** blocks
    return total


def moves(solution: Solution) -> list[tuple[int, ...]]:
    """Permutations of all positions that generate the group: neighbouring units, or blocks, change places."""
    found = []
    for kind, units in enumerate(solution.classes):
        inside = units.count // (1 if units.parent is None else solution.classes[units.parent].count)
        for unit in range(units.count - 1):
            if unit // inside == (unit + 1) // inside:
                found.append(_exchanged(solution, kind, unit, unit + 1))
    return found


def _exchanged(solution: Solution, kind: int, a: int, b: int) -> tuple[int, ...]:
    """Two units of a class change places, and the blocks that they are with all that is in them."""
    to = np.arange(len(solution.kind))
    swapped = {(kind, a): (kind, b), (kind, b): (kind, a)}
    for child, one in enumerate(solution.classes):
        if one.parent == kind:
            inside = one.count // solution.classes[kind].count
            for k in range(inside):
                swapped[child, a * inside + k] = (child, b * inside + k)
                swapped[child, b * inside + k] = (child, a * inside + k)
    where = {(int(k), int(u), int(s)): i for i, (k, u, s) in enumerate(_keys(solution))}
    for i, (k, u, s) in enumerate(_keys(solution)):
        if (int(k), int(u)) in swapped:
            other = swapped[int(k), int(u)]
            to[i] = where[(*other, int(s))]
    return tuple(to.tolist())


def _keys(solution: Solution) -> list[tuple[int, int, int]]:
    return list(zip(solution.kind.tolist(), solution.unit.tolist(), solution.slot.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_the_solution_is_all_that_is_allowed(seed: int) -> None:
    """Every exchange that it says is allowed, and where it held nothing for itself there are no others."""
    known = drawn(seed)
    allowed = known.allowed()
    solution = solve(known)
    for move in moves(solution):
        assert move in allowed
    if not solution.reduced and not solution.crossed.any():
        assert count(solution) == len(allowed)
    else:
        assert count(solution) <= len(allowed)


def test_a_table_of_which_both_sides_move_gives_up_one_on_one_axis_alone() -> None:
    known = Constraints()
    table, rows, columns = known.fresh((3, 4)), known.fresh((3,)), known.fresh((4,))
    known.tie(known.outer(table, [0]), rows)
    known.tie(known.outer(table, [1]), columns)
    assert sorted(one.count for one in solve(known).classes) == [3, 4]
    known.lines.append(table.ravel())
    held = solve(known)
    assert [one.count for one in held.classes] == [4]
    assert len(held.reduced) == 1


def test_reasons_can_be_left_out() -> None:
    known = Constraints()
    units = known.fresh((5,))
    known.hold(units[:2], "a table")
    assert [one.count for one in solve(known).classes] == [3]
    assert [one.count for one in solve(known, ["a table"]).classes] == [5]
