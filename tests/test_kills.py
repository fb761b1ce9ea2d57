"""A run that is killed (SIGKILL) at random moments, inside saves too, ends in the same bits as one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from attempts import SECONDS, Attempts
from cli_cases import fastar
from run_cases import SMALL, assert_log_is_whole, assert_same_models

KILLS = 30


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to know what is being saved")
def test_thirty_kills_change_no_bit(tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    moments = random.Random(0)
    kills = within_saves = 0
    with Attempts(tmp_path / "data") as attempts:
        # The run that nothing happens to saves nothing on the way either.
        attempts.begin(whole, "checkpoint.epochs=0", "checkpoint.minutes=0")
        assert attempts.ended() == 0
        while True:
            stop_in_save = moments.choice([0, 0, 1, 2, 2, 2])
            steps = moments.choice([1, 1, 2])
            limit = 4 if stop_in_save else steps + 1  # however late the kill comes
            pid = attempts.begin(folder, steps=limit, stop_in_save=stop_in_save)
            start, last = time.perf_counter(), ""
            while stop_in_save or steps:
                last = attempts.hear()
                if last != "step":
                    break
                steps -= 1
                start, took = time.perf_counter(), time.perf_counter() - start
            if last.startswith("ended"):
                assert last == "ended 0"
                break
            if last == "step":
                time.sleep(moments.uniform(0, min(took, 0.02)))  # anywhere in the next step, and its save
            os.kill(pid, signal.SIGKILL)
            assert attempts.ended() == -signal.SIGKILL
            kills += 1
            within_saves += last == "save"
    assert kills >= KILLS
    assert within_saves >= 5
    assert_same_models(folder, whole)
    assert_log_is_whole(folder, whole)
    assert not (folder / "in-training").exists()


@pytest.mark.slow
def test_thirty_kills_of_the_command_change_no_bit(tmp_path: Path) -> None:
    """As above, each attempt a process of its own that is killed whenever it comes."""
    options = [
        *("--dataset", "digits", "--quiet", f"dataset.directory={tmp_path / 'data'}", *SMALL),
        *("train.batch_size=20", "train.epochs=4", "star.epochs=90"),
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert fastar("train-star", *options, "checkpoint.minutes=0", "--out", whole).code == 0
    moments = random.Random(1)
    command = [sys.executable, "-c", "from fastar.cli import main; main()", "train-star", *options, "--out", str(cut)]
    kills = 0
    while True:
        before = newest(cut)
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        end = time.monotonic() + SECONDS
        while process.poll() is None and newest(cut) == before:
            assert time.monotonic() < end, "no progress"
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.2))
        if process.poll() is None and kills < KILLS + 2:
            process.kill()
        _, error = process.communicate()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, error
            break
        kills += 1
    assert kills >= KILLS
    assert_same_models(cut, whole)
    assert_log_is_whole(cut, whole)
    results = [json.loads((folder / "results.json").read_text()) for folder in (cut, whole)]
    assert results[0]["paths"] == results[1]["paths"]


def newest(folder: Path) -> int:
    """When something was last written for training to go on from, in ns."""
    times = [0]
    for path in folder.rglob("*.safetensors"):
        try:
            times.append(path.stat().st_mtime_ns)
        except FileNotFoundError:  # pruned meanwhile
            continue
    return max(times)
