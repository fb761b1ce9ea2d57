"""Requests to stop, by Ctrl-C or a batch scheduler: training saves first, all else stops at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

# EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command goes on.
EXIT_CONTINUE = 75
EXIT_INTERRUPTED = 130
# SIGTERM comes before a batch scheduler's kill; SIGUSR1 (Windows has none) some minutes earlier, where asked for.
SCHEDULERS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Stopped(BaseException):
    """The user or a batch scheduler asked the run to stop. No error: nothing is to catch it but the command line.

    `code` is the process's exit code; `saved` says what was saved last, if something was.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number
        self.code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_CONTINUE
        self.reason = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        self.saved = ""

    def __str__(self) -> str:
        return f"{self.reason}; run it again to go on from {self.saved or 'what is finished'}"


_deferring = False
_request: Stopped | None = None


@contextmanager
def signals_stop(
    signals: Sequence[signal.Signals] = (signal.SIGINT, *SCHEDULERS), *, once: bool = False
) -> Iterator[None]:
    """Let SIGTERM, SIGUSR1 and Ctrl-C (or other `signals`) raise `Stopped` inside: at once, or as `deferred` says.

    A second Ctrl-C raises at once wherever it comes (with `once` it is ignored); a third is the system's own. Signals
    that are ignored stay so (`nohup`), and outside the main thread nothing changes.
    """
    global _request
    before: dict[int, Any] = {}
    owner = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        global _request
        if os.getpid() != owner:  # a child that was forked inside
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
            return
        again = _request is not None
        if again and (once or number != signal.SIGINT):
            return  # it is being done
        if _request is None:
            _request = Stopped(number)
        if again:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise Stopped(number)
        if not _deferring:
            raise _request

    try:
        for number in signals:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        _request = None
        for changed, handler in before.items():
            signal.signal(changed, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Let the first request inside wait until somebody asks (`requested`) or the block ends."""
    global _deferring
    outer, _deferring = _deferring, True
    try:
        yield
    finally:
        _deferring = outer
    if _request is not None and not _deferring:
        raise _request


def requested() -> Stopped | None:
    """The request that is waiting: save, then raise it."""
    return _request
