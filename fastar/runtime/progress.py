"""Progress of long work, told to whoever watches: a terminal, a log file, or nobody.

Rooms take a `Progress` and never print. `SILENT` is the default; `fastar.cli` passes a `TerminalProgress`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.text import Text

from fastar.errors import printable
from fastar.runtime.standard_streams import forgiving


class Advance(Protocol):
    """Reports `count` more units done; `note` is a short text shown beside the bar (a loss, a file name)."""

    def __call__(self, count: int = 1, note: str = "") -> None: ...


class Progress(Protocol):
    """Shows tasks of known length, and lines of text."""

    def task(self, description: str, total: int, unit: str = "items") -> AbstractContextManager[Advance]:
        """A context manager around work of `total` units; inside, call the `Advance` it yields."""
        ...

    def line(self, text: str) -> None:
        """Show one line of text now."""
        ...


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def task(self, description: str, total: int, unit: str = "items") -> Iterator[Advance]:
        yield lambda count=1, note="": None

    def line(self, text: str) -> None:
        return


SILENT = SilentProgress()


def size_text(size: float) -> str:
    """Bytes as people read them.

    >>> size_text(11_200_000_000), size_text(44_700_000)
    ('11.2 GB', '44.7 MB')
    """
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def count_text(count: int, noun: str) -> str:
    """A number of things.

    >>> count_text(1, "source"), count_text(2, "source")
    ('1 source', '2 sources')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class _RateColumn(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {task.fields['unit']}/s", style="progress.data.speed")


# Tasks within others are told of in a log only if they took this long: a run has thousands of short ones.
_WORTH_A_LINE = 10.0
_TELL_SECONDS = 300.0  # after so many, a log is told where a task stands


class TerminalProgress:
    """Bars with rate and time remaining on a terminal; elsewhere a plain line every five minutes and when a task ends,
    unless it was a short one within another. Writes to stderr; where that fails it says nothing from then on, and the
    work goes on."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self.console = console or Console(file=sys.stderr)
        self.console.file = forgiving(sys.stderr if console is None else console.file)
        self._live: RichProgress | None = None
        self._depth = 0

    @contextmanager
    def task(self, description: str, total: int, unit: str = "items") -> Iterator[Advance]:
        if self.console.is_terminal:
            with self._bars() as bars:
                identity = bars.add_task(description, total=total, unit=unit, note="")

                def advance(count: int = 1, note: str = "") -> None:
                    bars.update(identity, advance=count, note=note)

                try:
                    yield advance
                finally:
                    bars.remove_task(identity)
            return

        start = told = self._clock()
        done, last_note = 0, ""

        def advance_plain(count: int = 1, note: str = "") -> None:
            nonlocal done, last_note, told
            done, last_note, now = done + count, note or last_note, self._clock()
            if done and now - told >= _TELL_SECONDS:
                told, rate = now, done / (now - start)
                left = f"{(total - done) / rate / 60:,.0f} minutes left"
                self.line(f"{description}: {done:,} of {total:,} {unit}, {rate:,.1f} {unit}/s, {left}")

        self._depth += 1
        try:
            yield advance_plain
        finally:
            self._depth -= 1
        seconds = self._clock() - start
        if not done or (self._depth and seconds < _WORTH_A_LINE):  # others did it, or there is nothing to tell
            return
        rate = f", {done / seconds:,.1f} {unit}/s" if seconds > 0 else ""
        self.line(f"{description}: {done} {unit} in {seconds:.1f} s{rate}{', ' + last_note if last_note else ''}")

    def line(self, text: str) -> None:
        self.console.print(printable(text), highlight=False, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def _bars(self) -> Iterator[RichProgress]:
        """One live display, shared by nested tasks."""
        if self._live is not None:
            yield self._live
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with RichProgress(*columns, console=self.console, transient=True) as bars:
            self._live = bars
            try:
                yield bars
            finally:
                self._live = None
