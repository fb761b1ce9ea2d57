"""README's performance section, from the files under `tools/results/`: what was promised, and what was measured.

    python tools/performance_table.py [--write] [--results DIR]    # print it, or put it between README.md's markers

A table for each device, whose files count together: of a figure measured twice the later one. Only what ran on a GPU is
shown; results of the simulated one, of a CPU or of small problems are refused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastar.checkpoints import write_atomically
from fastar.errors import FastarError

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- performance: made by tools/performance_table.py -->", "<!-- /performance -->"
RECIPE = {"arch": "resnet18", "batch": 128, "size": 32, "precision": "bfloat16", "cudnn_benchmark": False}
IMAGENET = {"arch": "imagenet-resnet18", "batch": 256, "size": 224, "precision": "bfloat16"}
CPU_BENCHES = ("loader",)  # what is measured on a GPU's host

Line = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A figure as text, and whether the target is met (None: there is none)."""

    text: str
    met: bool | None = None


@dataclass(frozen=True)
class Figure:
    """What an issue promised: where it is found among the lines of a device."""

    what: str
    target: str
    find: Callable[[Lines], Measured | None]


class Lines:
    """All lines of a device in the order they were measured, errors left out."""

    def __init__(self, lines: Iterable[Line]):
        self._lines = [line for line in lines if "error" not in line]

    def all(self, bench: str, case: str, **facts: Any) -> list[Line]:
        wanted = {"bench": bench, "case": case, **facts}
        return [line for line in self._lines if all(line.get(key) == value for key, value in wanted.items())]

    def last(self, bench: str, case: str, **facts: Any) -> Line | None:
        return next(reversed(self.all(bench, case, **facts)), None)


def spread(values: dict[str, float], factor: float = 1.0, unit: str = "") -> str:
    """The median and the quantiles beside it."""
    low, high = (values.get(a, values.get(b, values["median"])) for a, b in (("q25", "q10"), ("q75", "q90")))
    numbers = [f"{factor * value:.3g}" for value in (values["median"], low, high)]
    return f"{numbers[0]}{unit} ({numbers[1]} to {numbers[2]})"


def inverse(values: dict[str, float]) -> dict[str, float]:
    """Quantiles of 1 / x."""
    return {"median": 1 / values["median"], "q25": 1 / values["q75"], "q75": 1 / values["q25"]}


def matched(case: str, seconds: float) -> Callable[[Lines], Measured | None]:
    """Seconds for all of 50 sources."""

    def find(lines: Lines) -> Measured | None:
        line = lines.last("matching", case, arch="resnet18", sources=50)
        if line is None:
            return None
        each = line["seconds_per_source"]
        moved = f", theta moved by {line['moved_by']:.0%}" if "moved_by" in line else ""
        return Measured(f"{spread(each, 50, ' s')}{moved}", 50 * each["median"] <= seconds)

    return find


def beside_rebasin(lines: Lines) -> Measured | None:
    line = lines.last("matching", "rebasin / fastar", arch="resnet18", sources=50)
    if line is None:
        return None
    faster = line["times_faster"]
    return Measured(f"{faster['cold']:.3g} times cold, {faster['warm']:.3g} times warm, n = {line['n']}")


def objective(lines: Lines) -> Measured | None:
    line = lines.last("matching", "rebasin / fastar", arch="resnet18", sources=50)
    if line is None:
        return None
    told = str(line["objective_at_least_equal"])
    good, pairs = (int(number) for number in told.removesuffix(" pairs").split(" of "))
    return Measured(told, good == pairs)


def bandwidth(case: str, millions: int) -> Callable[[Lines], Measured | None]:
    """A kernel's bandwidth over the copy's."""

    def find(lines: Lines) -> Measured | None:
        line = lines.last("kernels", case, kernels="triton", parameters=millions * 1_000_000 // 16 * 16)
        if line is None or "of_copy" not in line:
            return None
        return Measured(f"{line['of_copy']:.1%}, {line['gb_per_s']:,.0f} GB/s", line["of_copy"] >= 0.85)

    return find


def step(case: str, key: str, limit: float | None, *, faster: bool = False) -> Callable[[Lines], Measured | None]:
    """A ratio of a step's time, or `faster` its inverse, which is to be at most, or at least, the limit."""

    def find(lines: Lines) -> Measured | None:
        line = lines.last("step", case, **RECIPE)
        if line is None or key not in line:
            return None
        values = inverse(line[key]) if faster else line[key]
        met = None if limit is None else (values["median"] >= limit if faster else values["median"] <= limit)
        rate = f"; {line['images_per_s']:,.0f} images/s" if faster else ""
        return Measured(f"{spread(values)}{rate}", met)

    return find


def augmentation(lines: Lines) -> Measured | None:
    line = lines.last("step", "loading", **RECIPE)
    steps = {case: lines.last("step", case, **RECIPE) for case in ("regular", "regular, graph")}
    if line is None or steps["regular"] is None:
        return None
    shares = {case: line["ms"]["median"] / one["ms"]["median"] for case, one in steps.items() if one is not None}
    return Measured(", ".join(f"{share:.1%} ({case})" for case, share in shares.items()), max(shares.values()) <= 0.1)


def epoch(lines: Lines) -> Measured | None:
    cases = {case: lines.last("epoch", case, **{**RECIPE, "sources": 50}) for case in ("star", "matching", "steps")}
    if any(line is None for line in cases.values()):
        return None
    found = {case: line["of_regular"] for case, line in cases.items() if line is not None}
    parts = f"matching {found['matching']['median']:.3g}, steps {found['steps']['median']:.3g}"
    return Measured(f"{spread(found['star'])}: {parts}", found["star"]["median"] <= 1.15)


def barrier(lines: Lines) -> Measured | None:
    found = {case: lines.last("barrier", case) for case in ("together", "together, graph", "one at a time")}
    shared, apart = found["together"], found["one at a time"]
    if shared is None or apart is None or "speed_up" not in shared:
        return None
    graph = found["together, graph"]
    told = f"{shared['passes']} passes against {apart['passes']}, {spread(shared['speed_up'])} times faster"
    if graph is not None:
        told += f", by graphs {graph['speed_up']['median']:.3g}"
    return Measured(told, shared["passes"] == 2 and shared["speed_up"]["median"] >= 4)


def loader(pipeline: str, times: float) -> Callable[[Lines], Measured | None]:
    def find(lines: Lines) -> Measured | None:
        line = lines.last("loader", "fastar", pipeline=pipeline)
        if line is None:
            return None
        rate = f"{line['images_per_s']['median']:,.0f} images/s, {line['workers']} workers"
        return Measured(f"{spread(line['speed_up'])}; {rate}", line["speed_up"]["median"] >= times)

    return find


def compute(lines: Lines) -> Measured | None:
    line = lines.last("imagenet", "compute: regular step", **IMAGENET)
    return None if line is None else Measured(f"{line['images_per_second']:,.0f} images/s")


def with_loader(lines: Lines) -> Measured | None:
    found = lines.all("imagenet", "loader: regular epoch", **IMAGENET)
    if not found:
        return None
    rate, share = (statistics.median(line[key] for line in found) for key in ("images_per_second", "load_share"))
    threads = f", {found[-1]['threads']} threads" if found[-1].get("threads") else ""
    return Measured(f"{rate:,.0f} images/s, {share:.0%} of the time waiting for images{threads}, n = {len(found)}")


def imagenet_star(lines: Lines) -> Measured | None:
    line = lines.last("imagenet", "compute: star step", **IMAGENET)
    return None if line is None else Measured(spread(line["of_regular"]))


def peak(sources: int) -> Callable[[Lines], Measured | None]:
    def find(lines: Lines) -> Measured | None:
        line = lines.last("imagenet", "memory", **IMAGENET, sources=sources, cap="40GB")
        if line is None or "peak_bytes" not in line:
            return None
        return Measured(f"{line['peak_bytes'] / 1e9:.2f} GB", line["peak_bytes"] < 40e9)

    return find


def plan(sources: int) -> Callable[[Lines], Measured | None]:
    def find(lines: Lines) -> Measured | None:
        line = lines.last("imagenet", "memory", **IMAGENET, sources=sources, cap="40GB")
        if line is None or "of_plan" not in line:
            return None
        each = ", ".join(f"{phase} {share:.3f}" for phase, share in line.get("of_plan_each", {}).items())
        return Measured(f"{line['of_plan']:.3f}{f' ({each})' if each else ''}", 0.9 <= line["of_plan"] <= 1.1)

    return find


MODES = {"": "eager", ", graph": "CUDA graph", ", compiled": "compiled", ", compiled, graph": "compiled, CUDA graph"}
UPDATES = {
    "interpolate bf16 indexed": "interpolation",
    "sgd_update bf16, next point": "SGD's update with the next point",
    "adam_update bf16, next point": "Adam's update with the next point",
}
FIGURES = (
    Figure("matching 50 ResNet-18 sources, first time", "at most 4 s", matched("fastar cold", 4)),
    Figure("the same again, theta as it was", "at most 1 s", matched("fastar warm", 1)),
    Figure("the same again, after an epoch of theta", "at most 1 s", matched("fastar warm, theta moved", 1)),
    Figure("rebasin's time over fastar's, per source", "", beside_rebasin),
    Figure("objective at least rebasin's", "every pair", objective),
    *(
        Figure(f"{what}, {millions} M parameters, of copy bandwidth", "at least 85 %", bandwidth(case, millions))
        for millions in (11, 100)
        for case, what in UPDATES.items()
    ),
    *(
        Figure(f"star step over regular step, {what}", "at most 1.05", step(f"star{mode}", "of_like", 1.05))
        for mode, what in MODES.items()
    ),
    *(
        Figure(
            f"plain PyTorch's star step over fastar's, {MODES[mode]}",
            "",
            step(f"star{mode}", "of_plain_star", None, faster=True),
        )
        for mode in ("", ", graph")
    ),
    *(
        Figure(
            f"training speed over plain PyTorch's, {MODES[mode]} over eager",
            "at least 1.3",
            step(f"regular{mode}", "of_plain", 1.3, faster=True),
        )
        for mode in ("", ", graph")
    ),
    *(
        Figure(
            f"training speed over plain PyTorch's, {MODES[mode]} over compiled",
            "at least 1",
            step(f"regular{mode}", "of_plain_compiled", 1.0, faster=True),
        )
        for mode in (", compiled", ", compiled, graph")
    ),
    Figure("star epoch over regular epoch, 50 sources", "at most 1.15", epoch),
    Figure("augmentation, of a step", "at most 10 %", augmentation),
    Figure("barrier: passes over the data, speed over one at a time", "2; at least 4", barrier),
    Figure("loading cifar10, over DataLoader and Pillow", "at least 10", loader("cifar10", 10)),
    Figure("loading ImageNet-size JPEG, over DataLoader and Pillow", "at least 2", loader("imagenet", 2)),
    Figure("ImageNet, ResNet-18, batch 256, bf16: compute alone", "", compute),
    Figure("the same with the loader", "", with_loader),
    Figure("the same, star step over regular step", "", imagenet_star),
    *(Figure(f"the same, peak memory with {n} sources", "under 40 GB", peak(n)) for n in (30, 500)),
    *(Figure(f"the same, over `fastar plan`'s, {n} sources", "0.9 to 1.1", plan(n)) for n in (30, 500)),
)


def check(name: str, record: dict[str, Any]) -> None:
    """FastarError unless the file holds figures of a GPU."""
    device = str(record.get("device", ""))
    if device == "simulated" or record.get("small") or device.startswith("cpu") or not device:
        what = "small problems" if record.get("small") else f"device {device!r}"
        raise FastarError(f"{name}: no GPU's figures ({what}); delete it, or give another --results")


def section(results: list[tuple[str, dict[str, Any]]]) -> str:
    """Markdown of all results: for each device a table of what was promised, with what was measured last.

    Raises:
        FastarError: a file that was not measured on a GPU.
    """
    for name, record in results:
        check(name, record)
    if not results:
        return "No GPU figure has been measured yet; `python tools/gpu_suite.py` measures them."
    return "\n\n".join(device_section(device, results) for device in dict.fromkeys(r["device"] for _, r in results))


def device_section(device: str, results: list[tuple[str, dict[str, Any]]]) -> str:
    """The table of one device, under what its files are of, and over the parts that never finished."""
    files = [(name, record) for name, record in results if record["device"] == device]
    parts = [part for _, record in files for part in record["parts"]]
    lines = Lines(
        line
        for part in parts
        for line in part.get("lines", [])
        if line.get("device") == device or line.get("bench") in CPU_BENCHES
    )
    ended = {part["part"]: part.get("exit_code") == 0 for part in parts}  # the last time that each was run
    torch_versions, commits, dates, drivers = (
        ", ".join(dict.fromkeys(values))
        for values in (
            [str(record["versions"]["torch"]) for _, record in files],
            [str(record["versions"]["commit"]) for _, record in files],
            [str(record["date"]) for _, record in files],
            [str(record.get("driver", "unknown")) for _, record in files],
        )
    )
    links = ", ".join(f"[{name}](tools/results/{name})" for name, _ in files)
    rows = ["| figure | target | measured | met |", "|---|---|---|---|"]
    for figure in FIGURES:
        found = figure.find(lines)
        met = "" if found is None or found.met is None else ("yes" if found.met else "no")
        rows.append(f"| {figure.what} | {figure.target} | {'not measured' if found is None else found.text} | {met} |")
    head = f"**{device}**, {dates}, torch {torch_versions}, driver {drivers}, commit {commits} ({links}):"
    unfinished = [name for name, good in ended.items() if not good]
    return "\n\n".join(
        [head, "\n".join(rows), *([f"Failed or not finished: {', '.join(unfinished)}."] if unfinished else [])]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="change README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "tools" / "results", help="folder of results files")
    arguments = parser.parse_args()
    results = []
    for path in sorted(arguments.results.glob("*.json"), key=lambda path: path.stem):
        try:
            results.append((path.name, json.loads(path.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise FastarError(f"{path}: not valid JSON ({error}); measure again or delete it") from error
    text = section(results)
    if not arguments.write:
        print(text)
        return
    readme = ROOT / "README.md"
    before, start, rest = readme.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise FastarError(f"{readme}: the markers {START} and {END} are missing")
    write_atomically(readme, f"{before}{START}\n{text}\n{END}{after}".encode())


if __name__ == "__main__":
    try:
        main()
    except FastarError as error:
        print(f"performance_table: {error}", file=sys.stderr)
        sys.exit(2)
