"""The line and the exit code of an error that ends a command."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from pathlib import Path

from fastar._version import __version__
from fastar.errors import FastarError
from fastar.runtime.standard_streams import forgiving

EXIT_BAD_INPUT = 2
# EX_SOFTWARE of sysexits.h.
EXIT_DEFECT = 70
# Refusals of the system that no program can help: names and places.
_REFUSED_BY_THE_SYSTEM = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EIO),
    *(errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOTDIR, errno.EISDIR),
)


def failure(error: BaseException, folder: Path | None = None) -> tuple[str, int]:
    """The line to say of an error that ends a command, and the exit code; `folder` keeps the traceback of a defect."""
    if isinstance(error, FastarError):
        return " ".join(str(error).split()), EXIT_BAD_INPUT
    if isinstance(error, OSError) and error.filename is not None and error.errno in _REFUSED_BY_THE_SYSTEM:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
        shown = name if len(name) <= 300 else f"{name[:300]}..."
        return f"{shown}: cannot be used ({error.strerror})", EXIT_BAD_INPUT
    return _unexpected(error, folder), EXIT_DEFECT


def _unexpected(error: BaseException, folder: Path | None) -> str:
    """The line for a defect; its traceback goes to a file in `folder`, else a temporary one, else to stderr."""
    found = f"unexpected error: {type(error).__name__}: {' '.join(str(error).split())[:300]}".rstrip(": ")
    text = "".join(traceback.format_exception(error))
    for place in (folder, None):
        if place is not None and not place.is_dir():
            continue
        try:
            number, path = tempfile.mkstemp(prefix="fastar-traceback-", suffix=".txt", dir=place)
            with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"fastar {__version__}, Python {sys.version}\n{sys.argv}\n\n{text}")
            return f"{found}; the traceback is in {path}; please report it"
        except OSError:
            continue
    print(text, end="", file=forgiving(sys.stderr))
    return f"{found}; the traceback is above; please report it"
