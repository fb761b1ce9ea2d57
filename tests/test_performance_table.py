"""README's table: the figures that were promised, each with its target, from files of GPUs alone."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "performance_table.py"
GPU = "Made Up GPU 80GB"
STEP = {"arch": "resnet18", "batch": 128, "size": 32, "precision": "bfloat16", "cudnn_benchmark": False}
IMAGENET = {"arch": "imagenet-resnet18", "batch": 256, "size": 224, "precision": "bfloat16", "cudnn_benchmark": False}


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(TOOL))


def around(value: float, factor: float = 1.1) -> dict[str, float]:
    return {"median": value, "q25": value / factor, "q75": value * factor, "min": value / factor}


def of_step(case: str, ms: float, **ratios: float) -> dict[str, Any]:
    ratios_around = {key: around(value) for key, value in ratios.items()}
    return {"bench": "step", "case": case, **STEP, "ms": around(ms), "images_per_s": 128_000 / ms, **ratios_around}


def of_kernel(case: str, numel: int, share: float) -> dict[str, Any]:
    facts = {"parameters": numel, "of_copy": share, "gb_per_s": 3000 * share, "kernels": "triton"}
    return {"bench": "kernels", "case": case, "ms": around(0.1), **facts}


def of_matching(case: str, seconds: float, **more: Any) -> dict[str, Any]:
    each = {"median": seconds / 50, "q10": seconds / 55, "q90": seconds / 45}
    return {"bench": "matching", "case": case, "arch": "resnet18", "sources": 50, "seconds_per_source": each, **more}


def of_memory(sources: int, peak: float, share: float) -> dict[str, Any]:
    facts = {"sources": sources, "cap": "40GB", "peak_bytes": peak, "of_plan": share}
    each = {"training": share, "matching": 0.5}
    return {"bench": "imagenet", "case": "memory", **IMAGENET, **facts, "of_plan_each": each}


LINES: list[dict[str, Any]] = [
    of_matching("fastar cold", 4.5),
    of_matching("fastar warm", 0.25),
    of_matching("fastar warm, theta moved", 0.75, moved_by=0.03),
    {
        **{"bench": "matching", "case": "rebasin / fastar", "arch": "resnet18", "sources": 50, "n": 3},
        **{"times_faster": {"cold": 120.0, "warm": 60.0}, "objective_at_least_equal": "2 of 3 pairs"},
    },
    of_kernel("interpolate bf16 indexed", 11_000_000, 0.91),
    of_kernel("sgd_update bf16, next point", 11_000_000, 0.84),
    of_kernel("adam_update bf16, next point", 11_000_000, 0.87),
    of_kernel("interpolate bf16 indexed", 100_000_000, 0.93),
    of_kernel("sgd_update bf16, next point", 100_000_000, 0.88),
    of_kernel("adam_update bf16, next point", 100_000_000, 0.89),
    of_step("regular", 8.0, of_regular=1, of_plain=0.8),
    of_step("star", 8.2, of_regular=1.025, of_like=1.025, of_plain_star=0.6),
    of_step("loading", 0.3, of_regular=0.0375),
    of_step("regular, graph", 4.0, of_regular=0.5, of_plain=0.4),
    of_step("star, graph", 4.4, of_regular=0.55, of_like=1.1, of_plain_star=0.3),
    of_step("regular, compiled", 6.0, of_plain_compiled=1.2),
    of_step("star, compiled", 6.1, of_like=1.02),
    of_step("regular, compiled, graph", 3.0, of_plain_compiled=0.6),
    of_step("star, compiled, graph", 3.1, of_like=1.03),
    *(
        {"bench": "epoch", "case": case, **STEP, "sources": 50, "of_regular": around(share)}
        for case, share in (("star", 1.12), ("matching", 0.08), ("steps", 1.04))
    ),
    {"bench": "barrier", "case": "together", "passes": 2, "speed_up": around(5)},
    {"bench": "barrier", "case": "together, graph", "passes": 2, "speed_up": around(7)},
    {"bench": "barrier", "case": "one at a time", "passes": 22, "speed_up": around(1)},
    {
        **{"bench": "loader", "case": "fastar", "pipeline": "cifar10", "device": "cpu, 16 threads"},
        **{"speed_up": around(40), "images_per_s": around(900_000), "workers": 16},
    },
    {
        **{"bench": "loader", "case": "fastar", "pipeline": "imagenet", "device": "cpu, 16 threads"},
        **{"speed_up": around(1.5), "images_per_s": around(5_000), "workers": 16},
    },
    {"bench": "imagenet", "case": "compute: regular step", **IMAGENET, "images_per_second": 3210.4},
    {"bench": "imagenet", "case": "compute: star step", **IMAGENET, "of_regular": around(1.01)},
    *(
        {
            **{"bench": "imagenet", "case": "loader: regular epoch", **IMAGENET, "threads": 16},
            **{"images_per_second": rate, "load_share": 0.04},
        }
        for rate in (2900.0, 3000.0, 3100.0)
    ),
    of_memory(30, 6.5e9, 1.02),
    of_memory(500, 41e9, 1.15),
]


def record(lines: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A results file with a part of these lines."""
    versions = {"torch": "2.11.0", "commit": "0123456789ab"}
    parts = [{"part": "bench", "exit_code": 0, "lines": [{"device": GPU, **line} for line in lines]}]
    return {"device": GPU, "driver": "580.1", "date": "2030-01-01", "versions": versions, "parts": parts, **changes}


def rows(text: str) -> dict[str, list[str]]:
    """What a table says: figure to [target, measured, met]."""
    found = [[cell.strip() for cell in line.strip("|").split(" |")] for line in text.splitlines() if line[:2] == "| "]
    return {cells[0]: cells[1:] for cells in found[1:]}


def test_every_promised_figure_beside_its_target(tool: dict[str, Any]) -> None:
    table = rows(tool["section"]([("made.json", record(LINES))]))
    assert len(table) == len(tool["FIGURES"])
    assert [figure for figure, cells in table.items() if cells[1] == "not measured"] == []
    assert table["matching 50 ResNet-18 sources, first time"] == ["at most 4 s", "4.5 s (4.09 to 5)", "no"]
    assert table["the same again, theta as it was"] == ["at most 1 s", "0.25 s (0.227 to 0.278)", "yes"]
    moved = table["the same again, after an epoch of theta"]
    assert moved == ["at most 1 s", "0.75 s (0.682 to 0.833), theta moved by 3%", "yes"]
    assert table["rebasin's time over fastar's, per source"] == ["", "120 times cold, 60 times warm, n = 3", ""]
    assert table["objective at least rebasin's"] == ["every pair", "2 of 3 pairs", "no"]
    assert table["interpolation, 11 M parameters, of copy bandwidth"][1:] == ["91.0%, 2,730 GB/s", "yes"]
    assert table["SGD's update with the next point, 11 M parameters, of copy bandwidth"][2] == "no"
    assert table["SGD's update with the next point, 100 M parameters, of copy bandwidth"][2] == "yes"
    assert table["star step over regular step, eager"] == ["at most 1.05", "1.02 (0.932 to 1.13)", "yes"]
    assert table["star step over regular step, CUDA graph"][2] == "no"
    assert table["plain PyTorch's star step over fastar's, CUDA graph"][1] == "3.33 (3.03 to 3.67); 29,091 images/s"
    eager = table["training speed over plain PyTorch's, eager over eager"]
    assert eager == ["at least 1.3", "1.25 (1.14 to 1.38); 16,000 images/s", "no"]
    assert table["training speed over plain PyTorch's, CUDA graph over eager"][2] == "yes"
    assert table["training speed over plain PyTorch's, compiled over compiled"][2] == "no"
    assert table["training speed over plain PyTorch's, compiled, CUDA graph over compiled"][2] == "yes"
    whole = table["star epoch over regular epoch, 50 sources"]
    assert whole == ["at most 1.15", "1.12 (1.02 to 1.23): matching 0.08, steps 1.04", "yes"]
    assert table["augmentation, of a step"] == ["at most 10 %", "3.8% (regular), 7.5% (regular, graph)", "yes"]
    shared = table["barrier: passes over the data, speed over one at a time"]
    assert shared == ["2; at least 4", "2 passes against 22, 5 (4.55 to 5.5) times faster, by graphs 7", "yes"]
    assert table["loading cifar10, over DataLoader and Pillow"][2] == "yes"
    assert table["loading ImageNet-size JPEG, over DataLoader and Pillow"][2] == "no"
    assert table["ImageNet, ResNet-18, batch 256, bf16: compute alone"][1] == "3,210 images/s"
    loaded = "3,000 images/s, 4% of the time waiting for images, 16 threads, n = 3"
    assert table["the same with the loader"][1] == loaded
    assert table["the same, peak memory with 30 sources"][1:] == ["6.50 GB", "yes"]
    assert table["the same, peak memory with 500 sources"][1:] == ["41.00 GB", "no"]
    assert table["the same, over `fastar plan`'s, 30 sources"][2] == "yes"
    over = table["the same, over `fastar plan`'s, 500 sources"]
    assert over == ["0.9 to 1.1", "1.150 (training 1.150, matching 0.500)", "no"]


@pytest.mark.parametrize("number", range(len(LINES)))
def test_what_was_not_measured_says_so(tool: dict[str, Any], number: int) -> None:
    """Every line of the made file is needed for some figure, and nothing else takes its place."""
    whole = tool["section"]([("made.json", record(LINES))])
    failed = {key: LINES[number][key] for key in ("bench", "case")} | {"error": "RuntimeError: no luck"}
    less = tool["section"]([("made.json", record([*LINES[:number], failed, *LINES[number + 1 :]]))])
    assert less != whole


def test_other_problems_are_not_the_promised_ones(tool: dict[str, Any]) -> None:
    """A quicker network, plain kernels, another device, cuDNN's own timing: none is what the table is of."""
    others = [
        {**of_step("star", 1.0, of_like=0.5), "arch": "resnet8"},
        {**of_step("star", 1.0, of_like=0.5), "cudnn_benchmark": True},
        {**of_step("star", 1.0, of_like=0.5), "device": "cpu, 16 threads"},
        {**of_kernel("interpolate bf16 indexed", 11_000_000, 0.99), "kernels": "reference"},
        {**of_matching("fastar warm", 0.1), "sources": 5},
        {**of_memory(30, 1e9, 1.0), "size": 32},
    ]
    table = rows(tool["section"]([("made.json", record(others))]))
    assert {cells[1] for cells in table.values()} == {"not measured"}


def test_the_later_file_counts(tool: dict[str, Any]) -> None:
    first = record(LINES)
    first["parts"] += [
        {"part": "tests", "exit_code": None, "stopped_after_seconds": 10, "lines": []},
        {"part": "bench_loader", "exit_code": None, "skipped": "no time left in the budget"},
    ]
    second = record([of_matching("fastar cold", 3.0)], versions={"torch": "2.11.0", "commit": "ba9876543210"})
    second["parts"].append({"part": "tests", "exit_code": 0, "lines": []})
    text = tool["section"]([("a.json", first), ("a-2.json", second)])
    assert rows(text)["matching 50 ResNet-18 sources, first time"][2] == "yes"
    assert rows(text)["the same again, theta as it was"][2] == "yes"
    assert "Failed or not finished: bench_loader." in text
    assert "commit 0123456789ab, ba9876543210" in text
    assert "torch 2.11.0, driver 580.1" in text
    other = tool["section"]([("a.json", first), ("b.json", record([], device="Another GPU"))])
    assert other.count("| figure |") == 2


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"device": "simulated"}, "device 'simulated'"),
        ({"device": "cpu, 16 threads, AVX2"}, "device 'cpu, 16 threads, AVX2'"),
        ({"small": True}, "small problems"),
    ],
)
def test_nothing_but_gpus_is_published(tool: dict[str, Any], changes: dict[str, Any], what: str) -> None:
    with pytest.raises(tool["FastarError"], match=re.escape(f"made.json: no GPU's figures ({what})")):
        tool["section"]([("good.json", record(LINES)), ("made.json", record(LINES, **changes))])


def run_table(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["performance_table.py", *arguments])
    runpy.run_path(str(TOOL), run_name="__main__")


def test_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_table(monkeypatch, "--results", str(tmp_path))
    assert capsys.readouterr().out.startswith("No GPU figure has been measured yet")
    (tmp_path / "made-up-2030-01-01.json").write_text(json.dumps(record(LINES)))
    run_table(monkeypatch, "--results", str(tmp_path))
    assert f"**{GPU}**, 2030-01-01" in capsys.readouterr().out
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(SystemExit) as stopped:
        run_table(monkeypatch, "--results", str(tmp_path))
    assert stopped.value.code == 2
    assert "broken.json: not valid JSON" in capsys.readouterr().err


def test_the_readme_has_the_tables_place_and_says_what_the_files_say() -> None:
    root = TOOL.parent.parent
    tool = runpy.run_path(str(TOOL))
    files = sorted((root / "tools" / "results").glob("*.json"), key=lambda path: path.stem)
    text = tool["section"]([(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in files])
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert f"{tool['START']}\n{text}\n{tool['END']}" in readme
