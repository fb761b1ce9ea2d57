"""The solver of axes: whatever is asked of it in whatever order, what it leaves free satisfies all of it."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from fastar.symmetry.axes import FIXED, Axis, AxisSolver, CannotSplit, Segment, fixed, length_of


def draw(solver: AxisSolver, var: int, size: int, drawn: dict[int, Tensor]) -> Tensor:
    """A random permutation of an unknown that obeys its blocks, the same each time."""
    if var not in drawn:
        found = solver.parent_of(var)
        if found is None:
            drawn[var] = torch.randperm(size)
        else:
            parent, inner = found
            sigma = draw(solver, parent.var, parent.size, drawn)
            inside = torch.stack([torch.randperm(inner) for _ in range(size // inner)])
            drawn[var] = (sigma[:, None] * inner + inside).flatten()
    return drawn[var]


def positions(solver: AxisSolver, axis: Axis, drawn: dict[int, Tensor]) -> Tensor:
    """Where each position of `axis` is taken from."""
    out, offset = [], 0
    for segment in solver.resolve(axis):
        index = torch.arange(segment.length).reshape(segment.outer, segment.size, segment.inner)
        if segment.var != FIXED:
            index = index[:, draw(solver, segment.var, segment.size, drawn)]
        out.append(index.flatten() + offset)
        offset += segment.length
    return torch.cat(out) if out else torch.arange(0)


def test_what_stays_free_satisfies_every_demand() -> None:
    """300 random sequences of demands on small axes, each checked with random permutations of what is left."""
    torch.manual_seed(0)
    moved = blocked = 0
    for trial in range(300):
        rng = random.Random(trial)
        solver = AxisSolver()
        axes = [solver.fresh(n) for n in (12, 12, 24, 24, 6, 4, 2, 3)] + [fixed(12)]
        checks: list[tuple[str, Axis, Axis, int]] = []
        for _ in range(rng.randint(2, 7)):
            kind = rng.choice(["unify", "unify", "blocks", "blocks", "child", "merge", "cut", "join"])
            axis = rng.choice(axes)
            length = length_of(axis)
            if kind == "unify":
                other = rng.choice([one for one in axes if length_of(one) == length])
                solver.unify(axis, other)
                checks.append(("same", axis, other, 1))
            elif kind == "blocks":
                inner = rng.choice([n for n in range(1, length + 1) if length % n == 0])
                parent = solver.blocks(axis, inner)
                checks.append(("blocks", axis, parent, inner))
                axes.append(parent)
            elif kind == "child" and length <= 8:
                child = solver.child(axis, 3)
                checks.append(("blocks", child, axis, 3))
                axes.append(child)
            elif kind == "merge":
                axes.append(solver.merge([fixed(rng.choice([1, 2])), axis, fixed(rng.choice([1, 2]))]))
            elif kind == "cut" and length > 2:
                start = rng.randint(1, length - 1)
                pieces = solver.cut(axis, 0, start), solver.cut(axis, start, length)
                checks.append(("same", axis, (*pieces[0], *pieces[1]), 1))
                axes += pieces
            elif kind == "join":
                axes.append((*axis, *rng.choice(axes)))
        for _ in range(2):
            drawn: dict[int, Tensor] = {}
            for kind, axis, other, inner in checks:
                mine, theirs = positions(solver, axis, drawn), positions(solver, other, drawn)
                assert torch.equal(mine.sort().values, torch.arange(len(mine))), trial
                if kind == "blocks":
                    mine = mine.reshape(-1, inner) // inner
                    assert (mine == mine[:, :1]).all(), f"trial {trial}: a block was torn apart"
                    mine = mine[:, 0]
                assert torch.equal(mine, theirs), f"trial {trial}: {kind}"
                moved += not torch.equal(mine, torch.arange(len(mine)))
            blocked += any(solver.parent_of(var) is not None for var in drawn)
    assert moved > 300, "nearly nothing was left free: the check above means nothing"
    assert blocked > 50


def test_blocks_of_a_free_axis_leave_all_that_is_possible() -> None:
    solver = AxisSolver()
    axis = solver.fresh(12)
    heads = solver.blocks(axis, 3)
    (whole,) = solver.resolve(axis)
    assert (whole.size, whole.inner, whole.outer) == (12, 1, 1)
    assert solver.parent_of(whole.var) == (heads[0], 3)
    assert solver.blocks(axis, 3) == heads  # asking again changes nothing
    # Another axis that moves with it has the same inside; blocks of another axis with the same heads have their own.
    other, values = solver.fresh(12), solver.child(heads, 5)
    solver.unify(axis, other)
    assert solver.resolve(other) == solver.resolve(axis)
    assert solver.parent_of(values[0].var) == (heads[0], 5)
    assert length_of(values) == 20
    # Heads that stay leave the inside of each free, as unknowns of their own.
    solver.fix(heads)
    assert [segment.size for segment in solver.resolve(axis)] == [3] * 4
    assert len({segment.var for segment in solver.resolve(axis)}) == 4
    assert [segment.size for segment in solver.resolve(values)] == [5] * 4


def test_fixing_an_axis_in_blocks_fixes_the_blocks() -> None:
    solver = AxisSolver()
    axis = solver.fresh(12)
    heads = solver.blocks(axis, 3)
    values = solver.child(heads, 2)
    solver.fix(axis)
    assert solver.is_fixed(heads)
    assert [segment.size for segment in solver.resolve(values)] == [2] * 4


def test_blocks_are_cut_between_blocks_or_hold_the_one_that_is_cut() -> None:
    solver = AxisSolver()
    axis = solver.fresh(12)
    solver.blocks(axis, 3)
    first = solver.cut(axis, 0, 6)
    assert [(s.size, solver.parent_of(s.var) is not None) for s in first] == [(6, True)]
    assert [s.size for s in solver.cut(axis, 6, 10)] == [3, 1]  # through the last block, which stays; its inside is cut
    assert [s.size for s in solver.resolve(axis)] == [6, 3, 1, 2]


def test_two_levels_of_blocks_hold_the_inner_one() -> None:
    solver = AxisSolver()
    axis = solver.fresh(24)
    outer, inner = solver.blocks(axis, 12), solver.blocks(axis, 4)
    (whole,) = solver.resolve(axis)
    assert whole.inner == 4  # the 4 units inside the inner blocks stay in order
    found = solver.parent_of(whole.var)
    assert found is not None
    assert (found[0].size, found[1]) == (2, 3)
    assert solver.resolve(outer) == (found[0],)
    assert solver.resolve(inner) == (Segment(whole.var, 6),)


def test_a_split_through_units_is_refused() -> None:
    solver = AxisSolver()
    with pytest.raises(CannotSplit, match="12 units into 3 x 4"):
        solver.split(solver.fresh(12), (3, 4))
