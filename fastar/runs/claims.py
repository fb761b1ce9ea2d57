"""Work that processes share: each part is claimed by holding a folder, and each process at it holds one of its own."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fastar.errors import refusal
from fastar.runs.lock import (
    DEAD_SECONDS,
    HANDLE,
    NAME,
    TOUCH_SECONDS,
    Holder,
    InUse,
    Taken,
    check_held,
    held_as_taken,
    is_held,
    lost,
    read_holder,
    taken,
    touched,
)

PROCESSES = "processes"
"""Folder of the processes at work in a folder: of each one that it holds."""
JOBS = "jobs"
"""Folder of the logs of jobs that a launcher started."""


@contextmanager
def claim(folder: Path, guards: Sequence[Path] = (), *, dead_seconds: float = DEAD_SECONDS) -> Iterator[bool]:
    """Hold `folder`, made where it is not there, unless another process does; tell whether it is held. Does not wait.

    An empty folder is removed at the end. One whose holder, on another host, was not seen to touch it for
    `dead_seconds` by this process's clock is taken over: ask again.

    Args:
        guards: as of `hold`.

    Raises:
        FastarError: the folder or the lock cannot be written, or what it is in was this process's and is no longer.
    """
    check_held(folder)  # else a run folder that was moved away would be made anew
    with refusal(f"{folder}: cannot be made", "free space or choose another folder"):
        _make(folder)
    try:
        own: Taken | None = taken(folder, None, dead_seconds)
    except (InUse, FileNotFoundError):  # or removed by another, which is done with it
        own = None
    if own is None:
        yield False
        return
    with held_as_taken(folder, own, guards, TOUCH_SECONDS):
        try:
            yield True
        finally:
            if lost(folder) is None:
                _remove_empty(folder)


class Processes:
    """The processes at work in `folder`: this one, once it has joined, and others."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._seats = folder / PROCESSES
        self._own = self._seats / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Be one of them until the block ends; what is written in the folder is guarded by that (`check_held`)."""
        with claim(self._own, [self._folder]):
            yield

    def others(self) -> list[Holder]:
        """The others that are alive."""
        # By the file system's clock, where this process has touched a file: hosts' clocks may differ.
        now, found = touched(self._own), list[Holder]()
        for seat in sorted(self._seats.glob("*")):
            holder = read_holder(seat)
            if seat != self._own and holder is not None and is_held(seat, now):
                found.append(holder)
        return found

    def locks(self) -> list[Path]:
        """The lock files of others, where they are: one that was killed early has none in its folder."""
        return [path / NAME for path in self._seats.glob("*") if path != self._own]


def _remove_empty(folder: Path) -> None:
    """Remove a folder that this process holds, and the one around it, where nothing else is in them."""
    with suppress(OSError):
        if all(path.name in (NAME, HANDLE) for path in folder.iterdir()):
            for name in filter(None, (NAME, HANDLE)):
                (folder / name).unlink()
            folder.rmdir()
            folder.parent.rmdir()


def _make(folder: Path) -> None:
    """Make a folder, though others remove those around it that are empty."""
    for left in reversed(range(10)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return
        except (FileNotFoundError, FileExistsError):  # the latter: it was removed before it was seen to be a folder
            if not left:
                raise
