"""Cases timed in turns inside one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from fastar.runtime.cuda_graph import record_cuda_graph
from fastar.runtime.device import synchronize
from fastar.runtime.progress import SILENT, Progress


@dataclass(frozen=True)
class Case:
    """Something to time: `run` does it once (`calls` times, where it cannot do less); `facts` are added to its line."""

    name: str
    run: Callable[[], object]
    facts: Mapping[str, Any] = field(default_factory=dict)
    calls: int = 1


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one case, one figure per round; `first`: of the very first run, with all that it builds,
    compiles and captures; `cpu`: of all processors, which another program on the machine changes less."""

    case: Case
    seconds: list[float]
    first: float = 0.0
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


Result = TypeVar("Result")
OnFailure = Callable[[Case, Exception], None]


def built_when_run(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """What `make` makes, made when it is run for the first time: what cannot be built fails as its own case."""
    made: list[Callable[[], object]] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return run


def in_one_graph(run: Callable[[], object], times: int, device: torch.device) -> Callable[[], object]:
    """`run` so many times as one CUDA graph, so that the device's own time is seen and not that of its launches.

    Elsewhere than on a GPU: a plain loop.
    """

    def repeated() -> None:
        for _ in range(times):
            run()

    return record_cuda_graph(repeated, repeated) if device.type == "cuda" else repeated


def time_in_turns(
    cases: Sequence[Case],
    device: torch.device,
    *,
    rounds: int,
    repeats: int = 1,
    warm_up: int = 3,
    on_failure: OnFailure | None = None,
    progress: Progress = SILENT,
) -> list[Timing]:
    """Time every case once a round, so that ratios within a round hold while the machine's speed drifts.

    Seconds are of `repeats` calls, divided: by CUDA events on a GPU (so that launches overlap), else by the clock. On a
    GPU an unmeasured run goes before them, so that it is busy while the first of them is launched. Every second round
    goes through the cases backwards, so that none always follows the same one.

    Args:
        on_failure: told of a case that fails, which is left out then; None: its error ends everything.
    """
    if len({case.name for case in cases}) != len(cases):
        raise ValueError(f"cases need names of their own: {[case.name for case in cases]}")
    first: dict[str, float] = {}
    taken: dict[str, list[tuple[float, float]]] = {}

    def attempt(case: Case, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            if on_failure is None:
                raise
            taken.pop(case.name, None)
            on_failure(case, error)

    def warm(case: Case) -> None:
        first[case.name], _ = timed(case.run, device)
        for _ in range(warm_up - 1):
            case.run()
        synchronize(device)  # what a kernel did wrong shows here, and not in the next case
        taken[case.name] = []

    def measure(case: Case) -> None:
        times = max(1, repeats // case.calls)
        cpu = time.process_time()
        seconds = _seconds(case, device, times)
        # On a GPU an unmeasured run is in it.
        calls = (times + (device.type == "cuda")) * case.calls
        taken[case.name].append((seconds, (time.process_time() - cpu) / calls))

    for case in cases:
        attempt(case, lambda case=case: warm(case))  # type: ignore[misc]
    gc.collect()
    with progress.task("measuring", total=rounds, unit="rounds") as advance:
        for number in range(rounds):
            for case in cases if number % 2 == 0 else reversed(cases):
                if case.name in taken:
                    attempt(case, lambda case=case: measure(case))  # type: ignore[misc]
            advance(1)
    return [
        Timing(case, [wall for wall, _ in found], first[case.name], [cpu for _, cpu in found])
        for case in cases
        if (found := taken.get(case.name)) is not None
    ]


def ratio(first: Timing, second: Timing, *, cpu: bool = False) -> dict[str, float]:
    """first / second: the median and quartiles of the ratios within each round, of wall or of CPU seconds."""
    pairs = zip(first.cpu, second.cpu, strict=True) if cpu else zip(first.seconds, second.seconds, strict=True)
    return quantiles([a / b for a, b in pairs])


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and smallest; of one value it alone."""
    if len(values) == 1:
        return dict.fromkeys(("median", "q25", "q75", "min"), values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high, "min": min(values)}


def timed(run: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds until all that a call does on the device is done, and what it returns."""
    synchronize(device)
    begin = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - begin, result


def _seconds(case: Case, device: torch.device, repeats: int) -> float:
    calls = repeats * case.calls
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            case.run()
            start.record()
            for _ in range(repeats):
                case.run()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(repeats):
        case.run()
    return (time.perf_counter() - begin) / calls
