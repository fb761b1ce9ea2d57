"""Progress: bars on a terminal, plain lines elsewhere, nothing at all when silent."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from fastar.runtime.progress import SILENT, TerminalProgress


def plain(**more: Any) -> tuple[TerminalProgress, io.StringIO]:
    stream = io.StringIO()
    return TerminalProgress(Console(file=stream, width=40), **more), stream


def terminal() -> tuple[TerminalProgress, io.StringIO]:
    stream = io.StringIO()
    return TerminalProgress(Console(file=stream, force_terminal=True, width=120)), stream


def test_silent_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with SILENT.task("work", total=2) as advance:
        advance()
        advance(1, note="x")
    SILENT.line("text")
    assert capsys.readouterr() == ("", "")


def test_plain_is_one_line_at_the_end_with_rate_and_note() -> None:
    progress, stream = plain()
    with progress.task("training source 0", total=3, unit="epochs") as advance:
        advance(1, note="loss 2")
        assert stream.getvalue() == ""
        advance(2, note="loss [red]1[/red]")
        advance(0)
    line = stream.getvalue()
    assert re.fullmatch(r"training source 0: 3 epochs in \d+\.\d s, [\d,.]+ epochs/s, loss \[red\]1\[/red\]\n", line), (
        line
    )
    assert "\x1b" not in line  # no colours in files


def test_plain_says_nothing_of_nothing_or_of_failures() -> None:
    progress, stream = plain()
    with progress.task("source models", total=0), progress.task("what others did", total=3):
        pass
    with pytest.raises(KeyError), progress.task("work", total=1):
        raise KeyError
    assert stream.getvalue() == ""


def test_plain_tells_of_tasks_within_others_only_if_they_were_long() -> None:
    for seconds, told in ((9.0, ["all"]), (11.0, ["part", "all"])):
        progress, stream = plain(clock=iter([0.0, 0.0, *[seconds] * 4]).__next__)
        with progress.task("all", total=1) as outer, progress.task("part", total=1) as inner:
            inner()
            outer()
        assert [line.split(":")[0] for line in stream.getvalue().splitlines()] == told


def test_plain_says_where_long_work_stands() -> None:
    progress, stream = plain(clock=iter([0.0, 299.0, 300.0, 301.0, 400.0]).__next__)
    with progress.task("writing", total=4000, unit="images") as advance:
        for _ in range(3):
            advance(1000)
    assert stream.getvalue().splitlines()[0] == "writing: 2,000 of 4,000 images, 6.7 images/s, 5 minutes left"
    assert len(stream.getvalue().splitlines()) == 2


def test_lines_are_not_wrapped_or_interpreted() -> None:
    progress, stream = plain()
    progress.line("[bold]" + "x" * 100)
    assert stream.getvalue() == "[bold]" + "x" * 100 + "\n"


def test_default_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    TerminalProgress().line("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_terminal_shows_nested_bars_and_clears_them() -> None:
    progress, stream = terminal()
    with progress.task("models", total=2, unit="models") as outer:
        with progress.task("training", total=5, unit="epochs") as inner:
            inner(5, note="loss 0.5")
        outer(2)
        assert progress._live is not None
        assert [task.description for task in progress._live.tasks] == ["models"]
        assert progress._live.tasks[0].completed == 2
    assert progress._live is None
    with pytest.raises(KeyError), progress.task("again", total=1):
        raise KeyError
    assert progress._live is None  # a failed task leaves no live display behind
    with progress.task("again", total=1):
        pass
    assert "models" in stream.getvalue()
