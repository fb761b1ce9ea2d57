"""Parts of training and their times, profiles, and the tools that time and profile training."""

from __future__ import annotations

import doctest
import itertools
import json
import re
import runpy
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench as benchmarks
import pytest
import torch
from training_cases import CPU, PlainMlp, dataset, network, store

from fastar.config import StarSettings, TrainSettings
from fastar.data import in_memory as device_data
from fastar.errors import FastarError
from fastar.flat import FlatLayout
from fastar.runtime import timing
from fastar.runtime.progress import SilentProgress
from fastar.runtime.timing import SpanClock, span
from fastar.training import Epoch, Profile, RegularStep, StarStep, StepsProfile, fit, profiling
from fastar.training.loop import timed_batches

TOOLS = Path(__file__).resolve().parent.parent / "tools"
TINY = ["--arch", "mlp", "--width", "4", "--size", "4", "--batch", "8", "--device", "cpu", "--sources", "2"]


def test_a_clock_adds_up_the_time_of_parts() -> None:
    with span("before"):
        pass
    with SpanClock(CPU) as clock:
        for _ in range(3):
            with span("slow"):
                time.sleep(0.02)
        with span("fast"):
            pass
    with span("after"):
        pass
    seconds = clock.seconds()
    assert list(seconds) == ["slow", "fast"]
    assert seconds["slow"] >= 0.06  # sleep never returns early
    assert seconds["fast"] < seconds["slow"]


def test_training_is_all_parts() -> None:
    model = network(PlainMlp, 0)
    settings = TrainSettings(batch_size=16, precision="fp32")
    z = store([network(PlainMlp, 1)], FlatLayout.from_module(model))
    step = StarStep(model, settings, StarSettings(), z, seed=0, match=lambda *_: None)
    with SpanClock(CPU) as clock:
        fit(step, dataset(channels=3, size=2, pad=0), settings, name="x", seed=0, epochs=1)
    assert set(clock.seconds()) == {"matching", "load", "augment", "interpolate", "forward", "backward", "update"}


class Hours:
    """A clock that only moves when it is told to, for the host and for a GPU's stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        hours = self
        self.now = 0.0

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing

            def record(self) -> None:
                self.at = hours.now

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_part_within_another_counts_for_itself(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hours = Hours(monkeypatch)
    first, second = (SpanClock(torch.device(device), clock=hours) for _ in range(2))
    with first, second:
        with span("outer"):
            hours.pass_by(2)
            with span("inner"):
                hours.pass_by(3)
            hours.pass_by(4)
        with span("inner"):
            hours.pass_by(5)
        with pytest.raises(KeyError), span("outer"), span("inner"):
            raise KeyError
        with span("after"):
            hours.pass_by(1)
    for clock in (first, second):
        assert clock.seconds() == clock.seconds() == {"outer": 6, "inner": 8, "after": 1}
    assert list(first.seconds()) == ["outer", "inner", "after"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("profiled", [False, True])
def test_what_is_done_to_images_is_no_waiting_for_them(
    device: str, profiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches come after 1 s of waiting; a block of them (here all) is augmented in 5 s."""
    hours = Hours(monkeypatch)
    true = device_data.augmented

    def slow(*arguments: Any) -> torch.Tensor:
        hours.pass_by(5)
        return true(*arguments)

    def waiting(batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            hours.pass_by(1)
            yield batch

    monkeypatch.setattr(device_data, "augmented", slow)
    images = dataset(channels=3, size=4, pad=1)
    steps = images.batch_count(16)
    clock = SpanClock(torch.device(device), clock=hours)
    with SpanClock(torch.device(device), clock=hours) if profiled else nullcontext() as other:
        for _ in timed_batches(waiting(images.batches(16, seed=0, epoch=0)), clock):
            with clock, span("forward"):
                hours.pass_by(2)
    for one in (clock, *([] if other is None else [other])):
        assert one.seconds() == {"load": steps, "augment": 5, "forward": 2 * steps}


def test_no_clock_counts_what_is_captured() -> None:
    with SpanClock(CPU) as clock:
        with timing.no_spans(), span("captured"):
            pass
        with span("counted"):
            pass
    assert list(clock.seconds()) == ["counted"]


def test_an_epoch_says_what_limits_it() -> None:
    epoch = Epoch(0, 0.5, 0.1, 1000, 2.0, 1.0, {"load": 0.1, "forward": 1.9})
    assert epoch.note() == "loss 0.5000, 500 samples/s, compute-limited (load 5%)"
    slow = replace(epoch, parts={"load": 1.0, "forward": 1.0})
    assert slow.note() == "loss 0.5000, 500 samples/s, loader-limited (load 50%)"


def test_long_epochs_are_told_of_one_by_one() -> None:
    class Told(SilentProgress):
        def line(self, text: str) -> None:
            lines.append(text)

    settings = TrainSettings(batch_size=16, precision="fp32")
    images = dataset(channels=3, size=2, pad=0)
    for seconds, told in ((29, 0), (31, 2)):
        lines: list[str] = []
        clock = itertools.count(step=seconds).__next__
        step = RegularStep(network(PlainMlp, 0), settings)
        fit(step, images, settings, name="source 3", seed=0, epochs=2, progress=Told(), clock=clock)
        assert len(lines) == told
    assert re.fullmatch(
        r"source 3, epoch 2 of 2: loss \d\.\d+, [\d,]+ samples/s, (loader|compute)-limited \(load \d+%\)", lines[1]
    )


def test_steps_in_the_middle_of_a_training_are_looked_at(tmp_path: Path) -> None:
    model = network(PlainMlp, 0)
    settings = TrainSettings(batch_size=16, precision="fp32")
    images = dataset(channels=3, size=2, pad=0)
    steps = images.batch_count(16)
    looking = StepsProfile(steps, Profile(CPU, trace=tmp_path / "trace.json"))
    history = fit(RegularStep(model, settings), images, settings, name="x", seed=0, epochs=3, profile=looking)
    found = looking.result
    assert found is not None
    assert all(set(epoch.parts) == {"load", "augment", "forward", "backward", "update", "other"} for epoch in history)
    assert {"load", "forward", "backward", "update"} <= set(found.parts)
    names = [event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert names.count("forward") == steps
    plain = network(PlainMlp, 0)
    fit(RegularStep(plain, settings), images, settings, name="x", seed=0, epochs=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("wanted", [0, 7, -1])
def test_a_training_too_short_to_be_looked_at(wanted: int) -> None:
    with pytest.raises(
        FastarError, match=rf"profile={wanted}: this training \(3 epochs of 6 steps\) has room for 1 to 6"
    ):
        StepsProfile(wanted, Profile(CPU)).check(epochs=3, steps_per_epoch=6)


def test_a_profile_has_parts_operations_and_a_trace(tmp_path: Path) -> None:
    images = torch.randn(64, 64)

    def run() -> None:
        with span("forward"):
            time.sleep(0.02)
            images @ images

    found = benchmarks.profile(run, CPU, trace=tmp_path / "trace.json")
    assert found.seconds >= found.parts["forward"] >= 0.02
    assert found.other == pytest.approx(found.seconds - found.parts["forward"])
    assert found.idle >= 0.015  # asleep; thread clocks may be coarse
    assert "aten::mm" in found.operations
    lines = found.table(steps=2).splitlines()
    assert [line.split()[0] for line in lines] == ["part", "forward", "other", "all", "idle", "peak"]
    assert float(lines[1].split()[1]) == pytest.approx(found.parts["forward"] * 500, abs=1e-3)
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"forward", "aten::mm", "[memory]"} <= names


def test_profiles_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FastarError, match=r"missing.*cannot be written \(No such file"):
        benchmarks.profile(lambda: None, CPU, trace=tmp_path / "missing" / "trace.json")


def test_examples() -> None:
    result = doctest.testmod(profiling)
    assert (result.attempted, result.failed) == (1, 0)
    assert profiling.union([]) == 0
    assert profiling.union([(3, 4), (0, 10), (9, 12)]) == 12


def test_cases_take_turns() -> None:
    calls: list[str] = []
    cases = [benchmarks.Case(name, lambda name=name: calls.append(name)) for name in "abc"]
    timings = benchmarks.time_in_turns(cases, CPU, rounds=4, repeats=2, warm_up=1)
    there, back = "aabbcc", "ccbbaa"
    assert "".join(calls) == "abc" + (there + back) * 2
    assert [len(timing.seconds) for timing in timings] == [4, 4, 4]
    with pytest.raises(ValueError, match="names of their own"):
        benchmarks.time_in_turns([cases[0], cases[0]], CPU, rounds=1)


def test_ratios_are_within_rounds() -> None:
    case = benchmarks.Case("x", lambda: None)
    first, second = benchmarks.Timing(case, [2.0, 40.0, 6.0]), benchmarks.Timing(case, [1.0, 20.0, 2.0])
    assert benchmarks.ratio(first, second) == {"median": 2.0, "q25": 2.0, "q75": 2.5, "min": 2.0}


def run_tool(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(TOOLS / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "arguments", "cases"),
    [
        (
            "bench_step.py",
            [*TINY, "--rounds", "2"],
            ["regular", "star", "loading", "plain regular", "plain star"],
        ),
        (
            "bench_step.py",
            [*TINY, "--rounds", "2", "--only", "plain star", "--optimizer", "adamw"],
            ["regular", "plain star"],
        ),
        (
            "bench_epoch.py",
            [*TINY, "--rounds", "2", "--images", "40", "--warm-images", "16"],
            ["regular", "star", "matching", "steps"],
        ),
    ],
)
def test_benchmarks_print_a_line_per_case(
    name: str,
    arguments: list[str],
    cases: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines: list[dict[str, Any]] = [
        json.loads(text) for text in run_tool(name, arguments, monkeypatch, capsys).splitlines()
    ]
    claimed = [found.pop("claim") for found in lines if "claim" in found]
    lines = [found for found in lines if "case" in found]
    if name == "bench_epoch.py":  # told at once, before any epoch
        first = lines.pop(0)
        assert first["case"] == "first matching"
        assert 0 < first["cold_seconds"] < first["setup_seconds"]
    assert [line["case"] for line in lines] == cases
    assert len(claimed) == (1 if name == "bench_epoch.py" else sum(f"plain {case}" in cases for case in cases))
    for line in lines:
        assert line["n"] == 2
        assert line["ms"]["min"] <= line["ms"]["q25"] <= line["ms"]["median"] <= line["ms"]["q75"]
        assert line["device"].startswith("cpu")
        assert line["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert "commit" in line["versions"]
    assert lines[0]["of_regular"]["median"] == 1


@pytest.mark.parametrize(
    ("what", "arguments", "parts"),
    [
        ("step", ["--steps", "3"], ["interpolate", "forward", "backward", "update"]),
        (
            "epoch",
            ["--images", "40"],
            ["matching", "load", "augment", "interpolate", "forward", "backward", "update", "evaluation"],
        ),
    ],
)
def test_profiles_print_their_parts(
    what: str,
    arguments: list[str],
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = run_tool("profile_training.py", [what, *TINY, *arguments], monkeypatch, capsys)
    table = printed[printed.index("\npart ") :].splitlines()[2:]
    assert [line.split()[0] for line in table] == [*parts, "other", "all", "idle", "peak"]
    assert "aten::" in printed


def test_a_plain_star_step_does_what_fastars_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark compares like with like: the same draws, losses and parameters."""
    tool = runpy.run_path(str(TOOLS / "bench_step.py"))
    settings = TrainSettings(batch_size=8, lr=0.05, precision="fp32")
    problem = benchmarks.Problem("mlp", CPU, settings, sources=3, size=4, width=5)
    images, labels = problem.batch()
    mine = problem.star_step()
    model = problem.network(0)
    theirs = tool["PlainStarStep"](model, problem, model, [problem.network(1 + n) for n in range(3)])
    count = 6
    mine.begin_epoch(0, count)
    theirs.draws = iter(list(zip(mine._draws.indices, mine._draws.ts, strict=True)))
    before = mine.theta.clone()
    for _ in range(count):
        mine(images, labels, torch.tensor(0.05))
        theirs(images, labels)
    flat = torch.cat([value.reshape(-1) for value in mine.layout.views(mine.theta).values()])
    names = [entry.name for entry in mine.layout.entries]
    start, pieces = 0, {}
    for name, parameter in model.named_parameters():
        pieces[name] = theirs.theta[start : start + parameter.numel()]
        start += parameter.numel()
    torch.testing.assert_close(flat, torch.cat([pieces[name] for name in names]), rtol=1e-5, atol=1e-6)
    assert (mine.theta - before).abs().max() > 1e-3


def test_a_training_that_fails_within_a_look_is_looked_at_anew() -> None:
    """As when it goes back because of losses that are not finite: what was half seen is no figure."""
    seen: list[str] = []

    class Looks(Profile):
        @contextmanager
        def clocked(self) -> Iterator[None]:
            seen.append("clock")
            with super().clocked():
                yield

        @contextmanager
        def profiled(self) -> Iterator[None]:
            seen.append("profile")
            with super().profiled():
                yield

    looking = StepsProfile(2, Looks(CPU))
    looking.epoch_begins(1, 4)
    for _ in range(3):  # within the second look
        looking.step_done()
    looking.close()
    assert looking.result is None
    looking.epoch_begins(1, 4)
    for _ in range(4):
        assert looking.result is None
        looking.step_done()
    looking.close()
    assert seen == ["clock", "profile"] * 2
    assert looking.result is not None
    found = looking.result
    looking.epoch_begins(2, 4)
    looking.step_done()
    assert (looking.result, len(seen)) == (found, 4)
