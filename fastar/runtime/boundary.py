"""Between a command and whoever started it: streams that may fail, and errors that nobody foresaw."""

from __future__ import annotations

import errno
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import IO, Any, TextIO, cast

from fastar._version import __version__
from fastar.errors import FastarError, printable

EXIT_BAD_INPUT = 2
# EX_SOFTWARE of sysexits.h.
EXIT_DEFECT = 70
# A shell's code for SIGPIPE: whoever read the output has read enough.
EXIT_UNREAD = 141
# Refusals of the system that no program can help: names and places.
_REFUSED_BY_THE_SYSTEM = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EIO),
    *(errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ENOTDIR, errno.EISDIR),
)


class _Nothing(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


class _Stream:
    """A text stream, up to its first failure, of which `failed` is told; what comes after it is dropped."""

    def __init__(self, stream: Any, failed: Callable[[OSError | ValueError], None]):
        self._stream, self._failed = stream, failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[..., object], *given: str) -> None:
        try:
            act(*given)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._stream = _Nothing()
            self._failed(error)


def _end(error: OSError | ValueError) -> None:
    """End a command whose output cannot be written."""
    if isinstance(error, BrokenPipeError):
        raise SystemExit(EXIT_UNREAD) from error
    why = getattr(error, "strerror", None) or error
    raise FastarError(f"the output cannot be written ({why}); files of a run are not touched by this") from error


def forgiving(stream: IO[str] | None) -> TextIO:
    """`stream`, silent from its first failure on; None (its descriptor was closed) is silent from the start."""
    return cast(TextIO, _Stream(_Nothing() if stream is None else stream, lambda error: None))


@contextmanager
def streams() -> Iterator[None]:
    """Around a command: what cannot be written to stdout ends it in one line (quietly where nobody reads on), and
    nothing that stays unwritten is met again by Python when it ends.

    Standard descriptors that are closed are opened on nothing, so that no file of the command's gets their numbers,
    which C libraries write to.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # the lowest that is free is this one; stdout's takes nothing, since somebody must hear of it
            os.set_inheritable(os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY), True)
    given = sys.stdout, sys.stderr
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that is not UTF-8, a ± where output is ASCII
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with redirect_stdout(cast(TextIO, _Stream(sys.stdout, _end))):
            yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            _settle(stream)
        sys.stdout, sys.stderr = given


def _settle(stream: TextIO) -> None:
    try:
        stream.flush()
    except (OSError, ValueError):  # was said, or cannot be; Python would try once more when it ends, and exit with 120
        with suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)


def say(line: str) -> None:
    """One line on stderr, where that can be written."""
    print(printable(line), file=forgiving(sys.stderr), flush=True)


def failure(error: BaseException, folder: Path | None = None) -> tuple[str, int]:
    """The line to say of an error that ends a command, and the exit code; `folder` keeps the traceback of a defect."""
    if isinstance(error, FastarError):
        return " ".join(str(error).split()), EXIT_BAD_INPUT
    refused = _refused_by_the_system(error)
    return (_unexpected(error, folder), EXIT_DEFECT) if refused is None else (refused, EXIT_BAD_INPUT)


def _refused_by_the_system(error: BaseException) -> str | None:
    """The line for an error that names a file and is the system's, not a defect; None: it is none."""
    if not isinstance(error, OSError) or error.filename is None or error.errno not in _REFUSED_BY_THE_SYSTEM:
        return None
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename)
    return f"{name if len(name) <= 300 else name[:300] + '...'}: cannot be used ({error.strerror})"


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
