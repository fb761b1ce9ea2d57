"""Several `fastar` commands at work on one run folder: killed and restarted, started at one moment, and at odds."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_cases import tiny
from forked_commands import SECONDS, Commands
from run_cases import assert_log_is_whole, assert_same_models

from fastar.runs import RunFolder
from fastar.runs.model_files import load_checkpoint, save_checkpoint

TIMES = ("seconds", "speed", "peak_bytes", "versions", "digest")
"""In results: what differs from run to run (also where the code is committed meanwhile), and the digest of all."""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with Commands(tmp_path_factory.mktemp("stderr")) as commands:
        yield commands


@pytest.fixture
def commands(started: Commands) -> Iterator[Commands]:
    yield started
    started.end_all()


def results(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in found.items() if key not in TIMES}


def lines_of(run: Path) -> int:
    """Epochs that were logged."""
    return (run / "log.jsonl").read_bytes().count(b"\n") if (run / "log.jsonl").is_file() else 0


def wait_for(what: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end, "no progress"
        time.sleep(0.01)


def assert_nothing_is_left(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert not names & {"processes", "in-training", "measured", "lock.json", "last-good"}
    assert not [path for path in run.rglob("*") if path.name.endswith((".tmp", "lock.json"))]


@pytest.mark.parametrize("most", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_kills_of_processes_that_share_a_run_change_no_bit(tmp_path: Path, commands: Commands, most: int) -> None:
    """Three of them, each killed at random moments, or asked to stop, and started again."""
    epochs = 20 if most == 5 else 60
    options = [
        *("train-star", *tiny(tmp_path / "data", sources=4, heldout=2), f"train.epochs={epochs}"),
        *(f"star.epochs={epochs}", "star.match_every_epochs=3", "evaluation.points=7"),
        *("checkpoint.seconds=0", "checkpoint.minutes=0.001"),
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    commands.begin(*options, "--out", whole)
    assert commands.wait() == [0]
    seed = random.randrange(1 << 32)
    draws, killed, seen = random.Random(seed), dict[int, int](), set(commands.ended())
    for _ in range(3):
        commands.begin(*options, "--out", cut)
    lines, next_kill = lines_of(whole), 1.0
    while commands.running:
        for pid, code in commands.ended().items():
            if pid not in seen and pid in killed:
                # A request to stop may come before there is anybody to take it, or where all is done.
                assert code in (-killed[pid], 75, 0), (seed, commands.stderr(pid))
                commands.begin(*options, "--out", cut)
            elif pid not in seen:
                assert code == 0, (seed, commands.stderr(pid))
            seen.add(pid)
        if commands.running and len(killed) < most and lines_of(cut) >= next_kill:
            pid = draws.choice(sorted(commands.running))
            if pid not in killed:
                time.sleep(draws.uniform(0, 0.1))
                killed[pid] = draws.choice([signal.SIGKILL, signal.SIGTERM])
                os.kill(pid, killed[pid])
                next_kill = lines_of(cut) + draws.uniform(0, lines / (2 * most))
        time.sleep(0.01)
    assert len(killed) > 0.6 * most, seed  # the last ones may find nobody to kill
    assert_same_models(cut, whole)
    assert_log_is_whole(cut, whole)
    assert results(cut) == results(whole), seed
    assert_nothing_is_left(cut)


@pytest.mark.parametrize("many", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_all_that_start_at_one_moment_train_each_model_once(tmp_path: Path, commands: Commands, many: int) -> None:
    """On a new folder, with data that are not written yet."""
    run, data = tmp_path / "run", tmp_path / "data"
    options = [one for one in tiny(data, sources=many - 2, heldout=2) if one != "--quiet"]
    pids = [commands.begin("train-sources", *options, "--out", run) for _ in range(many)]
    assert commands.wait() == [0] * many, [commands.stderr(pid) for pid in pids]
    log = Counter((entry["model"], entry["epoch"]) for entry in RunFolder(run).log.read())
    models = [f"source {index}" for index in range(many - 2)] + [f"heldout {index}" for index in range(2)]
    assert log == {(model, epoch): 1 for model in models for epoch in range(2)}
    said = [commands.stderr(pid) for pid in pids]
    assert sum("writing" in text for text in said) == 1, said
    assert_nothing_is_left(run)
    assert sorted(path.name for path in data.iterdir()) == ["digits"]


def test_processes_with_other_settings_are_refused_and_change_nothing(tmp_path: Path, commands: Commands) -> None:
    run, options = tmp_path / "run", [*tiny(tmp_path / "data", sources=3), "train.epochs=100"]
    first = commands.begin("train-star", *options, "--out", run)
    wait_for(lambda: lines_of(run) > 3)
    config = (run / "config.yaml").read_text()
    for other in ("train.lr=0.01", "sources.number=2", "seed=3"):
        pid = commands.begin("train-star", *options, other, "--out", run)
        assert commands.end_of(pid) == 2
        text = commands.stderr(pid)
        assert text.startswith(f"fastar: {run}: "), text
        assert text.count("\n") == 1
        assert other.partition("=")[0] in text
    assert (run / "config.yaml").read_text() == config
    os.kill(first, signal.SIGKILL)
    commands.wait()


def test_ctrl_c_ends_the_wait_for_another_process_at_once(tmp_path: Path, commands: Commands) -> None:
    options = [one for one in tiny(tmp_path / "data", sources=1, heldout=0) if one != "--quiet"]
    options = ["train-sources", *options, "train.epochs=100000", "--out", tmp_path / "run"]
    first = commands.begin(*options)
    wait_for(lambda: lines_of(tmp_path / "run") > 3)
    second = commands.begin(*options)
    wait_for(lambda: f"waiting for source 0 (process {first} on " in commands.stderr(second))
    os.kill(second, signal.SIGINT)
    assert commands.end_of(second) == 130
    last = commands.stderr(second).splitlines()[-1]
    assert last == "fastar: interrupted; run it again to go on from what is finished"
    os.kill(first, signal.SIGINT)
    assert commands.end_of(first) == 130
    assert not (tmp_path / "run" / "processes").exists()


def test_a_run_folder_that_is_moved_away_is_written_to_no_more(tmp_path: Path, commands: Commands) -> None:
    run, options = tmp_path / "run", [*tiny(tmp_path / "data", sources=3), "train.epochs=100000"]
    pids = [commands.begin("train-star", *options, "--out", run) for _ in range(2)]
    wait_for(lambda: lines_of(run) > 3)
    wait_for(lambda: len(list((run / "processes").iterdir())) == 2)
    run.rename(tmp_path / "moved")
    for pid in pids:
        assert commands.end_of(pid) == 2
        assert commands.stderr(pid).count("\n") == 1
        assert f"{run}: moved, deleted or replaced while it was in use" in commands.stderr(pid)
    assert not run.exists()


def test_heldouts_may_be_added_by_another_process(tmp_path: Path, commands: Commands) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    begun = "train.epochs=40"
    commands.begin("train-star", *tiny(data, sources=3, heldout=1), begun, "--out", run)
    wait_for(lambda: lines_of(run) > 3)
    more = ["train-star", *tiny(data, sources=3, heldout=3), begun, "--out", run]
    commands.begin(*more)
    assert commands.wait() == [0, 0]
    assert_nothing_is_left(run)
    log = Counter((entry["model"], entry["epoch"]) for entry in RunFolder(run).log.read())
    assert set(log.values()) == {1}
    assert len(RunFolder(run).models()) == 6
    commands.begin(*more)
    assert commands.wait() == [0]
    assert results(run)["heldout"] == 3


def test_a_model_that_fails_ends_each_process_with_one_line(tmp_path: Path, commands: Commands) -> None:
    """A checkpoint of another version lies where it is to be trained; all others are trained."""
    run, options = tmp_path / "run", [*tiny(tmp_path / "data", sources=4, heldout=2), "train.epochs=40"]
    commands.begin("train-sources", *options, "--out", run, "--only", "0")
    assert commands.wait() == [0]
    foreign = run / "in-training" / "source-0001"
    foreign.mkdir(parents=True)
    save_checkpoint(
        foreign / "epoch-00001-step-00000000.safetensors",
        load_checkpoint(run / "sources" / "seed-0000.safetensors").state,
        {"kind": "training"},
    )
    pids = [commands.begin("train-sources", *options, "--out", run) for _ in range(3)]
    assert commands.wait() == [2] * 3
    for pid in pids:
        assert commands.stderr(pid).count("\n") == 1
        assert "source-0001/epoch-00001-step-00000000.safetensors: saved by another version" in commands.stderr(pid)
    finished = [(kind, number) for _, kind, number in RunFolder(run).models()]
    assert finished == [("source", 0), ("source", 2), ("source", 3), ("heldout", 0), ("heldout", 1)]


def test_a_process_that_stands_still_here_is_waited_for(tmp_path: Path, commands: Commands) -> None:
    """The kernel knows that it lives, however long it says nothing."""
    options = [one for one in tiny(tmp_path / "data", sources=2, heldout=0) if one != "--quiet"]
    options = ["train-sources", *options, "train.epochs=60", "--out", tmp_path / "run"]
    first = commands.begin(*options)
    wait_for(lambda: lines_of(tmp_path / "run") > 3)
    os.kill(first, signal.SIGSTOP)
    second = commands.begin(*options)
    wait_for(lambda: f"waiting for source 0 (process {first} on " in commands.stderr(second))
    assert (tmp_path / "run" / "sources" / "seed-0001.safetensors").is_file()
    os.kill(first, signal.SIGCONT)
    assert commands.wait() == [0, 0]
    log = Counter((entry["model"], entry["epoch"]) for entry in RunFolder(tmp_path / "run").log.read())
    assert log == {(f"source {index}", epoch): 1 for index in range(2) for epoch in range(60)}
    assert_nothing_is_left(tmp_path / "run")
