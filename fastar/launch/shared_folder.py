"""Checks of the folder that jobs share: that all nodes see it, and whether its file system has locks."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

from fastar.errors import FastarError, refusal
from fastar.runtime.progress import Progress


def left_handshake(logs: Path) -> Path:
    """A new file that jobs look for, in the folder of their logs, which is made; its absolute path.

    Raises:
        FastarError: it cannot be written.
    """
    path = Path(os.path.abspath(logs / f"handshake-{secrets.token_hex(4)}"))
    with refusal(f"{logs}: cannot be written", "free space or choose another run folder (out)"):
        logs.mkdir(parents=True, exist_ok=True)
        path.touch()
    return path


def not_shared(handshake: Path, host: str = "") -> str:
    """The line of a job that does not find the file."""
    folder = handshake.parent.parent
    return (
        f"{folder}: on {host or socket.gethostname()} this is not the folder that the jobs were started for; choose a "
        "run folder (out) that all nodes share"
    )


def check_handshake(handshake: Path) -> None:
    """Raise FastarError where this host does not have the file."""
    if not handshake.is_file():
        raise FastarError(not_shared(handshake))


def say_if_without_locks(logs: Path, progress: Progress) -> None:
    """Say that the file system has no locks, and what is done about it, where that is so."""
    from filelock import lock_descriptor  # only here: what plans takes no lock

    probe = logs / "locks"
    with probe.open("ab") as file:
        try:
            lock_descriptor(file.fileno(), blocking=False)
        except OSError:
            progress.line(
                f"{logs.parent}: its file system has no locks; processes keep apart by lock.json files, and what a "
                "dead one on another host left is taken up after two minutes"
            )
    probe.unlink(missing_ok=True)
