"""What the benchmarks share: cases that take turns, fail alone, and are told of in one line."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import bench as benchmarks
import pytest
import torch
from bench import CannotRun, Case, Timing, built_when_run, failing_alone, in_one_graph, line, time_in_turns
from bench.trained import digits
from scipy.optimize import linear_sum_assignment

from fastar.config import TrainSettings
from fastar.flat import FlatLayout
from fastar.models import build_model
from fastar.symmetry import derive_symmetry
from fastar.training import StarStep

CPU = torch.device("cpu")
TOOLS = Path(__file__).resolve().parent.parent / "tools"


def run_tool(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(TOOLS / name), run_name="__main__")


def broken() -> None:
    raise RuntimeError("no\nluck")


class Counted:
    """Counts its calls, and fails at call number `fails`."""

    def __init__(self, fails: int | None = None):
        self.calls, self.fails = 0, fails

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == self.fails:
            raise ValueError(f"call {self.calls}")


@pytest.mark.parametrize("fails", [1, 3, 4, 6])
def test_a_case_that_fails_ends_no_other(fails: int) -> None:
    """In a warm-up of 3 calls, or in any of 4 rounds."""
    good, bad, last = Counted(), Counted(fails), Counted()
    told: list[tuple[str, str]] = []
    timings = time_in_turns(
        [Case("good", good), Case("bad", bad), Case("last", last)],
        CPU,
        rounds=4,
        on_failure=lambda case, error: told.append((case.name, str(error))),
    )
    assert [(t.case.name, len(t.seconds)) for t in timings] == [("good", 4), ("last", 4)]
    assert told == [("bad", f"call {fails}")]
    assert (good.calls, bad.calls, last.calls) == (7, fails, 7)
    with pytest.raises(ValueError, match=f"call {fails}"):
        time_in_turns([Case("bad", Counted(fails))], CPU, rounds=4)


def test_what_cannot_be_built_fails_as_its_own_case() -> None:
    made = []

    def make() -> Counted:
        made.append(Counted())
        return made[-1]

    run = built_when_run(make)
    assert made == []
    told: list[str] = []
    timings = time_in_turns(
        [Case("broken", built_when_run(lambda: broken)), Case("whole", run)],
        CPU,
        rounds=2,
        warm_up=1,
        on_failure=lambda case, error: told.append(case.name),
    )
    assert [t.case.name for t in timings] == ["whole"]
    assert told == ["broken"]
    assert [one.calls for one in made] == [3]  # built once, called by warm-up and rounds
    assert timings[0].first > 0


def test_seconds_are_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def ten() -> None:
        now[0] += 10

    one, batch = (Case("one", ten), Case("ten calls", ten, calls=10))
    timings = time_in_turns([one, batch], CPU, rounds=2, repeats=20)
    assert [t.median for t in timings] == [10, 1]
    assert timings[0].first == 10


def test_a_loop_where_there_are_no_graphs() -> None:
    counted = Counted()
    in_one_graph(counted, 7, CPU)()
    assert counted.calls == 7


def test_a_failure_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with failing_alone("step", "broken", CPU, arch="mlp"):
        broken()
    with failing_alone("step", "whole", CPU):
        pass
    captured = capsys.readouterr()
    (printed,) = map(json.loads, captured.out.splitlines())
    assert (printed["bench"], printed["case"], printed["arch"]) == ("step", "broken", "mlp")
    assert printed["error"] == "RuntimeError: no luck"
    assert printed["device"].startswith("cpu")
    assert "RuntimeError: no\nluck" in captured.err


def test_a_line_says_how_long_the_first_run_took() -> None:
    timing = Timing(Case("x", broken), [0.002, 0.004], first=1.5)
    found = json.loads(line("step", timing, CPU))
    assert found["first_s"] == 1.5
    assert found["ms"]["median"] == 3
    assert "first_s" not in json.loads(line("step", Timing(timing.case, timing.seconds), CPU))


def test_steps_go_on_over_many_epochs() -> None:
    """A star step draws for as many steps as its epoch has; more of them begin another."""
    problem = benchmarks.Problem("mlp", CPU, TrainSettings(batch_size=4, precision="fp32"), 2, size=4, width=4)
    step = MagicMock(spec=StarStep)
    run = problem.endless(step)
    for _ in range(2 * benchmarks.problem.EPOCH + 1):
        run()
    assert [call.args for call in step.begin_epoch.call_args_list] == [(n, benchmarks.problem.EPOCH) for n in range(3)]


def test_modes_name_cases_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = runpy.run_path(str(TOOLS / "bench_step.py"))
    problem = benchmarks.Problem("mlp", CPU, TrainSettings(batch_size=4, precision="fp32"), 2, size=4, width=4)
    cases = tool["make_cases"](problem)
    assert {name for names in tool["MODES"].values() for name in names} == set(cases)
    assert set(tool["BASES"]) <= set(cases)
    for names in tool["MODES"].values():
        for name in names:  # what a star is compared with takes turns with it
            assert "star" not in name or tool["like"](name) in names, name


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("star", "regular"),
        ("star, graph, host store", "regular, graph"),
        ("star, compiled, graph", "regular, compiled, graph"),
        ("plain star, compiled", "plain regular, compiled"),
    ],
)
def test_a_star_step_is_compared_with_a_regular_one_of_its_kind(name: str, wanted: str) -> None:
    assert runpy.run_path(str(TOOLS / "bench_step.py"))["like"](name) == wanted


def test_graphs_without_a_gpu_are_left_out_and_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--arch", "mlp", "--width", "4", "--size", "4", "--batch", "8", "--device", "cpu", "--sources", "2"]
    run_tool("bench_step.py", [*small, "--rounds", "2", "--modes", "graph"], monkeypatch)
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    left_out = {found["case"]: found["skipped"] for found in lines if "skipped" in found}
    assert left_out == dict.fromkeys(
        ("regular, graph", "star, graph", "star, graph, host store"), "CUDA graphs need a GPU"
    )
    assert not any("error" in found for found in lines)
    assert [found["case"] for found in lines if "ms" in found] == ["regular", "plain regular", "plain star"]


def test_what_a_machine_lacks_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    problem = benchmarks.Problem("mlp", CPU, TrainSettings(batch_size=4, precision="fp32"), 2, size=4, width=4)
    for changes, lacks in (({"graph": True}, "CUDA graphs need a GPU"), ({"precision": "fp16"}, "fp16 needs a GPU")):
        for make in (problem.regular_step, problem.star_step):
            with failing_alone("step", "a case", CPU):
                make(**changes)
            captured = capsys.readouterr()
            assert json.loads(captured.out)["skipped"] == lacks
            assert (captured.err, "error" in json.loads(captured.out)) == ("", False)
    assert problem.changed(compile=True).compile
    with pytest.raises(CannotRun, match="CUDA graphs"):
        problem.changed(graph=True)


def test_kernels_and_copies_are_told_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_tool("bench_kernels.py", ["--device", "cpu", "--millions", "1", "--rounds", "2"], monkeypatch)
    lines: list[dict[str, Any]] = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert lines[0]["case"] == "copy"
    (fastest,) = {found["copied_by"] for found in lines}
    assert fastest in ("copy", "copy, by a kernel")
    by_case = {found["case"]: found for found in lines}
    assert by_case[fastest]["of_copy"] == 1
    assert by_case["sgd_update bf16 gradient"]["bytes"] == 18_000_000
    assert all(found["of_copy"] > 0 and found["buffer_sets"] == 1 for found in lines)


def test_sweeping_needs_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_tool("bench_kernels.py", ["--device", "cpu", "--sweep"], monkeypatch)
    assert "--sweep is of the Triton kernels" in capsys.readouterr().err


@pytest.fixture
def compiled_kernels() -> Iterator[None]:
    """Kernels defined inside are for a GPU, whoever imports them first; other tests define theirs to be interpreted."""

    def taken() -> dict[str, ModuleType]:
        """The modules that define kernels; they are imported anew by whoever needs them next."""
        names = [name for name in sys.modules if name.startswith("fastar.kernels.")]
        return {name: sys.modules.pop(name) for name in names if "triton" in vars(sys.modules[name])}

    before = taken()
    yield
    taken()
    for name, module in before.items():
        sys.modules[name] = module
        setattr(sys.modules["fastar.kernels"], name.rpartition(".")[2], module)


def test_a_launcher_takes_other_blocks_and_warps_for_a_while(compiled_kernels: None) -> None:
    pytest.importorskip("triton")
    interpolation = importlib.import_module("fastar.kernels.interpolation")

    tool = runpy.run_path(str(TOOLS / "bench_kernels.py"))
    for module, kernel in tool["KERNELS"].values():
        found = __import__(f"fastar.kernels.{module}", fromlist=[kernel])
        assert callable(getattr(found, kernel).fn)
        assert isinstance(found.BLOCK, int)
    kernel, block = interpolation._interpolate_kernel, interpolation.BLOCK
    with tool["launched_with"]("interpolation", "_interpolate_kernel", 4096, 8):
        assert interpolation.BLOCK == 4096
        launch = interpolation._interpolate_kernel[(3,)]
        assert launch.keywords == {"num_warps": 8}
    assert (interpolation._interpolate_kernel, interpolation.BLOCK) == (kernel, block)


def test_matching_is_told_of_case_by_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--arch", "mlp", "--width", "6", "--sources", "2", "--steps", "5", "--repeats", "2", "--device", "cpu"]
    run_tool("bench_matching.py", small, monkeypatch)
    lines = {found["case"]: found for found in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(lines)[1:] == [
        *("fastar cold, first call", "fastar cold", "fastar warm", "fastar warm, theta moved"),
        *("fastar cold, chunk=1", "fastar warm, theta moved, chunk=1", "floor", "objective"),
    ]
    assert lines["fastar warm"]["solves"] <= lines["fastar cold"]["solves"]
    assert lines["fastar warm, theta moved"]["moved_by"] > 0
    assert lines["fastar cold"]["seconds_per_source"]["median"] > 0
    # Two hidden layers of 6 units: the first owns 192 weights, a bias and 6 weights of the next for each unit, the
    # second 6, a bias and 10. Each owned number is multiplied for 6 by 6 pairs of units.
    assert lines["floor"]["gflop_per_source"] == pytest.approx(2 * 36 * (192 + 1 + 6 + 6 + 1 + 10) / 1e9)
    assert lines["floor"]["warm_over_floor"]["median"] > 0
    for pair in lines["objective"]["pairs"]:
        assert pair["fastar"] >= pair["unmatched"]


def test_assignments_are_compared_with_another_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = runpy.run_path(str(TOOLS / "bench_matching.py"))
    arguments = SimpleNamespace(sources=3, seed=0, repeats=2)
    lines: list[dict[str, Any]] = []

    def compare() -> list[dict[str, Any]]:
        lines.clear()
        tool["compare_assignments"]([4, 9], arguments, torch.device("cpu"), lambda **line: lines.append(line))
        return lines

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install torch-linear-assignment" in compare()[0]["missing"]
    monkeypatch.undo()
    # The other package's interface, by the definition of what it solves: costs to minimise, [batch, n, n].
    other = ModuleType("torch_linear_assignment")
    other.__spec__ = ModuleSpec("torch_linear_assignment", None)
    other.batch_linear_assignment = lambda costs: torch.stack(  # type: ignore[attr-defined]
        [torch.from_numpy(linear_sum_assignment(one.numpy())[1]) for one in costs]
    )
    monkeypatch.setitem(sys.modules, "torch_linear_assignment", other)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    found = {line["case"]: line for line in compare()}
    for size in (4, 9):
        assert found[f"assignment of {size}, total"]["total_over"] == pytest.approx(1)
        assert found[f"assignment of {size}, threads"]["n"] == found[f"assignment of {size}, device"]["n"] == 2


@pytest.mark.parametrize("threads", [1, 2])
def test_the_floor_is_a_sweeps_products(threads: int) -> None:
    """The products of theta with itself have the squares of what each unit owns on their diagonals."""
    tool = runpy.run_path(str(TOOLS / "bench_matching.py"))
    model = build_model("resnet8", input_shape=(3, 8, 8), classes=10, seed=0, width=0.25)
    symmetry = derive_symmetry(model, (torch.zeros(2, 3, 8, 8),))
    layout = FlatLayout.from_module(model)
    row = layout.flatten(model.state_dict())
    floor = tool["Floor"](symmetry, layout.views(row), layout.views(row.expand(3, -1).contiguous()), threads)
    before = torch.get_num_threads()
    floor()
    assert torch.get_num_threads() == before
    counted = [(g, m) for g in symmetry.groups for m in g.members if m.tensor in symmetry.parameters]
    assert [len(products) for products in floor._products] == 3 * [len(counted)]
    for (group, member), (left, right) in zip(counted, floor._products[2], strict=True):
        assert left.shape == (group.size, left.numel() // group.size)
        assert right.shape == left.T.shape
        assert left.numel() == right.numel() == dict(model.named_parameters())[member.tensor].numel()
        assert torch.equal(left.reshape(-1), right.reshape(-1))  # the same share of each source's own row
    assert floor.flops == sum(2 * group.size * dict(model.named_parameters())[m.tensor].numel() for group, m in counted)


def test_matching_does_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # an import of it fails
    images, labels, what = digits()
    assert what == "ten noisy patterns"
    assert images.shape == (1797, 3, 8, 8)
    assert sorted(set(labels.tolist())) == list(range(10))
    assert abs(float(images.mean())) < 1e-5
    assert float(images.std()) == pytest.approx(1, abs=1e-3)


def test_a_user_s_network_takes_turns_with_the_registered_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--arch", "mlp", "--width", "8", "--channels", "1", "--size", "8", "--batch", "8", "--device", "cpu"]
    theirs = ["--model", f"{TOOLS}/bench/user_networks.py:mlp", "--rounds", "2"]
    run_tool("bench_step.py", [*small, "--sources", "2", *theirs], monkeypatch)
    lines = {found["case"]: found for found in map(json.loads, capsys.readouterr().out.splitlines())}
    compared = {name for name, found in lines.items() if "of_registered" in found}
    for name in ("regular", "star"):
        assert {f"{name}, user's network", f"{name}, user's loss"} <= compared
    assert lines["star"]["cpu_ms"]["min"] > 0
    with pytest.raises(SystemExit):
        run_tool("bench_step.py", [*small[:2], "--width", "9", *small[4:], *theirs], monkeypatch)
    assert "its parameters have other shapes than those of mlp" in capsys.readouterr().err


def test_networks_together_and_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--width", "4", "--size", "6", "--batch", "32", "--device", "cpu", "--rounds", "2", "--numbers", "2", "3"]
    run_tool("bench_stacked.py", small, monkeypatch)
    found = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    lines = [one for one in found if "case" in one]
    assert len(found) - len(lines) == sum(one["same_bits"] for one in lines[1::2])  # claims
    assert [(one["case"], one["networks"]) for one in lines] == [
        (case, number) for number in (2, 3) for case in ("apart", "together")
    ]
    assert all(one["apart_of_together"]["median"] > 0 and "same_bits" in one for one in lines[1::2])


def test_quality_is_told_of_star_by_star(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = ["dataset.limit=200", f"dataset.directory={tmp_path}", "train.epochs=2", "sources.number=2"]
    small += ["sources.heldout=1", "evaluation.points=3", "workers=1", "device=cpu"]
    picture = tmp_path / "quality.png"
    chosen = ["--ways", "random", "mean", "--shares", "0.5", "--seeds", "2", "--picture", str(picture)]
    run_tool("bench_quality.py", [*small, *chosen], monkeypatch)
    out = capsys.readouterr().out
    lines = [json.loads(text) for text in out.splitlines() if text.startswith("{")]
    stars = [one for one in lines if "case" in one]
    told = [(one["seed"], one["epochs"], one["case"]) for one in stars]
    assert told == [(seed, 1, way) for seed in (0, 1) for way in ("random", "mean")]
    assert all(one["largest_loss"] >= one["star_loss"] > 0 and one["cpu_s"] > 0 for one in stars)
    assert len({one["star_loss"] for one in stars}) == len(stars)
    first, second = (one["largest_loss"] for one in stars if one["case"] == "mean")
    assert f"| mean | 1 | {(first + second) / 2:.3f} ± {abs(first - second) / 2**0.5:.3f} |" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="--ways 'nowhere': choose of random; source; mean; "):
        run_tool("bench_quality.py", ["--ways", "nowhere"], monkeypatch)
