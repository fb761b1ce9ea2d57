"""Units that lie within an axis of their parent's blocks: several children of one parent in one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from matching_calls import match_weights, objective, stacked
from matching_models import random_state
from torch import Tensor, nn
from torch.nn import functional as F
from within_models import (
    COLUMNS,
    GROUPS,
    INSIDE,
    MADE,
    READ,
    ROWS,
    apart,
    both,
    deep_experts,
    grouped,
    hyper,
    shared_keys,
    written,
)

from fastar.config import MatchingSettings
from fastar.errors import FastarError
from fastar.matching import Examples, match
from fastar.matching.activation.record import Observer
from fastar.matching.weight.descent import Descent
from fastar.matching.weight.problem import Problem
from fastar.symmetry import Group, Member, Permutations, Symmetry, verify_symmetry
from fastar.symmetry.random_network import RandomNetwork

Made = tuple[nn.Module, Symmetry, Tensor]
NETWORKS: dict[str, Callable[[], Made]] = {
    "grouped": grouped,
    "deep_experts": deep_experts,
    "shared_keys": shared_keys,
    "shared_keys_as_they_are": lambda: shared_keys(turned=False),
    "fused": lambda: fused(),
}
EVERY = pytest.mark.parametrize("name", list(NETWORKS))


class Fused(nn.Module):
    """Blocks whose units lie in several runs on one axis, beside one position that stays, and on another axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.make = nn.Linear(5, 6), nn.Parameter(torch.zeros(3, 10, 6))
        self.gate, self.mix = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 11, 2, 3, 2))
        self.readout = nn.Linear(36, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(torch.einsum("gai,bi->bga", self.make, torch.tanh(self.stem(x)))) * self.gate[:, None]
        pairs, twice = y[..., :4].unflatten(-1, (2, 2)).prod(-1), y[..., 4:].unflatten(-1, (2, 3)).prod(-2)
        y = torch.cat([y, pairs.sum(-1, keepdim=True) + twice.sum(-1, keepdim=True)], -1)
        return self.readout(torch.tanh(torch.einsum("gapjk,bga->bpgjk", self.mix, y)).flatten(1))


def fused() -> Made:
    model = Fused()
    blocks = (Member("make", 0), Member("gate", 0), Member("mix", 0), Member("readout.weight", 2))
    groups = (
        Group("stem", 6, (*both("stem"), Member("make", 2))),
        Group("blocks", 3, blocks),
        Group("pairs", 6, tuple(Member(name, 1, inner=2, within=0) for name in ("make", "mix")), "blocks"),
        Group("twice", 9, tuple(Member(name, 1, outer=2, offset=4, within=0) for name in ("make", "mix")), "blocks"),
        Group("made", 9, (Member("mix", 3, within=0), Member("readout.weight", 3, within=2)), "blocks"),
    )
    return model, written(model, groups, {"readout.weight": apart(5, a1=(2, 3, 3, 2))}), torch.zeros(2, 5)


@EVERY
def test_a_permuted_network_is_the_same_function(name: str) -> None:
    model, symmetry, example = NETWORKS[name]()
    trial = RandomNetwork(model, (example,), 0)
    state = trial.state(1.4)
    (expected,) = trial.outputs(state)
    for seed in range(5):
        moved = symmetry.apply(symmetry.random(seed), state)
        assert all((moved[tensor] != state[tensor]).any() for tensor in symmetry.within)
        (found,) = trial.outputs(moved)
        assert float((found - expected).abs().max()) < 1e-10 * float(expected.abs().max())
    verify_symmetry(model, symmetry, (example,))


@EVERY
def test_a_member_within_that_is_left_out_is_noticed(name: str) -> None:
    """Negative control: what it would move stays, and the outputs change."""
    model, symmetry, example = NETWORKS[name]()
    for group, member in symmetry.inside:
        if len(symmetry.parameters[member.tensor]) > 1:
            left = replace(group, members=tuple(one for one in group.members if one is not member))
            wrong = replace(symmetry, groups=tuple(left if one is group else one for one in symmetry.groups))
            with pytest.raises(FastarError, match="changes its outputs"):
                verify_symmetry(model, wrong, (example,))


def test_a_grouped_convolution_moves_as_when_it_is_written_out() -> None:
    model, symmetry, _ = grouped()
    state, permutations = random_state(model, 0), symmetry.random(3)
    sigma = permutations["groups"]
    made, read = permutations["made"].view(GROUPS, MADE) % MADE, permutations["read"].view(GROUPS, READ) % READ
    moved = symmetry.apply(permutations, state)["conv.weight"].unflatten(0, (GROUPS, MADE))
    given = state["conv.weight"].unflatten(0, (GROUPS, MADE))
    for g in range(GROUPS):
        assert torch.equal(moved[g], given[sigma[g]][made[g]][:, read[g]])


@EVERY
def test_channels_last_and_rows_of_a_store_move_alike(name: str) -> None:
    model, symmetry, _ = NETWORKS[name]()
    states, permutations = [random_state(model, seed) for seed in range(5)], symmetry.random(2, count=5)
    wanted = [symmetry.apply(permutations.select(n), state) for n, state in enumerate(states)]
    last = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in states[0].items()}
    found = symmetry.apply(permutations.select(0), last)
    assert all(torch.equal(value, wanted[0][key]) for key, value in found.items())
    rows = stacked(symmetry, states)
    symmetry.apply_rows(permutations, rows)
    assert all(torch.equal(one[n], wanted[n][key]) for key, one in rows.items() for n in range(5))


@EVERY
def test_a_shuffled_copy_comes_back_by_weights(name: str) -> None:
    model, symmetry, _ = NETWORKS[name]()
    theta, shuffles = random_state(model, 100), symmetry.random(4, count=6)
    sources = stacked(symmetry, [symmetry.apply(shuffles.select(n), theta) for n in range(6)])
    for way in ({}, {"chunk": 1}, {"chunk": 4, "restarts": 2, "perturbations": 2}):
        assert match_weights(symmetry, theta, sources, **way).permutations == shuffles.inverse(), way


@EVERY
def test_the_scores_of_a_descent_are_what_units_are_worth(name: str) -> None:
    """After any steps; where one child alone moves inside its blocks, what all of a tree say together is exact."""
    model, symmetry, _ = NETWORKS[name]()
    theta, states = random_state(model, 100), [random_state(model, seed) for seed in range(4)]
    sources = stacked(symmetry, states)
    problem, random = Problem(symmetry, theta, sources), np.random.default_rng(0)
    begun = symmetry.random(1, count=4)
    descent = Descent(
        problem, problem.part(sources, 0, 4), [begun[g.name].numpy() for g in symmetry.groups], "auto", None
    )

    def value(permutations: Permutations) -> list[float]:
        moved = [symmetry.apply(permutations.select(n), state) for n, state in enumerate(states)]
        return [objective(symmetry, theta, state) for state in moved]

    for trial in range(12):
        for t, tree in enumerate(problem.trees):
            scores = [descent.score(g).double().numpy() for g in tree]
            moving = tree[1:][trial % (len(tree) - 1)] if len(tree) > 1 else -1
            sigma = random.permutation(symmetry.groups[tree[0]].size)
            answers = [sigma]
            for g in tree[1:]:
                size = symmetry.groups[g].size // len(sigma)
                tau = [random.permutation(size) if g == moving else np.arange(size) for _ in sigma]
                answers.append((sigma[:, None] * size + np.stack(tau)).reshape(-1))
            said = sum(
                s[:, np.arange(len(a)), a].sum(1) - np.trace(s, 0, 1, 2) for s, a in zip(scores, answers, strict=True)
            )
            now = {
                g.name: torch.from_numpy(i.copy()) for g, i in zip(symmetry.groups, descent.permutations, strict=True)
            }
            before = value(Permutations(now))
            step = tuple(np.tile(a, (4, 1)) for a in answers)
            counted = descent.sources.gains(t, descent.everyone, step)[0]
            some = np.flatnonzero(random.random(4) < 0.7)  # others stay, so that tables lag behind differently
            if len(some):
                descent.note(t, some, tuple(one[some] for one in step))
            now |= {
                symmetry.groups[g].name: now[symmetry.groups[g].name][:, a] for g, a in zip(tree, answers, strict=True)
            }
            gains = np.array(value(Permutations(now))) - before
            np.testing.assert_allclose(counted, gains, atol=1e-4)
            np.testing.assert_allclose(said, gains, atol=1e-4)


@EVERY
def test_of_other_networks_the_objective_rises(name: str) -> None:
    model, symmetry, _ = NETWORKS[name]()
    theta, states = random_state(model, 100), [random_state(model, seed) for seed in range(4)]
    sources = stacked(symmetry, states)
    result = match_weights(symmetry, theta, sources)
    assert bool(result.converged.all())
    assert match_weights(symmetry, theta, sources, chunk=1).permutations == result.permutations
    for n, state in enumerate(states):
        permuted = symmetry.apply(result.permutations.select(n), state)
        assert float(result.objective[n]) == pytest.approx(objective(symmetry, theta, permuted), rel=1e-6)
        assert float(result.objective[n]) > objective(symmetry, theta, state)
        for t in range(len(symmetry.trees)):  # no exchange of two units by itself is better
            for moved in exchanges(symmetry, t):
                other = symmetry.apply(result.permutations.select(n).then(moved), state)
                assert objective(symmetry, theta, other) <= float(result.objective[n]) + 1e-4


def exchanges(symmetry: Symmetry, t: int) -> list[Permutations]:
    """All exchanges of two units of one child inside a block."""
    found = []
    for g in symmetry.trees[t][1:]:
        group = symmetry.groups[g]
        size = group.size // symmetry.blocks[group.name]
        for first in range(group.size):
            for other in range(first + 1, (first // size + 1) * size):
                index = torch.arange(group.size)
                index[[first, other]] = index[[other, first]]
                found.append(Permutations({**symmetry.identity(), group.name: index}))
    return found


def test_what_is_not_observed_stays_inside_its_blocks() -> None:
    """Heads of which each query is seen for units that move too, in another way in each block: those are held."""
    model, symmetry, example = shared_keys(turned=False)
    theta, shuffles = random_state(model, 100), symmetry.random(4, count=2)
    sources = stacked(symmetry, [symmetry.apply(shuffles.select(n), theta) for n in range(2)])
    inputs = torch.randn(256, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    examples = Examples(model, [(inputs, None)])
    result = match(MatchingSettings(method="activation"), symmetry, theta, sources, examples=lambda: examples)
    assert result.left == ("repeated",)
    symmetry.check(result.permutations)
    wanted = shuffles.inverse()
    for group in ("stream", "heads", "value", "inside"):
        assert torch.equal(result.permutations[group], wanted[group])
    inside = result.permutations["repeated"] % 2
    assert torch.equal(inside, torch.arange(2).repeat(3).expand(2, -1))


def test_values_are_seen_along_pairs_of_axes() -> None:
    model, symmetry, example = grouped()
    state = random_state(model, 0)
    x = torch.randn(8, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    seen: dict[Any, Tensor] = {}
    with (
        torch.no_grad(),
        Observer(
            {id(tensor): name for name, tensor in state.items()},
            lambda name, axis, kind, values: seen.update({(name, axis, kind): values}),
            symmetry.arranged,
            symmetry.within,
        ),
    ):
        torch.func.functional_call(model.eval(), state, (x,))
        stem = F.conv2d(x, state["stem.weight"], state["stem.bias"])
        read = torch.tanh(
            F.batch_norm(stem, *(state[f"norm.{n}"] for n in ("running_mean", "running_var", "weight", "bias")))
        )
        made = F.conv2d(read, state["conv.weight"], state["conv.bias"], groups=GROUPS)
    torch.testing.assert_close(seen["conv.weight", (0, 2), "read"], read.movedim(1, -1))
    torch.testing.assert_close(seen["conv.weight", (0, 1), "made"], made.movedim(1, -1))


def test_the_part_of_an_axis_that_is_seen_leaves_the_rest_as_samples() -> None:
    model, symmetry, _ = shared_keys()
    (state, values) = random_state(model, 0), torch.randn(2, 7, 24)
    seen: dict[Any, Tensor] = {}
    names = {id(tensor): name for name, tensor in state.items()}
    with Observer(names, lambda n, axis, k, v: seen.update({axis: v}), symmetry.arranged, symmetry.within):
        F.linear(values, state["project.weight"])
    apart_ = values.unflatten(-1, (3, 2, INSIDE))
    assert torch.equal(seen[1, 2], apart_.movedim(-1, -3).flatten(-2))
    assert torch.equal(seen[1, 3], apart_.movedim(-2, -3).flatten(-2))


def test_rows_and_columns_of_an_axis_both_move() -> None:
    model, symmetry, _ = hyper()
    state, permutations = random_state(model, 0), symmetry.random(3)
    moved = symmetry.apply(permutations, state)["make.bias"].view(ROWS, COLUMNS)
    given = state["make.bias"].view(ROWS, COLUMNS)
    assert torch.equal(moved, given[permutations["rows"]][:, permutations["columns"]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, m: (replace(g, parent=None), m), "'made': its member .* lies within axis 0, but it has no parent"),
        (lambda g, m: (g, replace(m, within=1)), r"within axis 1: its parent 'groups' must have a member there"),
        (
            lambda g, m: (g, replace(m, within=7)),
            r"within axis 7: .* whose 3 units are the whole axis; what is read is",
        ),
        (lambda g, m: (g, replace(m, within=2)), r"within axis 2: .* what is read is \[3, 5, 4, 3, 3\]"),
    ],
)
def test_members_that_cannot_lie_so_are_refused(change: Any, message: str) -> None:
    symmetry = grouped()[1]
    group = symmetry.group("made")
    changed, member = change(group, group.members[0])
    changed = replace(changed, members=(member, *group.members[1:]))
    with pytest.raises(FastarError, match=message) as why:
        replace(symmetry, groups=(*symmetry.groups[:2], changed))
    assert "\n" not in str(why.value)
    with pytest.raises(FastarError, match="must have a member there"):
        replace(symmetry, groups=(replace(symmetry.groups[0], members=()), *symmetry.groups[1:]))
    with pytest.raises(FastarError, match="must have a member there"):
        replace(symmetry, arranged={"conv.weight": apart(5, a0=(MADE, GROUPS))})


def test_a_grouped_convolution_that_is_transposed_shows_what_it_makes() -> None:
    weight, x, seen = torch.randn(6, 4, 2, 2), torch.randn(3, 6, 5, 5), dict[Any, Tensor]()
    names = {id(weight): "weight"}
    how = {"weight": apart(5, a0=(2, 3))}
    with Observer(names, lambda n, axis, k, v: seen.update({(axis, k): v}), how, {"weight": {(0, 1), (0, 2)}}):
        y = F.conv_transpose2d(x, weight, groups=2)
    assert torch.equal(seen[(0, 1), "read"], x.movedim(1, -1))
    assert torch.equal(seen[(0, 2), "made"], y.movedim(1, -1))
