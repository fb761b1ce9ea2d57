"""Matching N networks to one: `match`, and the table of methods behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastar.config import MatchingSettings
from fastar.errors import FastarError
from fastar.matching.activation.activation_cache import SourceActivations
from fastar.matching.activation.match_activations import correlate_units
from fastar.matching.checks import check_networks
from fastar.matching.request import GiveExamples, MatchResult, Request
from fastar.matching.sinkhorn import match_sinkhorn
from fastar.matching.weight.match_weights import chunk_size, match_weights
from fastar.matching.weight.permuted_sources import PermutedSources
from fastar.matching.weight.problem import Problem
from fastar.runtime.device import cpus
from fastar.runtime.progress import SILENT, Progress
from fastar.symmetry import Permutations, Symmetry

EXAMPLE_BATCHES = 4
"""Batches of data that methods of matching which look at data are shown."""


@dataclass(frozen=True)
class Method:
    """A method of matching.

    Args:
        match: finds the permutations.
        needs_data: the setting that asks for data, as users write it; None where these settings ask for none.
    """

    match: Callable[[Request], MatchResult]
    needs_data: Callable[[MatchingSettings], str | None]


def match(
    settings: MatchingSettings,
    symmetry: Symmetry,
    theta: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    *,
    start: Permutations | None = None,
    examples: GiveExamples | None = None,
    activations: SourceActivations | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> MatchResult:
    """Match N sources to theta by `settings.method`, an entry of `METHODS` (paper, section 3.3). Inputs stay unchanged.

    The result depends on the inputs, the start and the seed, not (but for rounding) on `settings.chunk`, `threads` or
    the other sources. Only weight goes on from `start`; the objective that the others report is weight matching's and
    may be below that of the start.

    Args:
        theta: parameter name -> tensor; of buffers only those count that groups permute.
        sources: parameter name -> [N, *shape], such as views of one [N, P] store, on theta's device.
        start: permutations, [size] or [N, size], under which the sources are known to match (last epoch's; the identity
            if they are applied already).
        examples: makes the data that a method may need.
        activations: those of the sources, where they are cached: what compares activations then needs no examples.
        threads: CPU threads to match on a CPU with; None: as torch uses. A GPU's assignments use all there are.

    Raises:
        FastarError: another architecture, devices that differ, NaN or infinite values (named), data are needed and
            there are none, a search that ended in numbers that are not finite.
    """
    began = time.perf_counter()
    count, device = check_networks(symmetry, theta, sources)
    method = METHODS[settings.method if symmetry.groups else "none"]
    wanted = method.needs_data(settings)
    if wanted and examples is None and activations is None:
        raise FastarError(f"{wanted} needs data, and here are none; leave it out to match by weights")
    request = Request(
        settings, symmetry, theta, sources, start, examples, activations, seed,
        matching_threads(device, threads), progress, count, device,
    )  # fmt: skip
    return replace(method.match(request), seconds=time.perf_counter() - began)


def matching_threads(device: torch.device, threads: int | None) -> int:
    """CPU threads to match with: on a CPU `threads` (None: as torch uses); for a GPU's assignments all that this
    process may use, since nothing else is done meanwhile and memory does not grow with them."""
    if device.type == "cpu":
        return threads or torch.get_num_threads()
    return cpus()


def _by_weights(request: Request) -> MatchResult:
    """Coordinate descent from where `matching.start` says; the best end is kept."""
    begin, start = request.settings.start, request.start
    if begin == "activations":
        found, _ = correlate_units(request)
        return match_weights(request, [not_worse(request, found), *([] if start is None else [start])])
    if start is None:
        return match_weights(request, [request.symmetry.identity() if begin == "identity" else None])
    return match_weights(request, [start, None] if begin == "backward" else [start])


def _by_activations(request: Request) -> MatchResult:
    found, left = correlate_units(request)
    if left:
        request.progress.line(f"matching by activations: units of {', '.join(left)} cannot be observed and stay")
    return replace(_measured(request, found), left=left)


def _unmatched(request: Request) -> MatchResult:
    return replace(_measured(request, request.symmetry.identity(request.count)), solves=0)


METHODS = {
    "weight": Method(
        _by_weights,
        lambda s: "matching.start=activations" if s.start == "activations" else None,
    ),
    "activation": Method(_by_activations, lambda s: "matching.method=activation"),
    "sinkhorn": Method(
        lambda request: _measured(request, match_sinkhorn(request)),
        lambda s: None if s.sinkhorn.objective == "l2" else f"matching.sinkhorn.objective={s.sinkhorn.objective}",
    ),
    "none": Method(_unmatched, lambda s: None),
}
"""Name in `matching.method` -> the method."""


def _measured(request: Request, found: Permutations) -> MatchResult:
    """The result of a method that solves each tree once and looks at no objective."""
    count, start = request.count, request.start
    objective, weights = _objectives(request, found)
    before, _ = _objectives(request, request.symmetry.identity() if start is None else start)
    return MatchResult(
        permutations=found,
        objective=objective,
        objective_weights=weights,
        objective_start=before,
        sweeps=torch.zeros(count, dtype=torch.int64, device="cpu"),
        converged=torch.ones(count, dtype=torch.bool, device="cpu"),
        solves=count * len(request.symmetry.trees),
    )


def _objectives(request: Request, permutations: Permutations) -> tuple[Tensor, Tensor]:
    """<theta, pi(theta_n)> [N] float64 over all parameters, and over those of at least two axes; in chunks, of which a
    copy is made."""
    symmetry, count = request.symmetry, request.count
    problem = Problem(symmetry, request.theta, request.sources)
    size = request.settings.chunk or chunk_size(symmetry, request.device, count, request.threads)
    found = []
    for begin in range(0, count, size):
        end = min(begin + size, count)
        units = [permutations[g.name].cpu().expand(count, g.size)[begin:end].numpy() for g in symmetry.groups]
        part = PermutedSources(problem, problem.part(request.sources, begin, end), units)
        found.append(np.stack(part.objectives()))
    total, weights = torch.from_numpy(np.concatenate(found, 1))
    return total, weights


def not_worse(request: Request, found: Permutations) -> Permutations:
    """`found` [N, size], but a source for which it lowers <theta, pi(theta_n)> stays as it is."""
    stay = request.symmetry.identity(request.count)
    worse = (_objectives(request, found)[0] < _objectives(request, stay)[0])[:, None]
    return Permutations({name: torch.where(worse, stay[name], index) for name, index in found.items()})
