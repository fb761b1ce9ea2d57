"""Units of equal activations (those that never fire above all), told apart by their weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastar.matching.assignment import Solver
from fastar.matching.blocks import solve_tree
from fastar.matching.weight.descent import Descent
from fastar.matching.weight.problem import Problem
from fastar.runtime.seeds import derive_seed

# Numbers that a unit's samples become; of two units that do not do the same they are never all the same by chance.
_PROBES = 8
# Standardised samples have norm 1: units so near have correlations with others that float32 hardly tells apart.
_SAME = 1e-5

Classes = dict[str, NDArray[np.int64]]
"""Group -> [size] or [N, size]: of each unit the first one that does the same."""


def classes(tables: Mapping[str, Tensor]) -> Classes:
    """Units that do the same, of tables [samples, size] or [N, samples, size]."""
    out: Classes = {}
    for group, table in tables.items():
        values = (_probes(group, table.shape[-2]).to(table.device) @ table).mT.cpu().numpy()  # [..., size, probes]
        flat = values.reshape(-1, *values.shape[-2:])
        out[group] = np.stack([_first_alike(one) for one in flat]).reshape(values.shape[:-1])
    return out


@functools.lru_cache(maxsize=256)  # networks have dozens of groups, which are probed once for each source
def _probes(group: str, samples: int) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed(0, "ties", group))
    return torch.randn(_PROBES, samples, generator=generator, dtype=torch.float32, device="cpu")


def _first_alike(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """[size]: of each row of [size, probes] the first that is the same."""
    size = len(values)
    first = np.arange(size)
    order = np.argsort(values[:, 0], kind="stable")
    apart = np.diff(values[order, 0]) > _SAME
    if apart.all():  # the rule
        return first
    for run in np.split(order, np.flatnonzero(apart) + 1):
        left = np.sort(run)
        while len(left) > 1:
            alike = (np.abs(values[left] - values[left[0]]) <= _SAME).all(1)
            first[left[alike]] = left[0]
            left = left[~alike]
    return first


def by_weights(
    problem: Problem,
    sources: Mapping[str, Tensor],
    n: int,
    own: Classes,
    theirs: Classes,
    found: Sequence[NDArray[np.int64]],
    solver: Solver,
) -> list[NDArray[np.int64]]:
    """`found`, an index [size] of source n for each group, with units that do the same paired as raises
    <theta, pi(theta_n)> most. No others move, so that the sum of correlations stays what it is.

    Args:
        own, theirs: [size], units of theta and of the source of equal activations; of groups that were observed.
    """
    tied = [
        t
        for t, tree in enumerate(problem.trees)
        if any(_alike(one[name]) for g in tree if (name := problem.groups[g].name) in own for one in (own, theirs))
    ]
    if not tied:
        return list(found)
    descent = Descent(problem, problem.part(sources, n, n + 1), [index[None] for index in found], solver, None)
    changed = True
    while changed:  # each step raises the objective
        changed = False
        for t in reversed(tied):
            changed |= _step(descent, t, own, theirs)
    return [index[0] for index in descent.permutations]


def _alike(units: NDArray[np.int64]) -> bool:
    return bool((units != np.arange(len(units))).any())


def _step(descent: Descent, t: int, own: Classes, theirs: Classes) -> bool:
    """Pair what is tied in tree t anew; tell whether that raises the objective."""
    groups = [descent.problem.groups[g] for g in descent.problem.trees[t]]
    tables = []
    for group, g in zip(groups, descent.problem.trees[t], strict=True):
        if group.name in own:
            # Whatever two sites do the same, or two units that are there now: such pairs are as good as each other in
            # every assignment of the highest score.
            here, there = own[group.name], theirs[group.name][descent.permutations[g][0]]
            allowed = (here[:, None] == here) | (there[:, None] == there)
        else:  # not observed: its units stay, inside their blocks if these move
            blocks = group.size if group is groups[0] else groups[0].size
            allowed = np.kron(np.ones((blocks, blocks)), np.eye(group.size // blocks)).astype(bool)
        # Pairs that are not allowed cost more than all others together can gain.
        table = descent.score(g)[0].double().cpu().numpy()
        tables.append(np.where(allowed, table, -(np.abs(table).sum() + 1)))
    answers = solve_tree(tables, solver="scipy")
    if all((answer == np.arange(len(answer))).all() for answer in answers):
        return False
    step = tuple(answer[None] for answer in answers)
    if not descent.improves(t, descent.everyone, step)[0]:
        return False
    descent.force(t, step)
    return True
