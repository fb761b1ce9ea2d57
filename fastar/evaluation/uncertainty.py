"""Scores of class probabilities: proper scores, calibration, and how well confidence tells right from wrong.

Functions of probabilities [n, C] and labels [n], in float64; no models. What has no value (an AUROC where all
predictions are right) is NaN. SciPy and scikit-learn are imported where they are used: that takes two seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BINS = 15
LEAST = 1e-12
"""Probabilities below it are taken for it in a logarithm, so that one wrong label of probability 0 is no infinity."""
NAMES = {
    "accuracy": "share of right predictions",
    "nll": "negative log likelihood of the labels, nats",
    "brier": "squared distance of the probabilities from the label's, summed over classes: 0 to 2",
    "ece": f"expected calibration error, {BINS} bins of equal width",
    "ece_adaptive": f"the same, {BINS} bins of equal counts",
    "gap": "mean confidence minus accuracy: above 0 is over-confident",
    "auroc": "right against wrong by confidence, exact",
    "auroc_entropy": "right against wrong by minus the entropy, exact",
    "aupr": "area under precision and recall, right predictions by confidence",
    "aupr_wrong": "the same of wrong predictions, by minus the confidence",
    "fpr_95": "share of wrong predictions that are let through where 95 % of right ones are",
    "aurc": "area under risk and coverage",
    "e_aurc": "the same, less that of the best order",
    "coverage_5": "largest share of samples that can be answered at a risk of 5 %",
    "risk_80": "risk of the most confident 80 % of samples",
    "auroc_20": "AUROC from 20 thresholds, as the paper's code has it: for comparison with it alone",
    "auroc_20_entropy": "the same by 1 - entropy, squashed batch by batch",
}
"""Metric -> what it is."""


def entropy(probabilities: Array) -> Array:
    """Entropy of each row, nats [n]; 0 log 0 is 0."""
    logs = np.log(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities))
    return -(probabilities * logs).sum(1)


def metrics(probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> dict[str, float]:
    """All metrics of `NAMES`.

    Args:
        probabilities: [n, C], each row sums to 1.
        labels: [n].
    """
    p = _normalised(probabilities)
    confidence, right = p.max(1), p.argmax(1) == labels
    uncertainty = entropy(p)
    risk = np.cumsum(~right[np.argsort(-confidence, kind="stable")]) / np.arange(1, len(p) + 1)
    answered = np.flatnonzero(risk <= 0.05)
    aurc = float(risk.mean())
    found = {
        **main_metrics(p, labels),
        "ece_adaptive": ece(confidence, right, adaptive=True),
        "auroc_entropy": auroc(-uncertainty, right),
        "aupr": aupr(confidence, right),
        "aupr_wrong": aupr(-confidence, ~right),
        "fpr_95": fpr_95(confidence, right),
        "aurc": aurc,
        "e_aurc": aurc - _best_aurc(right),
        "coverage_5": float(answered[-1] + 1) / len(p) if len(answered) else 0.0,
        "risk_80": float(risk[max(int(0.8 * len(p)) - 1, 0)]),
        "auroc_20": auroc_20(confidence, right),
        "auroc_20_entropy": auroc_20(squashed(1 - uncertainty), right),
    }
    return {name: found[name] for name in NAMES}


def main_metrics(probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> dict[str, float]:
    """Accuracy, NLL, Brier score, ECE, gap and AUROC: those of `metrics` that are taken many times."""
    p = _normalised(probabilities)
    confidence, right = p.max(1), p.argmax(1) == labels
    of_label, accuracy = p[np.arange(len(p)), labels], float(right.mean())
    return {
        "accuracy": accuracy,
        "nll": float(-np.log(np.maximum(of_label, LEAST)).mean()),
        "brier": float((np.square(p).sum(1) - 2 * of_label + 1).mean()),
        "ece": ece(confidence, right),
        "gap": float(confidence.mean()) - accuracy,
        "auroc": auroc(confidence, right),
    }


def _normalised(probabilities: NDArray[np.floating]) -> Array:
    """The probabilities in float64, float32's rounding of their sums taken out."""
    p = probabilities.astype(np.float64)
    return p / p.sum(1, keepdims=True)


@dataclass(frozen=True)
class Bins:
    """Predictions by their confidence: mean confidence, accuracy and number of each bin."""

    confidence: Array
    accuracy: Array
    count: NDArray[np.int64]

    @property
    def ece(self) -> float:
        """Mean distance of accuracy from confidence, each bin by its share of samples."""
        return float((self.count * np.abs(self.accuracy - self.confidence)).sum() / self.count.sum())


def bins(confidence: Array, right: NDArray[np.bool_], *, adaptive: bool = False) -> Bins:
    """`BINS` bins of equal width over [0, 1], closed on the right, or of equal counts (`adaptive`).
    Empty ones have zeros."""
    if adaptive:
        place = np.empty(len(confidence), np.int64)
        place[np.argsort(confidence, kind="stable")] = np.arange(len(confidence)) * BINS // len(confidence)
    else:
        place = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    count = np.bincount(place, minlength=BINS)
    some = np.maximum(count, 1)
    sums = (np.bincount(place, weights=weights, minlength=BINS) for weights in (confidence, right.astype(np.float64)))
    means, shares = (total / some for total in sums)
    return Bins(means, shares, count)


def ece(confidence: Array, right: NDArray[np.bool_], *, adaptive: bool = False) -> float:
    """Expected calibration error of confidences [n] and what was right [n]."""
    return bins(confidence, right, adaptive=adaptive).ece


def auroc(score: Array, right: NDArray[np.bool_]) -> float:
    """Exact area under the ROC curve of `score` [n] for what is right [n], ties half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(right, score)) if 0 < right.sum() < len(right) else float("nan")


def auroc_20(score: Array, right: NDArray[np.bool_]) -> float:
    """The area as the paper's code takes it (torchmetrics 1.3.1, 20 thresholds): a score counts as positive from
    thresholds 0, 1/19, ... 1 on, trapezoids between these points, and the curve is not closed at (0, 0).

    It moves where all scores move alike, which leaves every ranking as it is: no measure of ranking.
    """
    if not 0 < right.sum() < len(right):
        return float("nan")
    positive = score.astype(np.float32)[None] >= np.linspace(0, 1, 20, dtype=np.float32)[:, None]
    hits, alarms = positive[:, right].mean(1), positive[:, ~right].mean(1)
    return float((np.diff(alarms[::-1]) * (hits[::-1][1:] + hits[::-1][:-1]) / 2).sum())


def squashed(score: Array, batch: int = 100) -> Array:
    """The scores as torchmetrics reads them: each batch of 100 in which one lies outside [0, 1] is taken for logits."""
    parts = [score[start : start + batch] for start in range(0, len(score), batch)]
    return np.concatenate([part if ((part >= 0) & (part <= 1)).all() else 1 / (1 + np.exp(-part)) for part in parts])


def risk_coverage(probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> tuple[Array, Array]:
    """Coverage [n], and the share of wrong predictions among so many most confident ones [n]."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    counts = np.arange(1, len(right) + 1)
    return counts / len(right), np.cumsum(~right[np.argsort(-confidence, kind="stable")]) / counts


def cooled(probabilities: NDArray[np.floating], temperature: float) -> Array:
    """The probabilities at a temperature: log p over it, and normalised again. Above 1 is less confident."""
    logits = np.log(np.maximum(probabilities.astype(np.float64), LEAST)) / temperature
    logits -= logits.max(1, keepdims=True)
    weights = np.exp(logits)
    return weights / weights.sum(1, keepdims=True)


def best_temperature(probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """The temperature between 1/20 and 20 of the lowest negative log likelihood, on samples that are not tested on."""

    def nll(log_temperature: float) -> float:
        p = cooled(probabilities, float(np.exp(log_temperature)))
        return float(-np.log(np.maximum(p[np.arange(len(p)), labels], LEAST)).mean())

    from scipy.optimize import minimize_scalar

    found = minimize_scalar(nll, bounds=(-np.log(20), np.log(20)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


class Average:
    """The mean probabilities of networks so far, and how much these differ; holds no network's own."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, probabilities: NDArray[np.floating]) -> None:
        """Add a network's probabilities [n, C]."""
        p = probabilities.astype(np.float64)
        if not self.count:
            self._sum, self._entropy = np.zeros_like(p), np.zeros(len(p))
            self._votes = np.zeros(p.shape, np.int32)
        self.count += 1
        self._sum += p
        self._entropy += entropy(p)
        self._votes[np.arange(len(p)), p.argmax(1)] += 1

    @property
    def mean(self) -> Array:
        """Mean probabilities [n, C]."""
        mean: Array = self._sum / self.count
        return mean

    @property
    def votes(self) -> Array:
        """The share of networks that predict each class [n, C]."""
        return self._votes / self.count

    @property
    def information(self) -> Array:
        """The mutual information of prediction and network for each sample [n]: the entropy of the mean less the mean
        entropy, nats."""
        return entropy(self.mean) - self._entropy / self.count

    def diversity(self) -> dict[str, float]:
        """Mean share of pairs of networks that predict another class, and the mean of `information`."""
        k, votes = self.count, self._votes.astype(np.float64)
        alike = float((votes * (votes - 1)).sum(1).mean()) / (k * (k - 1)) if k > 1 else 1.0
        return {
            "disagreement": 1 - alike,
            "mutual_information": float(self.information.mean()),
        }


def spread(values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation (null: of one) of each metric over repetitions; null where one has none."""
    found: dict[str, dict[str, float | None]] = {}
    for name in values[0]:
        numbers = np.array([one[name] for one in values])
        known = bool(np.isfinite(numbers).all())
        std = float(numbers.std(ddof=1)) if known and len(numbers) > 1 else None
        found[name] = {"mean": float(numbers.mean()) if known else None, "std": std}
    return found


def aupr(score: Array, wanted: NDArray[np.bool_]) -> float:
    """Area under precision and recall (average precision) of `score` [n] for what is wanted [n]."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(wanted, score)) if 0 < wanted.sum() < len(wanted) else float("nan")


def fpr_95(score: Array, right: NDArray[np.bool_]) -> float:
    """The least share of the others that `score` [n] lets through where it lets 95 % of those that are right [n]."""
    if not 0 < right.sum() < len(right):
        return float("nan")
    from sklearn.metrics import roc_curve

    alarms, hits, _ = roc_curve(right, score, drop_intermediate=False)
    return float(alarms[hits >= 0.95][0])


def _best_aurc(right: NDArray[np.bool_]) -> float:
    """The area where all right predictions come first."""
    wrong, n = int((~right).sum()), len(right)
    return float((np.arange(1, wrong + 1) / np.arange(n - wrong + 1, n + 1)).sum() / n)
