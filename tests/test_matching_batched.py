"""Many sources moved together: the same permutations as one by one, and as few operations for many as for few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from matching_block_models import BLOCK_MODELS
from matching_calls import match_weights
from matching_models import CASES, Mlp, derived, random_state
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastar.errors import FastarError
from fastar.matching import MatchResult
from fastar.matching import blocks as blocks_module
from fastar.matching.blocks import solve_rows, solve_tree
from fastar.matching.checks import check_networks
from fastar.matching.weight import permuted_sources as sources_module
from fastar.matching.weight.descent import Descent
from fastar.matching.weight.problem import Problem
from fastar.matching.weight.unit_products import dots
from fastar.symmetry import Symmetry, derive_symmetry
from fastar.symmetry.batched_index import Rows, along, chosen, download, put_along, upload

CPU = torch.device("cpu")
State = dict[str, Tensor]


def every_case() -> dict[str, tuple[nn.Module, Symmetry]]:
    """Plain groups, trees, and a symmetry that leaves half of its groups in place."""
    symmetries = derived()
    cases = {name: (model, symmetries[name]) for name, (model, _) in CASES.items()}
    cases |= {name: (model, symmetry) for name, (model, symmetry, _) in BLOCK_MODELS.items()}
    cases["partial"] = (CASES["resnet"][0], replace(symmetries["resnet"], groups=symmetries["resnet"].groups[::2]))
    return cases


NAMES = [*CASES, *BLOCK_MODELS, "partial"]


def problem(name: str, count: int) -> tuple[Symmetry, State, State]:
    """theta, and sources of which the first ones are aligned but for a few units, ever more of them."""
    model, symmetry = every_case()[name]
    theta, states = random_state(model, 100), [random_state(model, seed) for seed in range(count)]
    for n, state in enumerate(states[: count // 2]):
        shuffle = symmetry.random(n)
        near = {key: theta[key] + 0.2 * state[key] for key in symmetry.parameters}
        swapped = symmetry.apply(shuffle, near)
        states[n] = {key: swapped[key] if k % (n + 2) == 0 else near[key] for k, key in enumerate(near)}
    return symmetry, theta, {key: torch.stack([state[key] for state in states]) for key in symmetry.parameters}


def ways(symmetry: Symmetry, count: int) -> dict[str, dict[str, Any]]:
    return {
        "cold": {},
        "warm": {"start": symmetry.random(3, count=count)},
        "escapes": {"perturbations": 1, "start": symmetry.identity(), "begin": "backward"},
    }


def same(first: MatchResult, second: MatchResult) -> None:
    """Equal decisions; objectives to float32 rounding of their sums."""
    assert first.permutations == second.permutations
    torch.testing.assert_close(first.objective, second.objective, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(first.objective_start, second.objective_start, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(first.objective_weights, second.objective_weights, rtol=1e-6, atol=1e-5)
    assert first.sweeps.tolist() == second.sweeps.tolist()
    assert first.solves == second.solves


@pytest.mark.parametrize("name", NAMES)
def test_together_as_one_by_one(name: str) -> None:
    count = 4 if name == "resnet" else 6  # ten times as much work as any other
    symmetry, theta, sources = problem(name, count)
    for settings in ways(symmetry, count).values():
        same(
            match_weights(symmetry, theta, sources, chunk=1, **settings),
            match_weights(symmetry, theta, sources, chunk=count, **settings),
        )


class Operations(TorchDispatchMode):
    """Counts what a GPU would be given to do: not views, nor what only looks."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.waits += name in ("_local_scalar_dense", "item", "nonzero", "is_nonzero")
        self.count += not (func.is_view or name in ("detach", "lift_fresh", "empty", "_unsafe_view"))
        return out


def around_visits(monkeypatch: pytest.MonkeyPatch, around: Callable[[Descent, int, Callable[[], None]], None]) -> None:
    """Do `around(descent, tree, visit)` in the place of each visit to a tree."""
    visit = Descent._visit
    monkeypatch.setattr(Descent, "_visit", lambda self, t: around(self, t, lambda: visit(self, t)))


def operations_of_visits(
    monkeypatch: pytest.MonkeyPatch, symmetry: Symmetry, theta: State, sources: State
) -> list[tuple[int, int, int, int]]:
    """Of each visit to a tree: operations, waits, copies to the host but one for each group, parameters touched."""
    found: list[tuple[int, int, int, int]] = []
    copies = 0

    def counted(tensor: Tensor) -> Any:
        nonlocal copies
        copies += 1
        return download(tensor)

    monkeypatch.setattr(sources_module, "download", counted)
    monkeypatch.setattr(blocks_module, "download", counted)

    def record(descent: Descent, t: int, visit: Callable[[], None]) -> None:
        before = copies
        with Operations() as seen:
            visit()
        if seen.count:
            others = copies - before - len(descent.problem.trees[t])
            found.append((seen.count, seen.waits, others, len(descent.problem.touched[t])))

    around_visits(monkeypatch, record)
    count = len(next(iter(sources.values())))
    match_weights(symmetry, theta, sources, chunk=count, threads=1, start=symmetry.identity())
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("name", ["resnet", "flatten", "concatenated", "attention", "group_norm"])
def test_a_visit_takes_as_many_operations_for_many_sources_as_for_few(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per parameter at most: its rows, what it was and becomes, theta's part, a difference, two products with up to two
    groups that need a copy of either side each, two writes; twice for all but the writes where the gain is in doubt.
    Two operations for each of 24 sources would be more already."""
    for count in (3, 24):
        symmetry, theta, sources = problem(name, count)
        visits = operations_of_visits(monkeypatch, symmetry, theta, sources)
        assert len(visits) >= len(symmetry.trees)
        for operations, waits, copies, touched in visits:
            assert waits == 0
            assert copies <= 2  # the best of each row; scores that they do not settle, by group; gains in doubt
            assert operations <= 24 + 22 * touched, (count, operations, touched)


def tables(count: int, size: int, seed: int) -> Tensor:
    return torch.randn(count, size, size, generator=torch.Generator().manual_seed(seed))


def near_permutation(count: int, size: int, seed: int) -> tuple[Tensor, list[list[int]]]:
    """Scores whose rows' best are a permutation."""
    score, best = tables(count, size, seed), []
    for n in range(count):
        index = torch.randperm(size, generator=torch.Generator().manual_seed(seed + n))
        score[n, torch.arange(size), index] += 20
        best.append(index.tolist())
    return score, best


def test_sources_whose_rows_agree_are_solved_with_others() -> None:
    aligned, best = near_permutation(3, 7, 0)
    score = torch.cat([aligned[:2], tables(2, 7, 9), aligned[2:]])
    for numbers in ([0, 1, 2, 3, 4], [0, 2, 4], [3]):
        (rows,) = chosen(np.array(numbers), 5, device=CPU)
        found = solve_rows([score], [False], rows, "auto", None)
        for n, one in zip(numbers, found, strict=True):
            (expected,) = solve_tree([score[n].numpy()])
            assert one.answers[0].tolist() == expected.tolist()
            if n not in (2, 3):
                assert expected.tolist() == best[{0: 0, 1: 1, 4: 2}[n]]
            then = score[n, torch.arange(7), torch.from_numpy(expected)].double()
            now = score[n].diagonal().double()
            moved = torch.from_numpy(expected) != torch.arange(7)
            assert one.moves == bool(moved.any())
            assert one.gain == pytest.approx(float((then - now).sum()), rel=1e-12, abs=1e-12)
            assert one.scale == pytest.approx(float((then.abs() + now.abs())[moved].sum()), rel=1e-12)


@pytest.mark.parametrize("blank", [False, True])
def test_trees_whose_rows_agree(blank: bool) -> None:
    """Blocks of three units: bests that move whole blocks settle it, bests that tear one apart do not."""
    generator = torch.Generator().manual_seed(1)
    parents, children = torch.zeros(4, 4, 4), tables(4, 12, 3)
    for n in range(4):
        sigma = torch.randperm(4, generator=generator)
        inside = torch.stack([torch.randperm(3, generator=generator) for _ in range(4)])
        children[n, torch.arange(12), (sigma[:, None] * 3 + inside).flatten()] += 20
        if not blank:
            parents[n] = torch.randn(4, 4, generator=generator)
            parents[n, torch.arange(4), sigma if n != 2 else sigma.flip(0)] += 5  # source 2: parent and child disagree
    children[3, 0] = children[3, 0].roll(1) + torch.arange(12) * 3.0  # a block torn apart
    found = solve_rows([parents, children], [blank, False], Rows.every(4), "auto", None)
    for n, one in enumerate(found):
        expected = solve_tree([parents[n].numpy(), children[n].numpy()])
        assert [index.tolist() for index in one.answers] == [index.tolist() for index in expected]
        values = [
            float((table[np.arange(len(i)), i].double() - table.diagonal().double()).sum())
            for table, i in zip((parents[n], children[n]), expected, strict=True)
        ]
        assert one.gain == pytest.approx(sum(values), rel=1e-9, abs=1e-9)


def test_scores_that_are_not_finite_are_named() -> None:
    for value in (float("nan"), float("inf")):
        score, _ = near_permutation(3, 5, 0)
        score[1, 2, 3] = value
        with pytest.raises(FastarError, match=r"score\[2, 3\] of an assignment is"):
            solve_rows([score], [False], Rows.every(3), "auto", None)


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3], [1, 2], [3], [0, 2, 3]])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_positions_along_an_axis_of_some_rows(numbers: list[int], axis: int) -> None:
    x = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    length = x.shape[axis + 1]
    index = np.stack([np.random.default_rng(n).permutation(length)[:3] for n in numbers])
    rows, at = chosen(np.array(numbers), 4, index, device=CPU)
    assert rows.everything == (len(numbers) == 4)
    found = along(rows.of(x), axis, at)
    expected = torch.stack([x[n].index_select(axis, torch.from_numpy(i)) for n, i in zip(numbers, index, strict=True)])
    assert torch.equal(found, expected)
    into, whole = x.clone(), rows.of(x).clone()
    put_along(whole, axis, at, -expected)
    rows.put(into, whole)
    for n in range(4):
        want = x[n].clone()
        if n in numbers:
            want.index_copy_(axis, torch.from_numpy(index[numbers.index(n)]), -expected[numbers.index(n)])
        assert torch.equal(into[n], want)
    parts = rows.split(2)
    assert torch.equal(torch.cat([part.of(x) for _, part in parts]), rows.of(x))
    assert [part.numbers.tolist() for _, part in parts] == [numbers[at] for at, _ in parts]


def test_what_is_uploaded_comes_back() -> None:
    arrays = [np.arange(6).reshape(2, 3)[:, ::-1], np.zeros((0, 4), dtype=np.int64), np.array([7])]
    for device in [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]:
        assert [download(there).tolist() for there in upload(arrays, device)] == [a.tolist() for a in arrays]
        assert upload([], device) == []


def test_products_are_exact_whatever_training_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    symmetry, theta, sources = problem("mlp", 2)
    seen: list[str] = []

    def record(descent: Descent, t: int, visit: Callable[[], None]) -> None:
        seen.append(torch.get_float32_matmul_precision())
        visit()

    around_visits(monkeypatch, record)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        match_weights(symmetry, theta, sources, threads=1)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


# On a GPU


def on(device: str, state: State) -> State:
    """Copies there, in the same memory formats."""
    return {name: tensor.to(device).clone() for name, tensor in state.items()}


@pytest.fixture
def gpu() -> Callable[[State], State]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return lambda state: on("cuda", state)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_finds_what_the_cpu_finds(name: str, gpu: Callable[[State], State]) -> None:
    symmetry, theta, sources = problem(name, 6)
    for way, settings in ways(symmetry, 6).items():
        expected = match_weights(symmetry, theta, sources, **settings)
        for chunk in (None, 1, 6):
            found = match_weights(symmetry, gpu(theta), gpu(sources), chunk=chunk, **settings)
            same(expected, found)
        if way == "cold":
            there, here = gpu(sources), {key: tensor.clone() for key, tensor in sources.items()}
            symmetry.apply_rows(expected.permutations, there)
            symmetry.apply_rows(expected.permutations, here)
            assert all(torch.equal(there[key].cpu(), here[key]) for key in here)


@pytest.mark.gpu
def test_bad_numbers_on_a_gpu_are_named(gpu: Callable[[State], State]) -> None:
    symmetry, theta, sources = problem("resnet", 3)
    broken = {name: tensor.clone() for name, tensor in sources.items()}
    broken["layers.0.bn1.bias"][2, 1] = float("nan")
    with pytest.raises(FastarError, match=r"source 2 has NaN or infinite values in 'layers\.0\.bn1\.bias'"):
        match_weights(symmetry, gpu(theta), gpu(broken))
    large = {name: torch.full_like(tensor, 3e38, dtype=torch.float32) for name, tensor in theta.items()}  # sums are inf
    assert check_networks(symmetry, gpu(large), gpu(sources))[0] == 3


@pytest.mark.gpu
def test_matching_again_on_a_gpu_takes_as_many_operations_for_many_sources(gpu: Callable[[State], State]) -> None:
    model = Mlp(5, 12, 12, 3)
    symmetry = derive_symmetry(model, (torch.zeros(2, 5),))
    theta, counts = random_state(model, 100), []
    for count in (2, 9):
        sources = {name: theta[name] + 0.01 * torch.randn(count, *theta[name].shape) for name in symmetry.parameters}
        problem = Problem(symmetry, gpu(theta), gpu(sources))
        with Operations() as seen, torch.no_grad():
            data = problem.part(gpu(sources), 0, count)
            start = [np.tile(np.arange(group.size), (count, 1)) for group in symmetry.groups]
            descent = Descent(problem, data, start, "auto", None)
            descent.run(lambda sweep: range(len(symmetry.trees)), 10)
            descent.sources.objectives()
        assert not any(descent.unsolved.any(0))
        counts.append(seen.count)
    assert counts[0] == counts[1]


def test_dots_of_any_shape() -> None:
    """A learnable temperature has no axis."""
    for shape in ((), (3,), (2, 3)):
        theta, sources = torch.randn(shape), torch.randn(4, *shape)
        wanted = torch.stack([(theta * one).double().sum() for one in sources])
        torch.testing.assert_close(dots(theta, sources), wanted, rtol=1e-6, atol=1e-6)
