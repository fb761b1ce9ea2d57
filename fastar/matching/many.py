"""Matching a whole set of networks: to a star, to a mean that is re-estimated, or pairwise; and averaging them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastar.config import MatchingSettings
from fastar.errors import FastarError
from fastar.matching.activation.activation_cache import ActivationCache, SourceActivations
from fastar.matching.activation.statistics import UnitActivations
from fastar.matching.checks import check_finite
from fastar.matching.methods import METHODS, match
from fastar.matching.request import GiveExamples, MatchResult
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.seeds import derive_seed
from fastar.symmetry.permutations import Permutations
from fastar.symmetry.symmetry import Symmetry

To = Literal["star", "mean", "pairwise"]
State = Mapping[str, Tensor]

# Networks that are matched to one theta in one call: memory is bounded to a copy of so many.
PART = 8


@dataclass(frozen=True)
class ManyResult:
    """The permutations of a set of networks, and what came of them.

    Args:
        permutations: [N, size] per group, to be applied to the networks as they were given; of pairwise none, since
            those of its pairs do not fit together.
        pairs: of pairwise: (i, j), i < j -> the permutations that bring network j to network i; else empty.
        objective: float64, of star and mean [N]: the inner product of each permuted network with the centre, or with
            the mean of all; of pairwise: one for each of `pairs`, in their order.
        mean: of star and mean: the average of the permuted networks, buffers too (whole numbers are the first's).
            Batch-norm statistics so averaged are not the averaged network's own: re-estimate them.
        history: of mean: the mean inner product of two permuted networks, at first and after each round.
        rounds: of mean: passes over all networks.
        converged: of mean: whether the last round changed nothing; else True.
        left: groups whose units a method could not see, and left where they are.
    """

    permutations: Permutations | None
    pairs: Mapping[tuple[int, int], Permutations]
    objective: Tensor
    mean: dict[str, Tensor] | None
    history: tuple[float, ...]
    rounds: int
    converged: bool
    left: tuple[str, ...] = ()

    def __repr__(self) -> str:
        what = f"{len(self.pairs)} pairs" if self.permutations is None else f"{len(self.objective)} networks"
        rounds = f", {self.rounds} rounds, {'' if self.converged else 'not '}converged" if self.history else ""
        left = f", {len(self.left)} groups left" if self.left else ""
        return f"ManyResult({what}, mean objective {float(self.objective.mean()):.6g}{rounds}{left})"

    def pair(self, i: int, j: int) -> Permutations:
        """The permutations that bring network j to network i, both as they were given."""
        if self.permutations is not None:
            return self.permutations.select(j).then(self.permutations.select(i).inverse())
        if i == j:
            return Permutations({name: index.sort().values for name, index in next(iter(self.pairs.values())).items()})
        return self.pairs[i, j] if i < j else self.pairs[j, i].inverse()


def match_many(
    symmetry: Symmetry,
    states: Sequence[State],
    *,
    to: To = "mean",
    centre: State | None = None,
    settings: MatchingSettings | None = None,
    examples: GiveExamples | None = None,
    rounds: int = 20,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> ManyResult:
    """Match N networks of one architecture. None is changed; the result is a function of the arguments.

    star: each to `centre`, such as a star model. pairwise: each to every one before it, a few at a time.

    mean: to one another, through their mean (git re-basin's algorithm 3). All are matched to the first network; then,
    in rounds of a random order, each to the mean of the others, until a round changes nothing. A step raises the mean
    inner product of all pairs of permuted networks, and a step that would lower it is not taken: `history` never
    falls. Since there is one permutation for each network, they are cycle-consistent: network j comes to network i by
    pi_ij = pi_i^-1 pi_j (`pair`), and pi_ij pi_jk = pi_ik. The first network stays as it was given.

    Args:
        states: names -> tensors of each network, on one device; buffers may be among them.
        centre: of star alone.
        settings: method and its settings; mean follows the weights, so its method is weight or sinkhorn with l2.
        rounds: of mean, at most.

    Raises:
        FastarError: too few networks, a centre that is missing or not needed, a method that mean does not take; as
            `match`.
    """
    settings = settings or MatchingSettings()
    _check(states, to, centre, settings, rounds)
    for n, state in enumerate(states):
        symmetry.check_state(state, f"model {n}")
        for name in symmetry.counted(state, state):
            check_finite(state[name], name, f"model {n}")
    cache = None
    if examples is not None and settings.by_activations and symmetry.groups:
        given, device = examples(), next(iter(states[0].values())).device
        cache = ActivationCache(
            UnitActivations(given.model, symmetry, given.inputs, device),
            states,
            [f"model {n}" for n in range(len(states))],
            allocate=lambda width, dtype: torch.empty(len(states), width, dtype=dtype, device="cpu"),
            progress=progress,
        )
    one_call = partial(match, settings, symmetry, examples=examples, seed=seed, threads=threads)
    networks = _Networks(symmetry, states, one_call, cache)
    if to == "pairwise":
        result = _pairwise(networks, progress)
    elif centre is not None:
        result = _star(networks, centre, progress)
    else:
        result = _to_mean(networks, rounds, seed, progress)
    if cache is not None and settings.method == "activation":
        return replace(result, left=cache.measure.unobserved)
    return result


def average(symmetry: Symmetry, states: Sequence[State], permutations: Permutations) -> dict[str, Tensor]:
    """The mean of N permuted networks, in float64, as the first's dtypes; whole numbers are the first's."""
    total: dict[str, Tensor] = {}
    for n, state in enumerate(states):
        for name, value in symmetry.apply(permutations.select(n), state).items():
            if not n:
                whole = not (value.is_floating_point() or value.is_complex())
                total[name] = value if whole else value.to(torch.promote_types(value.dtype, torch.float64))
            elif total[name].is_floating_point() or total[name].is_complex():
                total[name] += value
    return {
        name: (value / len(states)).to(states[0][name].dtype)
        if value.is_floating_point() or value.is_complex()
        else value
        for name, value in total.items()
    }


@dataclass(frozen=True)
class _Networks:
    """The networks, and how they are matched to whatever theta.

    Args:
        one_call: `match` with all that is the same for every theta.
        cache: their activations in host memory, where they are matched by these.
    """

    symmetry: Symmetry
    states: Sequence[State]
    one_call: Callable[..., MatchResult]
    cache: ActivationCache | None

    def match(
        self,
        theta: State,
        some: Sequence[int],
        start: Permutations | None = None,
        advance: Callable[[int], object] = lambda count: None,
    ) -> tuple[list[Permutations], list[Tensor]]:
        """Match the networks `some` to theta, a few at a time: each one's permutations, and objectives part by part."""
        names = [name for name in self.symmetry.moved if name in theta and name in self.states[0]]
        activations = None
        if self.cache is not None:
            activations = SourceActivations(self.cache, self.symmetry.identity(), some).with_theta(theta)
        found: list[Permutations] = []
        objectives: list[Tensor] = []
        for begin in range(0, len(some), PART):
            part = some[begin : begin + PART]
            result = self.one_call(
                {name: theta[name] for name in names},
                {name: torch.stack([self.states[n][name] for n in part]) for name in names},
                start=start,
                activations=None if activations is None else activations.part(begin, begin + PART),
            )
            permutations = result.permutations.to("cpu")
            found += [permutations.select(k) for k in range(len(part))]
            objectives.append(result.objective)
            advance(len(part))
        return found, objectives

    def permuted(self, n: int, permutations: Permutations) -> dict[str, Tensor]:
        return self.symmetry.apply(permutations, self.states[n])


def _star(networks: _Networks, centre: State, progress: Progress) -> ManyResult:
    count = len(networks.states)
    with progress.task("matching to the star", count, "models") as advance:
        found, objectives = networks.match(centre, range(count), advance=advance)
    together = Permutations.stack(found)
    mean = average(networks.symmetry, networks.states, together)
    return ManyResult(together, {}, torch.cat(objectives), mean, (), 0, True)


def _pairwise(networks: _Networks, progress: Progress) -> ManyResult:
    count = len(networks.states)
    pairs: dict[tuple[int, int], Permutations] = {}
    objectives: list[Tensor] = []
    with progress.task("matching pairs", count * (count - 1) // 2, "pairs") as advance:
        for i in range(count - 1):
            found, parts = networks.match(networks.states[i], range(i + 1, count), advance=advance)
            pairs |= {(i, j): one for j, one in enumerate(found, i + 1)}
            objectives += parts
    return ManyResult(None, pairs, torch.cat(objectives), None, (), 0, True)


def _to_mean(networks: _Networks, rounds: int, seed: int, progress: Progress) -> ManyResult:
    """Coordinate ascent: of sum_{i<j} <pi_i theta_i, pi_j theta_j>, n's part is <sum of the others, pi_n theta_n>."""
    symmetry, states = networks.symmetry, networks.states
    count = len(states)
    names = symmetry.counted(states[0], states[0])
    found = [symmetry.identity(), *networks.match(states[0], range(1, count))[0]]
    # float64 sums of float32 numbers: what is added and taken away again leaves nothing behind.
    total = {name: torch.zeros_like(states[0][name], dtype=torch.float64) for name in names}
    squares = 0.0
    for n in range(count):
        one = networks.permuted(n, found[n])
        for name in names:
            total[name] += one[name]
            squares += float(one[name].double().square().sum())

    def between() -> float:
        """The mean inner product of two permuted networks."""
        return (sum(float(value.square().sum()) for value in total.values()) - squares) / (count * (count - 1))

    history, done, changed = [between()], 0, count > 2  # of two networks, each is matched to the other already
    with progress.task("matching to the mean", rounds, "rounds") as advance:
        while changed and done < rounds:
            changed = False
            order = np.random.default_rng(derive_seed(seed, "match many", done)).permutation(count)
            for n in (int(n) for n in order):
                now = networks.permuted(n, found[n])
                rest = {name: total[name] - now[name] for name in names}
                theta = {name: (value / (count - 1)).to(states[0][name].dtype) for name, value in rest.items()}
                (matched,), _ = networks.match(theta, [n], found[n])
                then = networks.permuted(n, matched)
                gain = sum(float((rest[name] * (then[name].double() - now[name])).sum()) for name in names)
                if gain > 0:
                    found[n], changed = matched, True
                    total = {name: value + then[name] for name, value in rest.items()}
            done += 1
            history.append(between())
            advance(note=f"{history[-1]:.4g}")
    back = found[0].inverse()
    together = Permutations.stack([one.then(back) for one in found])
    mean = average(symmetry, states, together)
    objective = [
        sum(float((mean[name].double() * one[name]).sum()) for name in names)
        for one in (networks.permuted(n, together.select(n)) for n in range(count))
    ]
    reached = torch.tensor(objective, dtype=torch.float64, device="cpu")
    return ManyResult(together, {}, reached, mean, tuple(history), done, not changed)


def _check(states: Sequence[State], to: str, centre: State | None, settings: MatchingSettings, rounds: int) -> None:
    if to not in ("star", "mean", "pairwise"):
        raise FastarError(f"matching many: to={to!r} is none of star, mean, pairwise")
    if to == "star" and centre is None:
        raise FastarError("matching many: to=star needs a centre: give one (centre)")
    if to != "star" and centre is not None:
        raise FastarError(f"matching many: to={to} takes no centre: leave it out, or match to=star")
    least = 1 if to == "star" else 2
    if len(states) < least:
        raise FastarError(f"matching many: to={to} needs at least {least} model{'s' if least > 1 else ''}")
    wanted = METHODS[settings.method].needs_data(settings)
    if to == "mean" and wanted and settings.method != "weight":
        raise FastarError(
            f"matching many: to=mean follows the weights, not {wanted}, since the mean of networks that do not match "
            "yet computes nothing of use: match to one of them (to=star, with it as the centre), pairwise "
            "(to=pairwise) or by weights (matching.method=weight; matching.start=activations begins with activations)"
        )
    if rounds < 1:
        raise FastarError(f"matching many: rounds={rounds} must be at least 1")
