"""Scores of averages over families of networks and of their uncertainty (paper, figure 4), with controls."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastar.errors import FastarError
from fastar.evaluation.predictions import Probabilities
from fastar.evaluation.uncertainty import (
    Average,
    best_temperature,
    bins,
    cooled,
    metrics,
    risk_coverage,
    spread,
)
from fastar.experiments.families import FAMILIES, SINGLE, Families
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.look import Look
from fastar.experiments.session import measuring, threads
from fastar.runtime.progress import Advance

# Probabilities of all sources are kept up to so many bytes; else each order of the ensemble makes them anew.
KEPT = 2**30
CURVE = 200  # points of a risk-coverage curve
DRAWN = ("star", "ensemble", "star domain")
"""Families whose reliability and risk are drawn."""


def uncertainty(
    run: FinishedRun,
    *,
    most: int = 19,
    repetitions: int = 10,
    families: Sequence[str] = FAMILIES,
    radius: float = 0.1,
) -> dict[str, Any]:
    """Metrics of the average of K = 1 .. `most` networks of each family, on the run's last split.

    Args:
        most: networks of an average; of the ensemble at most all sources.
        repetitions: sequences of draws of a family. Of single sources: so many sources.
        radius: of the family `ball`, as a share of the star's norm.

    Returns:
        families: name -> K (list), and each metric's mean and std over repetitions at each K; where samples are kept
        for validation also at the best temperature found there (`nll_t`, `ece_t`, `temperature`). `reliability` and
        `risk` of one repetition at the largest K; split, samples, classes.

    Raises:
        FastarError: numbers below 1, one source alone, a loss that is not cross-entropy.
    """
    for name, value in (("most", most), ("repetitions", repetitions)):
        if value < 1:
            raise FastarError(f"{name}={value}: give at least 1")
    wrong = next((name for name in families if name not in FAMILIES), None)
    if wrong is not None:
        raise FastarError(f"unknown family {wrong!r}: choose from {', '.join(FAMILIES)}")
    session = run.session
    around = Families(run, radius=radius)
    with threads(session), measuring("predictions"):
        look = _Averages(run, around)
        found, drawn = {}, {}
        counts = {name: _count(name, run, most, repetitions) for name in families}
        total = sum(k * r for k, r in counts.values())
        with session.progress.task("predicting", total=total, unit="networks") as advance:
            for name, (members, times) in counts.items():
                sequences = []
                for repetition in range(times):
                    sequence, mean = look.averages(name, members, repetition, advance)
                    sequences.append(sequence)
                    if not repetition and name in DRAWN:
                        drawn[name] = mean
                found[name] = _over_repetitions(sequences)
    labels = look.labels[look.split]
    return {
        **run.described(),
        "split": look.split,
        "samples": len(labels),
        "classes": mean.shape[1],
        "radius": radius,
        "families": found,
        "reliability": {name: _reliability(p, labels) for name, p in drawn.items()},
        "risk": {name: _risk(p, labels) for name, p in drawn.items()},
    }


def _count(family: str, run: FinishedRun, most: int, repetitions: int) -> tuple[int, int]:
    """Networks of an average of a family, and its repetitions."""
    if family in SINGLE:
        return 1, 1
    if family == "source":
        return 1, min(repetitions, len(run.sources))
    return (min(most, len(run.sources)) if family == "ensemble" else most), repetitions


class _Averages:
    """Probabilities of a run's families on its last split, and on the validation samples where there are some."""

    def __init__(self, run: FinishedRun, around: Families):
        names = run.session.data.names()
        self.split = names[-1]
        self._names = [name for name in names if name in (self.split, "validation")]
        self._around, self._look = around, Look(run.session, self._names)
        self._kept: dict[int, Probabilities] = {}
        self.labels = self._look.labels

    def averages(
        self, family: str, count: int, repetition: int, advance: Advance
    ) -> tuple[list[dict[str, float]], np.ndarray]:
        """The metrics of the averages of the first 1, 2, ... `count` networks of a repetition, and the probabilities of
        the last average."""
        averages, found = {name: Average() for name in self._names}, []
        for one in self._probabilities(family, count, repetition):
            for name, average in averages.items():
                average.add(one[name])
            found.append(self._measured(averages))
            advance(1)
        return found, averages[self.split].mean

    def _measured(self, averages: dict[str, Average]) -> dict[str, float]:
        labels, average = self.labels[self.split], averages[self.split]
        found = {**metrics(average.mean, labels), **average.diversity()}
        if "validation" in averages and self.split != "validation":
            temperature = best_temperature(averages["validation"].mean, self.labels["validation"])
            at = metrics(cooled(average.mean, temperature), labels)
            found |= {"nll_t": at["nll"], "ece_t": at["ece"], "temperature": temperature}
        return found

    def _probabilities(self, family: str, count: int, repetition: int) -> Iterator[Probabilities]:
        if family not in ("ensemble", "source"):
            yield from self._look(self._around.members(family, count, repetition))
            return
        # Each source is in every order of the ensemble: it is looked at once, where there is room for all.
        order = self._around.order(count, repetition) if family == "ensemble" else [repetition]
        missing = [index for index in order if index not in self._kept]
        made = self._look(map(self._around.source, missing))
        for index in order:
            found = self._kept[index] if index in self._kept else next(made)
            if sum(p.nbytes for one in self._kept.values() for p in one.values()) < KEPT:
                self._kept[index] = found
            yield found


def _over_repetitions(sequences: list[list[dict[str, float]]]) -> dict[str, Any]:
    """K, and each metric's mean and std over repetitions at each K."""
    at = [spread(list(here)) for here in zip(*sequences, strict=True)]
    return {
        "k": list(range(1, len(at) + 1)),
        "repetitions": len(sequences),
        **{name: {key: [here[name][key] for here in at] for key in ("mean", "std")} for name in at[0]},
    }


def _reliability(p: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    found = bins(p.max(1), p.argmax(1) == labels)
    return {name: value.tolist() for name, value in vars(found).items()}


def _risk(p: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    coverage, risk = risk_coverage(p, labels)
    some = np.unique(np.linspace(0, len(risk) - 1, CURVE).astype(int))
    return {"coverage": coverage[some].tolist(), "risk": risk[some].tolist()}
