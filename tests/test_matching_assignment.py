"""The guarded assignment solver: right on everything it accepts, refusing the rest before lapjv sees it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from fastar.errors import FastarError
from fastar.matching import assignment, solve_assignment, solver_name

SOLVERS = ["scipy", "lapjv"] if assignment._lapjv() is not None else ["scipy"]


def tables(n: int) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(n)
    noise = random.normal(size=(n, n))
    return {
        "noise": noise,
        "float32": noise.astype(np.float32),
        "nearly aligned": 3 * np.eye(n)[random.permutation(n)] + 0.1 * noise,
        "products": np.outer(random.normal(size=n), random.normal(size=n)) + 0.01 * noise,
        "ties": (noise > 0).astype(float),
        "all equal": np.full((n, n), 4.5),
        "integers": random.integers(-5, 5, (n, n)),
        "tiny": noise * 1e-30,
        "huge": noise * 1e30,
    }


@pytest.mark.quick
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n", [1, 2, 3, 17, 64])
def test_the_total_is_the_optimum(n: int, solver: Any) -> None:
    for name, positive in tables(n).items():
        for table in (positive, -positive):
            out = solve_assignment(table, solver=solver)
            assert out.dtype == np.int64
            assert sorted(out.tolist()) == list(range(n)), name
            exact = table.astype(np.float64)
            rows, columns = linear_sum_assignment(exact, maximize=True)
            spread = exact.max() - exact.min()
            # lapjv works in float32: 2**-22 of the spread per row is what its guard admits.
            assert abs(exact[rows, columns].sum() - exact[rows, out].sum()) <= n * 2.0**-22 * spread, name


@pytest.mark.quick
@pytest.mark.parametrize("solver", SOLVERS)
def test_brute_force(solver: Any) -> None:
    random = np.random.default_rng(0)
    for n in (2, 3, 4, 5):
        for _ in range(20):
            table = random.normal(size=(n, n))
            best = max(table[range(n), list(p)].sum() for p in itertools.permutations(range(n)))
            out = solve_assignment(torch.from_numpy(table), solver=solver)
            # Random totals differ by far more than this.
            assert table[range(n), out].sum() == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_large_offset_does_not_hide_the_optimum(solver: Any) -> None:
    """Offsets of 1e6 leave float32 no digits for differences of 0.01: lapjv alone answers wrongly here."""
    random = np.random.default_rng(1)
    table = 0.01 * random.normal(size=(60, 60))
    for offset in (1e6, 1e6 * random.random((60, 1)), 1e6 * random.random((1, 60))):
        best = linear_sum_assignment(table, maximize=True)[1]
        out = solve_assignment(table + offset, solver=solver)
        assert table[range(60), out].sum() == pytest.approx(table[range(60), best].sum(), abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("solver", SOLVERS)
def test_values_that_are_not_finite_are_refused(bad: float, solver: Any) -> None:
    for where in ((2, 3), (2, slice(None)), (slice(None), slice(None))):
        table = np.zeros((5, 5))
        table[where] = bad
        with pytest.raises(FastarError, match=r"score\[[02], [03]\]"):
            solve_assignment(table, solver=solver)
    with pytest.raises(FastarError, match="finite"):
        solve_assignment(np.full((1, 1), bad), solver=solver)


def test_shapes_and_names() -> None:
    assert solve_assignment(np.zeros((0, 0))).shape == (0,)
    with pytest.raises(FastarError, match=r"\[2, 3\]"):
        solve_assignment(np.zeros((2, 3)))
    with pytest.raises(FastarError, match="auto, lapjv, scipy"):
        solve_assignment(np.zeros((2, 2)), solver="hungarian")  # type: ignore[arg-type]
    assert solver_name("scipy").startswith("scipy ")
    assert solver_name().split()[0] in ("lapjv", "scipy")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Gives another package lapjv to import; None: it is not installed."""

    def put(package: Any) -> None:
        monkeypatch.setitem(sys.modules, "lapjv", package)
        assignment._lapjv.cache_clear()

    yield put
    assignment._lapjv.cache_clear()


@pytest.mark.parametrize(
    "answer",
    [
        lambda cost: (np.zeros(len(cost), int), None, (0, np.zeros(len(cost)), np.zeros(len(cost)))),  # no bijection
        lambda cost: (np.arange(len(cost)), None, (0, np.zeros(len(cost)), np.zeros(len(cost)))),  # not optimal
        lambda cost: (np.arange(len(cost)), None, (0, *[np.full(len(cost), np.nan)] * 2)),  # no proof
    ],
)
def test_a_wrong_answer_of_lapjv_is_caught(answer: Any, library: Callable[[Any], None]) -> None:
    table = np.random.default_rng(2).normal(size=(30, 30))
    library(SimpleNamespace(lapjv=lambda cost, force_doubles: answer(cost)))
    assert (solve_assignment(table) == linear_sum_assignment(table, maximize=True)[1]).all()


def test_without_lapjv_scipy_solves(library: Callable[[Any], None]) -> None:
    table = np.random.default_rng(3).normal(size=(30, 30))
    expected = solve_assignment(table)
    library(None)
    assert (solve_assignment(table) == expected).all()
    assert solver_name().startswith("scipy ")
    with pytest.raises(FastarError, match="not installed"):
        solve_assignment(table, solver="lapjv")


def test_several_threads_get_what_one_gets() -> None:
    many = [np.random.default_rng(seed).normal(size=(80, 80)) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(solve_assignment, many))
    assert all((a == solve_assignment(b)).all() for a, b in zip(together, many, strict=True))


def test_duals_of_other_scores_do_no_harm() -> None:
    generator = np.random.default_rng(0)
    table = generator.standard_normal((64, 64)).astype(np.float32)
    best = table[np.arange(64), solve_assignment(table, solver="scipy")].sum()
    for size in (1e-3, 1.0, 1e6, np.inf):
        duals = (generator.standard_normal(64) * size).astype(np.float32)
        answer, _ = assignment.solve_again(table, duals)
        assert table[np.arange(64), answer].sum() == pytest.approx(best, rel=1e-6)
