"""Runs on a Ray cluster of this machine alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import refused
from run_cases import assert_log_is_whole, assert_same_models

from fastar.launch.ray_cluster import _do
from fastar.launch.shared_folder import left_handshake

SECONDS = 300  # for a machine with everything else to do; nothing is asserted on time


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


def test_two_jobs_of_ray_end_in_the_bits_of_one_process(tmp_path: Path, options: list[str], whole: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "fastar", "train-star", *options, "checkpoint.minutes=0", "--out", str(run)]
    ended = subprocess.run([*command, "--launcher", "ray:2"], capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 0, ended.stderr
    assert f"results: {run}/results.json" in ended.stdout
    assert_same_models(run, whole)
    assert_log_is_whole(run, whole)
    results = [json.loads((folder / "results.json").read_text())["paths"] for folder in (run, whole)]
    assert results[0] == results[1]
    logs = sorted(path.name for path in (run / "jobs").iterdir())
    assert logs == [f"ray-{name}.log" for name in ("measure-0", "measure-1", "source-0", "source-1", "star")]


def test_a_job_looks_for_the_folders_that_it_needs(tmp_path: Path) -> None:
    handshake = left_handshake(tmp_path / "jobs")
    log = str(tmp_path / "log")
    code, line = _do(["configs", "--list"], str(tmp_path / "none"), {}, log, str(handshake))
    assert code == 2
    assert f"{tmp_path / 'none'}: no such folder" in line
    handshake.unlink()
    code, line = _do(["configs", "--list"], str(tmp_path), {}, log, str(handshake))
    assert code == 2
    assert "all nodes share" in line


def test_a_failed_job_gives_its_last_line(tmp_path: Path) -> None:
    handshake = left_handshake(tmp_path / "jobs")
    log = tmp_path / "log"
    log.write_text("fastar: of the last attempt\n")
    code, line = _do(["train-star", "--dataset", "digits", "train.lrr=1"], str(tmp_path), {}, str(log), str(handshake))
    assert code == 2
    assert "train.lrr" in line
    assert line in log.read_text().splitlines()
    assert _do(["configs"], str(tmp_path), {}, str(log), str(handshake)) == (0, "")


def test_without_ray_or_a_cluster_it_says_what_to_do(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train-star", *options, "--out", tmp_path / "run", "--launcher", "ray"]
    monkeypatch.setenv("RAY_ADDRESS", "nowhere:0:0")
    assert "ray start --head" in refused(*command)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'fastar[ray]'" in refused(*command)
    assert not (tmp_path / "run").exists()
