"""Weight matching: never lowers the objective, ends at a fixed point, recovers shuffled copies, touches no input."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from matching_calls import (
    every_step_raises_the_objective,
    hard_problem,
    match_one,
    match_weights,
    objective,
    problem_of,
    stacked,
)
from matching_models import CASES, Mlp, derived, random_state
from torch import Tensor

from fastar.errors import FastarError
from fastar.matching import MatchResult
from fastar.matching.weight.descent import Descent
from fastar.matching.weight.problem import Problem
from fastar.symmetry import Permutations, Symmetry, derive_symmetry

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def symmetries() -> dict[str, Symmetry]:
    return derived()


def same(first: MatchResult, second: MatchResult) -> bool:
    """Equal permutations, and objectives to float32 rounding of their sums."""
    return first.permutations == second.permutations and torch.allclose(first.objective, second.objective, rtol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("name", [n for n in CASES if n != "two_axes"])
def test_a_shuffled_copy_is_recovered_exactly(name: str, symmetries: dict[str, Symmetry]) -> None:
    symmetry = symmetries[name]
    theta, _ = problem_of(name)
    # Near its own copy every unit's best partner is itself: noise would be recovered too, an exact copy must be.
    for seed in range(3):
        shuffle = symmetry.random(seed)
        permuted, found, result = match_one(symmetry, theta, symmetry.apply(shuffle, theta), restarts=5)
        assert found == shuffle.inverse(), name
        assert all(torch.equal(permuted[n], theta[n]) for n in theta)
        assert result.objective[0] == pytest.approx(objective(symmetry, theta, theta), rel=1e-6)
        assert bool(result.converged[0])


@pytest.mark.quick
@pytest.mark.parametrize("name", list(CASES))
def test_objective_is_what_it_says_and_never_falls(name: str, symmetries: dict[str, Symmetry]) -> None:
    symmetry = symmetries[name]
    theta, states = problem_of(name)
    result = match_weights(symmetry, theta, stacked(symmetry, states))
    for n, state in enumerate(states):
        permuted = symmetry.apply(result.permutations.select(n), state)
        assert result.objective[n] == pytest.approx(objective(symmetry, theta, permuted), rel=1e-6, abs=1e-5)
        assert result.objective_start[n] == pytest.approx(objective(symmetry, theta, state), rel=1e-6, abs=1e-5)
        expected = objective(symmetry, theta, permuted, weights_only=True)
        assert result.objective_weights[n] == pytest.approx(expected, rel=1e-6, abs=1e-5)
        assert result.objective[n] > result.objective_start[n]
    assert bool(result.converged.all())


@pytest.mark.parametrize("name", list(CASES))
def test_every_step_raises_the_objective(
    name: str, symmetries: dict[str, Symmetry], monkeypatch: pytest.MonkeyPatch
) -> None:
    symmetry = symmetries[name]
    theta, states = problem_of(name)
    every_step_raises_the_objective(monkeypatch, symmetry, theta, states)


@pytest.mark.parametrize("name", list(CASES))
def test_scores_kept_up_to_date_equal_fresh_ones(name: str, symmetries: dict[str, Symmetry]) -> None:
    """After a descent every S_g, corrected step by step, is what the permuted parameters give."""
    symmetry = symmetries[name]
    theta, states = problem_of(name)
    sources = stacked(symmetry, states)
    problem = Problem(symmetry, theta, sources)
    data = problem.part(sources, 0, len(states))
    start = [np.tile(np.arange(g.size), (len(states), 1)) for g in symmetry.groups]
    descent = Descent(problem, data, start, "auto", None)
    descent.run(lambda sweep: range(len(symmetry.trees)), 100)
    for g in range(len(symmetry.groups)):
        kept, fresh = descent.score(g), descent._full_score(g)
        # Dozens of float32 corrections, each rounded to 6e-8 of the terms.
        torch.testing.assert_close(kept, fresh, rtol=1e-4, atol=1e-5 * float(fresh.abs().max()))


@pytest.mark.quick
def test_tiny_networks_end_where_no_single_group_can_improve() -> None:
    """All 4! permutations of each of two groups, by hand; and the best of several orders is often the global best."""
    model = Mlp(3, 4, 4, 2)
    symmetry = derive_symmetry(model, (torch.zeros(2, 3),))
    everything = [torch.tensor(p) for p in itertools.permutations(range(4))]
    first, second = (g.name for g in symmetry.groups)
    global_best = 0
    for seed in range(4):
        theta, source = random_state(model, 50 + seed), random_state(model, seed)
        matched, found, result = match_one(symmetry, theta, source, restarts=8, seed=seed)
        reached = objective(symmetry, theta, matched)
        totals = {}
        for p, q in itertools.product(everything, everything):
            permuted = symmetry.apply(Permutations({first: p, second: q}), source)
            totals[tuple(p.tolist()), tuple(q.tolist())] = objective(symmetry, theta, permuted)
        at = {name: tuple(found[name].tolist()) for name in found}
        assert reached == pytest.approx(totals[at[first], at[second]], abs=1e-5)
        for p in itertools.permutations(range(4)):
            assert totals[p, at[second]] <= reached + 1e-5
            assert totals[at[first], p] <= reached + 1e-5
        global_best += reached >= max(totals.values()) - 1e-5
        assert result.objective[0] == pytest.approx(reached, abs=1e-5)
    assert global_best >= 2  # 3 or 4 of these 4 with this many attempts; chance would be 4 in 576


@pytest.mark.parametrize("name", ["resnet", "flatten", "two_axes", "concatenated"])
def test_batches_chunks_threads_and_memory_formats_change_nothing(name: str, symmetries: dict[str, Symmetry]) -> None:
    symmetry = symmetries[name]
    theta, states = problem_of(name, count=5)
    sources = stacked(symmetry, states)
    result = match_weights(symmetry, theta, sources)
    for settings in ({"chunk": 2}, {"chunk": 5}, {"threads": 1}, {"threads": 3, "chunk": 2}, {"solver": "scipy"}):
        assert same(result, match_weights(symmetry, theta, sources, **settings)), settings
    for n, state in enumerate(states):
        _, alone, one = match_one(symmetry, theta, state)
        assert alone == result.permutations.select(n)
        assert one.objective[0] == pytest.approx(float(result.objective[n]), rel=1e-6)
    contiguous = {n: t.contiguous() for n, t in sources.items()}
    assert same(result, match_weights(symmetry, {n: t.contiguous() for n, t in theta.items()}, contiguous))
    store, views, at = torch.zeros(5, sum(t[0].numel() for t in sources.values()) + 3), {}, 0
    for key, tensor in sources.items():
        flat = store[:, at : at + tensor[0].numel()]
        at += tensor[0].numel()
        if tensor.ndim == 5:
            _, o, i, h, w = tensor.shape
            views[key] = flat.unflatten(1, (o, h, w, i)).permute(0, 1, 4, 2, 3)
        else:
            views[key] = flat.unflatten(1, tensor.shape[1:])
        views[key].copy_(tensor)
    before = store.clone()
    assert same(result, match_weights(symmetry, theta, views))
    assert torch.equal(store, before)


def test_inputs_are_not_written(symmetries: dict[str, Symmetry]) -> None:
    symmetry = symmetries["resnet"]
    theta, states = problem_of("resnet")
    sources = stacked(symmetry, states)
    copies = [{n: t.clone() for n, t in d.items()} for d in (theta, sources)]
    for chunk in (1, 3):
        match_weights(symmetry, theta, sources, chunk=chunk, start=symmetry.random(1), restarts=2)
    match_one(symmetry, theta, states[0])
    for given, copy in zip((theta, sources), copies, strict=True):
        assert all(torch.equal(given[n], copy[n]) for n in copy)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("chunk", [1, 3])
def test_the_first_guess_gives_way_to_sources_that_are_aligned(
    name: str, chunk: int, symmetries: dict[str, Symmetry]
) -> None:
    """Two sources close to theta, one that is not: where the guess is worse, a source is matched from where it is."""
    symmetry = symmetries[name]
    theta, states = problem_of(name)
    near = [{n: 0.3 * states[0][n] + t for n, t in theta.items()}, states[1], {n: t.clone() for n, t in theta.items()}]
    sources = stacked(symmetry, near)
    copies = {n: t.clone() for n, t in sources.items()}
    result = match_weights(symmetry, theta, sources, chunk=chunk)
    from_here = match_weights(symmetry, theta, sources, chunk=chunk, start=symmetry.identity())
    assert (result.objective >= result.objective_start - 1e-5).all()
    assert result.permutations.select(2).is_identity()
    assert result.objective[0] >= from_here.objective_start[0] - 1e-5
    for n, state in enumerate(near):
        reached = objective(symmetry, theta, symmetry.apply(result.permutations.select(n), state))
        assert result.objective[n] == pytest.approx(reached, rel=1e-6, abs=1e-5)
    assert all(torch.equal(sources[n], copy) for n, copy in copies.items())


@pytest.mark.parametrize("name", list(CASES))
def test_a_warm_start_from_the_result_takes_no_step(name: str, symmetries: dict[str, Symmetry]) -> None:
    symmetry = symmetries[name]
    theta, states = problem_of(name)
    sources = stacked(symmetry, states)
    cold = match_weights(symmetry, theta, sources)
    warm = match_weights(symmetry, theta, sources, start=cold.permutations)
    assert same(cold, warm)
    assert warm.sweeps.tolist() == [1] * len(states)
    assert warm.solves == len(symmetry.trees) * len(states)
    torch.testing.assert_close(warm.objective_start, cold.objective, rtol=1e-6, atol=1e-5)


def test_more_attempts_and_starts_are_never_worse(symmetries: dict[str, Symmetry]) -> None:
    symmetry = symmetries["resnet"]
    theta, states = hard_problem()
    sources = stacked(symmetry, states)
    one = match_weights(symmetry, theta, sources)
    many = match_weights(symmetry, theta, sources, restarts=6)
    assert (many.objective >= one.objective).all()
    assert (many.objective > one.objective + 1e-3).any()
    start = symmetry.random(4, count=len(states))
    from_each = [match_weights(symmetry, theta, sources, start=s) for s in (start, None)]
    together = match_weights(symmetry, theta, sources, start=start, begin="backward")
    best = torch.stack([r.objective for r in from_each]).amax(0)
    torch.testing.assert_close(together.objective, best, rtol=1e-6, atol=0)
    assert from_each[0].permutations != from_each[1].permutations


def test_the_seed_alone_decides(symmetries: dict[str, Symmetry]) -> None:
    symmetry = symmetries["resnet"]
    theta, states = hard_problem()
    sources = stacked(symmetry, states)
    torch.manual_seed(1)
    first = match_weights(symmetry, theta, sources, restarts=3, seed=5)
    torch.manual_seed(2)
    again = match_weights(symmetry, theta, sources, restarts=3, seed=5)
    assert first.permutations == again.permutations
    others = [match_weights(symmetry, theta, sources, restarts=3, seed=s).permutations for s in range(6, 10)]
    assert any(first.permutations != other for other in others)


def test_max_sweeps_ends_early_and_says_so(symmetries: dict[str, Symmetry]) -> None:
    symmetry = symmetries["resnet"]
    theta, states = problem_of("resnet")
    sources = stacked(symmetry, states)
    short = match_weights(symmetry, theta, sources, max_sweeps=1)
    full = match_weights(symmetry, theta, sources)
    assert short.sweeps.tolist() == [1, 1, 1]
    assert not short.converged.any()
    assert (short.objective <= full.objective).all()
    assert (short.objective > short.objective_start).all()


def test_bad_input_is_named(symmetries: dict[str, Symmetry]) -> None:
    symmetry = symmetries["resnet"]
    theta, states = problem_of("resnet")
    sources = stacked(symmetry, states)

    def broken(given: State, name: str, value: float) -> State:
        out = {n: t.clone() for n, t in given.items()}
        out[name].view(-1)[-1] = value
        return out

    for value in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(FastarError, match=r"theta has NaN or infinite values in 'linear\.weight'"):
            match_weights(symmetry, broken(theta, "linear.weight", value), sources)
        with pytest.raises(FastarError, match=r"source 2 has NaN or infinite values in 'layers\.0\.bn1\.bias'"):
            match_weights(symmetry, theta, broken(sources, "layers.0.bn1.bias", value))
    with pytest.raises(FastarError, match=r"sources lacks parameter 'linear\.bias'"):
        match_weights(symmetry, theta, {n: t for n, t in sources.items() if n != "linear.bias"})
    with pytest.raises(FastarError, match="another architecture"):
        match_weights(symmetry, theta, {**sources, "linear.bias": torch.zeros(3, 4)})
    with pytest.raises(FastarError, match=r"2 of 'linear\.bias'"):
        match_weights(symmetry, theta, {**sources, "linear.bias": sources["linear.bias"][:2]})
    with pytest.raises(FastarError, match="no sources"):
        match_weights(symmetry, theta, {n: t[:0] for n, t in sources.items()})
    with pytest.raises(FastarError, match="of 2 sources, there are 3"):
        match_weights(symmetry, theta, sources, start=symmetry.random(0, count=2))
    with pytest.raises(FastarError, match="do not fit"):
        match_weights(symmetry, theta, sources, start=symmetries["mlp"].identity())


def test_large_but_finite_values_are_matched(symmetries: dict[str, Symmetry]) -> None:
    """Their sum overflows float32, they do not."""
    symmetry = symmetries["mlp"]
    theta, states = problem_of("mlp")
    sources = stacked(symmetry, states)
    sources["layers.2.bias"] = torch.full_like(sources["layers.2.bias"], 3e38)
    theta["layers.2.bias"] = torch.zeros_like(theta["layers.2.bias"])
    assert bool(match_weights(symmetry, theta, sources).converged.all())


def test_a_network_without_groups_is_left_as_it_is() -> None:
    model = Mlp(4, 3)
    symmetry = derive_symmetry(model, (torch.zeros(2, 4),))
    theta, state = random_state(model, 0), random_state(model, 1)
    matched, permutations, result = match_one(symmetry, theta, state)
    assert len(permutations) == 0
    assert all(torch.equal(matched[n], state[n]) for n in state)
    assert result.objective[0] == pytest.approx(objective(symmetry, theta, state), rel=1e-6)


def test_progress_counts_sources(symmetries: dict[str, Symmetry]) -> None:
    symmetry = symmetries["mlp"]
    theta, states = problem_of("mlp", count=4)
    seen: list[int] = []

    class Watch:
        def task(self, description: str, total: int, unit: str = "items") -> Any:
            from contextlib import contextmanager

            @contextmanager
            def running() -> Any:
                seen.append(-total)
                yield lambda count=1, note="": seen.append(count)

            return running()

        def line(self, text: str) -> None:
            raise AssertionError(text)

    match_weights(symmetry, theta, stacked(symmetry, states), chunk=3, progress=Watch())
    assert seen[0] == -4
    assert sum(seen[1:]) == 4


def test_weights_whose_products_overflow_are_named(symmetries: dict[str, Symmetry]) -> None:
    """Every number is finite, and so is every sum of them."""
    symmetry = symmetries["mlp"]
    theta, states = problem_of("mlp")
    sources = stacked(symmetry, states)
    sources["layers.1.weight"][1] *= 3e37
    theta["layers.1.weight"] = theta["layers.1.weight"] * 1e10
    with pytest.raises(FastarError, match=r"^weights of theta or of source 1 are too large to be matched: [^\n]*rate"):
        match_weights(symmetry, theta, sources, chunk=1, threads=1)
