"""Live figures of trainings: TensorBoard's event files, written without TensorBoard, and Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from fastar.config import LoggingSettings
from fastar.errors import FastarError
from fastar.runs.atomic import write_atomically
from fastar.runs.lock import check_held
from fastar.runtime.json_files import read_file, read_object

# Folders of event files end in these numbers, one more with every attempt; TensorBoard reads them in this order.
_EVENTS = "events.out.tfevents."
_NUMBERED = re.compile(r"events\.out\.tfevents\.([0-9]{10,})")


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC = _crc_table()


def masked_crc(data: bytes) -> int:
    """CRC-32C of `data`, masked as TFRecord files have it.

    >>> hex(masked_crc(b"123456789"))  # CRC-32C is 0xe3069283
    '0xc78ab0e5'
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def event(
    *, step: int = 0, version: str = "", starts: bool = False, scalars: Mapping[str, float] | None = None
) -> bytes:
    """A record of an event file: tensorflow.Event with wall time and step, framed as TFRecord files are.

    Args:
        step: what the figures stand over.
        version: of the file format; the first event of a file has it.
        starts: a session starts here: figures that an earlier file has for this step and later ones are void.
        scalars: tag -> value.
    """
    data = b"\x09" + struct.pack("<d", time.time())  # 1: wall_time, double
    if step:
        data += b"\x10" + _varint(step)  # 2: step, int64
    if version:
        data += _field(3, version.encode())  # 3: file_version
    if scalars:  # 5: summary, of values (1) with tag (1) and simple_value (2, float)
        values = (_field(1, tag.encode()) + b"\x15" + struct.pack("<f", value) for tag, value in scalars.items())
        data += _field(5, b"".join(_field(1, value) for value in values))
    if starts:
        data += _field(7, b"\x08\x01")  # 7: session_log, its status (1) START
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data))


class EventFile:
    """The figures of one model as TensorBoard reads them, one point per epoch.

    Every attempt writes a file of its own; the first point of a later one makes void what an earlier one has from there
    on, so that no epoch is there twice. Each point is written at once and whole: a kill can cut the last.

    Args:
        folder: of this model's files; made with the first point.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._handle: int | None = None

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Add the point of epoch number `step` (from 1).

        Raises:
            FastarError: the file cannot be written.
        """
        check_held(self._folder)
        record = event(step=step, scalars=figures)
        try:
            if self._handle is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                before = [int(found[1]) for name in os.listdir(self._folder) if (found := _NUMBERED.fullmatch(name))]
                number = max(before, default=-1) + 1
                path = self._folder / f"{_EVENTS}{number:010d}"
                self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
                start = event(step=step, starts=True) if before else b""
                record = event(version="brain.Event:2") + start + record
            os.write(self._handle, record)
        except OSError as error:
            raise FastarError(
                f"{self._folder}: figures cannot be written ({error.strerror}); free space or set "
                "logging.tensorboard=false"
            ) from error

    def close(self) -> None:
        """After the last point."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


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
        if masked_crc(length) != int.from_bytes(data[place + 8 : place + 12], "little"):
            return False
        end = place + 12 + int.from_bytes(length, "little")
        if end + 4 <= len(data) and masked_crc(data[place + 12 : end]) != int.from_bytes(data[end : end + 4], "little"):
            return False
        place = end + 4
    return True


class WandbRun:
    """A run folder's run at Weights & Biases; an epoch that was sent is not sent again.

    Args:
        folder: where its id, and what was sent, are kept.
        project: `logging.wandb`.
        settings: shown with it.

    Raises:
        FastarError: the package is not installed, or does not let the run begin.
    """

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]):
        wandb = import_wandb(project)
        self._file = folder / "wandb.json"
        self._sent: dict[str, int] = {}
        identity = None
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            kept = read_object(self._file)
            identity, self._sent = str(kept["id"]), {str(name): int(step) for name, step in kept["sent"].items()}
        try:
            self._run = wandb.init(
                project=project, name=folder.name, dir=str(folder), id=identity, resume="allow", config=dict(settings)
            )
        except Exception as error:  # its own kinds of errors: no login, no network
            reason = " ".join(str(error).split())
            raise FastarError(f"logging.wandb={project}: {reason}; set logging.wandb=null to go on without") from error
        self._id = str(self._run.id)

    def add(self, model: str, step: int, figures: Mapping[str, float]) -> None:
        """Send the point of epoch number `step` of `model`."""
        if step <= self._sent.get(model, 0):
            return
        self._run.log({f"{model}/epoch": step, **{f"{model}/{name}": value for name, value in figures.items()}})
        self._sent[model] = step
        write_atomically(self._file, json.dumps({"id": self._id, "sent": self._sent}).encode())

    def forget(self, model: str, step: int) -> None:
        """The points of `model` after number `step` are made again, and will differ."""
        self._sent[model] = min(self._sent.get(model, 0), step)

    def close(self) -> None:
        """Wait for what is being sent."""
        self._run.finish()


class LiveFigures:
    """Where a run's figures are shown, as `settings` say.

    Args:
        folder: the run folder.
        settings: `figures`.
        resolved: all settings of the run.

    Raises:
        FastarError: Weights & Biases is asked for and cannot be had.
    """

    def __init__(self, folder: Path, settings: LoggingSettings, resolved: Mapping[str, Any]):
        self._folder = folder
        self._settings = settings
        self._model: tuple[str, int] | None = None
        self._file: EventFile | None = None
        self._wandb = WandbRun(folder, settings.wandb, resolved) if settings.wandb else None

    def add(self, kind: str, index: int, step: int, figures: Mapping[str, float]) -> None:
        """Show the figures of epoch number `step` (from 1) of a model."""
        if self._settings.tensorboard:
            if self._file is None or self._model != (kind, index):
                self._end_file()
                self._file = EventFile(self._folder / "tensorboard" / f"{kind}-{index:04d}")
                self._model = (kind, index)
            self._file.add(step, figures)
        if self._wandb is not None:
            self._wandb.add(f"{kind}-{index:04d}", step, figures)

    def forget(self, kind: str, index: int, step: int) -> None:
        """The points of a model after number `step` are made again, and will differ."""
        self._end_file()
        if self._wandb is not None:
            self._wandb.forget(f"{kind}-{index:04d}", step)

    def close(self) -> None:
        """After the last."""
        self._end_file()
        if self._wandb is not None:
            self._wandb.close()

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


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


def finite(figures: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    """Those that are numbers.

    >>> finite([("a", 1.0), ("b", None), ("c", float("nan"))])
    {'a': 1.0}
    """
    return {name: float(value) for name, value in figures if value is not None and math.isfinite(value)}
