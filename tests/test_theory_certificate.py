"""The certificate without data: what is drawn, gaps under each permutation, and Q."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastar.errors import FastarError
from fastar.experiments.theory import run_certificate
from fastar.theory.certificate import PERMUTATIONS, C, draw, gaps, share_within, spiked


def networks(number: int, width: int, seed: int = 0) -> np.ndarray:
    return draw(number, width, np.random.default_rng(seed))


@pytest.mark.parametrize("width", [2, 3, 64, 1024])
def test_what_is_drawn_is_a_solution(width: int) -> None:
    drawn = np.concatenate([networks(50, width), spiked(width)[None]])
    assert drawn.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=2), 1, atol=1e-12)
    np.testing.assert_allclose((drawn[:, 0] * drawn[:, 1]).sum(axis=1), C, atol=1e-12)


def test_a_permuted_copy_has_no_gap() -> None:
    phi = networks(1, 16)
    copy = phi[:, :, np.random.default_rng(1).permutation(16)]
    for permutation in PERMUTATIONS:
        assert gaps(phi, copy, permutation)[0, 0] == pytest.approx(0, abs=1e-12)  # type: ignore[arg-type]


def test_no_permutation_brings_the_spiked_theta_near() -> None:
    # Entries of phi are at most about 0.005 at this width, and three of them make the gap's difference from 1.
    assert np.abs(gaps(networks(5, 2**20), spiked(2**20)[None], "sort") - 1).max() < 0.02
    assert gaps(networks(5, 1024), spiked(1024)[None], "exact").min() > 0.7  # a lower bound of any permutation's


def test_gaps_against_every_permutation() -> None:
    for phi, theta in zip(networks(20, 4), networks(20, 4, seed=1), strict=True):
        every = [theta[:, list(order)] for order in itertools.permutations(range(4))]
        sums = np.array([phi[0] @ one[1] + phi[1] @ one[0] for one in every])
        nearest = max(every, key=lambda one: float((phi * one).sum()))
        matched = abs(phi[0] @ nearest[1] + phi[1] @ nearest[0] - 2 * C)
        bound = max(0.0, sums.min() - 2 * C, 2 * C - sums.max())
        assert gaps(phi[None], theta[None], "matching")[0, 0] == pytest.approx(matched, abs=1e-12)
        assert gaps(phi[None], theta[None], "exact")[0, 0] == pytest.approx(bound, abs=1e-12)
        assert bound <= np.abs(sums - 2 * C).min() + 1e-12


def test_exact_is_no_larger_than_the_others() -> None:
    phi, theta = networks(10, 8), networks(10, 8, seed=1)
    least = gaps(phi, theta, "exact")
    for permutation in ("matching", "sort"):
        assert (least <= gaps(phi, theta, permutation) + 1e-12).all()  # type: ignore[arg-type]


def test_share_within_counts_by_hand() -> None:
    assert share_within(np.array([0.01, 0.02, 0.5]), np.array([0.005, 0.01, 0.1])).tolist() == [0, 1 / 3, 2 / 3]


def test_q_rises_with_eps_and_width_and_is_repeatable() -> None:
    found = run_certificate(most=256, draws=20, permutation="sort")
    q = np.array(found["q"])
    assert found["widths"] == [2, 4, 8, 16, 32, 64, 128, 256]
    assert (np.diff(q, axis=1) >= 0).all()
    assert (q[0], q[-1, -1]) == (pytest.approx(np.zeros(50)), 1)
    assert ((q > 0) & (q < 1)).any()
    assert run_certificate(most=256, draws=20, permutation="sort")["worst"] == found["worst"]
    assert run_certificate(most=256, draws=20, permutation="sort", seed=1)["worst"] != found["worst"]
    sharper = np.array(run_certificate(most=256, draws=20, permutation="sort", of="barrier")["q"])
    assert (sharper >= q).all()
    adversarial = run_certificate(most=256, draws=20, permutation="sort", adversarial=True)
    assert not np.any(adversarial["q"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"most": 0}, "--most 0: the largest width is a number from 2 to 1024"),
        ({"draws": 1}, "--draws 1: give a number from 2 to 10000"),
        ({"permutation": "best"}, "--permutation best: choose one of sort, matching, exact"),
        ({"of": "loss"}, "--of loss: choose one of gap, barrier"),
    ],
)
def test_bad_input_is_said(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(FastarError) as caught:
        run_certificate(**wrong)  # type: ignore[arg-type]
    assert str(caught.value) == words
