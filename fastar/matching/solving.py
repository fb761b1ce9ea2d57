"""The best assignments of one family for many sources, by as few copies from the device as possible."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastar.matching.assignment import Solver
from fastar.matching.families import Answers, solve_family
from fastar.symmetry.batched_index import Rows, chosen, download

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Solved:
    """The best assignments of a family for one source.

    Args:
        answers: an index for each group.
        gain: what they add to the objective, as the scores say it; 0 where nothing moves.
        scale: the sum of the sizes of the terms of `gain`, for what its rounding may be.
    """

    answers: Answers
    gain: float
    scale: float
    moves: bool


def solve_rows(
    scores: Sequence[Tensor],
    blank: Sequence[bool],
    rows: Rows,
    solver: Solver,
    pool: ThreadPoolExecutor | None,
) -> list[Solved]:
    """The best assignments of a family for each of `rows`.

    Where the best of each row of the scores are a permutation already they are the optimum, and only they leave the
    device: the rule once sources are aligned. All other scores are copied to the host together.

    Args:
        scores: S_g [N, size, size] of each group of the family.
        blank: whether a group's S_g is 0 throughout, since it has no parameters.
        pool: threads that solve side by side.
    """
    found: list[Solved | None] = [None] * len(rows)
    if len(rows) > 1 or scores[0].device.type != "cpu":
        found = _aligned(scores, blank, rows)
    left = [k for k, one in enumerate(found) if one is None]
    if left:
        tables = _tables(scores, rows if len(left) == len(rows) else _only(rows, left, scores[0].device))

        def solve(tables: Sequence[Floats]) -> Solved:
            answers = solve_family(tables, solver=solver)
            now = [np.diagonal(table) for table in tables]
            then = [table[np.arange(len(answer)), answer] for table, answer in zip(tables, answers, strict=True)]
            return _solved(answers, now, then)

        solved = pool.map(solve, tables) if pool is not None and len(left) > 1 else map(solve, tables)
        for k, one in zip(left, solved, strict=True):
            found[k] = one
    return [one for one in found if one is not None]


def _only(rows: Rows, left: Sequence[int], device: torch.device) -> Rows:
    only: Rows = chosen(rows.numbers[left], rows.count, device=device)[0]
    return only


def _tables(scores: Sequence[Tensor], rows: Rows) -> list[list[Floats]]:
    """On the host: each source's S_g of each group."""
    sizes = [score.shape[1] for score in scores]
    if len(scores) == 1 or scores[0].device.type == "cpu":
        of_groups = [download(rows.of(score)) for score in scores]
    else:
        flat = download(torch.cat([rows.of(score).flatten(1) for score in scores], 1))
        ends = np.cumsum([size**2 for size in sizes])
        of_groups = [
            part.reshape(len(rows), size, size) for part, size in zip(np.split(flat, ends[:-1], 1), sizes, strict=True)
        ]
    return [[table[k] for table in of_groups] for k in range(len(rows))]


def _solved(answers: Answers, now: Sequence[Floats], then: Sequence[Floats]) -> Solved:
    """`now`, `then`: [size] of each group, the scores of where its units are and of where they would be."""
    gain, scale, moves = 0.0, 0.0, False
    for answer, before, after in zip(answers, now, then, strict=True):
        moved = np.flatnonzero(answer != np.arange(len(answer)))
        if len(moved):
            a, b = before[moved].astype(np.float64), after[moved].astype(np.float64)
            gain, scale = gain + float((b - a).sum()), scale + float(np.abs(b).sum() + np.abs(a).sum())
            moves = True
    return Solved(answers, gain, scale, moves)


def _aligned(scores: Sequence[Tensor], blank: Sequence[bool], rows: Rows) -> list[Solved | None]:
    """Of each source: the best of each row if they permute the family, else None. One copy to the host."""
    parts = []
    for score in scores:
        some = rows.of(score)
        highest, where = some.max(2)
        # float32 holds every position of an axis exactly.
        parts += [where.float(), highest, some.diagonal(dim1=1, dim2=2)]
    columns = [part.shape[1] for part in parts]
    flat = np.split(download(torch.cat(parts, 1)), np.cumsum(columns)[:-1], 1)
    found: list[Solved | None] = []
    for k in range(len(rows)):
        best, top, now = ([part[k] for part in flat[kind::3]] for kind in range(3))
        answers = None
        if all(np.isfinite(values).all() for values in (*top, *now)):
            answers = _together([index.astype(np.int64) for index in best], blank)
        found.append(None if answers is None else _solved(answers, now, _reached(top, answers, best)))
    return found


def _reached(top: Sequence[Floats], answers: Answers, best: Sequence[Floats]) -> list[Floats]:
    """What `answers` score: the best of each row, or 0 where a blank group follows its children."""
    return [
        values if np.array_equal(answer, index) else np.zeros_like(values)
        for values, answer, index in zip(top, answers, best, strict=True)
    ]


def _together(best: Sequence[NDArray[np.int64]], blank: Sequence[bool]) -> Answers | None:
    """`best` [size] of each group of a family if they permute it: bijections, and blocks move as the parent's units."""
    parent, *children = best
    if not children:
        return (parent,) if _bijection(parent) else None
    blocks = [child.reshape(len(parent), -1) for child in children]
    sigmas = [block[:, 0] // block.shape[1] for block in blocks]
    sigma = sigmas[0] if blank[0] else parent
    for child, block, own in zip(children, blocks, sigmas, strict=True):
        if not (np.array_equal(own, sigma) and (block // block.shape[1] == own[:, None]).all() and _bijection(child)):
            return None
    return (sigma, *children) if _bijection(sigma) else None


def _bijection(index: NDArray[np.int64]) -> bool:
    seen = np.zeros(len(index), dtype=bool)
    seen[index] = True
    return bool(seen.all())
