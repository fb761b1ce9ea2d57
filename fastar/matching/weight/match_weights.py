"""Weight matching: permute N sources towards theta (paper section 3.3; git re-basin's algorithm 1 for each source)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastar.errors import FastarError
from fastar.matching.assignment import ScoresNotFinite
from fastar.matching.request import MatchResult, Request
from fastar.matching.weight.permuted_sources import LARGEST_HELD
from fastar.matching.weight.problem import Problem
from fastar.matching.weight.restarts import best_ends
from fastar.runtime.full_precision import full_precision
from fastar.runtime.memory import free_bytes
from fastar.symmetry import Permutations, Symmetry

# On a CPU, bytes of a source (`bytes_of_one`) up to which several are matched together: at 2 MB (ResNet-18 of width
# 0.25) 4 took 0.8 of the time, at 6 MB (an MLP of 512 units) 1.1.
SMALL = 3 << 20
# Bytes of all sources from which on threads gain more than calls cost, and of a chunk at most.
_SHARED, _TOGETHER = 4 << 20, 64 << 20


def match_weights(request: Request, starts: Sequence[Permutations | None]) -> MatchResult:
    """Permutations pi_n that raise <theta, pi_n(theta_n)> to a fixed point of coordinate descent over the groups.

    No step lowers the objective; at the end no group's best assignment raises it. Descent ends in local optima. The
    gains of the ways out, on 2 pairs of briefly trained ResNet-18 of objective (without 1-D parameters) 434
    (`tools/bench_escapes.py --sources 2`, on a CPU):

    - `start=backward`: 6.3 over the identity, at about its cost;
    - `start=activations`: 1.0 less than backward, but better in one of the two pairs; needs data;
    - `restarts=3`: 2.4 more, `restarts=8`: 3.0 more, at nearly as many times the descents;
    - `perturbations=1`: 7.8 more, 5: 13.5 (with `restarts=3` 15.2), 15: 17.8, each for half of a descent or less;
    - from last epoch's permutations, backward gains nothing, one perturbation 5.6 for as long as the re-match.

    Args:
        starts: permutations to start from, [size] or [N, size]; None: from the output layer backwards, wherever that
            is better than leaving the sources as they are. Of several, the best end is kept.
    """
    symmetry, settings, count = request.symmetry, request.settings, request.count
    problem = Problem(symmetry, request.theta, request.sources)
    indices = [None if one is None else _indices(symmetry, one, count) for one in starts]
    size = settings.chunk or chunk_size(symmetry, request.device, count, request.threads, settings.perturbations)
    bounds = [(begin, min(begin + size, count)) for begin in range(0, count, size)]

    def run_chunk(begin: int, end: int, pool: ThreadPoolExecutor | None) -> MatchResult:
        with torch.no_grad():
            data = problem.part(request.sources, begin, end)
            own = [None if one is None else [index[begin:end] for index in one] for one in indices]
            try:
                return best_ends(problem, data, own, settings, request.seed, pool)
            except ScoresNotFinite as error:
                which = f"source {begin}" if end == begin + 1 else f"one of the sources {begin} to {end - 1}"
                raise FastarError(
                    f"weights of theta or of {which} are too large to be matched: their products overflow float32; "
                    "train with a lower rate, or leave the source out"
                ) from error

    best: list[MatchResult] = []
    # Gains are far smaller than the inner products they are read off.
    with full_precision(), request.progress.task("matching", total=count, unit="sources") as advance:
        for ends in _run(run_chunk, bounds, request.device, request.threads):
            best.append(ends)
            advance(len(ends.objective))

    names = ("objective", "objective_weights", "objective_start", "sweeps", "converged")
    joined: dict[str, Any] = {name: torch.cat([getattr(one, name) for one in best]) for name in names}
    permutations = {g.name: torch.cat([one.permutations[g.name] for one in best]) for g in symmetry.groups}
    return MatchResult(Permutations(permutations), **joined, solves=sum(one.solves for one in best))


def _run(
    run_chunk: Callable[[int, int, ThreadPoolExecutor | None], MatchResult],
    bounds: Sequence[tuple[int, int]],
    device: torch.device,
    workers: int,
) -> Iterator[MatchResult]:
    """The ends of each chunk, in order.

    CPU: as many chunks at a time as there are threads, each on one thread. GPU: two at a time, so that the assignments
    of one are solved (on `workers` threads) while the products of the other are computed.
    """
    if device.type == "cpu" and (len(bounds) == 1 or workers == 1):
        yield from (run_chunk(begin, end, None) for begin, end in bounds)
        return
    lanes = min(len(bounds), workers if device.type == "cpu" else 2)
    before = torch.get_num_threads()
    solving = ThreadPoolExecutor(workers) if device.type != "cpu" else None
    try:
        # Inside a lane torch must not use further threads. The setting is the thread's own but MKL's is global.
        with ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(lambda bound: run_chunk(bound[0], bound[1], solving), bounds)
    finally:
        if solving is not None:
            solving.shutdown()
        torch.set_num_threads(before)


def _indices(symmetry: Symmetry, start: Permutations, count: int) -> list[NDArray[np.int64]]:
    """Permutations to start from as an [N, size] index per group."""
    symmetry.check(start)
    if start.count not in (None, count):
        raise FastarError(f"matching: start holds permutations of {start.count} sources, there are {count}")
    return [start[g.name].cpu().expand(count, g.size).contiguous().numpy() for g in symmetry.groups]


def chunk_size(symmetry: Symmetry, device: torch.device, count: int, threads: int, perturbations: int = 0) -> int:
    """Sources of a chunk.

    CPU: of a small network as many as there are, since each call takes longer than what it computes; from `_SHARED`
    bytes on the threads share them out. Of larger ones one, whose tables stay in the cache. GPU: what fits half of the
    free memory, since two chunks are in flight: the assignments of one are solved while the other's products are
    computed.
    """
    one = bytes_of_one(symmetry, perturbations)
    if device.type == "cuda":
        return max(1, min(-(-count // 2), free_bytes(device) // 4 // one))
    if one > SMALL:
        return 1
    return min(count if count * one <= _SHARED else -(-count // threads), max(1, _TOGETHER // one))


def bytes_of_one(symmetry: Symmetry, perturbations: int = 0) -> int:
    """Bytes that a source takes while it is matched, beside itself; `perturbations` as of the settings."""
    sizes = [4 * math.prod(shape) for name, shape in symmetry.parameters.items() if name not in symmetry.tied]
    tables = [4 * group.size**2 for group in symmetry.groups]
    largest = max((sum(tables[g] for g in tree) for tree in symmetry.trees), default=0)
    scores = sum(tables) + largest  # T_g, and S_g of the tree that is solved
    if perturbations:  # T_g to go back to; S_g with noise, and the noise
        scores += sum(tables) + 2 * largest
    arranged = sum(4 * math.prod(symmetry.parameters.get(name, (0,))) for name in symmetry.arranged)  # copies
    return int(LARGEST_HELD * max(sizes, default=0)) + scores + arranged
