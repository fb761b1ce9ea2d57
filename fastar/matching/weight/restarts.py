"""Ways out of local optima: several descents from several starts, and perturbations of the best end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastar.config import MatchingSettings
from fastar.matching.request import MatchResult
from fastar.matching.weight.descent import Descent, OrderOfSweep, stacked
from fastar.matching.weight.problem import Problem
from fastar.runtime.seeds import derive_seed
from fastar.symmetry import Permutations
from fastar.symmetry.batched_index import upload

# Noise on S_g, in standard deviations of its entries, one after the other: units whose partners are nearly as good as
# another's change them, sure ones stay. On ResNet-18, 5 perturbations at 0.25 throughout gained as much, at 0.15 a
# quarter less and at 0.1 half as much; noise on single groups, or on all of them at 0.5 and more, gained less for the
# time.
LEVELS = (0.3, 0.25, 0.2, 0.15, 0.1)


def reached(descent: Descent, first: Tensor) -> MatchResult:
    """The ends that a descent has reached; `first` [n] is the objective that the first one began with."""
    objective, weights = (torch.from_numpy(values) for values in descent.sources.objectives())
    indices = zip(descent.problem.groups, descent.permutations, strict=True)
    return MatchResult(
        permutations=Permutations({group.name: torch.from_numpy(index.copy()) for group, index in indices}),
        objective=objective,
        objective_weights=weights,
        objective_start=first,
        sweeps=torch.from_numpy(descent.sweeps.copy()),
        converged=torch.from_numpy(np.logical_not(descent.unsolved.any(0))),
        solves=descent.solves,
    )


def better(one: MatchResult, other: MatchResult) -> MatchResult:
    """The better end of each source."""
    mine = one.objective >= other.objective
    names = ("objective", "objective_weights", "sweeps", "converged")
    permutations = {
        name: torch.where(mine[:, None], index, other.permutations[name]) for name, index in one.permutations.items()
    }
    picked: dict[str, Any] = {name: torch.where(mine, getattr(one, name), getattr(other, name)) for name in names}
    return replace(one, permutations=Permutations(permutations), solves=one.solves + other.solves, **picked)


def best_ends(
    problem: Problem,
    data: dict[str, Tensor],
    starts: Sequence[Sequence[NDArray[np.int64]] | None],
    settings: MatchingSettings,
    seed: int,
    pool: ThreadPoolExecutor | None,
) -> MatchResult:
    """The best end of each source of a chunk: of every restart from every start, then of perturbations of the best.

    Args:
        data: parameter name -> [n, ...] in memory order, not written to.
        starts: an [n, size] index per group; None: the identity, improved by `align_backward`.
        pool: threads for the assignments of a chunk's sources.
    """
    count = len(next(iter(data.values())))
    identity = [np.tile(np.arange(group.size), (count, 1)) for group in problem.groups]
    best: MatchResult | None = None
    descent: Descent | None = None
    for restart, start in itertools.product(range(settings.restarts), starts):
        descent = None  # what it holds goes before the next takes as much
        descent = Descent(problem, data, identity if start is None else start, settings.solver, pool)
        first = torch.from_numpy(descent.sources.objectives()[0]) if best is None else best.objective_start
        if start is None:
            align_backward(descent)
        descent.run(_order(len(problem.trees), seed, restart), settings.max_sweeps)
        ends = reached(descent, first)
        best = ends if best is None else better(best, ends)
    assert best is not None
    if settings.perturbations:
        if descent is None or settings.restarts * len(starts) > 1:  # else it stands where it has ended
            descent = None
            indices = [best.permutations[group.name].numpy() for group in problem.groups]
            descent = Descent(problem, data, indices, settings.solver, pool)
        before = descent.solves
        perturb(descent, settings.perturbations, seed, settings.max_sweeps)
        end, solves = reached(descent, best.objective_start), best.solves + descent.solves - before
        best = replace(end, sweeps=best.sweeps, solves=solves)
    return best


def _order(trees: int, seed: int, restart: int) -> OrderOfSweep:
    """Orders of trees: the first descent goes from the output to the input and back again; the others in a random
    order, anew for each sweep."""
    if restart == 0:
        return lambda sweep: range(trees) if sweep % 2 else range(trees - 1, -1, -1)

    def shuffled(sweep: int) -> list[int]:
        random = np.random.default_rng(derive_seed(seed, "matching order", restart, sweep))
        return [int(t) for t in random.permutation(trees)]

    return shuffled


def align_backward(descent: Descent) -> None:
    """Match tree after tree from the output to the input, as a place to start from.

    Each S_g counts only parameters whose other groups are matched already, since the others would add noise. Every
    product of a parameter is computed once; afterwards all S_g are complete. A source for which this ends below the
    objective it began with goes back to where it was.
    """
    problem, count, device = descent.problem, descent.count, descent.sources.device
    before, mark = descent.sources.objectives()[0], descent.mark()
    done, told = set[int](), set[int]()
    for t, tree in reversed(list(enumerate(problem.trees))):
        for g in tree:
            size = problem.groups[g].size
            table = torch.zeros(count, size, size, device=device, dtype=torch.float32)
            for name in problem.tensors[g]:
                if {p.group for p in problem.sites[name]} - done <= set(tree) and not problem.twice(t, name):
                    descent.sources.add(table, name, g)
                    told.add(g)
            descent.tables[g] = table
        done |= set(tree)
        # No unit of the tree has moved yet: its S_g are the tables.
        answers = stacked(
            descent.solve(t, [known for g in tree if (known := descent.tables[g]) is not None], descent.everyone)
        )
        descent.note(t, descent.everyone, answers)
        for g in tree[1:] if problem.crossed[t] else ():
            if g not in told:  # but by parameters that tell of the other children too, now that these are matched
                scores = [_crossing(descent, t, h, done) for h in tree]
                descent.note(t, descent.everyone, stacked(descent.solve_child(t, g, scores)))
        for name in problem.touched[t]:
            others = {p.group for p in problem.sites[name]}
            if others <= done:
                late = others if problem.twice(t, name) else others - set(tree)
                for h in sorted(late):
                    known = descent.tables[h]
                    assert known is not None
                    descent.sources.add(known, name, h)
    descent.seen = [[index.copy() for index in descent.permutations] for _ in problem.groups]
    after, _ = descent.sources.objectives()
    descent.go_back(mark, np.flatnonzero(after < before))


def _crossing(descent: Descent, t: int, g: int, done: set[int]) -> Tensor:
    """S_g of every source by what is counted so far, and by parameters on which tree t lies twice."""
    problem, table = descent.problem, descent.tables[g]
    assert table is not None
    table = table.clone()
    for name in problem.tensors[g]:
        if problem.twice(t, name) and {p.group for p in problem.sites[name]} <= done:
            descent.sources.add(table, name, g)
    return descent.in_place(g, table, descent.everyone)


def perturb(descent: Descent, times: int, seed: int, max_sweeps: int) -> None:
    """Perturb every source of a descent that has ended, `times` times (iterated local search).

    A perturbation solves all trees once, in a random order, with noise on S_g, takes these assignments whatever they
    do to the objective, and descends to the next local optimum. A source keeps the better of it and where it stood, so
    that no objective is lowered. What is drawn depends on the seed and the number of the perturbation alone, so that a
    source's result does not depend on the others'.
    """
    groups, trees = descent.problem.groups, descent.problem.trees
    for number in range(times):
        random = np.random.default_rng(derive_seed(seed, "matching kick", number))
        mark, (before, _) = descent.mark(), descent.sources.objectives()
        for t in random.permutation(len(trees)):
            noisy = []
            for g in trees[t]:
                size, score = groups[g].size, descent.score(g)
                (noise,) = upload([random.standard_normal((size, size), dtype=np.float32)], score.device)
                spread = score.flatten(1).std(dim=1, correction=0) * LEVELS[number % len(LEVELS)]
                noisy.append(score + noise * spread[:, None, None])
            descent.force(int(t), stacked(descent.solve(int(t), noisy, descent.everyone)))
        order = [int(t) for t in random.permutation(len(trees))]

        def there_and_back(sweep: int, order: list[int] = order) -> list[int]:
            return order[::-1] if sweep % 2 else order

        descent.run(there_and_back, max_sweeps)
        # Back at the same end the objective is the same, whatever the rounding of sums says.
        elsewhere = [(now != index).any(1) for now, index in zip(descent.permutations, mark.permutations, strict=True)]
        improved = np.any(elsewhere, axis=0) & (descent.sources.objectives()[0] > before)
        descent.go_back(mark, np.flatnonzero(~improved))
