"""A request to match networks, as every method is given it, and the result that it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastar.config import MatchingSettings
from fastar.flat.forward import Batch
from fastar.losses import Loss
from fastar.matching.activation.activation_cache import SourceActivations
from fastar.runtime.progress import Progress
from fastar.symmetry import Permutations, Symmetry


@dataclass(frozen=True)
class Examples:
    """Data for the methods that look at some.

    Args:
        model: of the architecture, with any weights; not touched.
        batches: inputs as the model takes them, and targets (None where there are none: `matching.sinkhorn`'s losses
            need them), on theta's device.
        loss: of its outputs and the targets; None: cross-entropy.
    """

    model: nn.Module
    batches: Sequence[tuple[Batch, Any]]
    loss: Loss | None = None

    def __repr__(self) -> str:
        return f"Examples({type(self.model).__name__}, {len(self.batches)} batches)"

    @property
    def inputs(self) -> list[Batch]:
        """The batches without their labels."""
        return [inputs for inputs, _ in self.batches]


GiveExamples = Callable[[], Examples]
"""Makes `Examples` when a method needs them."""


@dataclass(frozen=True)
class Request:
    """Networks to be matched, checked already, and how; the arguments are those of `match`."""

    settings: MatchingSettings
    symmetry: Symmetry
    theta: Mapping[str, Tensor]
    sources: Mapping[str, Tensor]
    start: Permutations | None
    examples: GiveExamples | None
    activations: SourceActivations | None
    seed: int
    threads: int
    progress: Progress
    count: int
    device: torch.device


@dataclass(frozen=True)
class MatchResult:
    """Permutations that bring each source towards theta, and how they were found.

    Args:
        permutations: [N, size] per group, to be applied to the sources as they were given.
        objective: [N] float64, <theta, pi(theta_n)> over all parameters.
        objective_weights: [N] float64, the same without 1-D parameters, which hardly depend on the permutation.
        objective_start: [N] float64, `objective` at the start (the identity, or the first permutations given).
        sweeps: [N] passes over the groups until nothing improved, of the best descent.
        converged: [N] whether no group's step improved any more (else `max_sweeps` ended the descent).
        solves: assignments solved, all sources and descents together.
        seconds: wall time of the whole call.
        left: groups whose units a method could not observe, and left where they are.
    """

    permutations: Permutations
    objective: Tensor
    objective_weights: Tensor
    objective_start: Tensor
    sweeps: Tensor
    converged: Tensor
    solves: int
    seconds: float = 0.0
    left: tuple[str, ...] = ()

    def __repr__(self) -> str:
        before, after = float(self.objective_start.mean()), float(self.objective.mean())
        left = f", {len(self.left)} groups left" if self.left else ""
        return f"MatchResult({len(self.objective)} sources, mean objective {before:.6g} -> {after:.6g}{left})"
