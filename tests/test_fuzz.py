"""Damaged files of every kind, for a while: no traceback, no hang, nothing outside, nothing damaged accepted."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("fuzzing.py")


def fuzz(seed: int, seconds: int) -> None:
    """Failures print what repeats them: the seed and the case's number."""
    command = [sys.executable, str(PROGRAM), "--seed", str(seed), "--seconds", str(seconds)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 900, check=False)
    last = found.stdout.strip().splitlines()[-1:]
    print(f"seed {seed}: {last}")
    assert found.returncode == 0, (
        f"python tests/fuzzing.py --seed {seed}\n{found.stdout[-4000:]}\n{found.stderr[-4000:]}"
    )


def test_damaged_files_for_some_seconds() -> None:
    fuzz(seed=0, seconds=5)


@pytest.mark.slow
def test_damaged_files_for_five_minutes_of_a_new_seed() -> None:
    fuzz(seed=random.SystemRandom().randrange(10**6), seconds=300)
