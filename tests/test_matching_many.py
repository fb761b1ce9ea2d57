"""Many networks: to a star, to their mean, pairwise; and what they average to."""

from __future__ import annotations

import itertools

import pytest
import torch
from matching_block_models import BLOCK_MODELS
from matching_calls import match_weights
from matching_models import CASES, derived, random_state
from torch import Tensor, nn

from fastar.config import MatchingSettings
from fastar.errors import FastarError
from fastar.matching import match_many
from fastar.symmetry import Permutations, Symmetry

State = dict[str, Tensor]


def case(name: str) -> tuple[nn.Module, Symmetry]:
    return (BLOCK_MODELS[name][0], BLOCK_MODELS[name][1]) if name in BLOCK_MODELS else (CASES[name][0], derived()[name])


def noisy(name: str, count: int, noise: float) -> list[State]:
    """Networks near one another, shuffled."""
    model, symmetry = case(name)
    base = random_state(model, 100)
    return [
        symmetry.apply(
            symmetry.random(n),
            {
                key: value + noise * random_state(model, n)[key].abs() if value.is_floating_point() else value
                for key, value in base.items()
            },
        )
        for n in range(count)
    ]


def product(symmetry: Symmetry, a: State, b: State) -> float:
    return sum(float((a[n].double() * b[n].double()).sum()) for n in symmetry.parameters if n not in symmetry.tied)


def between(symmetry: Symmetry, states: list[State], permutations: Permutations) -> float:
    """The mean inner product of two permuted networks, written out plainly."""
    moved = [symmetry.apply(permutations.select(n), state) for n, state in enumerate(states)]
    found = [product(symmetry, a, b) for a, b in itertools.combinations(moved, 2)]
    return sum(found) / len(found)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["mlp", "resnet", "attention", "group_norm"])
def test_shuffled_copies_come_together_exactly(name: str) -> None:
    model, symmetry = case(name)
    theta = random_state(model, 100)
    shuffles = [symmetry.random(seed) for seed in range(5)]
    copies = [symmetry.apply(shuffle, theta) for shuffle in shuffles]
    found = match_many(symmetry, copies)
    assert found.converged
    assert found.permutations is not None
    assert found.mean is not None
    for n, state in enumerate(copies):
        moved = symmetry.apply(found.permutations.select(n), state)
        assert all(torch.equal(moved[key], value) for key, value in copies[0].items())
    assert found.permutations.select(0).is_identity()
    assert all(torch.equal(found.mean[key], value) for key, value in copies[0].items())
    assert {key: value.dtype for key, value in found.mean.items()} == {key: v.dtype for key, v in theta.items()}
    for i, j in itertools.product(range(5), repeat=2):
        assert found.pair(i, j) == shuffles[j].inverse().then(shuffles[i])


@pytest.mark.quick
@pytest.mark.parametrize("name", ["concatenated", "two_axes", "attention"])
def test_the_mean_objective_never_falls_and_ends_where_no_network_can_improve(name: str) -> None:
    _, symmetry = case(name)
    states = noisy(name, 5, 2.0)
    found = match_many(symmetry, states, rounds=30)
    assert found.converged
    assert found.permutations is not None
    assert found.rounds == len(found.history) - 1 >= 1
    assert all(b >= a for a, b in itertools.pairwise(found.history))
    assert found.history[-1] > found.history[0]  # the rounds were worth something for each of these
    assert found.history[-1] == pytest.approx(between(symmetry, states, found.permutations), rel=1e-9)
    moved = [symmetry.apply(found.permutations.select(n), state) for n, state in enumerate(states)]
    for n in range(5):
        rest = {key: sum(m[key] for k, m in enumerate(moved) if k != n) / 4 for key in symmetry.parameters}
        own = {key: moved[n][key][None] for key in symmetry.parameters}
        again = match_weights(symmetry, rest, own, start=symmetry.identity())  # type: ignore[arg-type]
        assert float(again.objective[0]) == pytest.approx(float(again.objective_start[0]), rel=1e-6)
    # The mean is that of the permuted networks, buffers too.
    assert found.mean is not None
    for key, value in found.mean.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, torch.stack([m[key] for m in moved]).mean(0), rtol=1e-5, atol=1e-6)
    assert found.objective.tolist() == pytest.approx([product(symmetry, found.mean, m) for m in moved], rel=1e-6)


def test_permutations_are_cycle_consistent_and_a_function_of_the_arguments() -> None:
    _, symmetry = case("concatenated")
    states = noisy("concatenated", 4, 2.0)
    before = [{key: value.clone() for key, value in state.items()} for state in states]
    found = match_many(symmetry, states, seed=3)
    for i, j, k in itertools.permutations(range(4), 3):
        assert found.pair(j, k).then(found.pair(i, j)) == found.pair(i, k)
        assert found.pair(i, j) == found.pair(j, i).inverse()
    torch.manual_seed(5)
    again = match_many(symmetry, states, seed=3)
    assert again.permutations == found.permutations
    assert again.history == found.history
    assert all(
        torch.equal(state[key], value) for state, old in zip(states, before, strict=True) for key, value in old.items()
    )
    # Fewer rounds stop on the way, and say so.
    one = match_many(symmetry, states, seed=3, rounds=1)
    assert (one.rounds, one.history) == (1, found.history[:2])
    assert one.converged == (found.rounds == 1)


def test_to_a_star_and_pairwise_are_weight_matching_of_each() -> None:
    model, symmetry = case("mlp")
    states = [random_state(model, seed) for seed in range(10)]  # more than are matched in one call
    centre = random_state(model, 100)
    stacked = {name: torch.stack([state[name] for state in states]) for name in symmetry.parameters}
    wanted = match_weights(symmetry, centre, stacked)
    found = match_many(symmetry, states, to="star", centre=centre)
    assert found.permutations == wanted.permutations
    torch.testing.assert_close(found.objective, wanted.objective, rtol=1e-6, atol=1e-6)
    assert found.mean is not None
    moved = [symmetry.apply(wanted.permutations.select(n), state) for n, state in enumerate(states)]
    for key, value in found.mean.items():
        torch.testing.assert_close(value, torch.stack([m[key] for m in moved]).mean(0), rtol=1e-5, atol=1e-6)
    pairs = match_many(symmetry, states, to="pairwise")
    assert list(pairs.pairs) == list(itertools.combinations(range(10), 2))
    assert (pairs.permutations, pairs.mean) == (None, None)
    for k, (i, j) in enumerate(pairs.pairs):
        one = match_weights(symmetry, states[i], {name: states[j][name][None] for name in symmetry.parameters})
        assert pairs.pairs[i, j] == one.permutations.select(0)
        assert float(pairs.objective[k]) == pytest.approx(float(one.objective[0]), rel=1e-6)
    assert pairs.pair(7, 2) == pairs.pairs[2, 7].inverse()
    assert pairs.pair(3, 3).is_identity()


def test_two_networks_and_none() -> None:
    model, symmetry = case("mlp")
    states = [random_state(model, seed) for seed in range(2)]
    found = match_many(symmetry, states)
    one = match_weights(symmetry, states[0], {name: states[1][name][None] for name in symmetry.parameters})
    assert found.permutations is not None
    assert found.permutations.select(1) == one.permutations.select(0)
    assert found.converged
    none = match_many(symmetry, states, settings=MatchingSettings(method="none"))
    assert none.permutations is not None
    assert none.permutations.is_identity()
    assert none.mean is not None
    torch.testing.assert_close(
        none.mean["layers.0.weight"], (states[0]["layers.0.weight"] + states[1]["layers.0.weight"]) / 2
    )


def test_bad_input_is_named() -> None:
    model, symmetry = case("mlp")
    states = [random_state(model, seed) for seed in range(3)]
    for message, arguments in {
        "to='middle' is none of": {"to": "middle"},
        "to=star needs a centre: give one": {"to": "star"},
        "to=mean takes no centre": {"centre": states[0]},
        "rounds=0": {"rounds": 0},
        "to=mean follows the weights": {"settings": MatchingSettings(method="activation")},
    }.items():
        with pytest.raises(FastarError, match=message):
            match_many(symmetry, states, **arguments)  # type: ignore[arg-type]
    with pytest.raises(FastarError, match="needs at least 2 models"):
        match_many(symmetry, states[:1])
    with pytest.raises(FastarError, match=r"model 1 lacks parameter 'layers\.0\.weight'"):
        match_many(symmetry, [states[0], {}, states[1]])
    broken = {**states[1], "layers.0.bias": states[1]["layers.0.bias"] * float("nan")}
    with pytest.raises(FastarError, match=r"model 1 has NaN or infinite values in 'layers\.0\.bias'"):
        match_many(symmetry, [states[0], broken, states[2]])
