"""`train.graph=auto` and `train.compile=auto`: the way that a trial finds fastest for the whole training."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from fastar.config import TrainSettings, load_settings
from fastar.errors import FastarError
from fastar.experiments.session import new_session
from fastar.runs import RunFolder
from fastar.training import RegularStep
from fastar.training.step_trial import TIMED, UNTIMED, time_steps, with_fastest_steps

GPU = torch.device("cuda")
BOTH = TrainSettings(graph="auto", compile="auto")
# (compile, graph): seconds of the first step, and of each later one.
TIMES = {
    (False, False): (1.0, 0.010),
    (False, True): (2.0, 0.008),
    (True, False): (50.0, 0.007),
    (True, True): (51.0, 0.004),
}


def found(settings: TrainSettings, steps: int, failing: tuple[tuple[bool, bool], ...] = ()) -> tuple[object, list[str]]:
    said: list[str] = []

    def trial(way: TrainSettings) -> tuple[float, float]:
        if (way.compile, way.graph) in failing:
            raise FastarError("cannot be captured")
        return TIMES[bool(way.compile), bool(way.graph)]

    chosen = with_fastest_steps(settings, GPU, trial, steps, said.append)
    assert chosen.model_copy(update={"graph": settings.graph, "compile": settings.compile}) == settings
    return (chosen.compile, chosen.graph), said


@pytest.mark.parametrize(
    ("steps", "way", "tried"),
    [
        (1_000, (False, True), 2),  # over in 8 s: nothing is compiled to find out
        (9_000, (False, True), 4),  # 72 s, against 87 compiled
        (100_000, (True, True), 4),
    ],
)
def test_compiling_counts(steps: int, way: tuple[bool, bool], tried: int) -> None:
    chosen, said = found(BOTH, steps)
    assert chosen == way
    assert sum("ms a step" in line for line in said) == tried
    assert said[-1] == f"train.graph=auto train.compile=auto: compile={str(way[0]).lower()} graph={str(way[1]).lower()}"


def test_what_is_set_is_kept_and_what_fails_is_left_out() -> None:
    assert found(TrainSettings(graph="auto", compile=True), 10)[0] == (True, True)
    assert found(TrainSettings(graph=False, compile="auto"), 100_000)[0] == (True, False)
    chosen, said = found(BOTH, 1_000, failing=((False, True),))
    assert chosen == (False, False)
    assert any("graph=true left out (cannot be captured)" in line for line in said)
    with pytest.raises(FastarError, match="cannot be captured"):
        found(BOTH, 1_000, failing=tuple(TIMES))


def test_a_cpu_and_defaults_try_nothing(tmp_path: Path) -> None:
    def never(way: TrainSettings) -> tuple[float, float]:
        raise AssertionError

    plain = TrainSettings()
    assert with_fastest_steps(plain, GPU, never, 1, never) is plain
    said: list[str] = []
    chosen = with_fastest_steps(BOTH, torch.device("cpu"), never, 1, said.append)
    assert (chosen.graph, chosen.compile) == (False, False)
    assert said == ["train.graph=auto train.compile=auto: false on a CPU"]
    settings = load_settings(dataset="digits", overrides=["train.graph=auto", "train.compile=auto", "device=cpu"])
    assert settings.train.graph == "auto"
    train = new_session(settings, RunFolder(tmp_path)).train
    assert (train.graph, train.compile) == (False, False)


def test_steps_are_timed_after_others_and_draw_nothing_from_torch() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 3))
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    before = torch.random.get_rng_state()
    ticks = itertools.count()
    batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(5, dtype=torch.int64)
    first, each = time_steps(TrainSettings(graph="auto"), model, batch, clock=lambda: float(next(ticks)))
    assert (first, each) == (1.0, 1 / TIMED)
    assert len(calls) == 1 + UNTIMED + TIMED
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_step_that_nobody_decided_for_runs_without() -> None:
    step = RegularStep(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), BOTH)
    assert step(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), torch.tensor(0.1)).item() > 0
