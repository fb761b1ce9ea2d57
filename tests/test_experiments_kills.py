"""A run that is killed (SIGKILL) at random moments, inside saves too, ends in the same bits as one that was not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attempts import SECONDS, Attempts, killed_until_ended
from cli_cases import contents, fastar
from run_cases import SMALL, assert_log_is_whole, assert_same_models
from task_cases import saved_run

from fastar.data.ffcv.folder import verify_folder

KILLS, TWENTY = 30, 20
FASTAR = [sys.executable, "-m", "fastar"]
IMAGES = ["--dataset", "imagefolder", "--name", "made", "dataset.resolution=16", "dataset.crop=resize256-crop224"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to know what is being saved")
def test_thirty_kills_change_no_bit(tmp_path: Path) -> None:
    folder, whole = tmp_path / "run", tmp_path / "whole"
    moments = random.Random(0)
    with Attempts(tmp_path / "data") as attempts:
        # The run that nothing happens to saves nothing on the way either.
        attempts.begin(whole, "checkpoint.epochs=0", "checkpoint.minutes=0")
        assert attempts.ended() == 0
        kills, within_saves = killed_until_ended(attempts, folder, moments)
    assert kills >= KILLS
    assert within_saves >= 5
    assert_same_models(folder, whole)
    assert_log_is_whole(folder, whole)
    assert not (folder / "in-training").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to know what is being saved")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensors", "samples", "workers"])
def test_twenty_kills_of_a_users_task_change_no_bit(kind: str, tmp_path: Path) -> None:
    """A network with dropout, a loss of the user's own; tensors, or a dataset that draws for each sample."""
    folder, whole = tmp_path / "run", tmp_path / "whole"
    saved_run(kind, whole)
    with Attempts(tmp_path, kind) as attempts:
        assert killed_until_ended(attempts, folder, random.Random(5), TWENTY)[0] == TWENTY
    assert_same_models(folder, whole)
    assert_log_is_whole(folder, whole)
    assert results(folder)["paths"] == results(whole)["paths"]
    assert not (folder / "in-training").exists()


@pytest.mark.slow
def test_thirty_kills_of_the_command_change_no_bit(tmp_path: Path) -> None:
    """As above, each attempt a process of its own that is killed whenever it comes."""
    options = [
        *("train-star", "--dataset", "digits", "--quiet", f"dataset.directory={tmp_path / 'data'}", *SMALL),
        *("train.batch_size=20", "train.epochs=4", "star.epochs=90"),
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert fastar(*options, "checkpoint.minutes=0", "--out", whole).code == 0
    command = [*FASTAR, *options, "--out", str(cut)]
    assert killed_at_progress(command, lambda: newest(cut), KILLS + 2, random.Random(1)) >= KILLS
    assert_same_models(cut, whole)
    assert_log_is_whole(cut, whole)
    assert results(cut)["paths"] == results(whole)["paths"]


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["digits", "images"])
def test_twenty_kills_of_a_batch_norm_network_change_no_bit(tmp_path: Path, made: Path, dataset: str) -> None:
    """Of images in memory, and of images of any size that stream."""
    data = ["--dataset", "digits"] if dataset == "digits" else [*IMAGES, f"dataset.root={made}"]
    options = [
        *("train-star", *data, "--arch", "resnet8", "--quiet", f"dataset.directory={tmp_path / 'data'}", *SMALL),
        *("model.width=0.25", "dataset.limit=40", "train.batch_size=10", "train.epochs=4", "star.epochs=60"),
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert fastar(*options, "checkpoint.minutes=0", "--out", whole).code == 0
    command = [*FASTAR, *options, "--out", str(cut)]
    assert killed_at_progress(command, lambda: newest(cut), TWENTY, random.Random(2)) == TWENTY
    assert_same_models(cut, whole)
    assert_log_is_whole(cut, whole)
    assert results(cut)["paths"] == results(whole)["paths"]


@pytest.mark.slow
def test_twenty_kills_while_data_are_written_change_no_bit(tmp_path: Path, made: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def command(out: Path) -> list[str]:
        tool = Path(__file__).parent.parent / "tools" / "write_ffcv.py"
        options = ["--dataset", "imagefolder", "--name", "made", "--source", str(made), "--out", str(out)]
        return [sys.executable, str(tool), *options, "--workers", "2"]

    assert run(command(whole)).returncode == 0

    def written() -> int:
        """Bytes of unfinished files that have reached the disk."""
        return sum(path.stat().st_blocks for path in present(cut.glob("made/*.partial")))

    assert killed_at_progress(command(cut), written, TWENTY, random.Random(3)) == TWENTY
    assert contents(cut) == contents(whole)
    assert verify_folder(cut / "made") == []


@pytest.mark.slow
def test_twenty_kills_while_barriers_are_measured_change_no_bit(tmp_path: Path) -> None:
    options = [
        *("train-star", "--dataset", "digits", "--quiet", f"dataset.directory={tmp_path / 'data'}", *SMALL),
        *("sources.heldout=2", "evaluation.points=21", "--out", str(tmp_path / "run")),
    ]
    assert fastar(*options).code == 0
    run_folder = tmp_path / "run"
    whole, models = (
        results(run_folder),
        {name: content for name, content in contents(run_folder).items() if name.endswith(".safetensors")},
    )
    command, moments, kills = [*FASTAR, *options], random.Random(4), 0
    (run_folder / "results.json").unlink()
    start = time.monotonic()
    assert run(command).returncode == 0
    takes = time.monotonic() - start
    while kills < TWENTY:
        (run_folder / "results.json").unlink(missing_ok=True)
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env=ONE_THREAD)
        time.sleep(moments.uniform(0.3, 1) * takes)
        process.kill()
        _, error = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), error
        kills += process.returncode != 0
    assert run(command).returncode == 0
    assert results(run_folder)["paths"] == whole["paths"]
    assert {name: content for name, content in contents(run_folder).items() if name.endswith(".safetensors")} == models


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs of ImageNet's sizes, enough for two processes that encode."""
    folder = tmp_path_factory.mktemp("made") / "images"
    tool = Path(__file__).parent.parent / "tools" / "make_images.py"
    assert run([sys.executable, str(tool), str(folder), "--train", "520", "--val", "40"]).returncode == 0
    return folder


def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command, env=ONE_THREAD, timeout=SECONDS)


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def killed_at_progress(command: list[str], progress: Callable[[], int], most: int, moments: random.Random) -> int:
    """Give `command` again and again until it ends by itself; kill it `most` times, each soon after `progress` has
    changed. Returns how often it was killed."""
    kills = 0
    while True:
        before = progress()
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env=ONE_THREAD)
        end = time.monotonic() + SECONDS
        while process.poll() is None and progress() == before:
            assert time.monotonic() < end, "no progress"
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.2))
        if process.poll() is None and kills < most:
            process.kill()
        _, error = process.communicate()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, error
            return kills
        kills += 1


def present(paths: Iterable[Path]) -> Iterator[Path]:
    """Those that are still there."""
    return (path for path in paths if path.exists())


def newest(folder: Path) -> int:
    """When something was last written for training to go on from, in ns."""
    times = [0]
    for place, _, names in os.walk(folder):  # which passes over what is gone meanwhile
        for path in (Path(place) / name for name in names if name.endswith(".safetensors")):
            with contextlib.suppress(FileNotFoundError):
                times.append(path.stat().st_mtime_ns)
    return max(times)
