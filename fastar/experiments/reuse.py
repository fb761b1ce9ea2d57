"""A run is done, or its results are reused: by its files' digests, without data, memory or slow imports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastar.config import Settings
from fastar.config.renamed import with_old_names
from fastar.errors import FastarError
from fastar.runs import RunFolder, is_checkpoint, read_metadata, stored_digest
from fastar.runtime.json_files import content_digest
from fastar.runtime.progress import SILENT, Progress


def finished_results(settings: Settings, run: RunFolder, progress: Progress = SILENT) -> dict[str, Any] | None:
    """The results of a run whose models are all there and have been measured as `settings` say; else None.

    The models' own digests are compared, not their tensors, and the data's is what the star was trained on.

    Raises:
        FastarError: a model that is there is truncated or says of itself what was not saved.
    """
    numbers = {"heldout": settings.sources.heldout}
    if settings.sources.folder is None:
        numbers["source"] = settings.sources.number
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
    if results.get("measured") != measured_digest(settings, run, str(metadata.get("dataset_digest"))):
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
    """A digest of all that results depend on: the models, the data (by their digest), and how they are measured."""
    sources, own = source_paths(settings, run), settings.sources.folder is None
    heldouts = [run.model("heldout", i) for i in range(settings.sources.heldout)]
    content: dict[str, Any] = {
        "models": [
            stored_digest(run.star, own=True),
            *(stored_digest(path, own=own) for path in sources),
            *(stored_digest(path, own=True) for path in heldouts),
        ],
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


def source_paths(settings: Settings, run: RunFolder) -> list[Path]:
    """The files of a run's sources: its own, or those that `sources.folder` gives (see `given_paths`)."""
    number, folder = settings.sources.number, settings.sources.folder
    return given_paths(folder, number) if folder is not None else [run.model("source", i) for i in range(number)]


def given_paths(folder: Path, count: int) -> list[Path]:
    """The first `count` checkpoints of `folder`, in the order of their names.

    Raises:
        FastarError: no such folder, a run's folder instead of its sources', or too few of them.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise FastarError(f"sources.folder={folder}: no such folder")
    if RunFolder(folder).config.is_file() and (folder / "sources").is_dir():
        raise FastarError(f"sources.folder={folder}: is a run folder; give its sources, {folder / 'sources'}")
    paths = sorted(path for path in folder.iterdir() if is_checkpoint(path) and path.is_file())
    if len(paths) < count:
        raise FastarError(
            f"{folder}: holds {len(paths)} checkpoints, sources.number={count} asks for more; add some or lower it"
        )
    return paths[:count]
