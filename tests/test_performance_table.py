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
    return {
        "bench": "step",
        "case": case,
        **STEP,
        "n": 15,
        "ms": around(ms),
        "images_per_s": 128_000 / ms,
        **ratios_around,
    }


def of_kernel(case: str, numel: int, share: float) -> dict[str, Any]:
    facts = {"parameters": numel, "of_copy": share, "gb_per_s": 3000 * share, "kernels": "triton", "n": 30}
    return {"bench": "kernels", "case": case, "ms": around(0.1), **facts}


def of_matching(case: str, seconds: float, **more: Any) -> dict[str, Any]:
    each = {"median": seconds / 50, "q25": seconds / 55, "q75": seconds / 45}
    facts = {"arch": "resnet18", "sources": 50, "seconds_per_source": each, "n": 3}
    return {"bench": "matching", "case": case, **facts, **more}


def of_memory(sources: int, peak: float, share: float) -> dict[str, Any]:
    facts = {"sources": sources, "cap": "40GB", "peak_bytes": peak, "reserved_bytes": 1.1 * peak, "of_plan": share}
    each = {"training": share, "matching": 0.5}
    return {"bench": "imagenet", "case": "memory", **IMAGENET, **facts, "of_plan_each": each}


LINES: list[dict[str, Any]] = [
    of_matching("fastar cold", 4.5),
    of_matching("fastar warm", 0.25),
    of_matching("fastar warm, theta moved", 0.75, moved_by=0.03),
    of_matching("floor", 0.1, warm_over_floor=around(2.5)),
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
        {
            **{"bench": "epoch", "case": case, **STEP, "sources": 50, "n": 4},
            **{"of_regular": around(share), "moved_by": around(0.12)},
        }
        for by, more in (("", 0.0), (", by activations", 0.06))
        for case, share in ((f"star{by}", 1.12 + more), (f"matching{by}", 0.08 + more), (f"steps{by}", 1.04))
    ),
    {"bench": "barrier", "case": "together", "passes": 2, "n": 2, "speed_up": around(5)},
    {"bench": "barrier", "case": "together, graph", "passes": 2, "n": 2, "speed_up": around(7)},
    {"bench": "barrier", "case": "one at a time", "passes": 22, "n": 2, "speed_up": around(1)},
    {
        **{"bench": "loader", "case": "fastar", "pipeline": "cifar10", "device": "cpu, 16 threads"},
        **{"speed_up": around(40), "images_per_s": around(900_000), "workers": 16, "n": 3},
    },
    {
        **{"bench": "loader", "case": "fastar", "pipeline": "imagenet", "device": "cpu, 16 threads"},
        **{"speed_up": around(1.5), "images_per_s": around(5_000), "workers": 16, "n": 3},
    },
    {"bench": "imagenet", "case": "compute: regular step", **IMAGENET, "images_per_second": 3210.4, "n": 4},
    {"bench": "imagenet", "case": "compute: star step", **IMAGENET, "of_regular": around(1.01), "n": 4},
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
    facts = {"driver": "580.1", "power_limit": "700.00 W", "cpu": "Made Up CPU", "cores": 16, "date": "2030-01-01"}
    return {"device": GPU, **facts, "versions": versions, "parts": parts, **changes}


def rows(text: str) -> dict[str, list[str]]:
    """What the tables say: figure to [target, measured, n, met]."""
    found = [[cell.strip() for cell in line.strip("|").split(" |")] for line in text.splitlines() if line[:2] == "| "]
    return {cells[0]: cells[1:] for cells in found if cells[0] != "figure"}


def test_every_promised_figure_beside_its_target(tool: dict[str, Any]) -> None:
    table = rows(tool["section"]([("made.json", record(LINES))]))
    assert len(table) == sum(len(group.figures) for group in tool["GROUPS"])  # and no two of one name
    assert [figure for figure, cells in table.items() if cells[1] == "not measured"] == []
    assert table["first time: sources as they were trained"] == ["at most 4 s", "4.5 s (4.09 to 5)", "3", "no"]
    assert table["again, theta as it was"] == ["at most 1 s", "0.25 s (0.227 to 0.278)", "3", "yes"]
    moved = table["again, after theta was trained on"]
    assert moved == ["at most 1 s", "0.75 s (0.682 to 0.833), theta moved by 3%", "3", "yes"]
    assert table["again, over one sweep's matrix products alone"] == ["", "2.5 (2.27 to 2.75)", "3", ""]
    faster = table["PyPI rebasin's time over fastar's, a source"]
    assert faster == ["", "120 the first time, 60 again", "3", ""]
    assert table["objective at least rebasin's"] == ["every pair", "2 of 3 pairs", "3", "no"]
    assert table["interpolation to bf16, 11 M parameters"] == ["at least 85%", "91.0%, 2,730 GB/s", "30", "yes"]
    assert table["SGD's update with the next interpolation, 11 M parameters"][3] == "no"
    assert table["SGD's update with the next interpolation, 100 M parameters"][3] == "yes"
    eager = table["star step's time over regular step's, eager"]
    assert eager == ["at most 1.05", "1.02 (0.932 to 1.13)", "15", "yes"]
    assert table["star step's time over regular step's, CUDA graph"][3] == "no"
    plain = table["star step's speed over plain PyTorch's eager star step, CUDA graph"]
    assert plain[1] == "3.33 (3.03 to 3.67); 29,091 images/s"
    speed = "regular step's speed over plain PyTorch's"
    assert table[f"{speed} eager one, eager"] == ["at least 1.3", "1.25 (1.14 to 1.38); 16,000 images/s", "15", "no"]
    assert table[f"{speed} eager one, CUDA graph"][3] == "yes"
    assert table[f"{speed} compiled one, compiled"][3] == "no"
    assert table[f"{speed} compiled one, compiled, CUDA graph"][3] == "yes"
    told = "1.12 (1.02 to 1.23): matching 0.08, steps 1.04; theta moved by 12% an epoch"
    assert table["star epoch's time over regular epoch's"] == ["at most 1.15", told, "4", "yes"]
    told = "1.18 (1.07 to 1.3): matching 0.14, steps 1.04; theta moved by 12% an epoch"
    assert table["the same, sources matched by their activations"] == ["", told, "4", ""]
    shares = "3.8% of an eager step, 7.5% of a step by CUDA graph"
    augmented = table["shuffling, cropping and mirroring a batch, of a step's time"]
    assert augmented == ["at most 10%", shares, "15", "yes"]
    shared = table["a barrier's passes over the data; speed over one point at a time"]
    assert shared == ["2; at least 4", "2 against 22; 5 (4.55 to 5.5), by CUDA graphs 7", "2", "yes"]
    assert table["CIFAR-10: images/s over DataLoader and Pillow's"][3] == "yes"
    assert table["ImageNet's sizes: images/s over DataLoader and Pillow's"][3] == "no"
    assert table["regular training, images on the GPU"][1:3] == ["3,210 images/s", "4"]
    loaded = "3,000 images/s, 4% of the time waiting for images, 16 threads"
    assert table["regular training, images decoded from JPEG"][1:3] == [loaded, "3"]
    assert table["peak memory with 30 sources"][1:] == ["6.50 GB of tensors, 7.15 GB taken for them", "1", "yes"]
    assert table["peak memory with 500 sources"][3] == "no"
    assert table["peak memory over `fastar plan`'s, 30 sources"][3] == "yes"
    over = table["peak memory over `fastar plan`'s, 500 sources"]
    assert over == ["0.9 to 1.1", "1.150 (training 1.150, matching 0.500)", "1", "no"]


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
    assert rows(text)["first time: sources as they were trained"][3] == "yes"
    assert rows(text)["again, theta as it was"][3] == "yes"
    assert "Failed or not finished: bench_loader." in text
    head = "(700.00 W; host: 16 cores of Made Up CPU), 2030-01-01, torch 2.11.0, driver 580.1, commit "
    assert f"**{GPU}** {head}0123456789ab, ba9876543210 ([a.json](tools/results/a.json), [a-2.json]" in text
    other = tool["section"]([("a.json", first), ("b.json", record([], device="Another GPU"))])
    assert other.count("| figure |") == 2 * len(tool["GROUPS"])


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
    assert f"**{GPU}** (700.00 W; " in capsys.readouterr().out
    # Names of two calls say nothing of which was first.
    later = record([of_matching("fastar cold", 3.0)], started="2030-01-01T09:00:00+00:00")
    (tmp_path / "made-up-2030-01-01-call-1.json").write_text(json.dumps(later))
    first = record(LINES, started="2030-01-01T08:00:00+00:00")
    (tmp_path / "made-up-2030-01-01-call-2.json").write_text(json.dumps(first))
    run_table(monkeypatch, "--results", str(tmp_path))
    assert rows(capsys.readouterr().out)["first time: sources as they were trained"][1].startswith("3 s")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(SystemExit) as stopped:
        run_table(monkeypatch, "--results", str(tmp_path))
    assert stopped.value.code == 2
    assert "broken.json: not valid JSON" in capsys.readouterr().err


def test_the_readme_has_the_tables_place_and_says_what_the_files_say() -> None:
    root = TOOL.parent.parent
    tool = runpy.run_path(str(TOOL))
    files = [(path.name, json.loads(path.read_text("utf-8"))) for path in (root / "tools" / "results").glob("*.json")]
    text = tool["section"](sorted(files, key=tool["started"]))
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert f"{tool['START']}\n{text}\n{tool['END']}" in readme
