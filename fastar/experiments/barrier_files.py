"""Barriers of single checkpoints, whoever trained them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fastar.config import dataset_spec, load_settings
from fastar.errors import FastarError
from fastar.evaluation import Path as Segment
from fastar.evaluation import evaluate_paths
from fastar.experiments.measure import check_endpoint, endpoint, matched_endpoints, path_result, statistics_error
from fastar.experiments.plan.preflight import check_network
from fastar.experiments.regular import check_fits, device_name, tell
from fastar.experiments.session import Session, measuring, new_session, threads
from fastar.experiments.statistics_batches import statistics_batches
from fastar.experiments.task import DATA_KEYS, Shape
from fastar.runs import RunFolder, versions
from fastar.runs.model_files import Checkpoint, load_checkpoint, load_whole_into
from fastar.runtime.progress import SILENT, Progress


def context_of(
    first: Checkpoint,
    *,
    dataset: str | None,
    arch: str | None,
    changes: Mapping[str, object],
    progress: Progress = SILENT,
) -> Session:
    """The surroundings of a checkpoint: from its metadata, or named by the caller.

    Args:
        changes: settings by their dotted keys.
    """
    known = first.metadata
    dataset = dataset or known.get("dataset")
    arch = arch or known.get("arch")
    for option, value in (("--dataset", dataset), ("--arch", arch)):
        if value is None:
            raise FastarError(f"{first.path}: does not say what it is; give {option}")
    values: dict[str, object] = {f"model.{key}": value for key, value in known.get("model", {}).items()}
    shape = None
    if dataset == known.get("dataset"):
        values |= {f"dataset.{key}": known[name] for name, key in DATA_KEYS.items() if known.get(name) is not None}
        batch = known.get("train", {}).get("batch_size")
        if batch is not None:  # batch-norm statistics are taken in batches as in its training
            values["train.batch_size"] = batch
        if dataset_spec(str(dataset)).variable_size and "input_shape" in known and "classes" in known:
            shape = Shape(tuple(known["input_shape"]), known["classes"])
            values["dataset.resolution"] = shape.image[1]
    settings = load_settings(dataset=dataset, arch=arch, values={**values, **changes})
    # What the checkpoint says of its images will do where they are not needed, as in matching.
    session = new_session(settings, RunFolder(Path(".")), progress, shape=shape)
    if shape is None and settings.dataset.spec.variable_size:
        check_network(session)  # a conversion of the data may take hours: what is wrong is said before
    return session


def load_whole(session: Session, path: Path, checkpoint: Checkpoint | None = None, *, same_data: bool) -> Checkpoint:
    """A checkpoint as a whole state of the session's architecture."""
    checkpoint = checkpoint or load_checkpoint(path)
    check_fits(session, checkpoint, same_data=same_data)
    whole = load_whole_into(session.network.build(seed=0).cpu(), checkpoint)
    tell(whole, session.progress)
    return whole


def barriers_of_files(
    first: Path,
    others: Sequence[Path],
    *,
    dataset: str | None,
    arch: str | None,
    matching: bool,
    changes: Mapping[str, object],
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Barriers from the checkpoint `first` to each of `others` on train, test and, where `first` was trained without
    them (`dataset.validation`), validation images.

    Returns:
        dataset, arch, t, paths (as in `results.json`, each with train_barrier and test_barrier), versions, device.
    """
    if not others:
        raise FastarError("a barrier needs a second checkpoint")
    checkpoint = load_checkpoint(first)
    session = context_of(checkpoint, dataset=dataset, arch=arch, changes=changes, progress=progress)
    with threads(session), measuring("barriers"):
        start = load_whole(session, first, checkpoint, same_data=True)
        ends = [load_whole(session, path, same_data=True) for path in others]
        names = [str(path) for path in others]
        check_endpoint(session, str(first), start, None)
        centre = endpoint(session, str(first), start)
        if matching:
            points = matched_endpoints(session, start, ends, names, checked=True, progress=progress)
        else:
            points = [endpoint(session, name, end) for name, end in zip(names, ends, strict=True)]
            for name, end in zip(names, ends, strict=True):
                check_endpoint(session, name, end, None)
        paths = [Segment("path", centre, point) for point in points]
        measured = evaluate_paths(
            session.network.build(seed=0),
            session.network.layout,
            paths,
            session.data.splits(),
            points=session.settings.evaluation.points,
            statistics_batches=partial(statistics_batches, session),
            method=session.settings.evaluation.batch_norm,
            graph=session.settings.evaluation.graph,
            progress=progress,
        )
        error = statistics_error(session, paths)
    return {
        "dataset": session.settings.dataset.label,
        "arch": session.settings.model.arch,
        "matched": matching,
        "t": measured[0].t,
        "paths": [{**path_result(path), **{f"{s}_barrier": path.barrier(s) for s in path.loss}} for path in measured],
        "versions": versions(),
        "device": device_name(session.device),
        "batch_norm_error": error,
    }
