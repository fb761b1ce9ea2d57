"""Shipped configurations run from end to end at the smallest scale: a few, others every day, and all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def smoke(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "tools/smoke.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_todays_configuration_runs_from_end_to_end() -> None:
    assert smoke("--today", "1").endswith("1 of 1 configurations ran\n")


@pytest.mark.slow
def test_every_configuration_runs_from_end_to_end_within_a_minute() -> None:
    lines = smoke().splitlines()
    count = len(list((ROOT / "configs").glob("*.yaml")))
    assert lines[-1] == f"{count} of {count} configurations ran"
    assert not [line for line in lines if "more than" in line]


def test_an_unknown_configuration_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "tools/smoke.py", "cifar10-vgg"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "did you mean cifar10-vgg1" in done.stderr
