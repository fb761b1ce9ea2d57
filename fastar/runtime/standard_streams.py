"""Standard output and error of a command: streams that may be closed, full, or read by nobody."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import IO, Any, TextIO, cast

from fastar.errors import FastarError, printable

# A shell's code for SIGPIPE: whoever read the output has read enough.
EXIT_UNREAD = 141


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


class _Nothing(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


def forgiving(stream: IO[str] | None) -> TextIO:
    """`stream`, silent from its first failure on; None (its descriptor was closed) is silent from the start."""
    return cast(TextIO, _Stream(_Nothing() if stream is None else stream, lambda error: None))


def say(line: str) -> None:
    """Print one line on stderr, where that can be written."""
    print(printable(line), file=forgiving(sys.stderr), flush=True)


@contextmanager
def streams() -> Iterator[None]:
    """Guard the streams of a command: output that cannot be written ends it in one line (quietly where nobody reads
    on), and Python does not meet it again when it ends.

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
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that is not UTF-8, or not ASCII where output is
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with redirect_stdout(cast(TextIO, _Stream(sys.stdout, _end))):
            yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            _settle(stream)
        sys.stdout, sys.stderr = given


def _end(error: OSError | ValueError) -> None:
    """End a command whose output cannot be written."""
    if isinstance(error, BrokenPipeError):
        raise SystemExit(EXIT_UNREAD) from error
    why = getattr(error, "strerror", None) or error
    raise FastarError(f"the output cannot be written ({why}); files of a run are not touched by this") from error


def _settle(stream: TextIO) -> None:
    try:
        stream.flush()
    except (OSError, ValueError):  # was said, or cannot be; Python would try once more when it ends, and exit with 120
        with suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)


def plus_minus() -> str:
    """The sign ±, or +/- where stdout cannot encode it."""
    try:
        "±".encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return "+/-"
    return "±"
