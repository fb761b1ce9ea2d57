"""Files that are either as they were or complete, in folders that are still this process's."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastar.errors import refusal
from fastar.runs.lock import check_held
from fastar.runtime.json_files import sealed


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` is either as it was or complete, and survives a power cut.

    Raises:
        FastarError: the disk is full or the folder not writable, or it was this process's and is no longer
            (`check_held`); nothing is left behind.
    """
    check_held(path)
    # No two writers share it: threads have one process id, and so may processes of two containers or hosts.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with refusal(f"{path}: cannot be written", "free space or choose another folder"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            check_held(path)  # again: writing may have taken long
            temporary.replace(path)
    finally:
        with suppress(OSError):  # gone after the rename; else best effort
            temporary.unlink()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically, numbers unrounded, with a digest of the content: `fastar verify` sees damage."""
    write_atomically(path, (json.dumps(sealed(content), indent=1) + "\n").encode())


def delete(path: Path) -> None:
    """Delete a file, if it is there.

    Raises:
        FastarError: see `write_atomically`.
    """
    check_held(path)
    with refusal(f"{path}: cannot be deleted", "delete it or move it away"):
        path.unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    """Delete a folder unless something is in it."""
    with suppress(OSError):
        folder.rmdir()


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and in those in it. Others may delete some meanwhile, which `Path.rglob` does not take."""
    return (Path(place) / name for place, _, names in os.walk(folder) for name in names)
