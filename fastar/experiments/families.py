"""Families of networks around a star: what is averaged, perturbed or fused.

Each yields networks one after the other, as `Endpoint`s that are made when their turn comes. A repetition is another
sequence of draws; the first K networks of one are the family's average of K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from fastar.errors import FastarError
from fastar.evaluation import Endpoint
from fastar.experiments.baselines.swag import Moments
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.measure import permuted_row
from fastar.experiments.session import Session
from fastar.flat import FlatLayout, mean_row
from fastar.kernels import interpolate
from fastar.runs.model_files import Checkpoint
from fastar.runtime.seeds import derive_seed
from fastar.symmetry import Permutations

SINGLE = ("star", "mean", "swa")
"""Families of one network."""
FAMILIES = ("source", "ensemble", "star", "star domain", "pairs", "ball", "mean")
"""Those of every run, in the order in which they are shown."""
SWAG = ("swa", "swag")
"""Those of one more training."""


class Families:
    """The families of a finished run.

    Args:
        radius: of the ball around the star, as a share of the star's norm.
        t: of points of the star domain; None: uniform in [0, 1].
        replace: the star domain's sources are drawn with replacement.
        moments: of the families `SWAG`.
    """

    def __init__(
        self,
        run: FinishedRun,
        *,
        radius: float = 0.1,
        t: float | None = None,
        replace: bool = True,
        moments: Moments | None = None,
    ):
        if len(run.sources) < 2:
            raise FastarError("families of networks need at least two sources; this run has one")
        self._run, self._radius, self._t, self._replace = run, radius, t, replace
        self._layout, self._moments = run.session.network.layout, moments
        self._of_pairs: dict[tuple[int, int], Permutations] = {}

    def members(self, family: str, count: int, repetition: int = 0) -> Iterator[Endpoint]:
        """The first `count` networks of a repetition of a family.

        source: one source, number `repetition` of them.
        ensemble: sources in a random order, none twice.
        star: the star. mean: the mean of the sources, matched to it.
        star domain: (1 - t) star + t matched source, source and t uniform.
        pairs: (1 - t) source + t another source matched to it: the control without a star.
        ball: the star and a step of one length in a random direction, over all parameters.
        swa: the mean of a training's epochs. swag: draws from the Gaussian of their moments.
        """
        if family == "source":
            return iter([self.source(repetition)])
        if family == "star":
            return iter([Endpoint("star", self._star_row)])
        if family == "mean":
            return iter([Endpoint("mean of the sources", self._mean_row)])
        if family == "swa" and self._moments is not None:
            return iter([Endpoint("SWA", self._moments.mean)])
        if family == "ensemble":
            return map(self.source, self.order(count, repetition))
        seed = derive_seed(self._run.session.settings.seed, "families", family.replace(" ", "_"), repetition)
        numbers = np.random.default_rng(seed)
        drawn: dict[str, Callable[[np.random.Generator, int], Iterator[Endpoint]]] = {
            "star domain": self._star_domain,
            "pairs": self._pairs,
            "ball": self._ball,
            **({} if self._moments is None else {"swag": self._swag}),
        }
        if family not in drawn:
            raise FastarError(f"unknown family {family!r}: choose from {', '.join(FAMILIES)}")
        return drawn[family](numbers, count)

    def source(self, index: int) -> Endpoint:
        """Source number `index`, its units where they are in its file."""
        return Endpoint(f"source {index}", partial(self._row, index, False))

    def order(self, count: int, repetition: int) -> list[int]:
        """The sources that the ensemble's repetition takes, in their order."""
        seed = derive_seed(self._run.session.settings.seed, "families", "ensemble", repetition)
        return [int(n) for n in np.random.default_rng(seed).permutation(len(self._run.sources))[:count]]

    def _star_domain(self, numbers: np.random.Generator, count: int) -> Iterator[Endpoint]:
        sources = len(self._run.sources)
        order = None if self._replace else numbers.permutation(sources).tolist()
        for k in range(count if order is None else min(count, sources)):  # n, t, n, t: fewer are the first of more
            n = int(numbers.integers(sources)) if order is None else order[k]
            t = float(numbers.random())
            at = t if self._t is None else self._t
            yield Endpoint(f"the point t={at:g} from the star to source {n}", partial(self._between_star, n, at))

    def _pairs(self, numbers: np.random.Generator, count: int) -> Iterator[Endpoint]:
        for _ in range(count):
            first, second = numbers.choice(len(self._run.sources), size=2, replace=False).tolist()
            t = float(numbers.random())
            yield Endpoint(
                f"the point t={t:g} from source {first} to source {second}",
                partial(self._between_sources, first, second, t),
            )

    def _ball(self, numbers: np.random.Generator, count: int) -> Iterator[Endpoint]:
        for k, seed in enumerate(numbers.integers(2**63, size=count).tolist()):
            yield Endpoint(f"point {k} at {self._radius:g} of the star's norm", partial(self._beside_star, seed))

    def _swag(self, numbers: np.random.Generator, count: int) -> Iterator[Endpoint]:
        assert self._moments is not None
        for k, seed in enumerate(numbers.integers(2**63, size=count).tolist()):
            yield Endpoint(f"draw {k} of SWAG", partial(self._moments.drawn, seed))

    def _star_row(self) -> Tensor:
        return permuted_row(self._run.session, self._run.star)

    def _row(self, index: int, matched: bool) -> Tensor:
        permutation = self._run.permutations[index] if matched else None
        return permuted_row(self._run.session, self._run.sources[index], permutation)

    @cached_property
    def _mean_row(self) -> Tensor:
        return mean_of(self._run.session, self._run.sources, self._run.permutations)

    def _between_star(self, index: int, t: float) -> Tensor:
        return point(self._star_row(), self._row(index, True), t)

    def _between_sources(self, first: int, second: int, t: float) -> Tensor:
        end = permuted_row(self._run.session, self._run.sources[second], self._of_pair(first, second))
        return point(self._row(first, False), end, t)

    def _of_pair(self, first: int, second: int) -> Permutations | None:
        """The permutation of a source that matches it to another; found once, since few sources make few pairs."""
        if (first, second) not in self._of_pairs and self._run.session.settings.ends_matched:
            sources = self._run.sources
            (self._of_pairs[first, second],) = self._run.matched(sources[first], [sources[second]])
        return self._of_pairs.get((first, second))

    def _beside_star(self, seed: int) -> Tensor:
        return beside(self._star_row(), self._layout, seed, self._radius)


def mean_of(session: Session, models: Sequence[Checkpoint], permutations: Sequence[Permutations | None]) -> Tensor:
    """The mean of models' parameters [P], their units permuted."""
    return mean_row(permuted_row(session, *one) for one in zip(models, permutations, strict=True))


def beside(star: Tensor, layout: FlatLayout, seed: int, radius: float, *, by_filter: bool = False) -> Tensor:
    """The row [P] `star` and a step in a random direction, isotropic over all parameters.

    Args:
        radius: length of the step, as a share of the star's norm.
        by_filter: each filter's part of the step has the length `radius` times the filter's own norm; parameters of one
            dimension stay, as in pictures of loss landscapes.
    """
    numbers = torch.Generator().manual_seed(seed)
    step = torch.zeros_like(star)  # the padding between parameters stays 0
    own = layout.views(star)
    for name, part in layout.views(step).items():
        noise = torch.randn(part.shape, generator=numbers, dtype=torch.float64, device="cpu")
        if by_filter:
            filters = tuple(range(1, part.ndim))
            norms = noise.norm(dim=filters, keepdim=True).clamp_min(1e-30) if filters else noise.norm()
            noise = noise / norms * own[name].double().norm(dim=filters, keepdim=True) if filters else noise * 0
        part.copy_(noise)
    if by_filter:
        return star + radius * step
    return star + step * (radius * star.double().norm() / step.double().norm()).float()


def point(first: Tensor, second: Tensor, t: float) -> Tensor:
    """The row [P] at t on the segment between two rows."""
    row = torch.empty_like(first)
    interpolate(first, second, torch.tensor(t, dtype=torch.float32, device=first.device), row)
    return row
