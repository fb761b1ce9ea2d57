"""Live metrics of trainings, a point for each epoch: TensorBoard's event files, and Weights & Biases."""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from fastar.config import LoggingSettings
from fastar.errors import FastarError, refusal
from fastar.runs.atomic import write_atomically
from fastar.runs.claims import claim
from fastar.runs.lock import check_held
from fastar.runtime.json_files import read_file, read_object

# Names of event files end in these numbers, one more with every attempt; TensorBoard reads them in this order.
_EVENTS = "events.out.tfevents."
_NUMBERED = re.compile(r"events\.out\.tfevents\.([0-9]{10,})")

# Files that are open at a time: of models that are trained together.
OPEN_FILES = 64


class EventFile:
    """The metrics of one model as TensorBoard reads them, one point per epoch.

    Every attempt writes a file of its own; the first point of a later one makes void what an earlier one has from there
    on, so that no epoch is there twice. Each point is written at once and whole: a kill can cut the last.

    Args:
        folder: of this model's files; made with the first point.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: FileIO | None = None

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the point of epoch number `step` (from 1).

        Raises:
            FastarError: the file cannot be written.
        """
        check_held(self._folder)
        self.write(step, metrics)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """`add`, where it was asked whether the folder is still held."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        with refusal(f"{self._folder}: metrics cannot be written", "free space or set logging.tensorboard=false"):
            if self._file is None:
                self._file = self._begin(step)
            self._file.write(_record(Event(wall_time=time.time(), step=step, summary=Summary(value=values))))

    def _begin(self, step: int) -> FileIO:
        self._folder.mkdir(parents=True, exist_ok=True)
        before = [int(found[1]) for path in self._folder.iterdir() if (found := _NUMBERED.fullmatch(path.name))]
        file = FileIO(self._folder / f"{_EVENTS}{max(before, default=-1) + 1:010d}", "xb")
        file.write(_record(Event(wall_time=time.time(), file_version="brain.Event:2")))
        if before:
            starts = SessionLog(status=SessionLog.START)
            file.write(_record(Event(wall_time=time.time(), step=step, session_log=starts)))
        return file

    def close(self) -> None:
        """After the last point."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _record(event: Event) -> bytes:
    """An event as TFRecord files frame it, for one write."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def event_files(folder: Path) -> list[Path]:
    """The event files that were written for the run in `folder`."""
    found = (folder / "tensorboard").glob(f"*/{_EVENTS}*")
    return sorted(path for path in found if _NUMBERED.fullmatch(path.name))


def is_event_file_whole(path: Path) -> bool:
    """Tell whether all records of an event file have their checksums. A last one that a kill has cut does not count.

    Raises:
        OSError: it cannot be read.
    """
    data, place = read_file(path), 0
    while len(data) - place >= 12:
        length = data[place : place + 8]
        if masked_crc32c(length) != int.from_bytes(data[place + 8 : place + 12], "little"):
            return False
        end = place + 12 + int.from_bytes(length, "little")
        saved = int.from_bytes(data[end : end + 4], "little")
        if end + 4 <= len(data) and masked_crc32c(data[place + 12 : end]) != saved:
            return False
        place = end + 4
    return True


class WandbRun:
    """A run folder's run at Weights & Biases; an epoch that was sent is not sent again. Processes at work on the folder
    have a run each, all in one group.

    Args:
        folder: where its id, and what was sent, are kept.
        project: `logging.wandb`.
        settings: shown with it.

    Raises:
        FastarError: the package is not installed, or does not let the run begin.
    """

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]):
        wandb = import_wandb(project)
        self._held = ExitStack()
        claims = ((n, claim(folder / "in-training" / f"wandb-{n:04d}")) for n in itertools.count())
        number = next(n for n, free in claims if self._held.enter_context(free))
        self._file = folder / (f"wandb-{number}.json" if number else "wandb.json")
        self._sent: dict[str, int] = {}
        identity = None
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            kept = read_object(self._file)
            identity, self._sent = str(kept["id"]), {str(name): int(step) for name, step in kept["sent"].items()}
        try:
            self._run = wandb.init(
                project=project,
                name=f"{folder.name} {number + 1}" if number else folder.name,
                group=folder.name,
                dir=str(folder),
                id=identity,
                resume="allow",
                config=dict(settings),
            )
        except Exception as error:  # its own kinds of errors: no login, no network
            self._held.close()
            reason = " ".join(str(error).split())
            raise FastarError(f"logging.wandb={project}: {reason}; set logging.wandb=null to go on without") from error

    def add(self, model: str, step: int, metrics: Mapping[str, float]) -> None:
        """Send the point of epoch number `step` of `model`."""
        if step <= self._sent.get(model, 0):
            return
        self._run.log({f"{model}/epoch": step, **{f"{model}/{name}": value for name, value in metrics.items()}})
        self._sent[model] = step
        write_atomically(self._file, json.dumps({"id": str(self._run.id), "sent": self._sent}).encode())

    def forget(self, model: str, step: int) -> None:
        """The points of `model` after number `step` are made again, and will differ."""
        self._sent[model] = min(self._sent.get(model, 0), step)

    def close(self) -> None:
        """Wait for what is being sent."""
        with self._held:
            self._run.finish()


class LiveMetrics:
    """The places where a run's metrics are shown, as `settings` say.

    Args:
        folder: the run folder.
        settings: `logging`.
        resolved: all settings of the run.

    Raises:
        FastarError: Weights & Biases is asked for and cannot be had.
    """

    def __init__(self, folder: Path, settings: LoggingSettings, resolved: Mapping[str, Any]):
        self._folder = folder
        self._settings = settings
        self._files: dict[str, EventFile] = {}
        self._wandb = WandbRun(folder, settings.wandb, resolved) if settings.wandb else None

    def add(self, points: Sequence[tuple[str, int, int, Mapping[str, float]]]) -> None:
        """Show points: each a model's kind and index, the number of an epoch (from 1) and its metrics."""
        check_held(self._folder)
        for kind, index, step, metrics in points:
            model = f"{kind}-{index:04d}"
            if self._settings.tensorboard:
                self._file_of(model).write(step, metrics)
            if self._wandb is not None:
                self._wandb.add(model, step, metrics)

    def _file_of(self, model: str) -> EventFile:
        if model not in self._files:
            while len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[model] = EventFile(self._folder / "tensorboard" / model)
        return self._files[model]

    def forget(self, kind: str, index: int, step: int) -> None:
        """The points of a model after number `step` are made again, and will differ."""
        file = self._files.pop(f"{kind}-{index:04d}", None)
        if file is not None:
            file.close()  # the next point begins a new one, which makes void what this one has
        if self._wandb is not None:
            self._wandb.forget(f"{kind}-{index:04d}", step)

    def close(self) -> None:
        """After the last."""
        for file in self._files.values():
            file.close()
        if self._wandb is not None:
            self._wandb.close()


def import_wandb(project: str) -> ModuleType:
    """The package wandb.

    Raises:
        FastarError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        what = f"logging.wandb={project}: the package wandb is not installed"
        raise FastarError(f"{what}; pip install wandb, or set logging.wandb=null") from error
    return wandb


def finite(metrics: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    """Those that are numbers.

    >>> finite([("a", 1.0), ("b", None), ("c", float("nan"))])
    {'a': 1.0}
    """
    return {name: float(value) for name, value in metrics if value is not None and math.isfinite(value)}
