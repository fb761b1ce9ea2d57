"""Algorithm 1: a star model theta of source models Z (paper, section 3).

Theta starts as a new network does, or where `star.start` says                                `StarStep._near_sources`
Each epoch, the sources are matched to theta:
    1. theta_n <- pi_n(theta_n) for all n in Z, pi_n the best permutation of hidden units    `match_store`, `Matcher`
and each step moves theta by the loss at a random point of the path to a random source:
    2. n ~ Unif(Z), t ~ Unif[0, 1]                                                           `draw`, `EpochDraws`
    3. point = (1 - t) theta + t theta_n                                                     `StarStep.__call__`
    4. the loss's gradient at the point, times 1 - t: the gradient with respect to theta     `Step._backward`
       (with `star.mu`, the gradient of theta's own loss is added: the modified objective of table 2)
    5. theta <- a step of the optimizer along it                                             `Step._update`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastar.config import MatchingSettings, StarSettings, TrainSettings
from fastar.errors import FastarError
from fastar.flat.forward import Batch
from fastar.losses import Loss
from fastar.matching import ActivationCache, GiveExamples, SourceActivations, match
from fastar.runtime import ranks
from fastar.runtime.cuda_graph import Record
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.seeds import derive_seed
from fastar.runtime.timing import span
from fastar.symmetry import Permutations, Symmetry
from fastar.training.resume import Resumable
from fastar.training.source_shares import SourceShares, of_all, rows_of
from fastar.training.sources import SourcesStore
from fastar.training.split_batch import SplitBatch
from fastar.training.steps import Step


def match_store(
    symmetry: Symmetry,
    theta: Tensor,
    sources: SourcesStore,
    settings: MatchingSettings,
    *,
    which: range | None = None,
    start: Permutations | None,
    seed: int,
    threads: int,
    examples: GiveExamples | None = None,
    activations: SourceActivations | None = None,
    progress: Progress = SILENT,
) -> tuple[Permutations, Tensor, Tensor]:
    """Step 1: theta_n <- pi_n(theta_n) for the rows `which` of the store (None: all), wherever they live.

    Args:
        activations: those of these rows.

    Returns:
        The permutations, and the objective [N] float64 that they reach: of all parameters, and without 1-D ones, which
        hardly depend on them.
    """
    found, objectives, weights = [], [], []
    centre = sources.layout.views(theta)
    remaining = None if activations is None else activations.with_theta(centre)
    for views in sources.parts(which):
        count = len(next(iter(views.values())))
        result = match(
            settings,
            symmetry,
            centre,
            views,
            start=start,
            examples=examples,
            seed=seed,
            threads=threads,
            activations=None if remaining is None else remaining.part(0, count),
            progress=progress,
        )
        symmetry.apply_rows(result.permutations, views)
        remaining = None if remaining is None else remaining.part(count)
        found.append(result.permutations.to("cpu"))
        objectives.append(result.objective.cpu())
        weights.append(result.objective_weights.cpu())
    if not found:  # a rank without sources
        none = torch.empty(0, dtype=torch.float64, device="cpu")
        return symmetry.identity(0), none, none
    permutations = Permutations({name: torch.cat([part[name] for part in found]) for name in found[0]})
    return permutations, torch.cat(objectives), torch.cat(weights)


class Matcher:
    """Step 1 from epoch to epoch: starts where the last matching ended, and remembers the permutations since the files.

    A part of the training that is saved with it (`Resumable`). Each rank matches its share of the sources, and is told
    the permutations of all.

    Args:
        symmetry: the architecture's permutation groups.
        sources: the store, as the sources are in their files.
        settings: the method of matching.
        seed: of all matchings; each epoch's has its own.
        threads: of a CPU.
        examples: makes what methods that look at data are shown.
        kept: activations, as they are in their files, of the sources that are matched here, where the method compares
            these.
        shares: the sources that are held and matched here; None: all.
    """

    def __init__(
        self,
        symmetry: Symmetry,
        sources: SourcesStore,
        settings: MatchingSettings,
        *,
        seed: int,
        threads: int = 1,
        examples: GiveExamples | None = None,
        kept: ActivationCache | None = None,
        progress: Progress = SILENT,
        shares: SourceShares | None = None,
    ):
        every = range(len(sources))
        self.shares = SourceShares(len(sources), every, every) if shares is None else shares
        self.permutations = symmetry.identity(self.shares.number)
        self._symmetry, self._sources, self._settings = symmetry, sources, settings
        self._seed, self._threads, self._progress = seed, threads, progress
        self._examples, self._kept = examples, kept
        self._matched = False

    def __call__(self, theta: Tensor, sources: SourcesStore, epoch: int) -> dict[str, float]:
        """Permute the rows of `sources` to match theta [P], in place.

        Returns:
            The mean objective (of all parameters, and without 1-D ones), and the share of hidden units that moved.
        """
        shares = self.shares
        now = rows_of(self.permutations, shares.matched)
        found = match_store(
            self._symmetry,
            theta,
            sources,
            self._settings,
            which=shares.matched_rows,
            # The rows are kept as permuted last: what matched then is where to start now.
            start=self._symmetry.identity() if self._matched else None,
            seed=derive_seed(self._seed, "star", "matching", epoch),
            threads=self._threads,
            examples=self._examples,
            activations=None if self._kept is None else self._kept.permuted(now),
            progress=self._progress,
        )
        moves, objective, weights = of_all(*found)
        for rows in shares.other_rows():
            self._permute(moves, rows)
        self.permutations = self.permutations.then(moves)
        self._matched = True
        return {
            "matching_objective": float(objective.mean()),
            "matching_objective_weights": float(weights.mean()),
            "matching_changed": share_changed(moves),
        }

    def save(self) -> dict[str, Tensor]:
        """The permutations; the rows follow from them and the sources' files."""
        return {
            "matched": torch.tensor(int(self._matched), dtype=torch.int64, device="cpu"),
            **{name: p.int() for name, p in self.permutations.items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Permute the rows, which are as in the sources' files, as they were: gathers alone, the same bits."""
        self._matched = bool(state["matched"])
        self.permutations = Permutations({name: index.long() for name, index in state.items() if name != "matched"})
        self._permute(self.permutations, range(len(self._sources)))

    def _permute(self, permutations: Permutations, rows: range) -> None:
        """Apply these, of all sources, to some rows of those that are held."""
        begin = self.shares.held.start + rows.start
        for views in self._sources.parts(rows):
            end = begin + len(next(iter(views.values())))
            here = {name: index[begin:end].to(self._sources.device) for name, index in permutations.items()}
            self._symmetry.apply_rows(Permutations(here), views)
            begin = end


def share_changed(moves: Permutations) -> float:
    """The share of hidden units, of all networks, that `moves` moves."""
    moved = sum(int((index != torch.arange(index.shape[-1], device="cpu")).sum()) for index in moves.values())
    return moved / max(1, sum(index.numel() for index in moves.values()))


def draw(star: StarSettings, sources: int, steps: int, seed: int) -> tuple[list[int], list[float]]:
    """Step 2, for all steps of an epoch: a source index ~ Unif(Z) and t ~ Unif[0, 1], Beta(alpha, beta) or constant.

    Drawn on the CPU in float64, so that every device sees the same draws.
    """
    generator = np.random.default_rng(seed)
    indices = generator.integers(sources, size=steps).tolist()
    if star.t == "constant":
        return indices, [star.value] * steps
    ts = generator.random(steps) if star.t == "uniform" else generator.beta(star.alpha, star.beta, steps)
    return indices, ts.tolist()


class EpochDraws:
    """Draws (n, t) of an epoch's steps from number `begin` on, and which of these steps is next.

    Args:
        indices: n of each step of the epoch.
        ts: t of each.
        sources: fetches the rows as they are needed.
        begin: steps of the epoch that are done already.
    """

    def __init__(self, indices: Sequence[int], ts: Sequence[float], sources: SourcesStore, begin: int):
        self.begin = begin
        self.indices, self.ts = indices[begin:], ts[begin:]
        self.t = torch.tensor(self.ts, dtype=torch.float32, device="cpu").to(sources.device)
        self.feed = sources.feed(self.indices)
        self.step = 0


class StarStep(Step):
    """Steps 2 to 5: the loss at a random point of the path to a random source moves the star.

    The network holds (1 - t) theta + t theta_n and runs in training mode, so batch-norm normalises with the batch; its
    running statistics belong to interpolated networks and mean nothing.

    Args:
        model: gives the architecture and the initial theta.
        settings: the recipe, as of a regular model.
        star: where theta starts, and how t is drawn.
        sources: Z, permuted in place by `match`; with `star.draws=each` the share of it that this rank holds.
        seed: of the draws of (source, t).
        match: step 1, given theta, the store and the epoch's number; its metrics. None: sources are never matched.
        match_every: epochs from one matching to the next; 0: never.
        loss, record: as of a `Step`.
        shares: the sources that this rank holds.

    Raises:
        FastarError: sources of another architecture, or settings that this device cannot follow.
    """

    _draws: EpochDraws

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        star: StarSettings,
        sources: SourcesStore,
        *,
        seed: int,
        match: Callable[[Tensor, SourcesStore, int], dict[str, float]] | None = None,
        match_every: int = 1,
        loss: Loss | None = None,
        record: Record | None = None,
        shares: SourceShares | None = None,
    ):
        super().__init__(model, settings, working_copy=True, loss=loss, record=record)
        self._shares = SourceShares.here(len(sources), star) if shares is None else shares
        self._each = self._split is not None and star.draws == "each"
        if self._each:
            self._split = SplitBatch(settings.batch_size, self._shares.weight)
        if sources.layout != self.layout:
            raise FastarError("the sources are of another architecture than the star model")
        self.star = star
        self.sources = sources
        self._seed = seed
        self._match, self._match_every = match, match_every
        # t of the step that runs: always at the same address, for graphs and since a kernel is compiled anew for
        # pointers that are aligned otherwise.
        self._t = torch.zeros((), device=self.device, dtype=torch.float32)
        self._graph = self._graph_of(self._body)

    def begin_epoch(self, epoch: int, steps: int) -> dict[str, float]:
        if epoch == 0 and self.star.start != "random":
            with span("matching"):
                self._near_sources()
        every, found = self._match_every, {}
        if self._match is not None and every and epoch % every == 0:  # (k - 1) mod m == 0: the first epoch too
            with span("matching"):
                found = self._match(self.theta, self.sources, epoch)
        self.resume_epoch(epoch, steps, 0)
        return found

    def _near_sources(self) -> None:
        """Theta becomes the first source, or the mean of the sources, matched to the first."""
        if self._each and not ranks.is_first():
            self.theta.zero_()
        else:
            self.theta.copy_(self.sources.rows[0])
        if self._each:
            ranks.sum_(self.theta)
        if self.star.start == "mean":
            if self._match is not None and self._match_every:
                self._match(self.theta, self.sources, 0)
            self.theta.copy_(self.sources.mean())
            if self._each:
                ranks.sum_(self.theta.mul_(self._shares.weight))

    def resume_epoch(self, epoch: int, steps: int, begin: int) -> None:
        own = (ranks.rank(),) if self._each and not ranks.is_first() else ()
        indices, ts = draw(self.star, len(self.sources), steps, derive_seed(self._seed, "draws", epoch, *own))
        self._draws = EpochDraws(indices, ts, self.sources, begin)

    def __call__(self, inputs: Batch, targets: Any, lr: Tensor) -> Tensor:
        assert self._working is not None
        draws = self._draws
        with span("interpolate"):
            self._t.copy_(draws.t[draws.step])
            self._working.interpolate(self.theta, draws.feed.take(draws.step), self._t)
            draws.feed.done(draws.step)
        draws.step += 1
        graph = self._replayed(self._graph, inputs, targets)
        if graph is not None:
            return graph(inputs, targets, lr)
        return self._body(inputs, targets, lr)

    def parts(self) -> dict[str, Resumable]:
        return {**super().parts(), **({"matching": self._match} if isinstance(self._match, Matcher) else {})}

    def permutations(self) -> Permutations:
        """The sources' permutations since their files; empty where they are never matched."""
        return self._match.permutations if isinstance(self._match, Matcher) else Permutations({})

    def release(self) -> None:
        self.sources.release()
        self._match = None  # and the sources' activations with it
        super().release()

    def describe(self, step: int) -> str:
        here = step - self._draws.begin
        whose = ", of rank 0" if self._each else ""
        return f" (source {self.sources.names[self._draws.indices[here]]}, t={self._draws.ts[here]:.4f}{whose})"

    def _body(self, inputs: Batch, targets: Any, lr: Tensor) -> Tensor:
        """Steps 4 and 5, at the point that the network holds; with `star.mu` at theta too, on the same batch."""
        mu = self.star.mu
        if self._each and not mu:  # each rank has a t of its own
            return self._update(lr, self._one, self._backward(inputs, targets, 1 - self._t))
        if not mu:
            return self._update(lr, 1 - self._t, self._backward(inputs, targets))
        assert self._working is not None
        loss = self._backward(inputs, targets, 1 - self._t)
        with span("interpolate"):
            self._working.write(self.theta)
        own = self._backward(inputs, targets, mu)  # added to the gradient of the path
        return self._update(lr, self._one / (1 + mu), (loss + mu * own) / (1 + mu))
