"""Matching as tests call it: of one source, of states that are stacked, and what it is held to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from matching_models import CASES, random_state
from torch import Tensor, nn

from fastar.config import MatchingSettings, SinkhornSettings
from fastar.flat.forward import Batch
from fastar.matching import Examples, MatchResult, Request, SourceActivations, match
from fastar.matching.activation.match_activations import correlate_units
from fastar.matching.checks import check_networks
from fastar.matching.methods import not_worse
from fastar.matching.weight.descent import Descent
from fastar.runtime.progress import SILENT, Progress
from fastar.symmetry import Permutations, Symmetry

State = Mapping[str, Tensor]


def stacked(symmetry: Symmetry, states: Sequence[State]) -> dict[str, Tensor]:
    """Parameters of several networks, name -> [N, *shape]."""
    return {name: torch.stack([s[name] for s in states]) for name in symmetry.parameters}


def objective(symmetry: Symmetry, theta: State, source: State, *, weights_only: bool = False) -> float:
    """<theta, source> over the parameters in float64, written out plainly; a tied tensor counts once."""
    names = [n for n in symmetry.parameters if n not in symmetry.tied]
    return sum(
        float((theta[n].double() * source[n].double()).sum()) for n in names if theta[n].ndim > 1 or not weights_only
    )


def problem_of(name: str, count: int = 3) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """theta, and `count` sources, all random."""
    model = CASES[name][0]
    return random_state(model, 100), [random_state(model, seed) for seed in range(count)]


def hard_problem(count: int = 3) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Random 1-D parameters settle each group by themselves; without them the descent has many ends."""
    theta, states = problem_of("resnet", count)
    for state in (theta, *states):
        for tensor in state.values():
            if tensor.ndim == 1:
                tensor.mul_(0.01)
    return theta, states


def match_weights(
    symmetry: Symmetry,
    theta: State,
    sources: State,
    *,
    start: Permutations | None = None,
    begin: str = "auto",
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = SILENT,
    **settings: Any,
) -> MatchResult:
    """`match` by weights; `begin` is the setting `start`."""
    chosen = MatchingSettings.model_validate({"start": begin, **settings})
    return match(chosen, symmetry, theta, sources, start=start, seed=seed, threads=threads, progress=progress)


def match_one(
    symmetry: Symmetry, theta: State, source: State, **how: Any
) -> tuple[dict[str, Tensor], Permutations, MatchResult]:
    """One source permuted towards theta by its weights (buffers too), its permutations, and the result."""
    batched = {name: source[name][None] for name in symmetry.parameters if name in source}
    result = match_weights(symmetry, theta, batched, **how)
    permutations = result.permutations.select(0)
    return symmetry.apply(permutations, source), permutations, result


def match_activations(
    model: nn.Module,
    symmetry: Symmetry,
    theta: State,
    sources: State,
    batches: Sequence[Batch],
    *,
    threads: int = 1,
    **settings: Any,
) -> tuple[Permutations, tuple[str, ...]]:
    """`match` by activations of `batches`: the permutations, and the groups that were not observed."""
    chosen = MatchingSettings(method="activation", **settings)
    examples = Examples(model, [(batch, None) for batch in batches])
    result = match(chosen, symmetry, theta, sources, examples=lambda: examples, threads=threads)
    return result.permutations, result.left


def match_cached(
    theta: State, sources: State, activations: SourceActivations, *, threads: int = 1, **settings: Any
) -> tuple[Permutations, tuple[str, ...]]:
    """The same, of sources whose activations are cached."""
    chosen, symmetry = MatchingSettings(method="activation", **settings), activations.cache.measure.symmetry
    result = match(chosen, symmetry, theta, sources, activations=activations, threads=threads)
    return result.permutations, result.left


def activations_start(
    model: nn.Module, symmetry: Symmetry, theta: State, sources: State, batches: Sequence[Batch]
) -> Permutations:
    """The permutations that `start=activations` lets weight matching begin with."""
    examples = Examples(model, [(batch, None) for batch in batches])
    count, device = check_networks(symmetry, theta, sources)
    settings, give = MatchingSettings(start="activations"), lambda: examples
    request = Request(settings, symmetry, theta, sources, None, give, None, 0, 1, SILENT, count, device)
    return not_worse(request, correlate_units(request)[0])


def match_sinkhorn(
    symmetry: Symmetry, theta: State, sources: State, settings: SinkhornSettings, seed: int = 0
) -> Permutations:
    """The permutations of `match` by Sinkhorn."""
    return match(
        MatchingSettings(method="sinkhorn", sinkhorn=settings), symmetry, theta, sources, seed=seed
    ).permutations


def every_step_raises_the_objective(
    monkeypatch: pytest.MonkeyPatch, symmetry: Symmetry, theta: State, states: Sequence[State]
) -> None:
    """Match all together; the objective written out after each answer that the descent takes."""
    history = [[objective(symmetry, theta, state)] for state in states]
    note = Descent.note

    def record(self: Descent, f: int, numbers: Any, answers: Any) -> None:
        note(self, f, numbers, answers)
        for n in numbers:
            index = {g.name: torch.from_numpy(p[n]) for g, p in zip(symmetry.groups, self.permutations, strict=True)}
            history[n].append(objective(symmetry, theta, symmetry.apply(Permutations(index), states[n])))

    monkeypatch.setattr(Descent, "note", record)
    count = len(states)
    result = match_weights(symmetry, theta, stacked(symmetry, states), chunk=count, start=symmetry.identity())
    for n, values in enumerate(history):
        assert len(values) > 1
        assert all(b > a for a, b in itertools.pairwise(values))
        assert values[-1] == pytest.approx(float(result.objective[n]), rel=1e-6, abs=1e-5)
    assert bool(result.converged.all())
