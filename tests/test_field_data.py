"""What went wrong with data in earnest: one CPU, damaged archives, damaged .beton files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import tiny

SECONDS = 120  # a run that hangs is ended then; one that does not takes a few

# Its processes see one CPU from the first line on, as in a job of one core.
ON_ONE_CPU = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
WRITE = "import sys, pathlib; from fastar.data import prepare; "
WRITE += "prepare('digits', data_root=None, directory=pathlib.Path(sys.argv[1]), limit=20)"


def ends(code: str, cache: Path, *arguments: object) -> None:
    """`code` in a process of its own on one CPU ends with exit code 0."""
    environment = {**os.environ, "FASTAR_CACHE": str(cache), "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE_CPU + code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_process_on_one_cpu_that_wrote_data_ends(tmp_path: Path) -> None:
    ends(WRITE, tmp_path / "cache", tmp_path / "data")
    assert (tmp_path / "data" / "digits" / "train.beton").is_file()


@pytest.mark.slow
def test_a_run_on_one_cpu_with_nothing_there_before_ends(tmp_path: Path) -> None:
    run = "from fastar.cli import main; main()"
    ends(run, tmp_path / "cache", "train-star", *tiny(tmp_path / "data"), "--out", tmp_path / "run")
    assert (tmp_path / "run" / "results.json").is_file()
