"""Barriers between all pairs of a run's networks, and the networks that could be hubs of all others, compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from fastar.errors import FastarError
from fastar.evaluation import PathLosses, Segment
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.landscape.named_networks import NamedNetworks
from fastar.experiments.measure import choose, evaluated, spreads_of
from fastar.experiments.reuse import model_paths
from fastar.experiments.session import measuring, threads
from fastar.experiments.whole_run import train_star
from fastar.runs import RunFolder
from fastar.runs.model_files import Checkpoint, load_checkpoint
from fastar.runtime.seeds import derive_seed

EPS = (0.01, 0.03, 0.1, 0.3, 1.0)
ONE = "star of one"
Pairs = Mapping[tuple[str, str], PathLosses]
"""The paths between networks, by their names in either order."""


def barrier_graph(run: FinishedRun, *, models: int = 12, star_of_one: bool = False) -> dict[str, Any]:
    """Barriers and largest losses between all pairs of sources, heldouts, the star and the mean of the matched sources.
    One of each pair is permuted to match the other: as for the run's barriers, or anew.

    Args:
        models: the most sources, and the most heldouts; more are drawn from.
        star_of_one: train a star of the run's first source alone (`star_of_first_source`), and compare it as a hub.

    Returns:
        names, in the order sources, heldouts, star, mean; splits: split -> loss of each network, and matrices `barrier`
        and `largest_loss` in the order of names (null on the diagonal); below: split -> eps, and the shares of pairs
        (of regular models, of star and regular, of mean and regular) whose barriers are below each, and of regular
        models whose barriers to all other regular ones are (`stars`); hubs: star, mean, medoid (the regular model with
        the lowest mean train barrier to the others), best source (of those here, by the loss on validation data, else
        train data), star of one -> the network's name, and on each split its loss and the spreads of barriers and
        largest losses on its paths to heldouts and to sources.

    Raises:
        FastarError: models below 1, or as `star_of_first_source`.
    """
    if models < 1:
        raise FastarError(f"models={models}: give at least 1")
    session, networks = run.session, NamedNetworks(run)
    if star_of_one:
        networks.add(ONE, star_of_first_source(run))
    drawn = {
        kind: [f"{kind}:{i}" for i in choose(len(some), models, derive_seed(session.settings.seed, "graph", kind))]
        for kind, some in (("source", run.sources), ("heldout", run.heldouts))
    }
    regular = [*drawn["source"], *drawn["heldout"]]
    with threads(session), measuring("a graph"):
        measured, _ = evaluated(session, _segments(run, networks, regular, star_of_one))
    pairs = {names: path for path in measured for names in ((path.first, path.second), (path.second, path.first))}
    splits = list(measured[0].loss)
    loss = {split: _losses(measured, split) for split in splits}
    names = [*regular, "star", "mean"]
    chosen_on = "validation" if "validation" in splits else "train"
    hubs = {
        "star": "star",
        "mean": "mean",
        **({"medoid": _medoid(pairs, regular)} if len(regular) > 1 else {}),
        "best source": min(drawn["source"], key=loss[chosen_on].__getitem__),
        **({ONE: ONE} if star_of_one else {}),
    }
    return {
        **run.described(),
        "heldout": len(run.heldouts),
        "loss": session.loss.name,
        "names": names,
        "splits": {
            split: {
                "loss": [loss[split][name] for name in names],
                "barrier": _matrix(pairs, names, split, PathLosses.barrier),
                "largest_loss": _matrix(pairs, names, split, PathLosses.largest_loss),
            }
            for split in splits
        },
        "below": {split: _below(pairs, regular, split) for split in splits},
        "hubs": {
            hub: {
                "network": name,
                **{
                    split: {
                        "loss": loss[split][name],
                        **{f"{kind}s": _spokes(pairs, name, some, split) for kind, some in drawn.items()},
                    }
                    for split in splits
                },
            }
            for hub, name in hubs.items()
        },
    }


def star_of_first_source(run: FinishedRun) -> Checkpoint:
    """The star of a run's first source alone, by the run's settings, in the folder `star-of-one` in its own: a run like
    any other, with the same heldouts. Trained where it is missing.

    Raises:
        FastarError: no heldouts, or another run in that folder.
    """
    session = run.session
    settings, folder = session.settings, session.run.star_of_one
    if not run.heldouts:
        raise FastarError(f"{session.run.path}: has no heldouts that a star of one source could be measured to")
    given = {
        "number": 1,
        "folder": model_paths(settings, session.run, "source")[0].absolute(),
        "heldout_folder": (settings.sources.heldout_folder or session.run.path / "heldout").expanduser().absolute(),
    }
    one = settings.model_copy(update={"sources": settings.sources.model_copy(update=given)})
    train_star(one, folder, session.progress, given=session.given if session.runs_user_code else None)
    return load_checkpoint(RunFolder(folder).star, own=True)


def _segments(run: FinishedRun, networks: NamedNetworks, regular: Sequence[str], star_of_one: bool) -> list[Segment]:
    """Paths between all pairs, the second matched to the first: as the run's own go, which keep their permutations."""
    pairs = {name: regular[k + 1 :] for k, name in enumerate(regular)}
    pairs |= {"star": regular, "mean": ["star", *regular], **({ONE: regular} if star_of_one else {})}
    found = []
    with run.session.progress.task("matching", total=len(pairs), unit="networks") as advance:
        for first, others in pairs.items():
            end = networks.end(first)
            for other, permutation in zip(others, networks.matched(first, others), strict=True):
                found.append(Segment("path", end, networks.end(other, permutation)))
            advance(1)
    return found


def _losses(measured: Iterable[PathLosses], split: str) -> dict[str, float]:
    """The loss of each network, where it is the first of a path if it is the first of any."""
    seconds = {path.second: path.loss[split][-1] for path in measured}
    return seconds | {path.first: path.loss[split][0] for path in measured}


def _matrix(
    pairs: Pairs, names: Sequence[str], split: str, number: Callable[[PathLosses, str], float]
) -> list[list[float | None]]:
    return [[None if a == b else number(pairs[a, b], split) for b in names] for a in names]


def _medoid(pairs: Pairs, regular: Sequence[str]) -> str:
    return min(regular, key=lambda a: fmean(pairs[a, b].barrier("train") for b in regular if b != a))


def _below(pairs: Pairs, regular: Sequence[str], split: str) -> dict[str, Any]:
    """Shares of barriers below each eps."""

    def shares(values: Sequence[float]) -> list[float | None]:
        return [fmean(value < eps for value in values) if values else None for eps in EPS]

    between = {a: [pairs[a, b].barrier(split) for b in regular if b != a] for a in regular}
    return {
        "eps": list(EPS),
        "regular": shares([value for some in between.values() for value in some]),
        "star": shares([pairs["star", one].barrier(split) for one in regular]),
        "mean": shares([pairs["mean", one].barrier(split) for one in regular]),
        "stars": shares([max(some) for some in between.values() if some]),
    }


def _spokes(pairs: Pairs, hub: str, others: Sequence[str], split: str) -> dict[str, Any]:
    """Spreads over the paths between a hub and others."""
    return spreads_of([pairs[hub, one] for one in others if one != hub], split)
