"""Scores of averages over families of networks and of their uncertainty (paper, figure 4), with controls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fastar.errors import FastarError
from fastar.evaluation.predictions import Probabilities, check_probabilities
from fastar.evaluation.uncertainty import (
    Average,
    best_temperature,
    bins,
    cooled,
    metrics,
    risk_coverage,
    spread,
)
from fastar.experiments.baselines.swag import swag_moments
from fastar.experiments.families import FAMILIES, SINGLE, SWAG, Families
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.look import Look, Split
from fastar.experiments.session import measuring, threads
from fastar.experiments.shift.changed_images import Pixels, corrupted_splits, other_splits
from fastar.experiments.shift.shift_scores import CORRUPTED, CorruptionScores, OtherScores

# Probabilities of all sources are kept up to so many bytes; else each order of the ensemble makes them anew.
KEPT = 2**30
CURVE = 200  # points of a risk-coverage curve
COOLED = {"ensemble": "ensemble at T", "star domain": "star domain at T"}
"""Families whose averages are measured at the best temperature too, and the names of these."""
DRAWN = ("star", "ensemble", "star domain")
"""Families whose reliability and risk are drawn."""


def uncertainty(
    run: FinishedRun,
    *,
    most: int = 19,
    repetitions: int = 10,
    families: Sequence[str] = FAMILIES,
    radius: float = 0.1,
    swag: bool = False,
    corruptions: bool = False,
    ood: Sequence[str] = (),
) -> dict[str, Any]:
    """Metrics of the average of K = 1 .. `most` networks of each family, on the run's last split. Long, as one look at
    each network serves all that is asked.

    Args:
        most: networks of an average; of the ensemble at most all sources.
        repetitions: sequences of draws of a family. Of single sources: so many sources.
        radius: of the family `ball`, as a share of the star's norm.
        swag: add `swa` and `swag`, of one more training (`fastar.experiments.baselines.swag`).
        corruptions: also measure on corrupted images.
        ood: names of other data sets, or of made images, that images of the run's own are told from.

    Returns:
        families: name -> K (list), and each metric's mean and std over repetitions at each K; where samples are kept
        for validation also NLL and ECE at the best temperature found there (`nll_t`, `ece_t`, `temperature`), and all
        metrics of the averages of `COOLED` at theirs, as families of their own. `reliability` and `risk` of one
        repetition at the largest K; split, samples, classes. `corruptions` and `ood` where asked for.

    Raises:
        FastarError: numbers below 1, one source alone, a loss that is not cross-entropy; inputs that are no images.
    """
    for name, value in (("most", most), ("repetitions", repetitions)):
        if value < 1:
            raise FastarError(f"{name}={value}: give at least 1")
    families = [*families, *(SWAG if swag else ())]
    wrong = next((name for name in families if name not in (*FAMILIES, *SWAG)), None)
    if wrong is not None:
        raise FastarError(f"unknown family {wrong!r}: choose from {', '.join(FAMILIES)}")
    session, ood = run.session, list(dict.fromkeys(ood))
    check_probabilities(session.loss)
    around = Families(run, radius=radius)  # first: it refuses one source
    more: dict[str, dict[str, Split]] = {"corruptions": {}, "ood": {}}
    if corruptions or ood:
        pixels = Pixels(session)
        more["corruptions"] = corrupted_splits(session, pixels) if corruptions else {}
        more["ood"] = other_splits(session, pixels, ood)
    if swag:
        around = Families(run, radius=radius, moments=swag_moments(run))
    with threads(session), measuring("predictions"):
        look = _Averages(run, around, more["corruptions"] | more["ood"])
        shifted = CorruptionScores(look.split, look.labels) if corruptions else None
        other = OtherScores(look.split, ood) if ood else None
        sequences: dict[str, list[list[dict[str, float]]]] = {}
        drawn = {}
        counts = {name: _count(name, run, most, repetitions) for name in families}
        total = sum(k * r for k, r in counts.values())
        with session.progress.task("predicting", total=total, unit="networks") as advance:
            for name, (members, times) in counts.items():
                shift = shifted if name in CORRUPTED else None
                names = [*look.names, *(more["corruptions"] if shift is not None else ()), *more["ood"]]
                for repetition in range(times):
                    found: dict[str, list[dict[str, float]]] = {}
                    for averages in look.averages(name, members, repetition, names):
                        temperature = look.temperature(averages)
                        for family, measured in look.measured(name, averages, temperature).items():
                            found.setdefault(family, []).append(measured)
                        advance(1)
                    for family, sequence in found.items():
                        sequences.setdefault(family, []).append(sequence)
                        if shift is not None:
                            shift.add(family, averages, None if family == name else temperature)
                    if other is not None:
                        other.add(name, averages)
                    if not repetition and name in DRAWN:
                        drawn[name] = averages[look.split].mean
    labels = look.labels[look.split]
    return {
        **run.described(),
        "split": look.split,
        "samples": len(labels),
        "classes": averages[look.split].mean.shape[1],
        "radius": radius,
        "families": {name: _over_repetitions(of) for name, of in sequences.items()},
        "reliability": {name: _reliability(p, labels) for name, p in drawn.items()},
        "risk": {name: _risk(p, labels) for name, p in drawn.items()},
        **({} if shifted is None else {"corruptions": shifted.results()}),
        **({} if other is None else {"ood": other.results()}),
    }


def _count(family: str, run: FinishedRun, most: int, repetitions: int) -> tuple[int, int]:
    """Networks of an average of a family, and its repetitions."""
    if family in SINGLE:
        return 1, 1
    if family == "source":
        return 1, min(repetitions, len(run.sources))
    return (min(most, len(run.sources)) if family == "ensemble" else most), repetitions


class _Averages:
    """Probabilities of a run's families on its last split, on the validation samples where there are some, and on more
    data."""

    def __init__(self, run: FinishedRun, around: Families, more: Mapping[str, Split]):
        names = run.session.data.names()
        self.split = names[-1]
        self.names = [name for name in names if name in (self.split, "validation")]
        self._around, self._look = around, Look(run.session, self.names, more)
        self._kept: dict[int, Probabilities] = {}
        self.labels = self._look.labels

    def averages(
        self, family: str, count: int, repetition: int, names: Sequence[str]
    ) -> Iterator[Mapping[str, Average]]:
        """The averages of the first 1, 2, ... `count` networks of a repetition on the splits `names`: the same objects
        each time."""
        averages = {name: Average() for name in names}
        for one in self._probabilities(family, count, repetition, names):
            for name, average in averages.items():
                average.add(one[name])
            yield averages

    def temperature(self, averages: Mapping[str, Average]) -> float | None:
        """The best temperature by the validation samples; None: the run keeps none, or is measured on them."""
        if "validation" not in averages or self.split == "validation":
            return None
        return best_temperature(averages["validation"].mean, self.labels["validation"])

    def measured(
        self, family: str, averages: Mapping[str, Average], temperature: float | None
    ) -> dict[str, dict[str, float]]:
        """The metrics of a family's averages, and those at a temperature under their own name."""
        labels, average = self.labels[self.split], averages[self.split]
        found = {family: {**metrics(average.mean, labels), **average.diversity()}}
        if temperature is not None:
            at = metrics(cooled(average.mean, temperature), labels)
            found[family] |= {"nll_t": at["nll"], "ece_t": at["ece"], "temperature": temperature}
            if family in COOLED:
                found[COOLED[family]] = {**at, "temperature": temperature}
        return found

    def _probabilities(self, family: str, count: int, repetition: int, names: Sequence[str]) -> Iterator[Probabilities]:
        if family not in ("ensemble", "source"):
            yield from self._look(self._around.members(family, count, repetition), names)
            return
        # Each source is in every order of the ensemble: it is looked at once, where there is room for all.
        order = self._around.order(count, repetition) if family == "ensemble" else [repetition]
        missing = [index for index in order if index not in self._kept]
        made = self._look(map(self._around.source, missing), names)
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
