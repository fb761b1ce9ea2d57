"""Groups in blocks: what permutes them is consistent, keeps the function, and is found exactly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from matching_block_models import BLOCK_MODELS
from matching_calls import every_step_raises_the_objective, match_one, match_weights, objective, stacked
from matching_models import random_state
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from fastar.errors import FastarError
from fastar.matching.blocks import solve_tree
from fastar.matching.weight.descent import Descent
from fastar.matching.weight.problem import Problem
from fastar.symmetry import Group, Member, Permutations, Symmetry, verify_symmetry

State = dict[str, Tensor]


def consistent(parent: list[int], inside: list[list[int]]) -> list[int]:
    return [g * len(tau) + d for g, tau in zip(parent, inside, strict=True) for d in tau]


def all_of_tree(blocks: int, inside: int, children: int) -> Iterator[tuple[list[int], ...]]:
    """Every consistent set of indices of a parent and its children."""
    taus = [list(p) for p in itertools.permutations(range(inside))]
    within = list(itertools.product(taus, repeat=blocks))
    for sigma in itertools.permutations(range(blocks)):
        for chosen in itertools.product(within, repeat=children):
            yield list(sigma), *(consistent(list(sigma), list(one)) for one in chosen)


# The symmetry


@pytest.mark.quick
@pytest.mark.parametrize("name", list(BLOCK_MODELS))
def test_random_permutations_of_blocks_keep_the_function(name: str) -> None:
    model, symmetry, example = BLOCK_MODELS[name]
    verify_symmetry(model, symmetry, (example,))
    assert symmetry.random(0, count=3) == symmetry.random(0, count=3)
    assert not symmetry.random(1).is_identity()
    both = symmetry.random(2, count=3)
    symmetry.check(both)
    symmetry.check(both.inverse())
    symmetry.check(both.then(symmetry.random(3)))
    assert both.then(both.inverse()).is_identity()


@pytest.mark.parametrize("name", list(BLOCK_MODELS))
def test_children_without_their_parent_change_the_function(name: str) -> None:
    """The blocks are needed: units permuted across them are another function."""
    model, symmetry, example = BLOCK_MODELS[name]
    free = Symmetry(tuple(Group(g.name, g.size, g.members) for g in symmetry.groups), symmetry.parameters)
    with pytest.raises(FastarError, match="changes its outputs"):
        verify_symmetry(model, free, (example,))


def test_inconsistent_permutations_are_refused() -> None:
    symmetry = BLOCK_MODELS["attention"][1]
    good = symmetry.random(0)
    other = symmetry.random(1)
    assert not torch.equal(good["heads"], other["heads"])
    with pytest.raises(FastarError, match=r"group 'value' does not move its blocks of 4 units as its parent 'heads'"):
        symmetry.check(Permutations({**good, "value": other["value"]}))
    with pytest.raises(FastarError, match="does not move its blocks"):
        match_weights(
            symmetry,
            random_state(BLOCK_MODELS["attention"][0], 0),
            stacked(symmetry, [random_state(BLOCK_MODELS["attention"][0], 1)]),
            start=Permutations({**good, "query": torch.arange(12).roll(1)}),
        )


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((Group("a", 4, (), "b"), Group("b", 2, ())), "does not come before"),
        ((Group("a", 2, ()), Group("b", 4, (), "a"), Group("c", 8, (), "b")), "has a parent itself"),
        ((Group("a", 3, ()), Group("b", 4, (), "a")), "must divide them into 3 blocks"),
        ((Group("a", 3, ()), Group("a", 4, ())), "two groups are called 'a'"),
    ],
)
def test_blocks_that_cannot_be_are_refused(groups: tuple[Group, ...], message: str) -> None:
    with pytest.raises(FastarError, match=message):
        Symmetry(groups, {})


def test_differences_of_a_state_are_listed() -> None:
    model, symmetry, _ = BLOCK_MODELS["attention"]
    state = random_state(model, 0)
    state["stem.weigth"] = state.pop("stem.weight")
    with pytest.raises(FastarError, match=r"'stem\.weigth' where the model has 'stem\.weight'"):
        symmetry.check_state(state, "theta")
    with pytest.raises(FastarError, match=r"theta lacks .*; lacks .*; lacks .*; and 10 more differences: it is of ano"):
        symmetry.check_state({}, "theta")
    state = {**random_state(model, 0), "scale": torch.zeros(4)}
    with pytest.raises(FastarError, match=r"has 'scale' of shape \[4\] where the model's is \[3\]"):
        symmetry.check_state(state, "theta")


# The assignment of a tree


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_is_assigned_as_well_as_trying_everything(seed: int) -> None:
    random = np.random.default_rng(seed)
    blocks, inside = (3, 2) if seed % 2 else (2, 3)
    tables = [random.standard_normal((n, n)).astype(np.float32) for n in (blocks, blocks * inside, blocks * inside)]
    answers = solve_tree(tables)
    reached = sum(float(t[np.arange(len(t)), a].sum()) for t, a in zip(tables, answers, strict=True))
    assert list(map(list, answers[1:])) == [
        consistent(list(answers[0]), (index.reshape(blocks, inside) % inside).tolist()) for index in answers[1:]
    ]
    best = max(
        sum(float(t[np.arange(len(t)), a].sum()) for t, a in zip(tables, every, strict=True))
        for every in all_of_tree(blocks, inside, 2)
    )
    assert reached == pytest.approx(best, rel=1e-5)  # float32 sums of a dozen terms


@pytest.mark.parametrize(
    ("blocks", "inside", "noise"), [(6, 5, 1.0), (6, 5, 0.3), (12, 7, 1.0), (1, 9, 1.0), (9, 1, 1.0)]
)
def test_bounds_cost_no_optimum(blocks: int, inside: int, noise: float) -> None:
    """Blocks too large to try: against solving every pair of blocks with SciPy, in float64."""
    random = np.random.default_rng(blocks)
    tables = [(noise * random.standard_normal((n, n))) for n in (blocks, blocks * inside, blocks * inside)]
    shuffled = [np.eye(len(table))[random.permutation(len(table))] for table in tables[1:]]
    tables = [tables[0], *(table + shuffle for table, shuffle in zip(tables[1:], shuffled, strict=True))]
    total = tables[0].copy()
    for table in tables[1:]:
        for g, h in itertools.product(range(blocks), repeat=2):
            pair = table[g * inside : (g + 1) * inside, h * inside : (h + 1) * inside]
            total[g, h] += pair[linear_sum_assignment(pair, maximize=True)].sum()
    best = total[linear_sum_assignment(total, maximize=True)].sum()
    answers = solve_tree([table.astype(np.float32) for table in tables])
    reached = sum(t[np.arange(len(t)), a].sum() for t, a in zip(tables, answers, strict=True))
    assert reached == pytest.approx(best, rel=1e-5)


# The descent


@pytest.mark.quick
@pytest.mark.parametrize("name", ["attention", "group_norm"])
@pytest.mark.parametrize("way", [{}, {"perturbations": 2}, {"restarts": 3}])
def test_a_shuffled_copy_is_recovered_exactly(name: str, way: dict[str, int]) -> None:
    model, symmetry, _ = BLOCK_MODELS[name]
    theta = random_state(model, 100)
    for seed in range(3):
        shuffle = symmetry.random(seed)
        permuted, found, result = match_one(symmetry, theta, symmetry.apply(shuffle, theta), **way)  # type: ignore[arg-type]
        assert found == shuffle.inverse()
        assert all(torch.equal(permuted[n], theta[n]) for n in theta)
        assert bool(result.converged[0])


@pytest.mark.parametrize("name", ["group_norm_residual", "gated"])
def test_a_shuffled_copy_under_a_quadratic_tree_is_recovered(name: str) -> None:
    """The descent follows a slope only, so restarts may be needed; 5 restarts and perturbations suffice for these."""
    model, symmetry, _ = BLOCK_MODELS[name]
    theta = random_state(model, 100)
    for seed in range(3):
        shuffle = symmetry.random(seed)
        _, found, _ = match_one(symmetry, theta, symmetry.apply(shuffle, theta), restarts=5, perturbations=5)
        assert found == shuffle.inverse()


@pytest.mark.parametrize("name", list(BLOCK_MODELS))
def test_every_step_raises_the_objective(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, symmetry, _ = BLOCK_MODELS[name]
    theta, states = random_state(model, 100), [random_state(model, seed) for seed in range(3)]
    every_step_raises_the_objective(monkeypatch, symmetry, theta, states)


@pytest.mark.parametrize("name", list(BLOCK_MODELS))
def test_scores_kept_up_to_date_equal_fresh_ones_and_going_back_restores(name: str) -> None:
    model, symmetry, _ = BLOCK_MODELS[name]
    theta, states = random_state(model, 100), [random_state(model, seed) for seed in range(2)]
    sources = stacked(symmetry, states)
    problem = Problem(symmetry, theta, sources)
    data = problem.part(sources, 0, 2)
    descent = Descent(problem, data, [np.tile(np.arange(g.size), (2, 1)) for g in symmetry.groups], "auto", None)
    descent.run(lambda sweep: range(len(symmetry.trees)), 100)

    def check_scores() -> None:
        for g in range(len(symmetry.groups)):
            fresh = descent._full_score(g)
            # A dozen float32 corrections, each rounded to 6e-8 of the terms.
            torch.testing.assert_close(descent.score(g), fresh, rtol=1e-4, atol=1e-5 * float(fresh.abs().max()) + 1e-9)

    check_scores()
    before, mark = {n: t.clone() for n, t in descent.sources.permuted()}, descent.mark()
    random = symmetry.random(5, count=2)
    for t, tree in enumerate(symmetry.trees):
        for g in tree:
            descent.score(g)
        descent.force(t, tuple(random[symmetry.groups[g].name].numpy() for g in tree))
    check_scores()
    symmetry.check(
        Permutations({g.name: torch.from_numpy(p) for g, p in zip(symmetry.groups, descent.permutations, strict=True)})
    )
    now = {n: t.clone() for n, t in descent.sources.permuted()}
    assert all(any(not torch.equal(now[n][k], t[k]) for n, t in before.items()) for k in range(2))
    descent.go_back(mark, np.array([1]))
    assert all(torch.equal(t[0], now[n][0]) and torch.equal(t[1], before[n][1]) for n, t in descent.sources.permuted())
    check_scores()
    descent.go_back(mark, np.array([0]))
    assert all(torch.equal(t, before[n]) for n, t in descent.sources.permuted())
    check_scores()


class Tiny(nn.Module):
    """Two blocks of two units, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)


def test_tiny_networks_end_where_no_single_tree_can_improve() -> None:
    model = Tiny()
    groups: list[Group] = []
    for name, reader in (("first", "second"), ("second", "last")):
        members = (Member(f"{name}.weight", 0), Member(f"{name}.bias", 0), Member(f"{reader}.weight", 1))
        groups += [Group(f"{name}.blocks", 2, ()), Group(name, 4, members, f"{name}.blocks")]
    symmetry = Symmetry(tuple(groups), {n: tuple(p.shape) for n, p in model.named_parameters()})
    every = [{"blocks": torch.tensor(sigma), "units": torch.tensor(units)} for sigma, units in all_of_tree(2, 2, 1)]
    assert len(every) == 8
    best_found = 0
    for seed in range(4):
        theta, source = random_state(model, 50 + seed), random_state(model, seed)
        matched, found, _ = match_one(symmetry, theta, source, restarts=8, seed=seed)
        reached = objective(symmetry, theta, matched)
        totals = {}
        for p, q in itertools.product(range(8), repeat=2):
            one = {
                f"{name}{part}": every[k][key]
                for name, k in (("first", p), ("second", q))
                for part, key in ((".blocks", "blocks"), ("", "units"))
            }
            totals[p, q] = objective(symmetry, theta, symmetry.apply(Permutations(one), source))
        at = tuple(
            next(k for k in range(8) if torch.equal(every[k]["units"], found[name])) for name in ("first", "second")
        )
        assert reached == pytest.approx(totals[at], abs=1e-5)
        for k in range(8):
            assert totals[k, at[1]] <= reached + 1e-5
            assert totals[at[0], k] <= reached + 1e-5
        best_found += reached >= max(totals.values()) - 1e-5
    assert best_found >= 3


@pytest.mark.parametrize("name", list(BLOCK_MODELS))
def test_batches_and_threads_change_nothing(name: str) -> None:
    model, symmetry, _ = BLOCK_MODELS[name]
    theta, states = random_state(model, 100), [random_state(model, seed) for seed in range(4)]
    sources = stacked(symmetry, states)
    result = match_weights(symmetry, theta, sources, perturbations=1)
    for settings in ({"chunk": 2}, {"chunk": 4, "threads": 2}, {"solver": "scipy"}):
        other = match_weights(symmetry, theta, sources, perturbations=1, **settings)  # type: ignore[arg-type]
        assert result.permutations == other.permutations, settings
    symmetry.check(result.permutations)
    for n, state in enumerate(states):
        permuted = symmetry.apply(result.permutations.select(n), state)
        assert result.objective[n] == pytest.approx(objective(symmetry, theta, permuted), rel=1e-6, abs=1e-5)
