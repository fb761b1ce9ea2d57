"""The command line called in this process, on runs small enough to take a second."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

from fastar.cli.main import main


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def fastar(*arguments: object) -> Outcome:
    """What `fastar ARGUMENTS` exits with and prints."""
    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            code = exit_.code
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), err.getvalue())


def refused(*arguments: object) -> str:
    """The one line that says why `fastar ARGUMENTS` is refused (exit code 2, nothing on stdout)."""
    outcome = fastar(*arguments)
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("fastar: ")
    assert outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1, outcome.err
    return outcome.err.removeprefix("fastar: ").rstrip("\n")


def tiny(data: Path, *, sources: int = 2, heldout: int = 1, seed: int = 0) -> list[str]:
    """Options of a run of digits that takes a second; its .beton files go to `data`."""
    return [
        "--dataset",
        "digits",
        "--quiet",
        "--sources",
        str(sources),
        "--heldout",
        str(heldout),
        f"dataset.directory={data}",
        "dataset.limit=300",
        "train.epochs=2",
        "train.batch_size=50",
        "evaluation.points=3",
        f"seed={seed}",
        "device=cpu",
        "workers=1",
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """All files below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
