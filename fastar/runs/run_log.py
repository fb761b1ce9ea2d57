"""A run's `log.jsonl`: a line for each epoch, each with a checksum, that a kill can cut and a resumed run repairs.

Several processes may write to it. Each locks the file while it does; where the file system has no locks, lines that two
hosts write at one moment can be lost.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fastar.errors import refusal
from fastar.runs.atomic import write_atomically
from fastar.runs.lock import check_held
from fastar.runtime.json_files import parse_object, read_file

_MARK = b', "checksum": "'
# A line that had a checksum, whichever of its bytes has become another.
_CHECKED = re.compile(rb'checksum|"[^"]{8}"\}.?\Z', re.DOTALL)
# The end of a whole line of the log, whatever its last byte has become.
_LINE_END = re.compile(rb'"checksum": "[0-9a-f]{8}"\}.?\Z|\n\Z', re.DOTALL)


class RunLog:
    """The log of a run.

    Args:
        path: its file, which need not be there.
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, **entry: Any) -> None:
        """Append one line, as `extend`."""
        self.extend([entry])

    def extend(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Append lines, each with a checksum as its last value.

        Raises:
            FastarError: they cannot be written, or the folder is another process's by now.
        """
        check_held(self.path)
        lines = b"".join(map(_line, entries))
        with refusal(f"{self.path}: cannot be written", "free space or choose another folder"), self._locked() as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # cut by a kill: that line is lost, not this one too
                    lines = b"\n" + lines
            file.write(lines)

    def lines(self) -> list[dict[str, Any] | None]:
        """All lines that are not empty; None: one that was cut by a kill, or is damaged.

        Raises:
            FastarError: it cannot be read.
        """
        return [_entry(line) for line in self._lines()]

    def read(self) -> list[dict[str, Any]]:
        """All whole lines (what a kill cut is left out)."""
        return [entry for entry in self.lines() if entry is not None]

    def newest_first(self) -> Iterator[dict[str, Any]]:
        """The whole lines, the last one first, each taken apart when it is asked for: of what ends early.

        Raises:
            FastarError: it cannot be read.
        """
        return (entry for line in reversed(self._lines()) if (entry := _entry(line)) is not None)

    def is_cut(self) -> bool:
        """Tell whether a kill has cut the last line: its end is missing."""
        return not _LINE_END.search(read_file(self.path))

    def repair(self, epochs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Make the epochs of some models, by their names, those that their trainings go on from: lines of epochs that
        were done after the last checkpoint go (they are done again), lines that a power cut took come back."""
        if self.path.exists() or any(epochs.values()):
            with self._locked():
                self._repair(epochs)

    def _repair(self, epochs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        lines = self.lines()
        entries = [entry for entry in lines if entry is not None]
        of_models = [entry for entry in entries if entry.get("model") in epochs and "epoch" in entry]
        others = [entry for entry in entries if entry.get("model") not in epochs or "epoch" not in entry]
        kept = {(entry["model"], entry["epoch"]): entry for entry in of_models}
        found: dict[str, list[int]] = {model: [] for model in epochs}
        for model, epoch in kept:
            found[model].append(epoch)
        as_wanted = found == {model: [entry["epoch"] for entry in some] for model, some in epochs.items()}
        if as_wanted and len(others) + len(kept) == len(lines):  # each once, and none damaged
            return
        wanted = [kept.get((model, entry["epoch"]), entry) for model, some in epochs.items() for entry in some]
        write_atomically(self.path, b"".join(map(_line, [*others, *wanted])))

    def take(self, models: Collection[str], other: RunLog) -> None:
        """Take the epochs of models from another log, in place of those that are here."""
        epochs = [entry for entry in other.read() if entry.get("model") in models and "epoch" in entry]
        with self._locked():
            kept = [entry for entry in self.read() if entry.get("model") not in models or "epoch" not in entry]
            write_atomically(self.path, b"".join(map(_line, [*kept, *epochs])))

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file, made where it is not there, for this process alone; open to be read and appended to."""
        from filelock import lock_descriptor  # only here: what reads logs takes no lock, and the import 20 ms

        while True:
            with self.path.open("ab+") as file:
                with suppress(OSError):  # the file system has no locks
                    lock_descriptor(file.fileno(), poll_interval=0.005)
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):  # else it was written anew meanwhile
                    yield file
                    return

    def _lines(self) -> list[bytes]:
        with refusal(f"{self.path}: cannot be read", "make it readable"):
            lines = read_file(self.path).splitlines() if self.path.exists() else []
        return [line for line in lines if line.strip()]


def _checksum(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()


def _line(entry: Mapping[str, Any]) -> bytes:
    """A line of the log, with a checksum of the rest as its last value."""
    text = json.dumps(entry).encode()
    return text[:-1] + _MARK + _checksum(text) + b'"}\n'


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry in a line of the log; None: not a whole one. Lines of older versions have no checksum."""
    front, _, rest = line.rpartition(_MARK)
    text = front + b"}"
    try:
        if rest == _checksum(text) + b'"}':
            return parse_object(text)
        return None if _CHECKED.search(line) else parse_object(line)
    except ValueError:
        return None
