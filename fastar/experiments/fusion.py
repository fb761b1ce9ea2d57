"""Fusion of a run's sources into one predictor: star, mean, greedy soup, ensemble, best single one (paper, table 2)."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fastar.evaluation import Endpoint
from fastar.evaluation.predictions import check_probabilities
from fastar.evaluation.uncertainty import Average, best_temperature, cooled, metrics
from fastar.experiments.baselines.student import student as ensemble_student
from fastar.experiments.baselines.swag import swag_moments
from fastar.experiments.families import Families
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.look import Look
from fastar.experiments.measure import endpoint, permuted_row, spread
from fastar.experiments.session import measuring, threads
from fastar.runtime.progress import Advance
from fastar.runtime.seeds import derive_seed

RESAMPLES = 2000


def fuse(run: FinishedRun, *, student: bool = False, swag: bool = False) -> dict[str, Any]:
    """Accuracy and NLL of each way to make one predictor of the sources, on the run's last split.

    What is chosen (the best source, the soup) is chosen on samples that are not tested on: validation samples where the
    run keeps some, else training samples. The best by the test samples is there too, as the paper has it. With
    validation samples the ensemble is also measured at the best temperature found there.

    Args:
        student: add a student of the ensemble (`fastar.experiments.baselines.student`).
        swag: add SWA (`fastar.experiments.baselines.swag`).

    Returns:
        predictors: name -> networks that a prediction takes, accuracy, nll, difference of the accuracy from the star's
        with its standard error by bootstrap over the same samples; `single`: the spread over sources; `chosen_on`.

    Raises:
        FastarError: one source alone, or a loss that is not cross-entropy.
    """
    session = run.session
    check_probabilities(session.loss)
    around, trained = Families(run), list[tuple[str, Endpoint]]()
    with threads(session):
        if student:
            trained.append(("student", endpoint(session, "student", ensemble_student(run))))
        if swag:
            trained.append(("swa", Endpoint("SWA", swag_moments(run).mean)))
    names = session.data.names()
    tested, chosen_on = names[-1], "validation" if "validation" in names else "train"
    look = Look(session, (chosen_on, tested))
    with (
        threads(session),
        measuring("fusion"),
        session.progress.task("predicting", total=2 * len(run.sources) - 1, unit="networks") as advance,
    ):
        everyone, held, single, chosen = Average(), Average(), [], []
        best: dict[str, tuple[float, np.ndarray]] = {}
        for index, found in enumerate(look(map(around.source, range(len(run.sources))))):
            p = found[tested]
            everyone.add(p)
            held.add(found[chosen_on])
            single.append(metrics(p, look.labels[tested]))
            chosen.append((look.accuracy(found, chosen_on), index))
            # The first of equals, by either split.
            for key, value in (("best", chosen[-1][0]), ("best by test", single[-1]["accuracy"])):
                if key not in best or value > best[key][0]:
                    best[key] = value, p
            advance(1)
        made = [("star", next(around.members("star", 1))), ("mean", next(around.members("mean", 1)))]
        order = [index for _, index in sorted(chosen, key=lambda one: (-one[0], one[1]))]
        soup, in_soup = _greedy_soup(run, look, chosen_on, order, advance)
        made += [("greedy soup", soup), *trained]
        networks = {name: found[tested] for (name, _), found in zip(made, look(one for _, one in made), strict=True)}
    labels, sources = look.labels[tested], len(run.sources)
    predictors = {
        "best source": (1, best["best"][1]),
        "best source by test": (1, best["best by test"][1]),
        "ensemble": (sources, everyone.mean),
        "vote": (sources, everyone.votes),
        **{name: (1, p) for name, p in networks.items()},
    }
    if chosen_on == "validation":
        temperature = best_temperature(held.mean, look.labels[chosen_on])
        predictors["ensemble at T"] = (sources, cooled(everyone.mean, temperature))
    return {
        **run.described(),
        "mu": session.settings.star.mu,
        "split": tested,
        "samples": len(labels),
        "chosen_on": chosen_on,
        "single": {key: spread([one[key] for one in single]) for key in ("accuracy", "nll")},
        "in_soup": in_soup,
        "predictors": _scored(predictors, labels, derive_seed(session.settings.seed, "fusion", "bootstrap")),
    }


def _scored(predictors: dict[str, tuple[int, np.ndarray]], labels: np.ndarray, seed: int) -> dict[str, Any]:
    """The figures of each predictor, a number of networks and its probabilities; beside the star's accuracy."""
    star, found = predictors["star"][1].argmax(1) == labels, {}
    for name, (networks, p) in predictors.items():
        of = metrics(p, labels)
        found[name] = {"networks": networks, "accuracy": of["accuracy"], **_against(p.argmax(1) == labels, star, seed)}
        if name != "vote":  # shares of votes are no probabilities
            found[name]["nll"] = of["nll"]
    return found


def _against(right: np.ndarray, star: np.ndarray, seed: int) -> dict[str, float]:
    """The difference of an accuracy from the star's, and its standard error over resampled samples (paired)."""
    difference = right.astype(float) - star
    numbers = np.random.default_rng(seed)
    means = [difference[numbers.integers(len(right), size=len(right))].mean() for _ in range(RESAMPLES)]
    return {"above_star": float(difference.mean()), "above_star_error": float(np.std(means, ddof=1))}


def _greedy_soup(
    run: FinishedRun, look: Look, chosen_on: str, order: list[int], advance: Advance
) -> tuple[Endpoint, list[int]]:
    """The mean of matched sources to which each is added, the best first, if the accuracy does not fall by it; and the
    sources in it."""

    def row(index: int) -> Tensor:
        return permuted_row(run.session, run.sources[index], run.permutations[index])

    def mean(total: Tensor, count: int) -> Endpoint:
        return Endpoint("the soup", (total / count).float())

    taken, total = [order[0]], row(order[0]).double()
    (found,) = look([mean(total, 1)])
    reached = look.accuracy(found, chosen_on)
    for index in order[1:]:
        more = total + row(index)
        (found,) = look([mean(more, len(taken) + 1)])
        accuracy = look.accuracy(found, chosen_on)
        if accuracy >= reached:
            taken, total, reached = [*taken, index], more, accuracy
        advance(1)
    return mean(total, len(taken)), taken
