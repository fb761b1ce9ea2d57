"""Matching as tests call it: of one source, of states that are stacked, and what it is held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matching_models import CASES, random_state
from torch import Tensor

from fastar.matching import MatchResult, match_weights
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


def match_one(
    symmetry: Symmetry, theta: State, source: State, **how: Any
) -> tuple[dict[str, Tensor], Permutations, MatchResult]:
    """One source permuted towards theta by its weights (buffers too), its permutations, and the result."""
    batched = {name: source[name][None] for name in symmetry.parameters if name in source}
    result = match_weights(symmetry, theta, batched, **how)
    permutations = result.permutations.select(0)
    return symmetry.apply(permutations, source), permutations, result
