"""What benchmarks share: cases timed in turns inside one process, and one line of JSON per case."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastar.kernels import backend
from fastar.progress import SILENT, Progress
from fastar.runs import versions


@dataclass(frozen=True)
class Case:
    """Something to time: `run` does it once; `facts` are added to its line."""

    name: str
    run: Callable[[], object]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one case, one figure per round."""

    case: Case
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def time_in_turns(
    cases: Sequence[Case],
    device: torch.device,
    *,
    rounds: int,
    repeats: int = 1,
    warm_up: int = 3,
    progress: Progress = SILENT,
) -> list[Timing]:
    """Time every case once a round, so that ratios within a round hold while the machine's speed drifts.

    Seconds are of `repeats` calls, divided: by CUDA events on a GPU (so that launches overlap), else by the clock.
    Every second round goes through the cases backwards, so that none always follows the same one.
    """
    for case in cases:
        for _ in range(warm_up):
            case.run()
    taken: dict[str, list[float]] = {case.name: [] for case in cases}
    if len(taken) != len(cases):
        raise ValueError(f"cases need names of their own: {[case.name for case in cases]}")
    gc.collect()
    with progress.task("measuring", total=rounds, unit="rounds") as advance:
        for round_number in range(rounds):
            for case in cases if round_number % 2 == 0 else reversed(cases):
                taken[case.name].append(_seconds(case, device, repeats))
            advance(1)
    return [Timing(case, taken[case.name]) for case in cases]


def ratio(first: Timing, second: Timing) -> dict[str, float]:
    """first / second: the median and quartiles of the ratios within each round."""
    return quantiles([a / b for a, b in zip(first.seconds, second.seconds, strict=True)])


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and smallest of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high, "min": min(values)}


def line(bench: str, timing: Timing, device: torch.device, **facts: Any) -> str:
    """The JSON line of one case: its name and facts, milliseconds, n, device, versions and commit."""
    record = {
        "bench": bench,
        "case": timing.case.name,
        **timing.case.facts,
        **facts,
        "ms": {name: value * 1e3 for name, value in quantiles(timing.seconds).items()},
        "n": len(timing.seconds),
        **where(device),
    }
    return json.dumps(record)


def where(device: torch.device) -> dict[str, Any]:
    """The device, the kernels' path on it, and versions with the commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return {"device": name, "kernels": backend(device), "versions": {**versions(), "cuda": torch.version.cuda}}


def _seconds(case: Case, device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                case.run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        case.run()
    return (time.perf_counter() - begin) / repeats
