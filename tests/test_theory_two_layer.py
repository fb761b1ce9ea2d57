"""Two-layer networks: gradients, matching, barriers and shares, each against a plain way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fastar.errors import FastarError
from fastar.experiments.theory import run_two_layer
from fastar.theory import two_layer

POINTS, SIGNS = two_layer.draw_points(np.random.default_rng(0))
ACTIVATIONS: tuple[two_layer.Activation, ...] = ("linear", "elu")


def networks(number: int, width: int) -> np.ndarray:
    return two_layer.draw_networks(number, width, np.random.default_rng(width)) * 3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loss_and_gradient_are_those_of_pytorch(activation: two_layer.Activation) -> None:
    units = torch.tensor(networks(3, 5), requires_grad=True)
    hidden = units[..., :2] @ torch.tensor(POINTS).T
    hidden = torch.nn.functional.elu(hidden) if activation == "elu" else hidden
    logits = (units[..., 2:] * hidden).sum(dim=1)
    targets = torch.tensor(SIGNS > 0).double().expand(3, -1)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
    losses.sum().backward()
    plain = units.detach().numpy()
    np.testing.assert_allclose(
        two_layer.loss(two_layer.outputs(plain, POINTS, activation), SIGNS), losses.detach(), rtol=1e-12
    )
    np.testing.assert_allclose(two_layer.gradient(plain, POINTS, SIGNS, activation), units.grad, rtol=1e-9, atol=1e-15)


def test_the_effective_vector_is_the_forward_pass_at_every_t() -> None:
    first, *others = networks(4, 8)
    losses = two_layer.path_losses(first, np.stack(others), POINTS, SIGNS, "linear")
    for t, row in zip(two_layer.T, losses, strict=True):
        for other, found in zip(others, row, strict=True):
            mixed = (1 - t) * first + t * other
            logits = (mixed[:, 2] @ (mixed[:, :2] @ POINTS.T))[None]
            assert found == pytest.approx(float(two_layer.loss(logits, SIGNS)[0]), rel=1e-12)


def test_matching_is_the_best_of_all_permutations() -> None:
    units = networks(6, 4)
    for first, second in itertools.pairwise(units):
        found = (first * second[two_layer.match(first, second)]).sum()
        every = [(first * second[list(order)]).sum() for order in itertools.permutations(range(4))]
        assert found == pytest.approx(max(every), rel=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_permuted_copy_has_no_barrier(activation: two_layer.Activation) -> None:
    unit = networks(1, 8)[0] * 3
    copies = np.stack([np.roll(unit, by, axis=0) for by in range(8)])
    matched = two_layer.barrier_matrix(copies, POINTS, SIGNS, activation, matched=True)
    unmatched = two_layer.barrier_matrix(copies, POINTS, SIGNS, activation, matched=False)
    assert matched.max() < 1e-15
    assert unmatched.max() > 1e-3


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_way_back_has_the_same_barrier(activation: two_layer.Activation) -> None:
    units = networks(5, 4)
    there, back = (
        two_layer.barrier_matrix(one, POINTS, SIGNS, activation, matched=True) for one in (units, units[::-1])
    )
    np.testing.assert_allclose(there, back[::-1, ::-1], rtol=1e-9, atol=1e-15)


def test_barriers_and_shares_by_hand() -> None:
    losses = np.linspace(1.0, 3.0, 11)[:, None] + np.zeros((11, 2))
    losses[4, 0] += 0.5
    losses[6, 1] -= 0.5
    np.testing.assert_allclose(two_layer.barriers(losses), [0.5, 0.0], atol=1e-15)
    matrix = np.array([[0.0, 0.1, 0.1], [0.1, 0.0, 0.3], [0.1, 0.3, 0.0]])
    assert two_layer.star_share(matrix, np.array([0.1, 0.2, 0.4])).tolist() == [0, 1 / 3, 1]  # below, strictly


@pytest.fixture(scope="module")
def linear() -> dict[str, object]:
    return run_two_layer("linear", draws=30)


def test_shares_rise_with_eps_and_width(linear: dict[str, list[list[float]]]) -> None:
    share, unmatched = np.array(linear["share"]), np.array(linear["unmatched"])
    assert linear["widths"] == [2, 4, 8, 32]
    assert (np.diff(share, axis=1) >= 0).all()
    assert share[-1].mean() > share[0].mean()
    assert share[-1].tolist() == [1, 1, 1, 1]
    assert (unmatched[-1] <= share[-1]).all()
    assert unmatched[-1, 0] < share[-1, 0]
    assert np.max(linear["loss"]) < 1e-5


def test_a_star_is_better_connected_than_most_networks(linear: dict[str, list]) -> None:
    for star, worst in zip(linear["star"], linear["worst"], strict=True):
        assert star["sources"] < max(1e-2, float(np.median(worst)))
        assert star["loss"] < 1e-2


def test_float32_is_refused() -> None:
    with pytest.raises(AssertionError, match="float32"):
        two_layer.loss(np.zeros((1, 60), dtype=np.float32), SIGNS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"activation": "relu"}, "relu: choose one of linear, elu"),
        ({"activation": "linear", "most": 0}, "--most 0: the largest width is a number from 2 to 1024"),
        ({"activation": "elu", "draws": 1}, "--draws 1: give a number from 2 to 10000"),
    ],
)
def test_bad_input_is_said(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(FastarError) as caught:
        run_two_layer(**wrong)  # type: ignore[arg-type]
    assert str(caught.value) == words
