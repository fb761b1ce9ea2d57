"""Files that are either as they were or complete."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from fastar.errors import FastarError


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` is either as it was or complete, and survives a power cut.

    Raises:
        FastarError: the disk is full or the folder not writable; nothing is left behind.
    """
    # No two writers share it: threads have one process id, and so may processes of two containers or hosts.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        what = f"{path}: cannot be written ({error.strerror}); free space or choose another folder"
        raise FastarError(what) from error
    finally:
        with suppress(OSError):  # gone after the rename; else best effort
            temporary.unlink()
