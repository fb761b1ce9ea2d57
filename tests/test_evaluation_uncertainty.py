"""Metrics of class probabilities against scikit-learn, torchmetrics where it is, and cases by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from fastar.evaluation import uncertainty as u


def drawn(n: int = 500, classes: int = 5, sharp: float = 3.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are often right, and the labels."""
    numbers = np.random.default_rng(seed)
    labels = numbers.integers(classes, size=n)
    logits = numbers.standard_normal((n, classes)) * 1.5
    logits[np.arange(n), labels] += sharp
    return u.cooled(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), 1.0), labels


def test_scores_are_scikit_learns() -> None:
    p, labels = drawn()
    found, right = u.metrics(p, labels), p.argmax(1) == labels
    assert found["nll"] == pytest.approx(log_loss(labels, p), rel=1e-12)
    assert found["brier"] == pytest.approx(np.square(p - np.eye(5)[labels]).sum(1).mean(), rel=1e-12)
    assert found["auroc"] == pytest.approx(roc_auc_score(right, p.max(1)), rel=1e-12)
    assert set(found) == set(u.NAMES)


def test_a_calibrated_forecast_has_no_calibration_error() -> None:
    confidence = np.repeat([0.25, 0.75], 4)
    right = np.array([True, False, False, False, True, True, True, False])
    assert u.ece(confidence, right) == pytest.approx(0, abs=1e-15)
    assert u.ece(confidence, ~right) == pytest.approx(0.5)


def test_calibration_error_by_hand() -> None:
    """Edges are closed on the right; a confidence of 1 has no bin of its own."""
    found = u.bins(np.array([1 / 15, 1 / 15 + 1e-9, 1.0, 1.0]), np.array([True, False, True, False]))
    assert found.count[[0, 1, 14]].tolist() == [1, 1, 2]
    assert found.ece == pytest.approx((14 / 15 + 1 / 15 + 2 * 0.5) / 4)


def test_equal_counts() -> None:
    p, labels = drawn(301)
    assert set(u.bins(p.max(1), p.argmax(1) == labels, adaptive=True).count.tolist()) == {20, 21}


def test_ties_count_half() -> None:
    assert u.auroc(np.array([0.7, 0.7]), np.array([True, False])) == 0.5
    assert math.isnan(u.auroc(np.array([0.7, 0.7]), np.array([True, True])))


@pytest.mark.quick
def test_a_temperature_moves_the_auroc_of_twenty_thresholds_and_no_other() -> None:
    """The defect of the paper's measure (section 3 of the specifications): the ranking is the same."""
    margin = 6 * (np.random.default_rng(0).standard_normal(10_000) + 1.75)  # of two classes: 96 % are right
    p = 1 / (1 + np.exp(-np.stack([margin, -margin], 1)))
    right, found = margin > 0, []
    for temperature in (1.0, 2.0, 3.0):
        confidence = u.cooled(p, temperature).max(1)
        found.append((u.auroc(confidence, right), u.auroc_20(confidence, right)))
    exact, of_20 = zip(*found, strict=True)
    assert exact[1:] == pytest.approx([exact[0]] * 2, abs=1e-4)  # the clamp of the least probabilities makes ties
    assert of_20[0] < of_20[1] - 0.05 < of_20[2] - 0.05
    assert exact[0] > of_20[0] + 0.05


def test_the_auroc_of_twenty_thresholds_is_torchmetrics() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    import torch

    p, labels = drawn(1000)
    confidence, right = p.max(1), p.argmax(1) == labels
    ours = u.auroc(confidence, right)
    exact = torchmetrics.classification.BinaryAUROC(thresholds=None)(torch.tensor(confidence), torch.tensor(right))
    assert ours == pytest.approx(float(exact), abs=1e-6)
    calibration = torchmetrics.classification.MulticlassCalibrationError(5, n_bins=15)
    assert u.ece(confidence, right) == pytest.approx(
        float(calibration(torch.tensor(p), torch.tensor(labels))), abs=1e-3
    )


def test_entropies_outside_the_unit_interval_are_squashed_batch_by_batch() -> None:
    score = np.concatenate([np.full(100, 0.5), np.full(100, -0.5)])
    assert u.squashed(score)[[0, 100]] == pytest.approx([0.5, 1 / (1 + math.exp(0.5))])


def test_selective_prediction_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    found = u.metrics(p, np.array([0, 0, 1, 0]))
    assert found["aurc"] == pytest.approx((0 + 0 + 1 / 3 + 1 / 4) / 4)
    assert found["e_aurc"] == pytest.approx(found["aurc"] - (1 / 4) / 4)
    assert found["coverage_5"] == 0.5
    assert found["risk_80"] == pytest.approx(1 / 3)
    assert found["fpr_95"] == 1


def test_a_probability_of_zero_is_no_infinity() -> None:
    found = u.metrics(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([1, 0]))
    assert found["nll"] == pytest.approx(-math.log(1e-12) / 2)
    assert u.entropy(np.array([[1.0, 0.0]])).tolist() == [0]


@pytest.mark.quick
def test_the_average_of_copies_is_the_one() -> None:
    p, labels = drawn()
    average = u.Average()
    for _ in range(4):
        average.add(p)
    one, four = u.metrics(p, labels), u.metrics(average.mean, labels)
    assert four == pytest.approx(one, rel=1e-12, abs=1e-12)
    assert average.diversity() == pytest.approx({"disagreement": 0, "mutual_information": 0}, abs=1e-12)


def test_disagreement_is_the_share_of_pairs() -> None:
    votes = [np.array([[0.9, 0.1], [0.2, 0.8]]), np.array([[0.6, 0.4], [0.7, 0.3]]), np.array([[0.8, 0.2], [0.9, 0.1]])]
    average = u.Average()
    for p in votes:
        average.add(p)
    assert average.diversity()["disagreement"] == pytest.approx((0 + 2 / 3) / 2)


def test_the_best_temperature_undoes_one() -> None:
    p, labels = drawn(3000)
    first = u.best_temperature(p, labels)
    assert u.best_temperature(u.cooled(p, 2.5), labels) == pytest.approx(first / 2.5, rel=1e-3)
