"""Barriers between the models of a run, and `results.json`."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastar.config import Settings
from fastar.evaluation import Endpoint, PathLosses, Segment, evaluate_paths, evaluate_rows
from fastar.evaluation.batch_norm import batch_norm_layers
from fastar.evaluation.ends import check_end
from fastar.evaluation.paths import Share
from fastar.experiments.epoch_times import epoch_seconds, speed
from fastar.experiments.matchings import Matchings
from fastar.experiments.regular import device_name
from fastar.experiments.session import Session
from fastar.experiments.statistics_batches import examples, statistics_batches, whole_statistics
from fastar.kernels import interpolate
from fastar.matching import match
from fastar.runs import versions
from fastar.runs.model_files import Checkpoint, load_into
from fastar.runtime.memory import peak_bytes, resident_models
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.seeds import derive_seed
from fastar.symmetry import Permutations
from fastar.training import PART_ROWS

# How many times `evaluation.bn_batches` it is compared with.
TIMES = 8
# Images that the ends of paths are run on.
CHECKED_ON = 64
KINDS = ("regular_regular", "star_heldout", "star_source", "regular_regular_unmatched")


def permuted(session: Session, checkpoint: Checkpoint, permutation: Permutations | None) -> Mapping[str, Tensor]:
    """A checkpoint's state, its units permuted if `permutation` is given."""
    if permutation is None:
        return checkpoint.state
    state = dict(checkpoint.state.items())  # by one read, where it lies in a file
    return session.network.symmetry.apply(permutation, state)


def permuted_row(session: Session, checkpoint: Checkpoint, permutation: Permutations | None = None) -> Tensor:
    """A checkpoint's parameters [P], its units permuted if `permutation` is given."""
    return session.network.layout.flatten(permuted(session, checkpoint, permutation))


def endpoint(session: Session, name: str, checkpoint: Checkpoint, permutation: Permutations | None = None) -> Endpoint:
    """A checkpoint as one end of a path, permuted by `permutation` if given; its row is made when it is asked for."""
    own = None
    if session.settings.evaluation.batch_norm == "reference":
        found = {  # in float32, as the rows are, whatever the file holds
            name: value.to(session.device, torch.float32)
            for name, value in permuted(session, checkpoint, permutation).items()
            if name.endswith(("running_mean", "running_var"))
        }
        own = found or None
    return Endpoint(name, partial(permuted_row, session, checkpoint, permutation), own)


def check_endpoint(session: Session, name: str, checkpoint: Checkpoint, permutation: Permutations | None) -> None:
    """Raise FastarError unless the network at this end of a path computes what the checkpoint's own does, on the first
    images of the last split and with its own batch-norm statistics."""
    own, standing = session.network.build(seed=0), session.network.build(seed=0)
    load_into(own, checkpoint)
    state = permuted(session, checkpoint, permutation)
    inputs, _ = next(iter(list(session.data.splits().values())[-1]()))
    some = tree_map_only(Tensor, lambda one: one[:CHECKED_ON], inputs)
    check_end(own, standing, session.network.layout, state, some, name)


def match_to(
    session: Session,
    first: Checkpoint,
    others: Sequence[Checkpoint],
    *,
    start: Permutations | None = None,
    progress: Progress = SILENT,
) -> list[Permutations]:
    """The permutations of `others` that match each to `first`, found for some dozen at a time.

    Args:
        start: where the others are known to match.
    """
    settings, layout = session.settings, session.network.layout
    theta = layout.views(session.network.row(first))
    size = min(PART_ROWS, resident_models(4 * layout.numel, session.device, len(others)))
    matched: list[Permutations] = []
    with progress.task("matching", total=len(others), unit="sources") as advance:
        for begin in range(0, len(others), size):
            some = others[begin : begin + size]
            rows = torch.zeros(len(some), layout.numel, device=session.device, dtype=torch.float32)
            for row, other in zip(rows, some, strict=True):
                row.copy_(layout.flatten(other.state))
            found = match(
                settings.matching,
                session.network.symmetry,
                theta,
                layout.views(rows),
                start=None if start is None else start.part(begin, begin + len(some)),
                examples=partial(examples, session),
                seed=derive_seed(settings.seed, "evaluation", "matching"),
                threads=settings.workers,
            ).permutations.to("cpu")
            matched += [found.select(k) for k in range(len(some))]
            advance(len(some))
    return matched


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


def regular_pairs(settings: Settings, sources: int, heldouts: int) -> list[tuple[int, int]]:
    """The pairs of regular models that a run measures, by their numbers, sources before heldouts; the first stays as
    it is, and the second is permuted."""
    seed, cross = settings.seed, settings.evaluation.cross
    if cross is None:
        return choose_pairs(sources + heldouts, int(settings.evaluation.regular_pairs), derive_seed(seed, "pairs"))
    firsts = choose(sources, cross[0], derive_seed(seed, "pairs", "source"))
    seconds = choose(heldouts, cross[1], derive_seed(seed, "pairs", "heldout"))
    return [(first, sources + second) for first in firsts for second in seconds]


def paths_of_run(
    session: Session,
    star: Checkpoint,
    sources: Sequence[Checkpoint],
    heldouts: Sequence[Checkpoint],
    permutations: Permutations | None,
) -> tuple[list[Segment], Matchings]:
    """All paths of a run (star to heldouts and sources, and pairs of regular models, matched and not), and the
    permutations of those that are matched.

    Args:
        permutations: of the sources, that the star was trained with: where matching them to it starts.
    """
    settings, found = session.settings, Matchings()
    regular = [*sources, *heldouts]
    names = [f"source {i}" for i in range(len(sources))] + [f"heldout {i}" for i in range(len(heldouts))]
    plain = functools.cache(lambda index: endpoint(session, names[index], regular[index]))

    def paths(
        kind: str, first: Checkpoint, end: Endpoint, seconds: Sequence[int], start: Permutations | None, shown: Progress
    ) -> list[Segment]:
        """Paths from `first`, whose end is `end`, to the regular models `seconds`, matched where the run matches."""
        if not settings.ends_matched or not seconds:
            return [Segment(kind, end, plain(index)) for index in seconds]
        others = [regular[index] for index in seconds]
        matched = match_to(session, first, others, start=start, progress=shown)
        found.add(first, others, matched)
        return [
            Segment(kind, end, endpoint(session, names[index], regular[index], permutation))
            for index, permutation in zip(seconds, matched, strict=True)
        ]

    centre, progress = endpoint(session, "star", star), session.progress
    measured = choose(len(sources), settings.evaluation.star_sources, derive_seed(settings.seed, "star sources"))
    known = None if permutations is None else Permutations({k: v[measured] for k, v in permutations.items()})
    segments = paths("star_heldout", star, centre, range(len(sources), len(regular)), None, progress)
    segments += paths("star_source", star, centre, measured, known, progress)

    pairs = regular_pairs(settings, len(sources), len(heldouts))
    with progress.task("matching pairs", total=len(pairs), unit="pairs") as advance:
        for first, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            seconds = [second for _, second in group]
            if settings.ends_matched:
                segments += paths("regular_regular", regular[first], plain(first), seconds, None, SILENT)
            segments += [Segment("regular_regular_unmatched", plain(first), plain(index)) for index in seconds]
            advance(len(seconds))
    return segments, found


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, sample standard deviation (null for one value), extremes and number; nulls where there is nothing."""
    if not values:
        return {"mean": None, "std": None, "min": None, "max": None, "n": 0}
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": std, "min": min(values), "max": max(values), "n": len(values)}


def spreads_of(paths: Sequence[PathLosses], split: str) -> dict[str, Any]:
    """The spreads of the barriers, and of the largest losses, over paths."""
    return {
        "barrier": spread([path.barrier(split) for path in paths]),
        "largest_loss": spread([path.largest_loss(split) for path in paths]),
    }


def evaluated(
    session: Session,
    segments: Sequence[Segment],
    *,
    points: int | None = None,
    splits: Sequence[str] | None = None,
    share: Share | None = None,
) -> tuple[list[PathLosses], dict[str, Any] | None]:
    """Losses and accuracies along paths on the session's data, and `statistics_error`.

    Args:
        points: of a path; None: `evaluation.points`.
        splits: those to measure on; None: all.
        share: as of `evaluate_paths`.
    """
    evaluation = session.settings.evaluation
    found = evaluate_paths(
        session.network.build(seed=0),
        session.network.layout,
        segments,
        {name: batches for name, batches in session.data.splits().items() if splits is None or name in splits},
        points=points or evaluation.points,
        statistics_batches=partial(statistics_batches, session),
        method=evaluation.batch_norm,
        loss=session.loss,
        graph=evaluation.graph,
        share=share,
        progress=session.progress,
    )
    return found, statistics_error(session, segments)


def measure(
    session: Session,
    star: Checkpoint,
    sources: Sequence[Checkpoint],
    heldouts: Sequence[Checkpoint],
    permutations: Permutations | None,
    share: Share | None = None,
) -> tuple[dict[str, Any], Matchings]:
    """The content of `results.json`, and the permutations that its paths were measured with.

    Args:
        permutations: of the sources, that the star was trained with (None: never matched).
        share: as of `evaluate_paths`.
    """
    settings = session.settings
    start = time.perf_counter()
    segments, matchings = paths_of_run(session, star, sources, heldouts, permutations)
    measured, error = evaluated(session, segments, share=share)
    seconds = time.perf_counter() - start
    log = session.run.log.read()
    results = {
        "dataset": settings.dataset.label,
        "arch": settings.model.arch,
        "sources": len(sources),
        "heldout": len(heldouts),
        "t": measured[0].t,
        **{split: summary(measured, split) for split in measured[0].loss},
        **metrics_of(measured),
        "paths": [path_result(path) for path in measured],
        "seconds": {**epoch_seconds(log), "evaluation": seconds},
        "speed": speed(log),
        "peak_bytes": max([peak_bytes(session.device), *(entry.get("peak_bytes", 0) for entry in log)]),
        "versions": versions(),
        "device": device_name(session.device),
        "seed": settings.seed,
        "batch_norm_error": error,
    }
    return results, matchings


def statistics_error(session: Session, segments: Sequence[Segment]) -> dict[str, Any] | None:
    """The change of the test loss half-way along the first path by `evaluation.bn_batches`: its difference to eight
    times as many batches, or all there are. None where all batches are taken, or without batch-norm."""
    wanted, model = session.settings.evaluation.bn_batches, session.network.build(seed=0)
    whole = whole_statistics(session)
    if wanted is None or wanted >= whole or not batch_norm_layers(model):
        return None
    path, half = segments[0], torch.tensor(0.5, device=session.device, dtype=torch.float32)
    row = torch.empty(session.network.layout.numel, device=session.device, dtype=torch.float32)
    interpolate(path.first.row_on(session.device), path.second.row_on(session.device), half, row)
    split, batches = list(session.data.splits().items())[-1]
    losses = []
    for times in (1, TIMES):
        found = evaluate_rows(
            model,
            session.network.layout,
            row[None],
            {split: batches},
            statistics_batches=partial(statistics_batches, session, times),
            method=session.settings.evaluation.batch_norm,
            loss=session.loss,
        )
        losses.append(float(found[split]["loss"][0]))
    against = min(TIMES * wanted, whole)
    return {"batches": wanted, "against": against, "test_loss": losses[0], "error": losses[0] - losses[1]}


def summary(measured: Sequence[PathLosses], split: str) -> dict[str, Any]:
    """Losses of the ends, and of each kind of path the barriers, the largest losses and the accuracy barriers, on one
    split."""
    regular, star = _at_ends(measured, "loss", split)
    of_kinds = {kind: [path for path in measured if path.kind == kind] for kind in KINDS}

    def spreads(number: Callable[[PathLosses, str], float | None]) -> dict[str, Any]:
        known = {kind: [number(path, split) for path in paths] for kind, paths in of_kinds.items()}
        return {kind: spread([one for one in values if one is not None]) for kind, values in known.items()}

    return {
        "regular_loss": regular,
        "star_loss": star,
        **spreads(PathLosses.barrier),
        "largest_loss": spreads(PathLosses.largest_loss),
        "accuracy_barrier": spreads(PathLosses.accuracy_barrier),
    }


def metrics_of(measured: Sequence[PathLosses]) -> dict[str, Any]:
    """The metrics of regular models and the star on each split: "accuracy", others under "metrics" by their names."""
    found = {
        name: {
            split: dict(zip(("regular", "star"), _at_ends(measured, name, split), strict=True)) for split in of_splits
        }
        for name, of_splits in measured[0].values.items()
        if name != "loss"
    }
    accuracy = {"accuracy": found.pop("accuracy")} if "accuracy" in found else {}
    return {**accuracy, **({"metrics": found} if found else {})}


def _at_ends(measured: Sequence[PathLosses], metric: str, split: str) -> tuple[dict[str, Any], float]:
    """A metric of the regular models that paths from the star lead to, and of the star."""
    star_paths = [path.values[metric][split] for path in measured if path.kind in ("star_heldout", "star_source")]
    regular = spread([along[-1] for along in star_paths])
    return {key: regular[key] for key in ("mean", "std", "n")}, star_paths[0][0]


def path_result(path: PathLosses) -> dict[str, Any]:
    """The losses and metrics of a path, JSON-able: `train_loss`, `train_accuracy` and so on for each split."""
    return {
        "kind": path.kind,
        "first": path.first,
        "second": path.second,
        "t": path.t,
        **{f"{split}_{name}": path.values[name][split] for split in path.loss for name in path.values},
    }
