"""Runs of digits that take a second and save themselves after every step, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastar.config import Settings, load_settings
from fastar.experiments import train_star
from fastar.experiments.finished_run import FinishedRun, finished_run
from fastar.runs import RunFolder
from fastar.runtime.progress import SilentProgress
from fastar.training import SourcesStore

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


def trained_run(data: Path, folder: Path, *overrides: str) -> FinishedRun:
    """A small run that is trained, and saves nothing on the way, for experiments on it."""
    train_star(small(data, *overrides, "checkpoint.minutes=0"), folder)
    return finished_run(RunFolder(folder))


class Killed(BaseException):
    """As a signal: nothing catches it."""


def kill() -> None:
    raise Killed


def around_calls(monkeypatch: pytest.MonkeyPatch, kind: type, around: Callable[..., Any]) -> list[int]:
    """Do `around(call, number, step, images, labels, lr)` in the place of each call of this kind of step.

    Returns the calls' numbers, from 1, which grow as training goes on.
    """
    call, calls = kind.__call__, list[int]()  # type: ignore[operator]

    def counted(self: Any, *arguments: torch.Tensor) -> Any:
        calls.append(len(calls) + 1)
        return around(call, calls[-1], self, *arguments)

    monkeypatch.setattr(kind, "__call__", counted)
    return calls


def poison(monkeypatch: pytest.MonkeyPatch, kind: type, bad: Callable[[int], bool]) -> list[int]:
    """Images that are no numbers in those calls that `bad` says."""

    def poisoned(call: Any, number: int, step: Any, images: torch.Tensor, *more: torch.Tensor) -> Any:
        return call(step, images * (float("nan") if bad(number) else 1.0), *more)

    return around_calls(monkeypatch, kind, poisoned)


def at_call(monkeypatch: pytest.MonkeyPatch, kind: type, wanted: int, act: Callable[[], None]) -> list[int]:
    """`act` within call number `wanted` of this kind of step."""

    def acting(call: Any, number: int, *arguments: Any) -> Any:
        if number == wanted:
            act()
        return call(*arguments)

    return around_calls(monkeypatch, kind, acting)


def copied_parts(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Sources are matched as on a GPU where they do not live there: so many at a time, copied there and back."""
    made = partialmethod(SourcesStore.__init__, in_place=False, part_rows=rows)
    monkeypatch.setattr(SourcesStore, "__init__", made)


class Heard(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)
