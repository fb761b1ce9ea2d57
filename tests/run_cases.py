"""Runs of digits that take a second and save themselves after every step, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastar.config import Settings, load_settings
from fastar.runs import RunFolder
from fastar.runtime.progress import SilentProgress

SMALL = [
    "dataset.limit=300",
    "train.epochs=2",
    "train.batch_size=100",
    "star.epochs=7",
    "star.match_every_epochs=3",
    "sources.number=2",
    "sources.heldout=0",
    "evaluation.points=3",
    "checkpoint.seconds=0",
    "checkpoint.minutes=0.0000001",  # after every step
    "device=cpu",
    "workers=1",
]


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def assert_same_models(found: Path, wanted: Path) -> None:
    """Every model and permutation, bit for bit; nothing else is left."""
    one, other = tensors(found), tensors(wanted)
    assert one.keys() == other.keys()
    assert {"star.safetensors", "permutations.safetensors", "sources/seed-0001.safetensors"} <= one.keys()
    for file, state in other.items():
        assert one[file].keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(one[file][name], value), (file, name)


def assert_log_is_whole(found: Path, wanted: Path) -> None:
    """Each epoch of each model once, with the loss of the uninterrupted run."""
    lines = [
        {(entry["model"], entry["epoch"]): entry["loss"] for entry in RunFolder(folder).log.read()}
        for folder in (found, wanted)
    ]
    assert lines[0] == lines[1]
    assert len(RunFolder(found).log.read()) == len(lines[0])


def small(data: Path, *overrides: str) -> Settings:
    """A small run; its .beton files go to `data`."""
    return load_settings(dataset="digits", overrides=[*SMALL, f"dataset.directory={data}", *overrides])


class Killed(BaseException):
    """As a signal: nothing catches it."""


def kill() -> None:
    raise Killed


def poison(monkeypatch: pytest.MonkeyPatch, kind: type, bad: Callable[[int], bool]) -> list[int]:
    """Images that are no numbers in those calls that `bad` says."""
    call, calls = kind.__call__, []  # type: ignore[operator]

    def poisoned(self: Any, images: torch.Tensor, labels: torch.Tensor, lr: torch.Tensor) -> Any:
        calls.append(1)
        return call(self, images * (float("nan") if bad(len(calls)) else 1.0), labels, lr)

    monkeypatch.setattr(kind, "__call__", poisoned)
    return calls


class Heard(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)
