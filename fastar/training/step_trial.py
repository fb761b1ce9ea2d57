"""`train.graph=auto` and `train.compile=auto`: some steps of each way on throw-away networks, and the fastest.

On a CPU both are false without a trial: its outcome could differ where a training goes on, which has to be to the same
bits.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastar.config import TrainSettings
from fastar.errors import FastarError
from fastar.flat.forward import Batch
from fastar.losses import Loss
from fastar.runtime.device import simulated, synchronize
from fastar.training.steps import RegularStep

AUTO = "auto"
# Steps that are timed, and before them steps that are not: clocks, caches and allocators settle.
TIMED, UNTIMED = 20, 5
# Seconds that compiling takes, about: a training that is over sooner is not compiled to find out.
COMPILING = 60.0

Trial = Callable[[TrainSettings], tuple[float, float]]
"""Times steps of a way: seconds of the first, with all that is built, compiled and captured, and of each later one."""


def with_fastest_steps(
    settings: TrainSettings, device: torch.device, trial: Trial, steps: int, say: Callable[[str], None]
) -> TrainSettings:
    """`settings` with `graph` and `compile` decided where they are auto.

    A way's time is that of a whole training: `steps` steps, and the first step's where compiling is a choice. A way
    that fails is left out.

    Args:
        steps: of a training.
        say: is told what was found.

    Raises:
        FastarError: every way failed.
    """
    auto = [key for key in ("graph", "compile") if getattr(settings, key) == AUTO]
    if not auto:
        return settings
    told = " ".join(f"train.{key}=auto" for key in auto)
    if device.type == "cpu":
        say(f"{told}: false on a CPU")
        return settings.model_copy(update=dict.fromkeys(auto, False))
    choices = [(False, True) if key in auto else (getattr(settings, key),) for key in ("compile", "graph")]
    ways: dict[str, tuple[float, TrainSettings]] = {}
    failed: FastarError | None = None
    for compiled, graph in itertools.product(*choices):
        way = settings.model_copy(update={"compile": compiled, "graph": graph})
        name = f"compile={str(compiled).lower()} graph={str(graph).lower()}"
        if compiled and "compile" in auto:
            soonest = min((seconds for seconds, _ in ways.values()), default=COMPILING)
            if soonest < COMPILING or simulated():
                say(f"{told}: {name} not tried, as a training takes {soonest:.0f} s without")
                continue
        try:
            first, each = trial(way)
        except FastarError as error:
            say(f"{told}: {name} left out ({error})")
            failed = error
            continue
        say(f"{told}: {name} takes {1e3 * each:.3g} ms a step")
        ways[name] = each * steps + (first if compiled and "compile" in auto else 0.0), way
    if not ways:
        assert failed is not None  # each way is tried where none is known
        raise failed
    best = min(ways, key=lambda name: ways[name][0])
    say(f"{told}: {best}")
    return ways[best][1]


def time_steps(
    settings: TrainSettings,
    model: nn.Module,
    batch: tuple[Batch, object],
    loss: Loss | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:
    """A `Trial` of regular steps of `model` on its device; torch's generators are left as they were."""
    device = next(model.parameters()).device
    lr = torch.zeros((), dtype=torch.float32, device=device)

    def seconds(step: Callable[[Batch, object, Tensor], Tensor], count: int) -> float:
        start = clock()
        for _ in range(count):
            step(*batch, lr)
        synchronize(device)
        return clock() - start

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        step = RegularStep(model, settings, loss=loss)
        first = seconds(step, 1)
        seconds(step, UNTIMED)
        each = seconds(step, TIMED) / TIMED
        step.release()
    return first, each
