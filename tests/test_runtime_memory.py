"""How many models are held at once follows from the memory that is free, and decides how often data is read."""

from __future__ import annotations

import functools
import gc
import os
import platform
import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path as File
from types import SimpleNamespace

import psutil
import pytest
import torch
from evaluation_cases import Batches, data, resnet, row
from torch import Tensor

from fastar.evaluation import Endpoint, Segment, evaluate_paths
from fastar.evaluation.batch_norm import statistics_bytes
from fastar.flat import FlatLayout
from fastar.runtime import memory

CPU = torch.device("cpu")


def available(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size))


def test_free_host_memory_is_what_is_available_within_the_container(
    tmp_path: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limit(most: str, used: int, droppable: int = 0) -> None:
        (tmp_path / "memory.max").write_text(f"{most}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {droppable}\n")

    available(monkeypatch, 8000 * 1024)
    assert memory.free_bytes(CPU, cgroup=tmp_path) == 8000 * 1024
    limit("max", 5)
    assert memory.free_bytes(CPU, cgroup=tmp_path) == 8000 * 1024
    limit("5000000", 1_000_000)
    assert memory.free_bytes(CPU, cgroup=tmp_path) == 4_000_000
    limit("900000000", 0)
    assert memory.free_bytes(CPU, cgroup=tmp_path) == 8000 * 1024
    limit("5", 10)
    assert memory.free_bytes(CPU, cgroup=tmp_path) == 0
    limit("5000000", 3_000_000, droppable=500_000)
    assert memory.free_bytes(CPU, cgroup=tmp_path) == 2_500_000


def test_free_memory_of_this_machine() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 10_000_000 < memory.free_bytes(CPU) <= total
    assert 50e6 < memory.peak_bytes(CPU) <= total  # torch alone takes more than that


def test_resident_models(monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 8000)
    assert memory.resident_models(400, CPU, 50) == 10  # half of 8,000 bytes
    assert memory.resident_models(400, CPU, 7) == 7
    assert memory.resident_models(400, CPU, 50, extra=6000) == 10  # on a host always half
    assert memory.resident_models(40_000, CPU, 7) == 1


def test_a_gpu_holds_as_many_models_as_what_else_is_needed_leaves() -> None:
    models, gigabyte = functools.partial(memory.models_that_fit, 50 << 20, wanted=500), 1 << 30
    assert models(free=32 * gigabyte, extra=8 * gigabyte, gpu=True) == (32 - 4 - 8) * 1024 // 50
    assert models(free=80 * gigabyte, extra=8 * gigabyte, gpu=True) == 500
    assert models(free=32 * gigabyte, gpu=True) == 16 * 1024 // 50  # nothing is known: half
    assert models(free=80 * gigabyte, extra=8 * gigabyte, gpu=False) == memory.LIMIT // (50 << 20)
    assert models(free=8 * gigabyte, extra=9 * gigabyte, gpu=True) == 1


@pytest.mark.parametrize(("fit", "passes"), [(100, 2), (31, 2), (30, 4), (8, 8)])
def test_passes_over_the_data(monkeypatch: pytest.MonkeyPatch, fit: int, passes: int) -> None:
    """Three paths with an end in common have 4 + 3 x 9 models: 2 passes, where one at a time took 66 with all ends."""
    model = resnet(0)
    layout = FlatLayout.from_module(model)
    available(monkeypatch, 2 * fit * (4 * layout.numel + statistics_bytes(model)))
    read: list[str] = []

    def counted(name: str) -> Batches:
        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            read.append(name)
            return iter(data(count=12, size=6)())

        return batches

    star, others = Endpoint("star", row(resnet(1))), [Endpoint(str(n), row(resnet(n))) for n in (2, 3, 4)]
    found = evaluate_paths(
        model,
        layout,
        [Segment("x", star, other) for other in others],
        {"train": counted("losses")},
        statistics_batches=counted("statistics"),
    )
    assert [len(path.loss["train"]) for path in found] == [11] * 3
    assert len(read) == passes
    assert read.count("statistics") == passes // 2


def test_rows_are_brought_when_their_paths_turn_comes() -> None:
    """Of many ends few are held at once, each is asked for once, and what comes out is the same."""
    model = resnet(0)
    layout = FlatLayout.from_module(model)
    models = [resnet(n) for n in range(1, 8)]
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    asked, most = [], 0

    def lazy(n: int) -> Tensor:
        nonlocal most
        made = row(models[n])
        alive.add(made)
        asked.append(n)
        gc.collect()
        most = max(most, len(alive))
        return made

    def measured(ends: list[Endpoint]) -> list[list[float]]:
        paths = [Segment("x", ends[0], end) for end in ends[1:]]
        found = evaluate_paths(model, layout, paths, {"train": data()}, points=3, statistics_batches=data(), resident=4)
        return [path.loss["train"] for path in found]

    held = measured([Endpoint(str(n), row(m)) for n, m in enumerate(models)])
    assert measured([Endpoint(str(n), partial(lazy, n)) for n in range(len(models))]) == held
    assert sorted(asked) == list(range(len(models)))
    assert most <= 5  # four that may be asked for again, and the one just made


PAGE_FAULTS = """
import resource, torch
from fastar.runtime.memory import freed_memory_kept

def page_faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(9 << 20, dtype=torch.float32)  # 36 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with freed_memory_kept():
    page_faults(30)  # until what is freed is enough: an aligned buffer does not always fit where one was
    print(page_faults(3))
print(page_faults(3))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
@pytest.mark.parametrize("users", [{}, {"MALLOC_ARENA_MAX": "4"}])
def test_freed_memory_is_kept_inside_and_given_back_after(users: dict[str, str]) -> None:
    """In a process of its own: trainings of other tests have set this one's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | users
    command = [sys.executable, "-c", PAGE_FAULTS]
    found = subprocess.run(command, env=environment, capture_output=True, check=True)
    inside, after = map(int, found.stdout.split())
    assert (inside > 1000) == bool(users)
    assert after > 1000
