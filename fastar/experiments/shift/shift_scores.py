"""Scores of averages on other images: what corruptions cost, and how well images of no class are told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastar.data.corruptions import CORRUPTIONS, SEVERITIES
from fastar.evaluation.uncertainty import Array, Average, aupr, auroc, cooled, entropy, fpr_95, main_metrics, spread

CORRUPTED = ("source", "ensemble", "star", "star domain", "swa", "swag")
"""Families that look at corrupted images: the others are controls of the star domain."""


class CorruptionScores:
    """Metrics of families on corrupted images, repetition by repetition.

    Args:
        clean: the split of the images before corruption.
        labels: of them.
    """

    def __init__(self, clean: str, labels: Mapping[str, np.ndarray]):
        self._clean, self._labels = clean, labels
        self._of: dict[str, list[dict[str, dict[str, float]]]] = {}

    def add(self, family: str, averages: Mapping[str, Average], temperature: float | None = None) -> None:
        """Take the averages of a repetition, each on its split; at a temperature, where one is given."""
        found = {}
        for name in (self._clean, *(_split(kind, s) for kind in CORRUPTIONS for s in range(1, SEVERITIES + 1))):
            p = averages[name].mean
            found[name] = main_metrics(p if temperature is None else cooled(p, temperature), self._labels[self._clean])
        self._of.setdefault(family, []).append(found)

    def results(self) -> dict[str, Any]:
        """Spreads over repetitions at severities 0 (clean images) to 5: `mean` over all kinds, and of each kind."""
        return {
            "kinds": CORRUPTIONS,
            "severities": list(range(SEVERITIES + 1)),
            "families": {
                family: {
                    "repetitions": len(repetitions),
                    "mean": self._over(repetitions, list(CORRUPTIONS)),
                    "kinds": {kind: self._over(repetitions, [kind]) for kind in CORRUPTIONS},
                }
                for family, repetitions in self._of.items()
            },
        }

    def _over(self, repetitions: Sequence[Mapping[str, Mapping[str, float]]], kinds: list[str]) -> dict[str, Any]:
        """Metric -> mean and std over repetitions at each severity, of its mean over kinds."""
        at, metrics = [], repetitions[0][self._clean]
        for severity in range(SEVERITIES + 1):
            names = [_split(kind, severity) if severity else self._clean for kind in kinds]
            means = [{key: float(np.mean([one[n][key] for n in names])) for key in metrics} for one in repetitions]
            at.append(spread(means))
        return {metric: {key: [here[metric][key] for here in at] for key in ("mean", "std")} for metric in metrics}


def _split(kind: str, severity: int) -> str:
    return f"{kind} {severity}"


class OtherScores:
    """How well families tell images of no class from their own test images, repetition by repetition.

    Args:
        known: the split of the run's own images.
        names: of the splits of other images.
    """

    def __init__(self, known: str, names: Sequence[str]):
        self._known, self._names = known, names
        self._of: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in names}
        self._sizes: dict[str, int] = {}

    def add(self, family: str, averages: Mapping[str, Average]) -> None:
        """Take the averages of a repetition, each on its split."""
        known = _scores(averages[self._known])
        for name in self._names:
            other, found = _scores(averages[name]), dict[str, float]()
            for kind, values in known.items():
                score = np.concatenate([values, other[kind]])
                strange = np.arange(len(score)) >= len(values)
                found |= {f"{kind} auroc": auroc(score, strange), f"{kind} aupr": aupr(score, strange)}
                found[f"{kind} fpr_95"] = fpr_95(score, strange)
            self._sizes[name] = len(other["confidence"])
            self._of[name].setdefault(family, []).append(found)

    def results(self) -> dict[str, Any]:
        """Name -> samples, and for each family and score the spread over repetitions of three metrics."""
        return {
            name: {"samples": self._sizes[name], "families": {key: _spreads(of) for key, of in families.items()}}
            for name, families in self._of.items()
        }


def _scores(average: Average) -> dict[str, Array]:
    """How strange each sample is to an average; the mutual information is 0 for one network."""
    p = average.mean
    found = {"confidence": 1 - p.max(1), "entropy": entropy(p)}
    return found if average.count == 1 else {**found, "mutual information": average.information}


def _spreads(repetitions: list[dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {"repetitions": len(repetitions)}
    for name, of in spread(repetitions).items():
        score, _, metric = name.rpartition(" ")
        found.setdefault(score, {})[metric] = of
    return found
