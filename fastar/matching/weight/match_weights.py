"""Weight matching: permute N sources towards theta (paper section 3.3; git re-basin's algorithm 1 for each source)."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastar.errors import FastarError
from fastar.matching.assignment import ScoresNotFinite, Solver, solver_name
from fastar.matching.checks import check_networks
from fastar.matching.weight.attempts import Attempts, Outcome, Start, best_ends
from fastar.matching.weight.permuted_sources import LARGEST_HELD
from fastar.matching.weight.problem import Problem
from fastar.runtime.full_precision import full_precision
from fastar.runtime.memory import free_bytes
from fastar.runtime.progress import SILENT, Progress
from fastar.symmetry.permutations import Permutations
from fastar.symmetry.symmetry import Symmetry

Starts = Permutations | Sequence[Permutations | None] | None


@dataclass(frozen=True)
class MatchResult:
    """Permutations that bring each source towards theta, and how they were found.

    Args:
        permutations: [N, size] per group, to be applied to the sources as they were given.
        objective: [N] float64, <theta, pi(theta_n)> over all parameters.
        objective_weights: [N] float64, the same without 1-D parameters, which hardly depend on the permutation.
        objective_start: [N] float64, `objective` at the start (the identity, or the first permutations given).
        sweeps: [N] passes over the groups until nothing improved, of the best attempt.
        converged: [N] whether no group's step improved any more (else `max_sweeps` ended the descent).
        kicks_kept: [N] kicks of the polish that were kept.
        solves: assignments solved, all sources and attempts together.
        solver: name and version of the assignment solver.
        seconds: wall time of the whole call.
        left: groups whose units a method could not see, and left where they are.
    """

    permutations: Permutations
    objective: Tensor
    objective_weights: Tensor
    objective_start: Tensor
    sweeps: Tensor
    converged: Tensor
    kicks_kept: Tensor
    solves: int
    solver: str
    seconds: float
    left: tuple[str, ...] = ()

    def __repr__(self) -> str:
        before, after = float(self.objective_start.mean()), float(self.objective.mean())
        left = f", {len(self.left)} groups left" if self.left else ""
        return f"MatchResult({len(self.objective)} sources, mean objective {before:.6g} -> {after:.6g}{left})"


def match_weights(
    symmetry: Symmetry,
    theta: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    *,
    start: Starts = None,
    seed: int = 0,
    orders: int = 1,
    kicks: int = 0,
    max_sweeps: int = 100,
    solver: Solver = "auto",
    chunk: int | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> MatchResult:
    """Permutations pi_n that raise <theta, pi_n(theta_n)> to a fixed point of coordinate descent over the groups.

    No step lowers the objective; at the end no group's best assignment raises it. Inputs are not written to. The result
    depends on the inputs, the starts and the seed, not (but for rounding) on `chunk`, `threads` or the other sources.

    Descent ends in local optima. What the ways out gain, on 2 pairs of briefly trained ResNet-18 of objective (without
    1-D parameters) 434 (`tools/bench_escapes.py --sources 2`, on a CPU):

    - the guess that `start=None` makes: 6.3 over the identity, at about its cost;
    - `match_activations` as the start: 1.0 less than the guess, but better in one of the two pairs; needs data;
    - `orders=3`: 2.4 more, `orders=8`: 3.0 more, at nearly as many times the descents;
    - `kicks=1`: 7.8 more, `kicks=5`: 13.5, `kicks=15`: 17.8, each kick for about half of the first descent or less;
      `orders=3, kicks=5`: 15.2;
    - from last epoch's permutations, a new guess gains nothing, one kick 5.6 for about the time of the re-match again.

    Args:
        theta: parameter name -> tensor; buffers may be among them and do not count.
        sources: parameter name -> [N, *shape], such as views of one [N, P] store, on theta's device.
        start: permutations to start from, [size] or [N, size]; of several, the best end is kept. None, alone or among
            them, where nothing is known about the sources: a first guess, made from the output layer backwards,
            wherever it is better than leaving them as they are. For sources that are permuted already give
            `symmetry.identity()`, which is faster.
        orders: attempts per start, the first sweeping backwards and forwards in turn, the others in random orders; the
            best end is kept.
        kicks: times that the best end is kicked out of its optimum, descends again and keeps what is better (`polish`).
        solver: "auto" (lapjv where installed), "lapjv" or "scipy".
        chunk: sources that are moved together; bounds memory to a copy of as many (and of two of their largest
            parameter each) per thread. None: 1 on a CPU; on a GPU half of them, or what fits half of the free memory.
        threads: CPU threads. None: as many as torch uses; for a GPU's assignments all that this process may use.

    Raises:
        FastarError: another architecture, devices that differ, NaN or infinite values (named), a setting out of range.
    """
    began = time.perf_counter()
    _check_settings(orders, kicks, max_sweeps, chunk, threads)
    count, device = check_networks(symmetry, theta, sources)
    problem = Problem(symmetry, theta, sources)
    starts = _starts(symmetry, start, count)
    solver_text = solver_name(solver)
    workers = threads or matching_threads(device, torch.get_num_threads())
    size = chunk or chunk_size(symmetry, device, count, kicks)
    bounds = [(begin, min(begin + size, count)) for begin in range(0, count, size)]
    attempts = Attempts(orders, kicks, max_sweeps, seed, solver)
    outcomes: list[Outcome | None] = [None] * count
    solves = 0

    def run_chunk(begin: int, end: int, pool: ThreadPoolExecutor | None) -> int:
        with torch.no_grad():
            data = {name: problem.source(name, sources, begin, end) for name in problem.names}
            own = [replace(one, permutations=[index[begin:end] for index in one.permutations]) for one in starts]
            try:
                outcomes[begin:end], done = best_ends(problem, data, own, attempts, pool)
            except ScoresNotFinite as error:
                which = f"source {begin}" if end == begin + 1 else f"one of the sources {begin} to {end - 1}"
                raise FastarError(
                    f"weights of theta or of {which} are too large to be matched: their products overflow float32; "
                    "train with a lower rate, or leave the source out"
                ) from error
            return done

    # Gains are far smaller than the inner products they are read off.
    with full_precision(), progress.task("matching", total=count, unit="sources") as advance:
        for (begin, end), done in _run(run_chunk, bounds, device, workers):
            solves += done
            advance(end - begin)

    found = [outcome for outcome in outcomes if outcome is not None]
    return MatchResult(
        permutations=Permutations(
            {
                g.name: torch.from_numpy(np.stack([o.permutations[i] for o in found]))
                for i, g in enumerate(symmetry.groups)
            }
        ),
        objective=torch.tensor([o.objective for o in found], dtype=torch.float64, device="cpu"),
        objective_weights=torch.tensor([o.objective_weights for o in found], dtype=torch.float64, device="cpu"),
        objective_start=torch.tensor([o.first for o in found], dtype=torch.float64, device="cpu"),
        sweeps=torch.tensor([o.sweeps for o in found], dtype=torch.int64, device="cpu"),
        converged=torch.tensor([o.converged for o in found], dtype=torch.bool, device="cpu"),
        kicks_kept=torch.tensor([o.kicks_kept for o in found], dtype=torch.int64, device="cpu"),
        solves=solves,
        solver=solver_text,
        seconds=time.perf_counter() - began,
    )


def _run(
    run_chunk: Callable[[int, int, ThreadPoolExecutor | None], int],
    bounds: Sequence[tuple[int, int]],
    device: torch.device,
    workers: int,
) -> Iterator[tuple[tuple[int, int], int]]:
    """Chunks as they are finished, with what `run_chunk` returned for each.

    CPU: as many chunks at a time as there are threads, each on one thread. GPU: two at a time, so that the assignments
    of one are solved (on `workers` threads) while the products of the other are computed.
    """
    if device.type == "cpu" and (len(bounds) == 1 or workers == 1):
        for begin, end in bounds:
            yield (begin, end), run_chunk(begin, end, None)
        return
    lanes = min(len(bounds), workers if device.type == "cpu" else 2)
    before = torch.get_num_threads()
    solving = ThreadPoolExecutor(workers) if device.type != "cpu" else None
    # Inside a lane torch must not use further threads. The setting is the thread's own but MKL's is global: restore it.
    with ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures: dict[Future[int], tuple[int, int]] = {}
        try:
            for begin, end in bounds:
                futures[pool.submit(run_chunk, begin, end, solving)] = (begin, end)
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            for future in futures:
                future.cancel()
            pool.shutdown(wait=True)
            if solving is not None:
                solving.shutdown()
            torch.set_num_threads(before)


def matching_threads(device: torch.device, workers: int) -> int:
    """CPU threads to match with: `workers` on a CPU; for a GPU's assignments all that this process may use, since
    nothing else is done meanwhile and memory does not grow with them."""
    if device.type == "cpu":
        return workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_settings(orders: int, kicks: int, max_sweeps: int, chunk: int | None, threads: int | None) -> None:
    if kicks < 0:
        raise FastarError(f"matching: kicks={kicks} must be at least 0")
    for name, value in (("orders", orders), ("max_sweeps", max_sweeps), ("chunk", chunk), ("threads", threads)):
        if value is not None and value < 1:
            raise FastarError(f"matching: {name}={value} must be at least 1")


def _starts(symmetry: Symmetry, start: Starts, count: int) -> list[Start]:
    """Every start of all sources; None becomes a guess from the identity."""
    given = [start] if start is None or isinstance(start, Permutations) else list(start)
    if not given:
        raise FastarError("matching: start=[] is empty: give permutations, or None for a guess")
    out = []
    for one in given:
        permutations = symmetry.identity() if one is None else one
        symmetry.check(permutations)
        if permutations.count not in (None, count):
            raise FastarError(f"matching: start holds permutations of {permutations.count} sources, there are {count}")
        indices = [permutations[g.name].cpu().expand(count, g.size).contiguous().numpy() for g in symmetry.groups]
        out.append(Start(indices, guess=one is None))
    return out


def chunk_size(symmetry: Symmetry, device: torch.device, count: int, kicks: int = 0) -> int:
    """CPU: one source per chunk, chunks side by side on the threads. GPU: what fits half of the free memory."""
    return _chunk_on_gpu(bytes_of_one(symmetry, kicks), count, free_bytes(device)) if device.type == "cuda" else 1


def bytes_of_one(symmetry: Symmetry, kicks: int = 0) -> int:
    """Bytes that a source takes while it is matched, beside itself; `kicks` as of `match_weights`."""
    sizes = [4 * math.prod(shape) for name, shape in symmetry.parameters.items() if name not in symmetry.tied]
    tables = [4 * group.size**2 for group in symmetry.groups]
    scores = 2 * sum(tables)  # S_g, and a copy of it
    if kicks:  # S_g to go back to; of the family that is kicked S_g with noise, and the noise of a group
        scores += sum(tables) + 2 * max((sum(tables[g] for g in family) for family in symmetry.families), default=0)
    return sum(sizes) + LARGEST_HELD * max(sizes, default=0) + scores  # as permuted so far; what a step holds


def _chunk_on_gpu(one: int, count: int, free: int) -> int:
    # Two chunks are in flight: the assignments of one are solved while the other's products are computed. Each may have
    # a quarter of what is free.
    return max(1, min(-(-count // 2), free // 4 // one))


def working_bytes(
    symmetry: Symmetry, count: int, free: int, *, gpu: bool, threads: int, chunk: int | None = None, kicks: int = 0
) -> int:
    """Bytes that matching `count` sources takes beside theta and the sources themselves, where `free` bytes are free.

    Args:
        gpu: whether the sources are on a GPU.
        threads: CPU threads.
        chunk, kicks: as of `match_weights`.
    """
    one, lanes = bytes_of_one(symmetry, kicks), 2 if gpu else threads
    size = chunk or (_chunk_on_gpu(one, count, free) if gpu else 1)
    return min(count, lanes * size) * one
