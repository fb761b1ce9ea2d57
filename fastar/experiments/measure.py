"""Barriers between the models of a run, and `results.json`."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastar.evaluation import Endpoint, Path, PathLosses, evaluate_paths, evaluate_rows
from fastar.evaluation.batch_norm import batch_norm_layers
from fastar.evaluation.ends import check_end
from fastar.experiments.regular import device_name
from fastar.experiments.session import Session
from fastar.experiments.statistics_batches import examples, statistics_batches, whole_statistics
from fastar.kernels import interpolate
from fastar.matching import match, matching_threads
from fastar.runs import versions
from fastar.runs.model_files import Checkpoint, load_into
from fastar.runtime.memory import peak_bytes, resident_models
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.seeds import derive_seed
from fastar.runtime.timing import shares
from fastar.symmetry import Permutations
from fastar.training import PART_ROWS, limited

# How many times `evaluation.bn_batches` it is compared with.
TIMES = 8
# Images that the ends of paths are run on.
CHECKED_ON = 64
KINDS = ("regular_regular", "star_heldout", "star_source", "regular_regular_unmatched")


def endpoint(session: Session, name: str, checkpoint: Checkpoint, permutation: Permutations | None = None) -> Endpoint:
    """A checkpoint as one end of a path, permuted by `permutation` if given; its row is made when it is asked for."""

    def state() -> Mapping[str, Tensor]:
        return (
            checkpoint.state if permutation is None else session.network.symmetry.apply(permutation, checkpoint.state)
        )

    def row() -> Tensor:
        return session.network.layout.flatten(state())

    own = None
    if session.settings.evaluation.batch_norm == "reference":
        found = {  # in float32, as the rows are, whatever the file holds
            name: value.to(session.device, torch.float32)
            for name, value in state().items()
            if name.endswith(("running_mean", "running_var"))
        }
        own = found or None
    return Endpoint(name, row, own)


def check_endpoint(session: Session, name: str, checkpoint: Checkpoint, permutation: Permutations | None) -> None:
    """Raise FastarError unless the network at this end of a path computes what the checkpoint's own does, on the first
    test images and with its own batch-norm statistics."""
    own, standing = session.network.build(seed=0), session.network.build(seed=0)
    load_into(own, checkpoint)
    state = checkpoint.state if permutation is None else session.network.symmetry.apply(permutation, checkpoint.state)
    images, _ = next(iter(session.data.splits()["test"]()))
    check_end(own, standing, session.network.layout, state, images[:CHECKED_ON], name)


def matched_endpoints(
    session: Session,
    first: Checkpoint,
    others: Sequence[Checkpoint],
    names: Sequence[str],
    *,
    start: Permutations | None = None,
    checked: bool = False,
    progress: Progress = SILENT,
) -> list[Endpoint]:
    """`others` as ends of paths from `first`, each permuted to match it: weight matching, some dozen at a time.

    `checked`: each is run beside its checkpoint's own network (`check_endpoint`).
    """
    if not others:
        return []
    settings, symmetry, layout = session.settings, session.network.symmetry, session.network.layout
    theta = layout.views(session.network.row(first))
    size = min(PART_ROWS, resident_models(4 * layout.numel, session.device, len(others)))
    ends = []
    with progress.task("matching", total=len(others), unit="sources") as advance:
        for begin in range(0, len(others), size):
            some = others[begin : begin + size]
            rows = torch.zeros(len(some), layout.numel, device=session.device, dtype=torch.float32)
            for row, other in zip(rows, some, strict=True):
                row.copy_(layout.flatten(other.state))
            found = match(
                settings.matching,
                symmetry,
                theta,
                layout.views(rows),
                start=None if start is None else start.part(begin, begin + len(some)),
                examples=partial(examples, session),
                seed=derive_seed(settings.seed, "evaluation", "matching"),
                threads=matching_threads(session.device, settings.workers),
            ).permutations.to("cpu")
            for k, other in enumerate(some):
                if checked:
                    check_endpoint(session, names[begin + k], other, found.select(k))
                ends.append(endpoint(session, names[begin + k], other, found.select(k)))
            advance(len(some))
    return ends


def choose(count: int, wanted: int | None, seed: int) -> list[int]:
    """`wanted` of `count` models drawn at random, in order; all where none or more are wanted."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).choice(count, size=wanted, replace=False).tolist())


def choose_pairs(count: int, wanted: int, seed: int) -> list[tuple[int, int]]:
    """`wanted` distinct pairs of `count` models, first below second, drawn at random; all where there are fewer."""
    pairs = list(itertools.combinations(range(count), 2))
    if len(pairs) <= wanted:
        return pairs
    chosen = np.random.default_rng(seed).choice(len(pairs), size=wanted, replace=False)
    return [pairs[i] for i in sorted(chosen.tolist())]


def paths_of_run(
    session: Session,
    star: Checkpoint,
    sources: Sequence[Checkpoint],
    heldouts: Sequence[Checkpoint],
    permutations: Permutations | None,
) -> list[Path]:
    """All paths of a run: star to heldouts and sources, and pairs of regular models, matched and not."""
    settings = session.settings
    centre = endpoint(session, "star", star)
    source_names = [f"source {i}" for i in range(len(sources))]
    heldout_names = [f"heldout {i}" for i in range(len(heldouts))]
    matching = settings.ends_matched
    paths: list[Path] = []
    measured = choose(len(sources), settings.evaluation.star_sources, derive_seed(settings.seed, "star sources"))
    chosen = [sources[i] for i in measured], [source_names[i] for i in measured]
    known = None if permutations is None else Permutations({k: v[measured] for k, v in permutations.items()})
    for kind, models, names, start in (
        ("star_heldout", heldouts, heldout_names, None),
        ("star_source", *chosen, known),
    ):
        if matching:
            ends = matched_endpoints(session, star, models, names, start=start, progress=session.progress)
        else:
            ends = [endpoint(session, name, model) for name, model in zip(names, models, strict=True)]
        paths += [Path(kind, centre, end) for end in ends]

    regular = [*sources, *heldouts]
    names = [*source_names, *heldout_names]
    pairs = choose_pairs(len(regular), settings.evaluation.regular_pairs, derive_seed(settings.seed, "pairs"))
    plain = {i: endpoint(session, names[i], regular[i]) for pair in pairs for i in pair}
    with session.progress.task("matching pairs", total=len(pairs), unit="pairs") as advance:
        for first, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            seconds = [second for _, second in group]
            if matching:
                ends = matched_endpoints(
                    session, regular[first], [regular[i] for i in seconds], [names[i] for i in seconds]
                )
                paths += [Path("regular_regular", plain[first], end) for end in ends]
            paths += [Path("regular_regular_unmatched", plain[first], plain[i]) for i in seconds]
            advance(len(seconds))
    return paths


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, sample standard deviation (null for one value), extremes and number; nulls where there is nothing."""
    if not values:
        return {"mean": None, "std": None, "min": None, "max": None, "n": 0}
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "min": min(values), "max": max(values), "n": len(values)}


def measure(
    session: Session,
    star: Checkpoint,
    sources: Sequence[Checkpoint],
    heldouts: Sequence[Checkpoint],
    permutations: Permutations | None,
) -> dict[str, Any]:
    """Everything in `results.json`."""
    settings = session.settings
    start = time.perf_counter()
    paths = paths_of_run(session, star, sources, heldouts, permutations)
    measured = evaluate_paths(
        session.network.build(seed=0),
        session.network.layout,
        paths,
        session.data.splits(),
        points=settings.evaluation.points,
        statistics_batches=partial(statistics_batches, session),
        method=settings.evaluation.batch_norm,
        graph=settings.evaluation.graph,
        progress=session.progress,
    )
    error = statistics_error(session, paths)
    seconds = time.perf_counter() - start
    log = session.run.log.read()
    return {
        "dataset": settings.dataset.label,
        "arch": settings.model.arch,
        "sources": len(sources),
        "heldout": len(heldouts),
        "t": measured[0].t,
        **{split: summary(measured, split) for split in measured[0].loss},
        "accuracy": {split: _accuracies(measured, split) for split in measured[0].accuracy},
        "paths": [path_result(path) for path in measured],
        "seconds": {**epoch_seconds(log), "evaluation": seconds},
        "speed": speed(log),
        "peak_bytes": max([peak_bytes(session.device), *(entry.get("peak_bytes", 0) for entry in log)]),
        "versions": versions(),
        "device": device_name(session.device),
        "seed": settings.seed,
        "batch_norm_error": error,
    }


def statistics_error(session: Session, paths: Sequence[Path]) -> dict[str, Any] | None:
    """What `evaluation.bn_batches` changes in the test loss half-way along the first path: the difference to eight
    times as many batches, or all there are. None where all batches are taken, or without batch-norm."""
    wanted, model = session.settings.evaluation.bn_batches, session.network.build(seed=0)
    whole = whole_statistics(session)
    if wanted is None or wanted >= whole or not batch_norm_layers(model):
        return None
    path, half = paths[0], torch.tensor(0.5, device=session.device, dtype=torch.float32)
    row = torch.empty(session.network.layout.numel, device=session.device, dtype=torch.float32)
    interpolate(path.first.row_on(session.device), path.second.row_on(session.device), half, row)
    losses = []
    for times in (1, TIMES):
        found = evaluate_rows(
            model,
            session.network.layout,
            row[None],
            {"test": session.data.splits()["test"]},
            statistics_batches=partial(statistics_batches, session, times),
            method=session.settings.evaluation.batch_norm,
        )
        losses.append(float(found["test"].loss[0]))
    against = min(TIMES * wanted, whole)
    return {"batches": wanted, "against": against, "test_loss": losses[0], "error": losses[0] - losses[1]}


def summary(measured: Sequence[PathLosses], split: str) -> dict[str, Any]:
    """Losses of the ends and barriers of each kind on one split."""
    star_paths = [path for path in measured if path.kind in ("star_heldout", "star_source")]
    regular = spread([path.loss[split][-1] for path in star_paths])
    return {
        "regular_loss": {key: regular[key] for key in ("mean", "std", "n")},
        "star_loss": star_paths[0].loss[split][0],
        **{kind: spread([path.barrier(split) for path in measured if path.kind == kind]) for kind in KINDS},
    }


def _accuracies(measured: Sequence[PathLosses], split: str) -> dict[str, Any]:
    star_paths = [path for path in measured if path.kind in ("star_heldout", "star_source")]
    regular = spread([path.accuracy[split][-1] for path in star_paths])
    return {
        "regular": {key: regular[key] for key in ("mean", "std", "n")},
        "star": star_paths[0].accuracy[split][0],
    }


def path_result(path: PathLosses) -> dict[str, Any]:
    """What was measured along a path, JSON-able: `train_loss`, `train_accuracy` and so on for each split."""
    return {
        "kind": path.kind,
        "first": path.first,
        "second": path.second,
        "t": path.t,
        **{f"{split}_{what}": getattr(path, what)[split] for split in path.loss for what in ("loss", "accuracy")},
    }


def epoch_seconds(log: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Median seconds of a regular epoch, and mean seconds of a star epoch (matching included) and of matching alone.

    Means, since not every epoch need match. Of the star's last attempt, where earlier ones were interrupted.
    """

    def median(values: list[float]) -> float | None:
        return statistics.median(values) if values else None

    def mean(values: list[float]) -> float | None:
        return statistics.fmean(values) if values else None

    star = _epochs(log, "star", {"seconds", "begin_seconds"})
    return {
        "regular_epoch": median([e["seconds"] for e in _epochs(log, "regular", {"seconds"})]),
        "star_epoch": mean([e["seconds"] + e["begin_seconds"] for e in star]),
        "matching_per_epoch": mean([e["begin_seconds"] for e in star]),
    }


def _epochs(log: Sequence[Mapping[str, Any]], kind: str, needed: set[str]) -> list[Mapping[str, Any]]:
    """The epochs of regular models, or of the star's last attempt, of which the log knows what is needed."""
    kinds = ("star",) if kind == "star" else ("source", "heldout")
    found = [entry for entry in log if entry.get("kind") in kinds and needed <= entry.keys()]
    if kind == "star":
        found = [entry for entry in found if "epoch" in entry]
        found = found[max((i for i, entry in enumerate(found) if entry["epoch"] == 0), default=0) :]
    return found


def speed(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of regular models and of the star: images per second of training, and the share of its time that each part took
    (matching, load, augment, interpolate, forward, backward, update, other), and what limits the steps. Null where the
    log does not know."""
    found: dict[str, Any] = {}
    for kind in ("regular", "star"):
        known = [entry for entry in _epochs(log, kind, {"images", "begin_seconds"}) if entry.get("parts")]
        took: dict[str, float] = {"matching": sum(e["begin_seconds"] for e in known)} if kind == "star" else {}
        for entry in known:
            for name, seconds in entry["parts"].items():
                took[name] = took.get(name, 0.0) + seconds
        whole = sum(took.values())
        images = sum(entry["images"] for entry in known)
        if whole <= 0:
            found[kind] = None
            continue
        steps = shares({name: seconds for name, seconds in took.items() if name != "matching"})
        found[kind] = {
            "images_per_second": images / whole,
            "shares": shares(took),
            "limited": limited(steps.get("load", 0.0)),
        }
    return found
