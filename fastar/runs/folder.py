"""Run folders: what lies where, one writer at a time, which settings a run may go on with, results."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from fastar.config import Settings, as_override, changes
from fastar.config.strict_yaml import read_yaml
from fastar.errors import FastarError, refusal
from fastar.runs.atomic import delete, files_below, remove_if_empty, write_atomically, write_json
from fastar.runs.claims import JOBS, PROCESSES, Processes, claim
from fastar.runs.lock import NAME as LOCK
from fastar.runs.lock import Holder, InUse, hold, lost
from fastar.runs.run_log import RunLog
from fastar.runs.safetensors_file import read_metadata
from fastar.runtime.json_files import read_file, read_object, unsealed
from fastar.runtime.progress import SILENT, Progress

# Settings that say how or where work is done, or what is measured afterwards: a run may go on with others.
FREE_KEYS = (
    "checkpoint.",
    "dataset.root",
    "dataset.directory",
    "dataset.threads",
    "device",
    "evaluation.",
    "logging.",
    "gpu_memory",
    "sources.store",
    "train.compile",
    "train.graph",
    "train.on_nonfinite",
    "workers",
)
# Folder of the last good states of models whose training became NaN or infinite: nothing finished.
LAST_GOOD = "last-good"
# Folder of the checkpoints of models in training.
IN_TRAINING = "in-training"
# Names of a training's checkpoints (epochs, steps), of models (number), and of a training's folder (kind, number).
# Others are the user's own.
CHECKPOINT = re.compile(r"epoch-([0-9]{5,})-step-([0-9]{8,})\.safetensors")
# File of how often a training has gone back, and where to.
RETRY = "retry.json"
_MODEL = re.compile(r"seed-([0-9]{4,})\.safetensors")
_TRAINING = re.compile(r"(source|heldout|star|swag|student)-([0-9]{4,})")
_TEMPORARY = re.compile(r"\..+\.[0-9]+(-[0-9a-f]{8})?\.tmp")
_CONFIG_DIGEST = "# digest: "
_FOLDERS = {"source": "sources", "heldout": "heldout"}
# Folder of networks that were given from Python.
GIVEN = "given"


class RunFolder:
    """A folder that holds one run: `config.yaml`, `sources/`, `heldout/`, `star.safetensors`, `log.jsonl`, results."""

    def __init__(self, path: Path):
        self.path = path
        self.log = RunLog(path / "log.jsonl")
        self.config = path / "config.yaml"
        self.star = path / "star.safetensors"
        self.results = path / "results.json"
        self.picture = path / "barrier.png"
        self.permutations = path / "permutations.safetensors"
        # The permutations that results were measured with.
        self.matchings = path / "matchings.safetensors"
        self.distances = path / "distances.json"
        # What commands on finished runs train: SWAG's moments, and the student of the ensemble.
        self.swag = path / "swag.safetensors"
        self.student = path / "student.safetensors"
        # The trained bends of curves, and a run of the first source alone.
        self.curves = path / "curves"
        self.star_of_one = path / "star-of-one"
        self.processes = Processes(path)
        self.measured = path / "measured"  # by several processes

    def is_drawn(self) -> bool:
        """Tell whether the picture is there, and no older than the results it shows."""
        with suppress(OSError):
            return self.picture.is_file() and self.picture.stat().st_mtime_ns >= self.results.stat().st_mtime_ns
        return False

    def profile(self, name: str) -> Path:
        """File `name` of what `--profile` found."""
        return self.path / "profile" / name

    def model(self, kind: str, index: int) -> Path:
        """File of source or heldout number `index`, or of the star, SWAG's moments or the student."""
        alone = {"star": self.star, "swag": self.swag, "student": self.student}
        if kind in alone:
            return alone[kind]
        return self.path / _FOLDERS[kind] / f"seed-{index:04d}.safetensors"

    def finished(self, kind: str, index: int) -> bool:
        """Tell whether a model's training is over; a star without its permutations is trained again."""
        return self.model(kind, index).is_file() and (kind != "star" or self.permutations.is_file())

    def in_training(self, kind: str, index: int) -> Path:
        """Folder of the checkpoints of a model while it is trained."""
        return self.path / IN_TRAINING / f"{kind}-{index:04d}"

    def models(self) -> list[tuple[Path, str, int]]:
        """Files of sources and heldouts that are there, each with its kind and number."""
        found = ((path, kind) for kind, name in _FOLDERS.items() for path in sorted((self.path / name).glob("seed-*")))
        return [(path, kind, int(name[1])) for path, kind in found if (name := _MODEL.fullmatch(path.name))]

    def trainings(self) -> list[tuple[Path, str, int]]:
        """Folders of models in training, each with the model's kind and number."""
        found = ((path, _TRAINING.fullmatch(path.name)) for path in (self.path / IN_TRAINING).glob("*"))
        return [(path, name[1], int(name[2])) for path, name in found if name and path.is_dir()]

    def last_good(self, kind: str, index: int) -> Path:
        """File of the last good state of a model whose training became NaN or infinite."""
        return self.path / LAST_GOOD / f"{kind}-{index:04d}.safetensors"

    @contextmanager
    def open(self, settings: Settings, progress: Progress = SILENT) -> Iterator[RunFolder]:
        """Create the folder or go on with it, with other processes that do the same; what each works on it claims.

        Raises:
            FastarError: the folder belongs to another run (the differing settings are named), holds something
                else, or cannot be written.
        """
        self.check(settings)
        made, nothing_done, finished = not self.path.exists(), False, False
        with self._usable():
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            with ExitStack() as seat:
                with self._held_shortly(progress):
                    self.check(settings)  # again: another process may have finished in between
                    seat.enter_context(self.processes.joined())
                    others = self.processes.others()
                    if others:
                        self._check_together(settings, others[0])
                    else:
                        self._remove_debris()
                    new = not self.config.exists()
                    text = settings.to_yaml()
                    write_atomically(self.config, f"{text}{_CONFIG_DIGEST}{_digest(text.encode())}\n".encode())
                try:
                    yield self
                    finished = True
                finally:
                    if lost(self.path) is None:
                        nothing_done = self._leave(seat, progress, finished=finished, undo=new and not finished)
        finally:
            if made and nothing_done:  # leave no trace
                remove_if_empty(self.path)

    def _leave(self, seat: ExitStack, progress: Progress, *, finished: bool, undo: bool) -> bool:
        """Give up the seat. The last to do so removes what killed processes left, and (`undo`) what an empty run made:
        tell whether it was empty. One that failed waits for nobody."""
        with ExitStack() as lock:
            try:
                lock.enter_context(hold(self.path, progress.line if finished else None, wait=finished))
                if not self.processes.others():
                    self._remove_debris()
            except InUse:
                return False
            except (FastarError, OSError):  # a full disk
                pass
            empty = undo and not (self.processes.others() or self.log.path.exists() or self._has_models())
            seat.close()
            if empty:
                self._remove_empty()
        return empty

    @contextmanager
    def held(self, progress: Progress = SILENT) -> Iterator[None]:
        """Keep other processes out of the folder until the block ends; nothing of it is changed. A folder that cannot
        be written to is not held: nobody writes there.

        Raises:
            FastarError: it is in use.
        """
        with ExitStack() as lock:
            if os.access(self.path, os.W_OK):
                with self._usable():
                    lock.enter_context(hold(self.path, progress.line))
                for other in self.processes.others():
                    raise InUse(f"{self.path}: in use by another fastar ({other}); wait for it")
            yield

    def claim(self, kind: str, index: int = 0) -> AbstractContextManager[bool]:
        """Take a model that is to be trained, or another part of the work, until the block ends; False: another process
        has it."""
        written = {"star": [self.star, self.permutations], "results": [self.results, self.matchings]}
        model = [self.model(kind, index)] if kind in _FOLDERS else []
        return claim(self.in_training(kind, index), written.get(kind, model))

    @contextmanager
    def _held_shortly(self, progress: Progress) -> Iterator[None]:
        """Wait until nobody holds the folder, and hold it."""
        with ExitStack() as lock:
            with self._usable():
                lock.enter_context(hold(self.path, progress.line, wait=True))
            yield

    def _check_together(self, settings: Settings, other: Holder) -> None:
        """Raise FastarError unless this process may work on the run beside another, by the settings of both."""
        for key, (was, now) in changes(self.saved_settings(), settings.model_dump(mode="json")).items():
            grown = key == "sources.heldout" and self._may_grow(key, (was, now))
            if not key.startswith(FREE_KEYS) and not grown:
                raise InUse(
                    f"{self.path}: in use by another fastar ({other}) with other settings ({key} is {was!r} there, "
                    f"{now!r} here); wait for it, or choose another run folder (out)"
                )

    def _usable(self) -> AbstractContextManager[None]:
        return refusal(f"{self.path}: cannot be used as run folder", "choose another run folder (out)")

    def _has_models(self) -> bool:
        found = (path for path in files_below(self.path) if path.suffix == ".safetensors")
        return any(path.parent.name != LAST_GOOD and not self.failed(path) for path in found)

    def failed(self, path: Path) -> bool:
        """Tell whether `path` is a checkpoint of a training that ended where it became NaN or infinite, and did not go
        on since: another recipe may take over."""
        folder = path.parent
        left = self.path / LAST_GOOD / f"{folder.name}.safetensors"
        if folder.parent != self.path / IN_TRAINING or not left.is_file():
            return False
        try:
            kept, found = read_metadata(left, own=True), read_metadata(path, own=True)
        except FastarError:  # damaged: nobody's to throw away
            return False
        ended, saved = ((kept.get("epochs", 0), kept.get("steps", 0)), (found.get("epoch", 0), found.get("step", 0)))
        return ended >= saved and all(kept.get(key) == value for key, value in found.get("recipe", {}).items())

    def _remove_debris(self) -> None:
        """Delete what killed processes left: of atomic writes (nobody else is at it now), locks, and the checkpoints of
        models that were finished meanwhile."""
        for path in files_below(self.path):
            if _TEMPORARY.fullmatch(path.name) and path.is_file():
                delete(path)
        for folder, kind, number in self.trainings():
            if self.finished(kind, number):
                remove_checkpoints(folder)
        measured = self.measured.glob("*") if self.results.is_file() else ()
        for path in (*self.path.glob(f"{IN_TRAINING}/*/{LOCK}"), *self.processes.locks(), *measured):
            delete(path)
            remove_if_empty(path.parent)
        for folder, _, _ in self.trainings():
            remove_if_empty(folder)
        remove_if_empty(self.path / IN_TRAINING)

    def _remove_empty(self) -> None:
        self.config.unlink(missing_ok=True)
        folders = [path for name in ("sources", "heldout", IN_TRAINING) for path in self.path.glob(f"{name}/**/")]
        for folder in sorted(folders, reverse=True):
            remove_if_empty(folder)

    def check(self, settings: Settings) -> None:
        """Raise FastarError unless the folder is empty, missing, or a run with these settings; writes nothing."""
        with self._usable():
            for path in (self.path, *self.path.parents):
                if path.exists() and not path.is_dir():
                    raise FastarError(f"{path}: is a file; choose another run folder (out)")
            if not self.config.is_file():
                foreign = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
                foreign = sorted(
                    name for name in foreign if not name.endswith(".tmp") and name not in (LOCK, GIVEN, JOBS, PROCESSES)
                )
                if foreign:
                    raise FastarError(
                        f"{self.path}: holds {foreign[0]} but no config.yaml: no run folder; choose another (out)"
                    )
                return
            self._check_names()
            old = self.saved_settings()
            if not self._has_models():
                return  # nothing of it was finished: it may become any run
        new = settings.model_dump(mode="json")
        changed = changes(old, new)
        fixed = {k: v for k, v in changed.items() if not k.startswith(FREE_KEYS) and not self._may_grow(k, v)}
        if fixed:
            shown = "; ".join(f"{key} was {was!r}, now {now!r}" for key, (was, now) in list(fixed.items())[:4])
            count, others = self.sources_to_take_over()
            taken = ""
            if count and all(key.startswith("train.") for key in fixed):
                taken = f" ({others} takes over the {'source that is' if count == 1 else 'sources that are'} finished)"
            raise FastarError(
                f"{self.path}: holds another run ({shown}); choose another run folder (out){taken} or the same settings"
            )

    def _check_names(self) -> None:
        """Raise FastarError where something else has the name of a file or folder that a run writes."""
        models = (path for path, _, _ in self.models())
        files = (
            self.star,
            self.swag,
            self.student,
            self.permutations,
            self.matchings,
            self.results,
            self.picture,
            self.log.path,
            *models,
        )
        folders = [self.path / name for name in ("sources", "heldout", IN_TRAINING, LAST_GOOD, "tensorboard")]
        wrong = [(path, "file") for path in files if path.exists() and not path.is_file()]
        wrong += [(path, "folder") for path in folders if path.exists() and not path.is_dir()]
        for path, kind in wrong:
            raise FastarError(f"{path}: is not a {kind}, and the run has one of this name; move it away")

    def sources_to_take_over(self) -> tuple[int, str]:
        """The number of sources finished here, and the settings by which another run takes them over, for a shell."""
        count = next(number for number in itertools.count() if not self.finished("source", number))
        folder = as_override("sources.folder", self.path / "sources")
        return count, shlex.join([folder, f"sources.number={count}"])

    def _may_grow(self, key: str, change: tuple[Any, Any]) -> bool:
        """More heldouts can always be added; sources and star settings may change while there is no star yet."""
        was, now = change
        if key == "sources.heldout":
            return isinstance(was, int) and bool(now >= was)
        return key.startswith(("sources.", "star.", "matching.")) and not self.star.exists()

    def saved_settings(self) -> dict[str, Any]:
        """The settings the folder was made with, nested.

        Raises:
            FastarError: no readable `config.yaml`.
        """
        try:
            content = read_yaml(read_file(self.config).decode())
        except OSError as error:
            raise FastarError(f"{self.path}: is no run folder (config.yaml: {error.strerror})") from error
        except (FastarError, UnicodeDecodeError) as error:
            what = f"{self.config}: not valid YAML ({error}); restore it or choose another run folder (out)"
            raise FastarError(what) from error
        if not isinstance(content, dict):
            raise FastarError(f"{self.config}: holds no settings; restore it or choose another run folder (out)")
        return content

    def is_config_whole(self) -> bool | None:
        """Tell whether `config.yaml` is as it was written; None: an older fastar wrote it, without a digest."""
        text = read_file(self.config)
        settings, found, digest = text.rpartition(_CONFIG_DIGEST.encode())
        if not found:
            last = text.rstrip().rpartition(b"\n")[2]
            return False if last.startswith(b"#") or b" digest: " in last else None
        return digest == f"{_digest(settings)}\n".encode()

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Write `results.json`, atomically and unrounded, with a digest of it."""
        write_json(self.results, results)

    def read_results(self, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
        """The results in `results.json`; `say` is told of results without a digest.

        Raises:
            FastarError: missing or damaged.
        """
        with refusal(f"{self.results}: no results", "run `fastar train-star` first"):
            try:
                results, checked = unsealed(read_object(self.results))
            except ValueError as error:
                what = f"{self.results}: holds no results ({error}); run its training again"
                raise FastarError(what) from error
        if not checked:
            say(f"{self.results}: by an older fastar, without a digest, so that damage to it is not seen")
        return results


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def run_folders_below(folder: Path) -> Iterator[Path]:
    """All run folders in `folder`, and itself if it is one. Other programs call their files config.yaml too."""
    for name, inner, files in os.walk(folder):
        run = RunFolder(Path(name))
        if "config.yaml" not in files or not run.config.is_file():
            continue
        try:
            saved = run.saved_settings()
            found = isinstance(saved.get("sources"), Mapping) and isinstance(saved.get("train"), Mapping)
        except FastarError:
            found = False
        if found or run.log.path.is_file() or run.star.is_file():
            yield run.path
            inner.clear()  # what is in it is its own


def remove_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a training, and its folder and the one that it is in where they are then empty."""
    for path in folder.glob("*"):
        if CHECKPOINT.fullmatch(path.name) or path.name == RETRY:
            delete(path)
    remove_if_empty(folder)
    remove_if_empty(folder.parent)
