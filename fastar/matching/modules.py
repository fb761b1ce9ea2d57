"""Matching of whole modules, and their groups as far as a method needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastar.config import MatchingSettings
from fastar.errors import FastarError
from fastar.matching.derive import derive_symmetry
from fastar.matching.methods import GiveExamples, match_by_settings
from fastar.matching.same import check_same_function
from fastar.matching.symmetry import Symmetry, without_groups
from fastar.matching.verify import ExampleInputs
from fastar.matching.weights import MatchResult
from fastar.progress import SILENT, Progress


def symmetry_by_settings(
    settings: MatchingSettings,
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    allow_partial: bool = False,
    name: object = None,
) -> Symmetry:
    """`derive_symmetry`, but no groups for `matching.method=none`, which needs none; nothing is traced then.

    Raises:
        FastarError: as `derive_symmetry`.
    """
    if settings.method == "none":
        return without_groups(model)
    return derive_symmetry(model, example_inputs, allow_partial=allow_partial, name=name)


def match_modules(
    theta: nn.Module,
    sources: Sequence[nn.Module],
    example_inputs: tuple[Tensor, ...],
    *,
    settings: MatchingSettings | None = None,
    examples: GiveExamples | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> tuple[list[dict[str, Tensor]], MatchResult]:
    """Match each of `sources` to `theta`: their state dicts, permuted (buffers too), and how it went. None is changed.

    Modules may be any of one architecture whose groups can be derived; `example_inputs` is what its forward takes.
    With `settings.method=none` nothing is derived, and all stay as they are.

    Raises:
        FastarError: no sources, another architecture, or one whose symmetry cannot be proven.
    """
    if not sources:
        raise FastarError("there are no sources to match: give at least one")
    settings = settings or MatchingSettings()
    if settings.method != "none":
        for n, source in enumerate(sources):
            check_same_function(theta, source, example_inputs, ("theta", f"source {n}"))
    symmetry = symmetry_by_settings(settings, theta, example_inputs)
    states = [source.state_dict() for source in sources]
    for n, state in enumerate(states):
        symmetry.check_state(state, f"source {n}")
    stacked = {name: torch.stack([state[name] for state in states]) for name in symmetry.moved}
    result = match_by_settings(
        settings, symmetry, theta.state_dict(), stacked, examples=examples, seed=seed, progress=progress
    )
    return [symmetry.apply(result.permutations.select(n), state) for n, state in enumerate(states)], result
