"""All that is on disk of a run, a data set or a model, read and checked again: `fastar verify`."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastar.config.strict_yaml import read_yaml
from fastar.errors import FastarError
from fastar.experiments.matchings import Matchings, star_permutations
from fastar.experiments.resumable import Subject
from fastar.experiments.reuse import check_permutations
from fastar.runs import (
    CHECKPOINT,
    LAST_GOOD,
    RETRY,
    RunFolder,
    checkpoint_files,
    is_checkpoint,
    is_held,
    read_holder,
    read_metadata,
    run_folders_below,
    stored_digest,
)
from fastar.runs.live_metrics import event_files, is_event_file_whole
from fastar.runs.lock import NAME as LOCK
from fastar.runs.model_files import load_checkpoint, state_digest
from fastar.runtime.json_files import read_file, read_object, unsealed
from fastar.runtime.progress import SILENT, Progress

NOT_OF_COMMANDS = ("results.json", LOCK, "wandb.json")
"""JSON files of a run folder that are checked by themselves, or hold no results."""
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass
class Rechecked:
    """The outcome of checking a folder or file."""

    kind: str
    """run, folder of runs, data set or model."""
    damaged: list[str] = field(default_factory=list)
    """A line for each thing that is not as it was written."""
    notes: list[str] = field(default_factory=list)
    """A line for each thing that could not be checked, and why."""

    def check(self, path: Path, check: Callable[[], str | None]) -> None:
        """Take in what a check of `path` finds."""
        try:
            note = check()
            self.notes += [note] if note else []
        except FastarError as error:
            self.damaged += [line for line in [str(error)] if line not in self.damaged]  # several read the same file
        except OSError as error:
            self.damaged.append(f"{error.filename or path}: cannot be read ({error.strerror})")

    def take(self, other: Rechecked) -> None:
        """Take in what was found of another."""
        self.damaged += other.damaged
        self.notes += other.notes


def recheck(path: Path, progress: Progress = SILENT) -> Rechecked:
    """Read and check all of a run folder, a folder of runs (a sweep's, a reproduction's), a data set's folder or a
    model's file.

    Raises:
        FastarError: it is none of them.
    """
    run = RunFolder(path)
    if any(file.is_file() for file in (run.config, run.star, run.results, run.log.path)):
        return _run(run, progress)
    if (path / "metadata.json").is_file() or any(path.glob("*.beton")):
        from fastar.data.ffcv.folder import verify_folder

        return Rechecked("data set", verify_folder(path, progress))
    if path.exists() and _is_model(path):
        return _model(path)
    below = sorted(run_folders_below(path))
    if below:
        return _runs(path, below, progress)
    what = "neither a run, a data set nor a model" if path.exists() else "no such folder or file"
    raise FastarError(f"{path}: {what}; give a run folder, a data set's folder or a checkpoint")


def _is_model(path: Path) -> bool:
    try:
        return any(is_checkpoint(file) for file in checkpoint_files(path))
    except FastarError:
        return False


def _model(path: Path) -> Rechecked:
    found = Rechecked("model")
    try:
        if not load_checkpoint(path).metadata:
            found.notes.append(f"{path}: not by fastar, so without a digest: readable, and all values are finite")
    except FastarError as error:
        found.damaged.append(str(error))
    return found


def _runs(folder: Path, below: Sequence[Path], progress: Progress) -> Rechecked:
    """Check the runs in a folder, and what commands have written about all of them."""
    found = Rechecked("folder of runs")
    for one in below:
        found.take(_run(RunFolder(one), progress))
    inside = set(below)
    files = [file for name in ("*.json", "sweep.yaml") for file in sorted(folder.rglob(name))]
    for file in files:
        if not inside.intersection(file.parents) and file.name not in NOT_OF_COMMANDS:
            found.check(file, partial(_yaml if file.suffix == ".yaml" else _json, file))
    return found


def _run(run: RunFolder, progress: Progress) -> Rechecked:
    found = Rechecked("run")
    for holder in [read_holder(run.path)] if is_held(run.path) else run.processes.others():
        found.notes.append(f"{run.path}: in use ({holder}); what it writes meanwhile may be missed")
    metadata: dict[Path, dict[str, Any]] = {}
    digests: dict[Path, str] = {}

    def model(path: Path, kind: str, index: int) -> None:
        checkpoint = load_checkpoint(path, own=True)
        recipe = checkpoint.metadata.get("recipe")
        if not isinstance(recipe, Mapping):
            raise FastarError(f"{path}: says nothing of what it is (damaged, or another's file); restore it")
        if (recipe.get("kind"), recipe.get("index")) != (kind, index):
            said = f"{recipe.get('kind')} {recipe.get('index')}"
            raise FastarError(f"{path}: is {said} by what it says, and has another one's name; restore both")
        metadata[path], digests[path] = checkpoint.metadata, state_digest(checkpoint)

    checks: list[Callable[[], str | None]] = [partial(_config, run), partial(_picture, run)]
    checks += [partial(model, *named) for named in run.models()]
    alone = {"star": run.star, "swag": run.swag, "student": run.student}
    checks += [partial(model, path, kind, 0) for kind, path in alone.items() if path.exists()]
    checks += [partial(_log, run, metadata)]
    checks += [partial(_permutations, run, metadata)] if run.permutations.is_file() else []
    checks += [partial(_matchings, run)] if run.matchings.is_file() else []
    checks += [partial(_training, path) for folder, _, _ in run.trainings() for path in sorted(folder.iterdir())]
    checks += [partial(_training, path) for path in sorted((run.path / LAST_GOOD).glob("*.safetensors"))]
    checks += [partial(_bend, path) for path in sorted(run.curves.glob("*.safetensors"))]
    checks += [partial(_events, path) for path in event_files(run.path)]
    checks += [partial(_sources, run, metadata, digests), partial(_results, run)]
    checks += [partial(_json, path) for path in sorted(run.path.glob("*.json")) if path.name not in NOT_OF_COMMANDS]
    with progress.task("checking", total=len(checks), unit="files") as advance:
        for check in checks:
            found.check(run.path, check)
            advance(1)
    if run.star_of_one.is_dir():
        found.take(_run(RunFolder(run.star_of_one), progress))
    return found


def _config(run: RunFolder) -> str | None:
    if not run.config.is_file():
        raise FastarError(f"{run.config}: missing; restore it")
    whole = run.is_config_whole()
    if whole is None:
        run.saved_settings()
        return f"{run.config}: by an older fastar, without a digest, so that damage to it is not seen"
    if not whole:
        raise FastarError(f"{run.config}: is not as it was written; restore it, or run it again")
    return None


def _log(run: RunFolder, metadata: Mapping[Path, Mapping[str, Any]]) -> None:
    """Check that all lines are whole, and where there are results, that all epochs of the models are there."""
    lines = run.log.lines()
    if lines and lines[-1] is None and run.log.is_cut():
        lines.pop()  # by a kill: nothing whole is lost
    damaged = [number for number, entry in enumerate(lines, 1) if entry is None]
    if damaged:
        count = f"{len(damaged)} of {len(lines)} lines are damaged, the first is number {damaged[0]}"
        raise FastarError(f"{run.log.path}: {count}; its figures are left out")
    logged = Counter(model for model, _ in {(entry.get("model"), entry.get("epoch")) for entry in lines if entry})
    for known in metadata.values() if run.results.exists() else ():
        name, epochs = Subject(known["recipe"]).name, known.get("epochs", 0)
        if logged[name] < epochs:
            raise FastarError(
                f"{run.log.path}: cut short: it has {logged[name]} of {epochs} epochs of {name}, and "
                f"{run.results.name} is of all; restore it"
            )


def _picture(run: RunFolder) -> str | None:
    """PNG has a checksum for each of its chunks."""
    if not run.picture.exists():
        return None
    data = read_file(run.picture)
    place, whole = len(PNG), data.startswith(PNG) and data[-8:-4] == b"IEND"
    while whole and place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        chunk, checksum = data[place + 4 : place + 8 + size], data[place + 8 + size : place + 12 + size]
        whole, place = zlib.crc32(chunk).to_bytes(4, "big") == checksum, place + 12 + size
    if not whole:
        raise FastarError(f"{run.picture}: damaged; `fastar report {run.path}` draws it again")
    return None


def _permutations(run: RunFolder, metadata: Mapping[Path, Mapping[str, Any]]) -> str | None:
    """Every source's units must each have one place, and the star must be the one that they were found for."""
    star_permutations(run.permutations)
    if run.star in metadata:  # else it is missing, or damaged, which has been said
        check_permutations(run, metadata[run.star])
    if "star" not in read_metadata(run.permutations, own=True):
        return f"{run.permutations}: by an older fastar; it does not say which star it belongs to"
    return None


def _matchings(run: RunFolder) -> None:
    """Check that all are permutations of their units, and those that the results were measured with."""
    Matchings.load(run.matchings)
    try:
        named = run.read_results().get("matchings")
    except FastarError:  # which is said of the results
        return
    if named and named.get("digest") != stored_digest(run.matchings, own=True):
        raise FastarError(f"{run.matchings}: is not what {run.results.name} was measured with; restore both")


def _training(path: Path) -> None:
    """Check a file that a training keeps, or has left behind."""
    try:
        if CHECKPOINT.fullmatch(path.name) or path.parent.name == LAST_GOOD:
            load_checkpoint(path, own=True)
        elif path.name == RETRY:
            unsealed(read_object(path))
    except FastarError:
        if path.exists():  # else a run in use has gone on to the next one
            raise
    except ValueError as error:
        raise FastarError(f"{path}: damaged ({error}); delete it") from error


def _bend(path: Path) -> None:
    """Check a trained bend of a curve."""
    load_checkpoint(path, own=True)


def _events(path: Path) -> str | None:
    if not is_event_file_whole(path):
        raise FastarError(f"{path}: damaged; TensorBoard shows what is before that place; the log has all figures")
    return None


def _sources(run: RunFolder, metadata: Mapping[Path, Mapping[str, Any]], digests: Mapping[Path, str]) -> str | None:
    """A star's sources must be those that it was trained on, where they lie in the run folder."""
    if run.star not in metadata:
        return None
    recorded = metadata[run.star]["recipe"].get("sources", [])
    if run.saved_settings().get("sources", {}).get("folder") is not None:
        return f"{run.star}: its sources lie elsewhere, and are not checked"
    for index, digest in enumerate(recorded):
        path = run.model("source", index)
        if not path.exists():
            raise FastarError(f"{path}: missing, and the star was trained on it; restore it")
        if digests.get(path, digest) != digest:
            raise FastarError(f"{path}: is not the source that the star was trained on; restore it")
    return None


def _results(run: RunFolder) -> str | None:
    if not run.results.exists():
        return None
    said: list[str] = []
    results = run.read_results(said.append)
    given = run.saved_settings().get("sources", {}).get("heldout_folder") is not None
    models = [run.model("heldout", i) for i in range(0 if given else results.get("heldout", 0))]
    needed = [*models, run.star, run.permutations, *([run.matchings] if results.get("matchings") else [])]
    missing = next((path for path in needed if not path.exists()), None)
    if missing is not None:
        raise FastarError(f"{missing}: missing, and {run.results.name} is of it; restore it")
    return said[0] if said else None


def _json(path: Path) -> str | None:
    """Check a file that a command on a finished run wrote; in each there is a digest of its content."""
    try:
        _, checked = unsealed(read_object(path))
    except ValueError as error:
        raise FastarError(f"{path}: damaged ({error}); the command that wrote it writes it again") from error
    return None if checked else f"{path}: without a digest (by an older fastar, or not by it): damage to it is not seen"


def _yaml(path: Path) -> None:
    """Check that a sweep's settings can be read."""
    try:
        read_yaml(read_file(path).decode())
    except (FastarError, UnicodeDecodeError) as error:
        raise FastarError(f"{path}: damaged ({error}); the sweep's command says what to do") from error
