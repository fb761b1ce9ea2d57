"""A run is done, or its results are reused: by its files' digests, without data, memory or slow imports."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastar.config import Settings
from fastar.config.renamed import with_old_names
from fastar.errors import FastarError
from fastar.runs import RunFolder, is_checkpoint, read_metadata, stored_digest
from fastar.runtime.json_files import content_digest
from fastar.runtime.progress import SILENT, Progress


def finished_results(
    settings: Settings, run: RunFolder, progress: Progress = SILENT, *, task: Callable[[], str] | None = None
) -> dict[str, Any] | None:
    """The results of a run whose models are all there and have been measured as `settings` say; else None.

    The models' own digests are compared, not their tensors.

    Args:
        task: makes a digest of data and functions; None: the data's is what the star was trained on.

    Raises:
        FastarError: a model that is there is truncated or says of itself what was not saved.
    """
    numbers = settings.sources.trained()
    # One after the other: the first that is missing is the answer, whatever number was asked for.
    if not run.results.is_file() or not run.finished("star", 0):
        return None
    if not all(run.finished(kind, index) for kind, number in numbers.items() for index in range(number)):
        return None
    metadata = read_metadata(run.star, own=True)
    check_permutations(run, metadata)
    heard: list[str] = []
    try:
        results = run.read_results(heard.append)
    except FastarError:  # damaged: they are measured again, and written anew
        return None
    found = str(metadata.get("dataset_digest")) if task is None else task()
    if results.get("measured") != measured_digest(settings, run, found):
        return None
    if results.get("matchings") and not run.matchings.is_file():  # older versions keep none
        return None
    for line in heard:
        progress.line(line)
    progress.line(f"{run.path}: finished already; these are its results")
    return results


def check_permutations(run: RunFolder, star: Mapping[str, Any]) -> None:
    """Raise FastarError unless the permutations are those that the star (`star`: its metadata) was trained with.

    Those of older versions do not say which star they belong to, and pass.
    """
    of = read_metadata(run.permutations, own=True)
    if "star" not in of:
        return
    sources = star.get("recipe", {}).get("sources")
    if (of["star"], of.get("sources")) != (stored_digest(run.star, own=True), sources):
        raise FastarError(
            f"{run.permutations}: belongs to another star than {run.star.name}; restore the one that was written with "
            "it, or delete it to train the star again"
        )


def measured_digest(settings: Settings, run: RunFolder, data: str) -> str:
    """A digest of all that results depend on: the models, the data and a user's functions (by a digest), and
    how they are measured."""
    digests = [stored_digest(run.star, own=True)]
    for kind in ("source", "heldout"):
        own = settings.sources.of_kind(kind)[1] is None
        digests += [stored_digest(path, own=own) for path in model_paths(settings, run, kind)]
    content: dict[str, Any] = {
        "models": digests,
        "data": data,
        "permutations": stored_digest(run.permutations, own=True),
        "evaluation": settings.evaluation.model_dump(mode="json", exclude={"graph"}),
        "matching": with_old_names("matching", settings.matching.recorded()),
        "limit": settings.dataset.limit,
        "seed": settings.seed,
    }
    if settings.dataset.validation:
        content["validation"] = settings.dataset.validation
    if settings.loss != "cross_entropy" or settings.metrics is not None:
        content |= {"loss": settings.loss, "metrics": settings.metrics and list(settings.metrics)}
    return content_digest(content)


def model_paths(settings: Settings, run: RunFolder, kind: str) -> list[Path]:
    """The files of a run's sources or heldouts: its own, or those that the settings give (see `given_paths`)."""
    number, folder = settings.sources.of_kind(kind)
    setting = "sources.number" if kind == "source" else "sources.heldout"
    return given_paths(folder, number, setting) if folder is not None else [run.model(kind, i) for i in range(number)]


def given_paths(folder: Path, count: int, setting: str = "sources.number") -> list[Path]:
    """The first `count` checkpoints of a folder, or of the files that a pattern names, in the order of their names.

    Raises:
        FastarError: as `matching_paths`, or too few of them.
    """
    paths = matching_paths(folder)
    if len(paths) < count:
        raise FastarError(
            f"{folder}: holds {len(paths)} checkpoints, {setting}={count} asks for more; add some or lower it"
        )
    return paths[:count]


def matching_paths(folder: Path) -> list[Path]:
    """The checkpoints of a folder, or of the files that a pattern such as 'ckpts/*.pt' names, in order.

    Raises:
        FastarError: no such folder, or a run's folder instead of its sources'.
    """
    whole = folder.expanduser()
    if RunFolder(whole).config.is_file() and (whole / "sources").is_dir():
        raise FastarError(f"{folder}: is a run folder; give its sources, {whole / 'sources'}")
    if whole.is_dir():
        found = list(whole.iterdir())
    elif whole.is_file():
        found = [whole]
    elif any(character in str(folder) for character in "*?["):
        found = [Path(name) for name in glob.glob(str(whole), recursive=True)]
    else:
        raise FastarError(f"{folder}: no such folder of checkpoints (sources.folder, sources.heldout_folder)")
    return sorted(path for path in found if is_checkpoint(path) and path.is_file())
