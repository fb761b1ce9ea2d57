"""Output that cannot be written, names that a terminal's library or UTF-8 would change, and defects: what a run is
worth never hangs on what is said of it."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from cli_cases import fastar, refused, tiny
from rich.console import Console

from fastar import config
from fastar.cli.main import main
from fastar.cli.output import print_table
from fastar.config import load_settings
from fastar.config.strict_yaml import read_yaml
from fastar.errors import printable
from fastar.report.results import barriers_table
from fastar.runs import RunFolder
from fastar.runtime.progress import TerminalProgress
from fastar.runtime.standard_streams import say

COMMAND = [sys.executable, "-m", "fastar"]
# A folder in a folder; as rich reads it: bold, an emoji, and an error; and not UTF-8.
READING = "yaml.SafeLoader.get_single_node"  # of every recipe
NAME = os.fsdecode(b"[bold]wide :x: \xff[/x]")


class Failing(io.StringIO):
    """A stream that takes `room` characters and then fails."""

    def __init__(self, number: int, room: int = 0, *, terminal: bool = False):
        super().__init__()
        self.number, self.room, self.terminal, self.refusals = number, room, terminal, 0

    def write(self, text: str) -> int:
        if len(self.getvalue()) + len(text) > self.room:
            self.refusals += 1
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)

    def isatty(self) -> bool:
        return self.terminal


def called(*arguments: object, out: Any, err: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """What `fastar ARGUMENTS` exits with, its streams being these."""
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    monkeypatch.undo()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / NAME
    outcome = fastar("train-star", *tiny(data), "--out", folder)
    assert outcome.code == 0, outcome
    assert outcome.out.endswith(f"picture: {folder}/barrier.png\n")
    return folder


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EPIPE, errno.EBADF, errno.EIO])
@pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
def test_progress_that_cannot_be_written_is_silent_from_then_on(
    monkeypatch: pytest.MonkeyPatch, number: int, terminal: bool
) -> None:
    ended: list[object] = []  # threads that an error ended, such as the live display's
    monkeypatch.setattr(threading, "excepthook", ended.append)
    stream = Failing(number, room=400 if terminal else 30, terminal=terminal)
    progress = TerminalProgress(Console(file=stream, force_terminal=terminal, width=80))
    progress.line("before")
    with progress.task("models", total=20) as advance:
        for _ in range(20):
            with progress.task("inner", total=1) as inner:
                progress.line("between")
                inner()
            advance()
    assert stream.getvalue().startswith("before\n")
    assert stream.refusals == 1
    assert ended == []


def test_progress_without_a_stderr_does_not_go_to_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    TerminalProgress().line("nobody hears this")
    say("nor this")
    monkeypatch.undo()
    assert capsys.readouterr() == ("", "")


def test_a_closed_stream_is_as_one_that_fails() -> None:
    stream = io.StringIO()
    progress = TerminalProgress(Console(file=stream, width=80))
    stream.close()
    progress.line("late")


def test_training_goes_on_when_nobody_hears_of_its_progress(
    tmp_path: Path, run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [option for option in tiny(data) if option != "--quiet"]
    out, err = io.StringIO(), Failing(errno.EPIPE)
    code = called("train-star", *options, "--out", tmp_path / "run", out=out, err=err, monkeypatch=monkeypatch)
    assert (code, err.refusals) == (0, 1)
    assert out.getvalue().endswith(f"picture: {tmp_path}/run/barrier.png\n")
    results = [json.loads((folder / "results.json").read_text()) for folder in (run, tmp_path / "run")]
    assert results[0]["paths"] == results[1]["paths"]


REPORTS = [("report", []), ("runs", ["--json"]), ("configs", [])]


@pytest.mark.parametrize(("command", "options"), REPORTS)
def test_results_that_cannot_be_printed_are_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, command: str, options: list[str]
) -> None:
    err = io.StringIO()
    arguments = [command, *options, *([] if command == "configs" else [run])]
    code = called(*arguments, out=Failing(errno.ENOSPC), err=err, monkeypatch=monkeypatch)
    assert code == 2
    assert re.fullmatch(r"fastar: the output cannot be written \(No space left on device\).*\n", err.getvalue())


@pytest.mark.parametrize(("command", "options"), REPORTS)
def test_whoever_has_read_enough_ends_a_command_without_a_word(
    run: Path, monkeypatch: pytest.MonkeyPatch, command: str, options: list[str]
) -> None:
    out, err = Failing(errno.EPIPE, room=10), io.StringIO()
    arguments = [command, *options, *([] if command == "configs" else [run])]
    assert called(*arguments, out=out, err=err, monkeypatch=monkeypatch) == 141  # as a shell has it of SIGPIPE
    assert err.getvalue() == ""


def test_neither_stream_can_be_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {"out": Failing(errno.ENOSPC), "err": Failing(errno.ENOSPC)}
    assert called("report", run, **streams, monkeypatch=monkeypatch) == 2
    assert called("nonsense", **streams, monkeypatch=monkeypatch) == 2


def test_output_in_ascii_has_other_boxes_and_loses_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ü").symlink_to(run)
    for arguments in (["report", tmp_path / "ü"], ["runs", run], ["configs"], ["--help"]):
        raw = io.BytesIO()
        out, err = io.TextIOWrapper(raw, encoding="ascii"), io.StringIO()
        assert called(*arguments, out=out, err=err, monkeypatch=monkeypatch) == 0
        text = raw.getvalue().decode("ascii")
        assert "+--" in text
        assert err.getvalue() == ""
        if arguments[0] == "report":
            assert f"picture: {tmp_path}/\\xfc/barrier.png\n" in text


def test_names_are_printed_as_they_are(run: Path, tmp_path: Path) -> None:
    shown = fastar("runs", run.parent.parent).out
    assert f" {NAME} " in shown
    path = {"first": f"{NAME}/a.pt", "second": f"{NAME}/b.pt", "train_loss": [0.5, 0.25]}
    path |= {"train_barrier": 0.125, "test_barrier": None}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        print_table(barriers_table([path]))
    assert f"Barriers from {NAME}/a.pt to {NAME}/" in " ".join(out.getvalue().split())
    assert f"{printable(NAME)}/nothing" in refused("report", tmp_path / NAME / "nothing")


def test_a_run_in_a_folder_that_is_not_utf8_works_and_is_printed_with_escapes(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (run / "sources" / f"seed-{number:04d}.safetensors" for number in (0, 1))
    written = run.parent / "b.safetensors"
    for arguments in (
        ["report", run],
        ["train-star", *tiny(data), "--out", run],
        ["match", first, second, "--out", written],
    ):
        raw = io.BytesIO()
        out, err = io.TextIOWrapper(raw, encoding="utf-8"), io.StringIO()
        assert called(*arguments, out=out, err=err, monkeypatch=monkeypatch) == 0, err.getvalue()
        assert printable(str(written.parent if arguments[0] == "match" else run)) in raw.getvalue().decode()
        assert err.getvalue() == ""
    (row,) = json.loads(fastar("runs", run.parent, "--json").out)
    assert row["run"] == str(run)
    _, taken = RunFolder(run).sources_to_take_over()
    settings = load_settings(dataset="digits", overrides=shlex.split(taken))
    assert settings.sources.folder == run / "sources"
    with RunFolder(tmp_path / "new").open(settings) as new:
        assert read_yaml(new.config.read_text())["sources"]["folder"] == str(run / "sources")


def test_names_in_progress_are_as_they_are() -> None:
    for terminal in (False, True):
        stream = io.StringIO()
        progress = TerminalProgress(Console(file=stream, force_terminal=terminal, width=120, color_system=None))
        with progress.task(f"reading {NAME}", total=1) as advance:
            advance(1, note=NAME)
        progress.line(NAME)
        assert stream.getvalue().count(printable(NAME)) >= 1
        assert stream.getvalue().replace("\udcff", "\\udcff").count(printable(NAME)) >= 2
        assert "❌" not in stream.getvalue()


@pytest.mark.parametrize(
    "redirect",
    [
        pytest.param(">&-", id="stdout closed"),
        pytest.param(">/dev/full", id="stdout full"),
        pytest.param(">/dev/full 2>&1", id="both full", marks=pytest.mark.slow),
        pytest.param(">&- 2>&- <&-", id="all closed", marks=pytest.mark.slow),
        pytest.param(">/dev/null 2>/dev/full", id="stderr full", marks=pytest.mark.slow),
        pytest.param(">/dev/null 2>&-", id="stderr closed", marks=pytest.mark.slow),
    ],
)
def test_python_ends_without_a_word_of_its_own(run: Path, redirect: str) -> None:
    """What the interpreter would flush, print and exit with (120) after the command."""
    command = ["sh", "-c", f'"$@" {redirect}', "sh", *COMMAND, "runs", run]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    fine = redirect.startswith(">/dev/null")
    said = "" if fine or "2>" in redirect else "fastar: the output cannot be written"
    assert (ended.returncode, ended.stderr.partition(" (")[0]) == (0 if fine else 2, said)
    assert ended.stderr.count("\n") == bool(said)


def failing(monkeypatch: pytest.MonkeyPatch, what: str, error: BaseException, folder: Path) -> None:
    """This function of a library fails; the system's temporary folder is `folder`."""

    def fails(*arguments: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(what, fails)
    monkeypatch.setattr("tempfile.tempdir", str(folder))


class Panic(BaseException):
    """As libraries in Rust raise it: no Exception."""


@pytest.mark.parametrize("defect", [ZeroDivisionError("a\nb"), MemoryError(), RecursionError("deep"), Panic("rust")])
def test_a_defect_is_one_line_that_says_where_its_traceback_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, defect: BaseException
) -> None:
    failing(monkeypatch, READING, defect, tmp_path)
    outcome = fastar("train-star", "--dataset", "digits")
    assert (outcome.code, outcome.out) == (70, "")
    (file,) = tmp_path.iterdir()
    kind, said = type(defect).__name__, f": {' '.join(str(defect).split())}" if str(defect) else ""
    assert outcome.err == (f"fastar: unexpected error: {kind}{said}; the traceback is in {file}; please report it\n")
    written = file.read_text()
    assert "Traceback (most recent call last)" in written
    assert "in fails" in written
    assert kind in written


def test_a_defect_within_a_run_is_kept_in_its_folder(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "matplotlib.figure.Figure.savefig", KeyError("x"), tmp_path)
    (run / "results.json").touch()  # newer than its picture, which is drawn anew
    before = {path.name for path in run.iterdir()}
    outcome = fastar("report", run)
    assert outcome.code == 70
    (name,) = {path.name for path in run.iterdir()} - before
    assert f"the traceback is in {printable(str(run / name))};" in outcome.err
    (run / name).unlink()

    # Before there is a folder: it is not made for this.
    failing(monkeypatch, "psutil.virtual_memory", KeyError("x"), tmp_path)
    outcome = fastar("train-star", *tiny(data), "--out", tmp_path / "new")
    assert outcome.code == 70
    assert [path.suffix for path in tmp_path.iterdir()] == [".txt"]


def test_a_traceback_that_cannot_be_kept_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, READING, ZeroDivisionError(), tmp_path / "not there")
    outcome = fastar("train-star", "--dataset", "digits")
    assert outcome.code == 70
    assert outcome.err.startswith("Traceback (most recent call last)")
    assert outcome.err.endswith(
        "fastar: unexpected error: ZeroDivisionError; the traceback is above; please report it\n"
    )


def test_python_code_still_gets_the_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, READING, ZeroDivisionError(), tmp_path)
    with pytest.raises(ZeroDivisionError):
        config.load_settings(dataset="digits")


def test_the_tool_that_writes_data_has_the_same_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(__file__).resolve().parents[1] / "tools" / "write_ffcv.py"
    specification = importlib.util.spec_from_file_location(file.stem, file)
    assert specification is not None
    assert specification.loader is not None
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    arguments = ["--dataset", "digits", "--out", str(tmp_path / "data")]
    for number in (errno.ENOSPC, errno.EPIPE):
        err = io.StringIO()
        monkeypatch.setattr(sys, "stdout", Failing(number))
        monkeypatch.setattr(sys, "stderr", err)
        if number == errno.EPIPE:
            with pytest.raises(SystemExit, match="141"):
                tool.main(arguments)
        else:
            assert tool.main(arguments) == 2
            assert "error: the output cannot be written (No space left on device)" in err.getvalue()
        monkeypatch.undo()

    arguments[-1] = str(tmp_path / "more")
    failing(monkeypatch, "sklearn.datasets.load_digits", ZeroDivisionError(), tmp_path)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert tool.main(arguments) == 70
    (kept,) = tmp_path.glob("*.txt")
    assert (
        said.getvalue() == f"error: unexpected error: ZeroDivisionError; the traceback is in {kept}; please report it\n"
    )


def test_what_the_system_refuses_is_no_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = PermissionError(errno.EACCES, "Permission denied", tmp_path / "x")
    failing(monkeypatch, "psutil.virtual_memory", denied, tmp_path)
    said = refused("train-star", *tiny(tmp_path / "data"), "--out", tmp_path / "run")
    assert said == f"{tmp_path}/x: cannot be used (Permission denied)"
    assert list(tmp_path.iterdir()) == []
