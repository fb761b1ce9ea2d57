"""A run that is killed (SIGKILL) at random moments, inside saves too, ends in the same bits as one that was not."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_cases import fastar
from run_cases import SMALL, assert_log_is_whole, assert_same_models, one_symmetry  # noqa: F401 (a fixture)

from fastar.config import Settings, load_settings
from fastar.experiments.star_domain import train_star
from fastar.training import RegularStep, StarStep

KILLS = 30
SECONDS = 300  # for a machine with everything else to do; nothing is asserted on time


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    data = tmp_path_factory.mktemp("data")
    return load_settings(dataset="digits", overrides=[*SMALL, f"dataset.directory={data}"])


@pytest.fixture(scope="module")
def whole(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to; it saves nothing on the way either."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    never = settings.checkpoint.model_copy(update={"epochs": 0, "minutes": 0.0})
    train_star(settings.model_copy(update={"checkpoint": never}), folder)
    return folder


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """A child that does `work(pipe)`, and the pipe's other end."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(read)
            work(write)
            code = 0
        except BaseException:  # noqa: BLE001 (the child must not go on as a second pytest)
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    return pid, read


def run_telling(settings: Settings, folder: Path, pipe: int, steps: int, stop_in_save: int) -> None:
    """Do the run, writing a byte for every step; wait to be killed inside save number `stop_in_save`, if not 0, and
    with step number `steps` at the latest."""
    done = 0
    for kind in (RegularStep, StarStep):

        def telling(self: Any, *arguments: Any, call: Any = kind.__call__) -> Any:
            nonlocal done
            done += 1
            if done == steps:
                signal.pause()
            loss = call(self, *arguments)
            os.write(pipe, b"s")
            return loss

        kind.__call__ = telling  # type: ignore[method-assign]
    fsync, saves = os.fsync, 0

    def told(handle: int) -> None:
        nonlocal saves
        if "in-training" in os.readlink(f"/proc/self/fd/{handle}"):
            saves += 1
            if saves == stop_in_save:
                os.write(pipe, b"p")
                signal.pause()
        fsync(handle)

    os.fsync = told
    train_star(settings, folder)


def next_byte(pipe: int) -> bytes:
    ready, _, _ = select.select([pipe], [], [], SECONDS)
    assert ready, "the run hangs"
    return os.read(pipe, 1)


def test_thirty_kills_change_no_bit(settings: Settings, whole: Path, tmp_path: Path) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to know what is being saved")
    folder = tmp_path / "run"
    moments = random.Random(0)
    kills = within_saves = 0
    while True:
        stop_in_save = moments.choice([0, 0, 1, 2, 2, 2])
        steps = moments.choice([1, 1, 2])
        limit = 4 if stop_in_save else steps + 1  # however late the kill comes

        def work(pipe: int, limit: int = limit, stop_in_save: int = stop_in_save) -> None:
            run_telling(settings, folder, pipe, limit, stop_in_save)

        pid, pipe = forked(work)
        start, last = time.perf_counter(), b""
        while (stop_in_save or steps) and (last := next_byte(pipe)):
            steps -= 1
            if last == b"p":
                break
            start, took = time.perf_counter(), time.perf_counter() - start
        if last:
            if last != b"p":
                time.sleep(moments.uniform(0, min(took, 0.02)))  # anywhere in the next step, and its save
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(pipe)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        kills += 1
        within_saves += last == b"p"
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
