"""Matching by what the units of two networks do: correlations of their activations (git re-basin's section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from fastar.flat.forward import Batch
from fastar.matching import ties
from fastar.matching.activation.statistics import KEPT, SourceActivations, Tables, UnitActivations, resampled, stacked
from fastar.matching.assignment import Solver
from fastar.matching.checks import check_networks
from fastar.matching.solving import solve_rows
from fastar.matching.weight.problem import Problem
from fastar.runtime.full_precision import full_precision
from fastar.runtime.memory import free_bytes
from fastar.runtime.progress import SILENT, Progress
from fastar.symmetry.batched_index import chosen
from fastar.symmetry.permutations import Permutations
from fastar.symmetry.symmetry import Symmetry

# Sources at a time on a GPU, where they fit: enough for batched products, whatever N is.
PART = 16


def match_activations(
    model: nn.Module,
    symmetry: Symmetry,
    theta: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    solver: Solver = "auto",
    progress: Progress = SILENT,
) -> Permutations:
    """Permutations [N, size] to start `match_weights` from: those of `correlate_units`, but a source for which they
    lower <theta, pi(theta_n)> stays as it is.

    Arguments and errors as of `correlate_units`.
    """
    found, _ = correlate_units(model, symmetry, theta, sources, batches, solver=solver, progress=progress)
    return not_worse(symmetry, theta, sources, found)


def not_worse(
    symmetry: Symmetry, theta: Mapping[str, Tensor], sources: Mapping[str, Tensor], found: Permutations
) -> Permutations:
    """`found` [N, size], but a source for which it lowers <theta, pi(theta_n)> stays as it is."""
    names = symmetry.counted(theta, sources)
    out = []
    for n in range(len(sources[names[0]])):
        state = {name: sources[name][n] for name in names}
        one = found.select(n)
        worse = _objective(theta, symmetry.apply(one, state), names) < _objective(theta, state, names)
        out.append(symmetry.identity() if worse else one)
    return Permutations.stack(out)


def correlate_units(
    model: nn.Module,
    symmetry: Symmetry,
    theta: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    batches: Sequence[Batch],
    *,
    solver: Solver = "auto",
    chunk: int | None = None,
    threads: int = 1,
    progress: Progress = SILENT,
) -> tuple[Permutations, tuple[str, ...]]:
    """Permutations [N, size] that pair units whose activations correlate most, all groups in one pass; and the groups
    that could not be observed, whose units stay (inside their blocks, if these move).

    What is looked at: `UnitActivations`. Each source costs a forward pass of the batches. A family's assignment is
    exact: blocks pair by their parent's own activations and the best pairing of the units inside. The weights only tell
    apart units that do the same, such as those that never fire: <theta, pi(theta_n)> may fall.

    Args:
        model: of the architecture, with any weights; copied, not touched.
        theta: parameter name -> tensor; of buffers those are looked at with that groups permute.
        sources: parameter name -> [N, *shape], on theta's device, and such buffers.
        batches: inputs [batch, ...] as the model takes them, on theta's device.
        chunk: sources that are compared together; bounds memory. None: as many as threads on a CPU, what fits a
            quarter of the free memory on a GPU.
        threads: CPU threads of assignments.

    Raises:
        FastarError: no batches, activations that are not finite, or not as many for a source as for theta.
    """
    _, device = check_networks(symmetry, theta, sources)
    look = UnitActivations(model, symmetry, batches, device)
    names = symmetry.computed_with(theta, sources)  # the model ties a tied tensor's other name to it
    own = look({name: theta[name] for name in names}, "theta")

    def tables(begin: int, end: int) -> Tables:
        numbers = range(begin, end)
        return stacked(look({name: sources[name][n] for name in names}, f"source {n}") for n in numbers)

    return _pair_units(look, own, tables, theta, sources, solver, chunk, threads, progress), look.unseen


def correlate_seen(
    theta: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    seen: SourceActivations,
    *,
    solver: Solver = "auto",
    chunk: int | None = None,
    threads: int = 1,
    progress: Progress = SILENT,
) -> tuple[Permutations, tuple[str, ...]]:
    """Pair units as `correlate_units` of sources whose activations were kept: theta alone is run, if it was not."""
    look, own = seen.cache.measure, seen.theta
    if own is None:
        own = look(theta, "theta")
    return _pair_units(look, own, seen.tables, theta, sources, solver, chunk, threads, progress), look.unseen


def bytes_of_one(symmetry: Symmetry, kept: int) -> int:
    """Bytes that a source takes while it is compared, if `cache_bytes` says `kept`: its tables in half and twice in
    full precision, and correlations, as they are and as they are solved."""
    return 5 * kept + 12 * sum(group.size**2 for group in symmetry.groups)


def comparing_bytes(
    symmetry: Symmetry,
    kept: int,
    looking: int,
    count: int,
    free: int,
    *,
    gpu: bool,
    threads: int,
    chunk: int | None = None,
) -> int:
    """Bytes that comparing `count` sources takes beside theta and the sources, where `free` bytes are free.

    Args:
        kept: bytes of one in `ActivationCache`.
        looking: bytes that a forward pass over a batch takes, the batch included.
        gpu: whether the sources are on a GPU.
        threads, chunk: as of `correlate_units`.
    """
    one = bytes_of_one(symmetry, kept)
    together = min(count, chunk or _chunk_size(one, count, free if gpu else None, threads))
    table = 2 * kept  # in full precision
    return table + max(
        together * one, looking + together * table
    )  # theta's own; the last is looked at, or all compared


def _chunk_size(one: int, count: int, free: int | None, threads: int) -> int:
    """Sources that are compared together where one takes `one` bytes, and a GPU (None: a CPU) has `free`."""
    if free is None:
        return min(count, threads)
    return max(1, min(PART, count, free // 4 // one))


def _pair_units(
    look: UnitActivations,
    own: Tables,
    tables: Callable[[int, int], Tables],
    theta: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    solver: Solver,
    chunk: int | None,
    threads: int,
    progress: Progress,
) -> Permutations:
    """The assignments of all families for each of the sources, of theta's tables `own` and theirs [n, ...]."""
    symmetry, device = look.symmetry, look.device
    problem = Problem(symmetry, theta, sources)
    count = len(sources[problem.names[0]])
    one = bytes_of_one(symmetry, KEPT.itemsize * sum(table.numel() for table in own.values()))
    size = chunk or _chunk_size(one, count, free_bytes(device) if device.type == "cuda" else None, threads)
    indices = {group.name: np.zeros((count, group.size), dtype=np.int64) for group in symmetry.groups}
    solving = ThreadPoolExecutor(threads) if threads > 1 else nullcontext()
    with torch.no_grad(), full_precision(), solving as pool, progress.task("matching", count, "sources") as advance:
        alike = ties.classes(own)
        for begin in range(0, count, size):
            end = min(begin + size, count)
            theirs = tables(begin, end)
            (rows,) = chosen(np.arange(end - begin), end - begin, device=device)
            part = {name: index[begin:end] for name, index in indices.items()}
            for family in (symmetry.families[f] for f in look.order):
                groups = [symmetry.groups[g] for g in family]
                scores = [
                    own[group.name].mT @ resampled(theirs[group.name], look.rows(group.name, part))
                    if group.name in own
                    else torch.zeros(end - begin, group.size, group.size, device=device, dtype=torch.float32)
                    for group in groups
                ]
                blank = [group.name not in own for group in groups]
                for n, solved in enumerate(solve_rows(scores, blank, rows, solver, pool), begin):
                    for group, answer in zip(groups, solved.answers, strict=True):
                        indices[group.name][n] = answer
            same = ties.classes(theirs)
            del theirs
            for n in range(begin, end):
                of_one = {name: units[n - begin] for name, units in same.items()}
                found = [index[n] for index in indices.values()]
                told_apart = ties.by_weights(problem, sources, n, alike, of_one, found, solver)
                for index, units in zip(indices.values(), told_apart, strict=True):
                    index[n] = units
            advance(end - begin)
    return Permutations({name: torch.from_numpy(index) for name, index in indices.items()})


def _objective(theta: Mapping[str, Tensor], state: Mapping[str, Tensor], names: Sequence[str]) -> float:
    return sum(float((theta[name].double() * state[name].double()).sum()) for name in names)
