"""What was promised of a GPU, and where it is found among the lines that benchmarks print."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

RECIPE = {"arch": "resnet18", "batch": 128, "size": 32, "precision": "bfloat16", "cudnn_benchmark": False}
IMAGENET = {"arch": "imagenet-resnet18", "batch": 256, "size": 224, "precision": "bfloat16"}


Line = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A figure as text, of how many measurements, and whether the target is met (None: there is none)."""

    text: str
    met: bool | None = None
    n: int | None = None


@dataclass(frozen=True)
class Figure:
    """What was promised, or what belongs beside it: where it is found among the lines of a device."""

    what: str
    target: str
    find: Callable[[Lines], Measured | None]


@dataclass(frozen=True)
class Group:
    """Figures of one problem, which is said over their table."""

    problem: str
    figures: tuple[Figure, ...]


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
    """The median and the quartiles."""
    middle, low, high = (f"{factor * values[name]:.3g}" for name in ("median", "q25", "q75"))
    return f"{middle}{unit} ({low} to {high})"


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
        return Measured(f"{spread(each, 50, ' s')}{moved}", 50 * each["median"] <= seconds, line["n"])

    return find


def beside_rebasin(lines: Lines) -> Measured | None:
    line = lines.last("matching", "rebasin / fastar", arch="resnet18", sources=50)
    if line is None:
        return None
    faster = line["times_faster"]
    return Measured(f"{faster['cold']:.3g} the first time, {faster['warm']:.3g} again", n=line["n"])


def objective(lines: Lines) -> Measured | None:
    line = lines.last("matching", "rebasin / fastar", arch="resnet18", sources=50)
    if line is None:
        return None
    told = str(line["objective_at_least_equal"])
    good, pairs = (int(number) for number in told.removesuffix(" pairs").split(" of "))
    return Measured(told, good == pairs, pairs)


def matching_floor(lines: Lines) -> Measured | None:
    line = lines.last("matching", "floor", arch="resnet18", sources=50)
    if line is None:
        return None
    return Measured(spread(line["warm_over_floor"]), n=line["n"])


def bandwidth(case: str, millions: int) -> Callable[[Lines], Measured | None]:
    """A kernel's bandwidth over the copy's."""

    def find(lines: Lines) -> Measured | None:
        line = lines.last("kernels", case, kernels="triton", parameters=millions * 1_000_000 // 16 * 16)
        if line is None or "of_copy" not in line:
            return None
        return Measured(f"{line['of_copy']:.1%}, {line['gb_per_s']:,.0f} GB/s", line["of_copy"] >= 0.85, line["n"])

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
        return Measured(f"{spread(values)}{rate}", met, line["n"])

    return find


def augmentation(lines: Lines) -> Measured | None:
    line = lines.last("step", "loading", **RECIPE)
    steps = {case: lines.last("step", case, **RECIPE) for case in ("regular", "regular, graph")}
    if line is None or steps["regular"] is None:
        return None
    shares = {case: line["ms"]["median"] / one["ms"]["median"] for case, one in steps.items() if one is not None}
    told = ", ".join(f"{share:.1%} of {NAMES[case]}" for case, share in shares.items())
    return Measured(told, max(shares.values()) <= 0.1, line["n"])


def epoch(lines: Lines, by: str = "") -> Measured | None:
    wanted = {**RECIPE, "sources": 50}
    cases = {case: lines.last("epoch", case + by, **wanted) for case in ("star", "matching", "steps")}
    if any(line is None for line in cases.values()):
        return None
    found = {case: line["of_regular"] for case, line in cases.items() if line is not None}
    parts = f"matching {found['matching']['median']:.3g}, steps {found['steps']['median']:.3g}"
    line = cases["matching"]
    assert line is not None
    moved = f"; theta moved by {line['moved_by']['median']:.0%} an epoch"
    return Measured(f"{spread(found['star'])}: {parts}{moved}", found["star"]["median"] <= 1.15, line["n"])


def epoch_by_activations(lines: Lines) -> Measured | None:
    found = epoch(lines, ", by activations")
    return found and replace(found, met=None)


def barrier(lines: Lines) -> Measured | None:
    found = {case: lines.last("barrier", case) for case in ("together", "together, graph", "one at a time")}
    shared, apart = found["together"], found["one at a time"]
    if shared is None or apart is None or "speed_up" not in shared:
        return None
    graph = found["together, graph"]
    told = f"{shared['passes']} against {apart['passes']}; {spread(shared['speed_up'])}"
    if graph is not None:
        told += f", by CUDA graphs {graph['speed_up']['median']:.3g}"
    return Measured(told, shared["passes"] == 2 and shared["speed_up"]["median"] >= 4, shared["n"])


def loader(pipeline: str, times: float) -> Callable[[Lines], Measured | None]:
    def find(lines: Lines) -> Measured | None:
        line = lines.last("loader", "fastar", pipeline=pipeline)
        if line is None:
            return None
        rate = f"{line['images_per_s']['median']:,.0f} images/s, {line['workers']} workers"
        return Measured(f"{spread(line['speed_up'])}; {rate}", line["speed_up"]["median"] >= times, line["n"])

    return find


def compute(lines: Lines) -> Measured | None:
    line = lines.last("imagenet", "compute: regular step", **IMAGENET)
    return None if line is None else Measured(f"{line['images_per_second']:,.0f} images/s", n=line["n"])


def with_loader(lines: Lines) -> Measured | None:
    found = lines.all("imagenet", "loader: regular epoch", **IMAGENET)
    if not found:
        return None
    rate, share = (statistics.median(line[key] for line in found) for key in ("images_per_second", "load_share"))
    told = f"{rate:,.0f} images/s, {share:.0%} of the time waiting for images, {found[-1]['threads']} threads"
    return Measured(told, n=len(found))


def imagenet_star(lines: Lines) -> Measured | None:
    line = lines.last("imagenet", "compute: star step", **IMAGENET)
    return None if line is None else Measured(spread(line["of_regular"]), n=line["n"])


def peak(sources: int) -> Callable[[Lines], Measured | None]:
    def find(lines: Lines) -> Measured | None:
        line = lines.last("imagenet", "memory", **IMAGENET, sources=sources, cap="40GB")
        if line is None or "peak_bytes" not in line:
            return None
        told = f"{line['peak_bytes'] / 1e9:.2f} GB of tensors, {line['reserved_bytes'] / 1e9:.2f} GB taken for them"
        return Measured(told, line["reserved_bytes"] < 40e9, 1)

    return find


def plan(sources: int) -> Callable[[Lines], Measured | None]:
    def find(lines: Lines) -> Measured | None:
        line = lines.last("imagenet", "memory", **IMAGENET, sources=sources, cap="40GB")
        if line is None or "of_plan" not in line:
            return None
        each = ", ".join(f"{phase} {share:.3f}" for phase, share in line["of_plan_each"].items())
        return Measured(f"{line['of_plan']:.3f} ({each})", 0.9 <= line["of_plan"] <= 1.1, 1)

    return find


MODES = {"": "eager", ", graph": "CUDA graph", ", compiled": "compiled", ", compiled, graph": "compiled, CUDA graph"}
NAMES = {"regular": "an eager step", "regular, graph": "a step by CUDA graph"}
UPDATES = {
    "interpolate bf16 indexed": "interpolation to bf16",
    "sgd_update bf16, next point": "SGD's update with the next interpolation",
    "adam_update bf16, next point": "Adam's update with the next interpolation",
}
GROUPS = (
    Group(
        "Matching 50 ResNet-18 sources (11.2 M parameters, fp32), all at once; seconds are of all 50",
        (
            Figure("first time: sources as they were trained", "at most 4 s", matched("fastar cold", 4)),
            Figure("again, theta as it was", "at most 1 s", matched("fastar warm", 1)),
            Figure("again, after theta was trained on", "at most 1 s", matched("fastar warm, theta moved", 1)),
            Figure("again, over one sweep's matrix products alone", "", matching_floor),
            Figure("PyPI rebasin's time over fastar's, a source", "", beside_rebasin),
            Figure("objective at least rebasin's", "every pair", objective),
        ),
    ),
    Group(
        "Fused kernels: bytes moved a second, over those of the faster copy (a kernel's or the driver's)",
        tuple(
            Figure(f"{what}, {millions} M parameters", "at least 85%", bandwidth(case, millions))
            for millions in (11, 100)
            for case, what in UPDATES.items()
        ),
    ),
    Group(
        "A training step: ResNet-18, 32x32, batch 128, bf16, channels-last. Plain PyTorch: autocast and torch.optim on"
        " the same network",
        (
            *(
                Figure(
                    f"star step's time over regular step's, {what}",
                    "at most 1.05",
                    step(f"star{mode}", "of_like", 1.05),
                )
                for mode, what in MODES.items()
            ),
            *(
                Figure(
                    f"regular step's speed over plain PyTorch's eager one, {MODES[mode]}",
                    "at least 1.3",
                    step(f"regular{mode}", "of_plain", 1.3, faster=True),
                )
                for mode in ("", ", graph")
            ),
            *(
                Figure(
                    f"regular step's speed over plain PyTorch's compiled one, {MODES[mode]}",
                    "at least 1",
                    step(f"regular{mode}", "of_plain_compiled", 1.0, faster=True),
                )
                for mode in (", compiled", ", compiled, graph")
            ),
            *(
                Figure(
                    f"star step's speed over plain PyTorch's eager star step, {MODES[mode]}",
                    "",
                    step(f"star{mode}", "of_plain_star", None, faster=True),
                )
                for mode in ("", ", graph")
            ),
            Figure("shuffling, cropping and mirroring a batch, of a step's time", "at most 10%", augmentation),
        ),
    ),
    Group(
        "An epoch: the same step by CUDA graph, 50,000 images, 50 sources matched before it",
        (
            Figure("star epoch's time over regular epoch's", "at most 1.15", epoch),
            Figure("the same, sources matched by their activations", "", epoch_by_activations),
        ),
    ),
    Group(
        "Loading and evaluation, on JPEG files",
        (
            Figure("a barrier's passes over the data; speed over one point at a time", "2; at least 4", barrier),
            Figure("CIFAR-10: images/s over DataLoader and Pillow's", "at least 10", loader("cifar10", 10)),
            Figure("ImageNet's sizes: images/s over DataLoader and Pillow's", "at least 2", loader("imagenet", 2)),
        ),
    ),
    Group(
        "ImageNet: ResNet-18, 224x224, batch 256, bf16, eager; memory under a cap of 40 GB, sources in host memory",
        (
            Figure("regular training, images on the GPU", "", compute),
            Figure("regular training, images decoded from JPEG", "", with_loader),
            Figure("star step's time over regular step's", "", imagenet_star),
            *(Figure(f"peak memory with {n} sources", "under 40 GB", peak(n)) for n in (30, 500)),
            *(Figure(f"peak memory over `fastar plan`'s, {n} sources", "0.9 to 1.1", plan(n)) for n in (30, 500)),
        ),
    ),
)
