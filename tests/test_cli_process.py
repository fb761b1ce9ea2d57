"""The command as a process of its own: Ctrl-C, exit codes, streams."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_cases import contents, fastar, tiny
from safetensors.torch import load_file

COMMAND = [sys.executable, "-c", "from fastar.cli.main import main; main()"]
SECONDS = 120  # for a machine with everything else to do; nothing is asserted on time


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def epochs_of(log: Path, model: str) -> int:
    if not log.is_file():
        return 0
    return sum(f'"model": "{model}"' in line for line in log.read_text().splitlines())


def test_ctrl_c_in_mid_training_keeps_what_is_finished_and_goes_on(tmp_path: Path) -> None:
    options = [*tiny(tmp_path / "data", sources=3, heldout=1), "train.epochs=15", "star.epochs=3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert fastar("train-star", *options, "--out", whole).code == 0  # also writes the data

    process = start("train-star", *options, "--out", cut)
    end = time.monotonic() + SECONDS
    while epochs_of(cut / "log.jsonl", "source 1") < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no progress"
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert re.fullmatch(r"fastar: interrupted; run it again to go on from epoch \d+.* of source [12].*\n", err), err
    assert out == ""
    assert (cut / "sources" / "seed-0000.safetensors").is_file()
    assert not (cut / "star.safetensors").exists()
    assert not (cut / "results.json").exists()
    assert not [path for path in cut.rglob("*") if path.name.endswith((".tmp", ".partial"))]
    finished = contents(cut / "sources")

    assert fastar("train-star", *options, "--out", cut).code == 0
    again = contents(cut / "sources")
    assert {name: again[name] for name in finished} == finished
    for name in ("sources/seed-0001", "sources/seed-0002", "heldout/seed-0000", "star", "permutations"):
        a, b = (load_file(folder / f"{name}.safetensors") for folder in (whole, cut))
        assert a.keys() == b.keys()
        assert all((a[key] == b[key]).all() for key in a), name
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, cut)]
    assert results[0]["paths"] == results[1]["paths"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train-star", "--dataset", "digits", "train.lrr=1"], "train.lrr"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], part: str) -> None:
    process = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=SECONDS)
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.startswith("fastar: ")
    assert process.stderr.count("\n") == 1
    assert part in process.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_survives_a_closed_pipe() -> None:
    process = start("--help")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.wait(timeout=SECONDS)
    assert "Traceback" not in err
