"""Intervals by a bootstrap over networks, and fits through points, against cases known by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastar.evaluation.fits import line, power_law
from fastar.evaluation.resampling import RESAMPLES, interval, resampled_means


def heldouts(count: int) -> list[list[tuple[str, str]]]:
    return [[("heldout", str(index))] for index in range(count)]


def test_a_mean_of_independent_networks_is_resampled_as_its_multinomial_says() -> None:
    """Two networks of values 0 and 1: the resampled mean is 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
    means = resampled_means([0.0, 1.0], heldouts(2), seed=0)
    assert set(means) == {0.0, 0.5, 1.0}
    assert (means == 0.5).mean() == pytest.approx(0.5, abs=4 * 0.5 / RESAMPLES**0.5)
    assert interval(means) == [0.0, 1.0]
    values = np.random.default_rng(0).normal(size=40)
    low, high = interval(resampled_means(values.tolist(), heldouts(40), seed=0)) or (0, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 40**0.5, rel=0.08)


def test_pairs_of_few_networks_are_as_uncertain_as_the_networks() -> None:
    """Values of pairs that are the sums of their networks' own: with 8 x 8 of them, an interval over independent pairs
    would be much narrower than that of the sum of two means of 8."""
    a, b = np.random.default_rng(1).normal(size=(2, 8))
    pairs = list(itertools.product(range(8), range(8)))
    networks = [[("source", str(i)), ("heldout", str(j))] for i, j in pairs]
    low, high = interval(resampled_means([a[i] + b[j] for i, j in pairs], networks, seed=0)) or (0, 0)
    error = ((a.var() + b.var()) / 8) ** 0.5
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_a_pair_of_a_network_with_itself_counts_nothing() -> None:
    """Of two networks, one pair: it has its value wherever both are drawn, and no value elsewhere (half the draws)."""
    means = resampled_means([0.25], [[("source", "0"), ("source", "1")]], seed=3)
    assert np.isnan(means).mean() == pytest.approx(0.5, abs=0.06)
    assert set(means[np.isfinite(means)]) == {0.25}
    assert interval(np.array([np.nan])) is None


def test_the_same_networks_are_drawn_for_whatever_is_measured_of_them() -> None:
    first, second = (resampled_means(values, heldouts(3), seed=0) for values in ([1.0, 2.0, 4.0], [3.0, 4.0, 6.0]))
    np.testing.assert_allclose(second, first + 2)
    assert not np.allclose(first, resampled_means([1.0, 2.0, 4.0], heldouts(3), seed=1))


def test_a_line_is_the_least_squares_one() -> None:
    x, y = [0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 2.0, 6.0]
    wanted = np.polyfit(x, y, 1)
    exact = [(np.full(5, a), np.full(5, b)) for a, b in zip(x, y, strict=True)]
    found = line(x, y, exact)
    assert [found["slope"], found["intercept"]] == pytest.approx(wanted.tolist())
    assert found["r2"] == pytest.approx(np.corrcoef(x, y)[0, 1] ** 2)
    assert found["slope_interval"] == pytest.approx([found["slope"]] * 2)
    noisy = [(a, b + np.random.default_rng(i).normal(size=5)) for i, (a, b) in enumerate(exact)]
    again = [np.polyfit(x, [b[r] for _, b in noisy], 1)[0] for r in range(5)]
    assert line(x, y, noisy)["slope_interval"] == pytest.approx(np.percentile(again, [2.5, 97.5]).tolist())
    at, *ends = line(x, y, noisy)["band"][-1]
    heights = [np.polyval(np.polyfit(x, [b[r] for _, b in noisy], 1), at) for r in range(5)]
    assert at == max(x)
    assert ends == pytest.approx(np.percentile(heights, [2.5, 97.5]).tolist())


@pytest.mark.parametrize(
    ("x", "reason"), [([1.0, 2.0], "needs 3 points, there are 2"), ([0.5, 0.5, 0.5], "x is the same at all points")]
)
def test_where_there_is_no_line_it_says_why(x: list[float], reason: str) -> None:
    found = line(x, x, [(np.ones(2), np.ones(2))] * len(x))
    assert found.pop("reason") == reason
    assert set(found.values()) == {None}


def test_a_power_law_is_found_again() -> None:
    n = [1, 2, 5, 10, 50]
    y = [0.3 * one**-0.7 + 0.05 for one in n]
    found = power_law(n, y, [np.full(5, one) for one in y])
    assert [found[key] for key in ("a", "b", "c", "r2")] == pytest.approx([0.3, 0.7, 0.05, 1.0], rel=1e-3)
    assert found["b_interval"] == pytest.approx([0.7, 0.7], rel=1e-3)
    higher = power_law(n, y, [np.array([one, 2 * one]) for one in y])["band"]
    assert higher[0] == pytest.approx([1, 0.35 * 1.025, 0.35 * 1.975], rel=1e-3)
    assert higher[-1] == pytest.approx([50, y[-1] * 1.025, y[-1] * 1.975], rel=1e-3)


@pytest.mark.parametrize(
    ("y", "reason"),
    [
        ([3.0, 2.0, 1.0], "needs 4 points, there are 3"),
        ([1.0, 2.0, 3.0, 4.0], "it does not fall with the number of sources"),
        ([2.0, 1.0, 1.0, 1.0], "it falls between the first two points alone"),
        ([1.0, 1.0, 1.0, 1.0], "it does not fall with the number of sources"),
        ([0.0, 0.0, 0.0, 0.0], "it does not fall with the number of sources"),
    ],
)
def test_where_there_is_no_power_law_it_says_why(y: list[float], reason: str) -> None:
    found = power_law([1, 2, 4, 8][: len(y)], y, [np.full(3, one) for one in y])
    assert found.pop("reason") == reason
    assert set(found.values()) == {None}
