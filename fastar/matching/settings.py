"""Weight matching as a run's settings ask for it, and of whole modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastar.config import MatchingSettings
from fastar.errors import FastarError
from fastar.matching.derive import derive_symmetry
from fastar.matching.permutations import Permutations
from fastar.matching.symmetry import Symmetry
from fastar.matching.weights import MatchResult, Starts, match_weights
from fastar.progress import SILENT, Progress

ByActivations = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Permutations]
"""(theta, sources) -> permutations to start from: `match_activations` on the data at hand."""


def match_by_settings(
    settings: MatchingSettings,
    symmetry: Symmetry,
    theta: Mapping[str, Tensor],
    sources: Mapping[str, Tensor],
    *,
    start: Permutations | None = None,
    activations: ByActivations | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> MatchResult:
    """`match_weights` with a run's `matching` settings.

    Args:
        start: where the sources are known to match (last epoch's permutations; the identity if they are applied).
        activations: needed by `matching.start=activations` alone.

    Raises:
        FastarError: as `match_weights`; or `matching.start=activations` where there are no data.
    """
    starts: Starts = start
    if settings.start == "identity" and start is None:
        starts = symmetry.identity()
    elif settings.start == "guess" and start is not None:
        starts = [start, None]
    elif settings.start == "activations":
        if activations is None:
            raise FastarError("matching.start=activations needs data, and here are none; set matching.start=auto")
        starts = [activations(theta, sources), *([] if start is None else [start])]
    return match_weights(
        symmetry,
        theta,
        sources,
        start=starts,
        seed=seed,
        orders=settings.orders,
        kicks=settings.kicks,
        max_sweeps=settings.max_sweeps,
        solver=settings.solver,
        threads=threads,
        progress=progress,
    )


def match_modules(
    theta: nn.Module,
    sources: Sequence[nn.Module],
    example_inputs: tuple[Tensor, ...],
    *,
    settings: MatchingSettings | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> tuple[list[dict[str, Tensor]], MatchResult]:
    """Match each of `sources` to `theta`: their state dicts, permuted (buffers too), and how it went. None is changed.

    Modules may be any of one architecture whose groups can be derived; `example_inputs` is what its forward takes.

    Raises:
        FastarError: no sources, another architecture, or one whose symmetry cannot be proven.
    """
    if not sources:
        raise FastarError("there are no sources to match: give at least one")
    symmetry = derive_symmetry(theta, example_inputs)
    states = [source.state_dict() for source in sources]
    for n, state in enumerate(states):
        symmetry.check_state(state, f"source {n}")
    stacked = {name: torch.stack([state[name] for state in states]) for name in symmetry.parameters}
    result = match_by_settings(
        settings or MatchingSettings(), symmetry, theta.state_dict(), stacked, seed=seed, progress=progress
    )
    if not symmetry.groups:
        return [symmetry.apply(result.permutations, state) for state in states], result
    return [symmetry.apply(result.permutations.select(n), state) for n, state in enumerate(states)], result
