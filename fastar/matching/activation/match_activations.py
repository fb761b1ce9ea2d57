"""Matching by activations: units are paired by the correlations of what they compute (git re-basin, section 3.1)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from fastar.matching.activation import ties
from fastar.matching.activation.activation_cache import CACHED
from fastar.matching.activation.statistics import Tables, UnitActivations, resampled
from fastar.matching.blocks import solve_rows
from fastar.matching.request import Request
from fastar.matching.weight.match_weights import SMALL
from fastar.matching.weight.problem import Problem
from fastar.runtime.full_precision import full_precision
from fastar.runtime.memory import free_bytes
from fastar.symmetry import Permutations, Symmetry
from fastar.symmetry.batched_index import chosen

# Sources at a time on a GPU, where they fit, and of small networks: enough for batched products, whatever N is.
PART = 16


def correlate_units(request: Request) -> tuple[Permutations, tuple[str, ...]]:
    """Permutations [N, size] that pair units whose activations correlate most, all groups in one pass; and the groups
    that could not be observed, whose units stay (inside their blocks, if these move).

    Activations are those of `UnitActivations`. Each source costs a forward pass of the batches, unless its activations
    are cached. A tree's assignment is exact: blocks pair by their parent's own activations and the best pairing of
    the units inside. The weights only tell apart units that compute the same, such as those that never fire:
    <theta, pi(theta_n)> may fall.

    Raises:
        FastarError: no batches, activations that are not finite, or not as many for a source as for theta.
    """
    symmetry, theta, sources, known = request.symmetry, request.theta, request.sources, request.activations
    if known is not None:
        measure, tables = known.cache.measure, known.tables
        own = known.theta or measure(theta, "theta")
    else:
        assert request.examples is not None
        examples = request.examples()
        measure = UnitActivations(examples.model, symmetry, examples.inputs, request.device)
        names = symmetry.computed_with(theta, sources)  # the model ties a tied tensor's other name to it
        own = measure({name: theta[name] for name in names}, "theta")

        def tables(begin: int, end: int) -> Tables:
            each = [measure({name: sources[name][n] for name in names}, f"source {n}") for n in range(begin, end)]
            return {group: torch.stack([one[group] for one in each]) for group in each[0]}

    count, threads, device = request.count, request.threads, measure.device
    problem = Problem(symmetry, theta, sources)
    one = bytes_of_one(symmetry, CACHED.itemsize * sum(table.numel() for table in own.values()))
    if device.type == "cuda":
        most = max(1, min(PART, free_bytes(device) // 4 // one))
    else:
        most = max(threads, PART if one <= SMALL else 1)
    size = request.settings.chunk or min(count, most)
    indices = {group.name: np.zeros((count, group.size), dtype=np.int64) for group in symmetry.groups}
    solving = ThreadPoolExecutor(threads) if threads > 1 else nullcontext()
    shown = request.progress.task("matching", count, "sources")
    with torch.no_grad(), full_precision(), solving as pool, shown as advance:
        alike = ties.classes(own)
        for begin in range(0, count, size):
            end = min(begin + size, count)
            theirs = tables(begin, end)
            part = {name: index[begin:end] for name, index in indices.items()}
            _pair(request, measure, own, theirs, part, pool)
            same = ties.classes(theirs)
            del theirs
            for n in range(begin, end):
                of_one = {name: units[n - begin] for name, units in same.items()}
                found = [index[n] for index in indices.values()]
                told_apart = ties.by_weights(problem, sources, n, alike, of_one, found, request.settings.solver)
                for index, units in zip(indices.values(), told_apart, strict=True):
                    index[n] = units
            advance(end - begin)
    return Permutations({name: torch.from_numpy(index) for name, index in indices.items()}), measure.unobserved


def _pair(
    request: Request,
    measure: UnitActivations,
    own: Tables,
    theirs: Tables,
    indices: dict[str, NDArray[np.int64]],
    pool: ThreadPoolExecutor | None,
) -> None:
    """Write the assignments of all trees of n sources, of tables [n, samples, size], into `indices` [n, size]."""
    symmetry, device = request.symmetry, measure.device
    count = len(next(iter(indices.values())))
    (rows,) = chosen(np.arange(count), count, device=device)
    for tree in (symmetry.trees[t] for t in measure.order):
        groups = [symmetry.groups[g] for g in tree]
        scores = [
            own[group.name].mT @ resampled(theirs[group.name], measure.rows(group.name, indices))
            if group.name in own
            else torch.zeros(count, group.size, group.size, device=device, dtype=torch.float32)
            for group in groups
        ]
        blank = [group.name not in own for group in groups]
        for n, solved in enumerate(solve_rows(scores, blank, rows, request.settings.solver, pool)):
            for group, answer in zip(groups, solved.answers, strict=True):
                indices[group.name][n] = answer


def bytes_of_one(symmetry: Symmetry, kept: int) -> int:
    """Bytes that a source takes while it is compared, if `cache_bytes` says `kept`: its tables in half and twice in
    full precision, and correlations, as they are and as they are solved."""
    return 5 * kept + 12 * sum(group.size**2 for group in symmetry.groups)
