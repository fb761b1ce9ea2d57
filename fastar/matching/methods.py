"""The methods of matching behind one interface: from a run's settings to a `MatchResult`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from fastar.config import MatchingSettings
from fastar.errors import FastarError
from fastar.flat.forward import Batch, forward, without_statistics
from fastar.matching.activation.match_activations import correlate_seen, correlate_units, not_worse
from fastar.matching.activation.statistics import SourceActivations
from fastar.matching.assignment import solver_name
from fastar.matching.checks import check_networks
from fastar.matching.sinkhorn import Loss, match_sinkhorn, recordable
from fastar.matching.weight.match_weights import MatchResult, Starts, chunk_size, match_weights, matching_threads
from fastar.matching.weight.permuted_sources import PermutedSources
from fastar.matching.weight.problem import Problem
from fastar.runtime.progress import SILENT, Progress
from fastar.symmetry.permutations import Permutations
from fastar.symmetry.symmetry import Symmetry

EXAMPLE_BATCHES = 4
"""Batches of data that methods of matching which look at data are shown."""


@dataclass(frozen=True)
class Examples:
    """What methods that look at data are given.

    Args:
        model: of the architecture, with any weights; not touched.
        batches: inputs as the model takes them, and labels [batch] (None where there are none: `matching.sinkhorn`'s
            losses need them), on theta's device.
    """

    model: nn.Module
    batches: Sequence[tuple[Batch, Tensor | None]]

    def __repr__(self) -> str:
        return f"Examples({type(self.model).__name__}, {len(self.batches)} batches)"

    @property
    def inputs(self) -> list[Batch]:
        """The batches without their labels."""
        return [inputs for inputs, _ in self.batches]


GiveExamples = Callable[[], Examples]
"""Makes `Examples` when a method needs them."""


def match(
    settings: MatchingSettings,
    symmetry: Symmetry,
    theta: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    *,
    start: Permutations | None = None,
    examples: GiveExamples | None = None,
    seed: int = 0,
    threads: int | None = None,
    activations: SourceActivations | None = None,
    progress: Progress = SILENT,
) -> MatchResult:
    """Match the sources to theta by `settings.method`: weight, activation, sinkhorn or none.

    activation and sinkhorn find the permutations anew, whatever `start` is; the objective that they report is weight
    matching's and may be below that of the start. none leaves all sources as they are.

    Args:
        start: where the sources are known to match (last epoch's permutations; the identity if they are applied).
        examples: needed by `matching.method=activation`, `matching.start=activations` and sinkhorn's losses alone.
        activations: what the sources' units do, where it was kept: the first two then need no examples.

    Raises:
        FastarError: as `match_weights`, `correlate_units` and `match_sinkhorn`; or data are needed and there are none.
    """

    def by_activations(setting: str) -> tuple[Permutations, tuple[str, ...]]:
        how: dict[str, Any] = {
            "solver": settings.solver,
            "chunk": settings.chunk,
            "threads": threads or matching_threads(device, torch.get_num_threads()),
            "progress": progress,
        }
        if activations is not None:
            return correlate_seen(theta, sources, activations, **how)
        given = _needed(examples, setting)
        return correlate_units(given.model, symmetry, theta, sources, given.inputs, **how)

    began = time.perf_counter()
    count, device = check_networks(symmetry, theta, sources)
    if settings.method == "weight":
        found_by_weights = match_weights(
            symmetry,
            theta,
            sources,
            start=_starts(settings, symmetry, theta, sources, start, by_activations),
            seed=seed,
            orders=settings.restarts,
            kicks=settings.perturbations,
            max_sweeps=settings.max_sweeps,
            solver=settings.solver,
            chunk=settings.chunk,
            threads=threads,
            progress=progress,
        )
        return replace(found_by_weights, seconds=time.perf_counter() - began)
    left: tuple[str, ...] = ()
    found = symmetry.identity(count)
    if settings.method != "none" and symmetry.groups:
        if settings.method == "activation":
            found, left = by_activations("matching.method=activation")
        else:
            wanted = settings.sinkhorn.objective
            loss = None
            if wanted != "l2":
                loss = _loss(_needed(examples, f"matching.sinkhorn.objective={wanted}"), theta)
            found = match_sinkhorn(
                symmetry,
                theta,
                sources,
                settings=settings.sinkhorn,
                loss=loss,
                seed=seed,
                solver=settings.solver,
                progress=progress,
            )
        if left:
            progress.line(f"matching by activations: units of {', '.join(left)} cannot be observed and stay")
    size = settings.chunk or chunk_size(symmetry, device, count)
    objective, weights = _objectives(symmetry, theta, sources, found, size)
    before, _ = _objectives(symmetry, theta, sources, symmetry.identity() if start is None else start, size)
    return MatchResult(
        permutations=found,
        objective=objective,
        objective_weights=weights,
        objective_start=before,
        sweeps=torch.zeros(count, dtype=torch.int64, device="cpu"),
        converged=torch.ones(count, dtype=torch.bool, device="cpu"),
        kicks_kept=torch.zeros(count, dtype=torch.int64, device="cpu"),
        solves=0 if settings.method == "none" else count * len(symmetry.families),
        solver=solver_name(settings.solver),
        seconds=time.perf_counter() - began,
        left=left,
    )


def _starts(
    settings: MatchingSettings,
    symmetry: Symmetry,
    theta: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    start: Permutations | None,
    by_activations: Callable[[str], tuple[Permutations, tuple[str, ...]]],
) -> Starts:
    """Where `matching.start` lets the descent begin."""
    if settings.start == "identity" and start is None:
        return symmetry.identity()
    if settings.start == "backward" and start is not None:
        return [start, None]
    if settings.start == "activations":
        found, _ = by_activations("matching.start=activations")
        return [not_worse(symmetry, theta, sources, found), *([] if start is None else [start])]
    return start


def _needed(examples: GiveExamples | None, setting: str) -> Examples:
    if examples is None:
        raise FastarError(f"{setting} needs data, and here are none; leave it out to match by weights")
    return examples()


def _loss(examples: Examples, theta: Mapping[str, Tensor]) -> Loss:
    """Cross-entropy on the batches in turn; batch-norm normalises with the batch."""
    device = next(iter(theta.values())).device
    with torch.inference_mode(False):
        model = without_statistics(examples.model, device)

    def loss(parameters: Mapping[str, Tensor], step: int) -> Tensor:
        inputs, labels = tree_map_only(Tensor, recordable, examples.batches[step % len(examples.batches)])
        if labels is None:
            raise FastarError(
                "matching.sinkhorn.objective=mid and random need labels, and these data have none; set l2"
            )
        return F.cross_entropy(forward(model, parameters, inputs), labels)

    return loss


def _objectives(
    symmetry: Symmetry,
    theta: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    permutations: Permutations,
    size: int,
) -> tuple[Tensor, Tensor]:
    """<theta, pi(theta_n)> [N] float64 over all parameters, and over those of at least two axes; `size` sources, of
    which a copy is made, at a time."""
    problem = Problem(symmetry, theta, sources)
    totals: list[Tensor] = []
    weights: list[Tensor] = []
    count = len(sources[problem.names[0]])
    for begin in range(0, count, size):
        end = min(begin + size, count)
        part = PermutedSources(problem, {name: problem.source(name, sources, begin, end) for name in problem.names})
        units = [permutations[g.name].cpu().expand(count, g.size)[begin:end].numpy() for g in symmetry.groups]
        for f, family in enumerate(problem.families):
            part.permute(f, np.arange(end - begin), tuple(units[g] for g in family))
        for found, values in zip((totals, weights), part.objectives(), strict=True):
            found.append(torch.from_numpy(values))
    return torch.cat(totals), torch.cat(weights)
