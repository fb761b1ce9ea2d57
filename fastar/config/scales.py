"""A recipe made smaller, to see it run from end to end: `--scale smoke` in seconds, `--scale small` in minutes.

What makes it the recipe stays: depth, optimizer, schedule (its epochs in proportion), how t is drawn, how sources are
matched. What is cut: epochs, images, models, width, and how much is measured. Its figures say that it works, and at
`small` which barrier is lower than which; they are not the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from fastar.config.compare import flatten, nested
from fastar.config.datasets import dataset_spec
from fastar.config.recipes import merge
from fastar.errors import FastarError

# Names of the scales, in the order of the columns below.
SCALES = ("smoke", "small")
# The most that is left of a setting.
MOST = {
    "train.epochs": (1, 12),
    "train.batch_size": (32, 64),
    "dataset.limit": (128, 5000),
    "dataset.resolution": (64, 96),
    "sources.number": (2, 4),
    "sources.heldout": (1, 3),
    "evaluation.points": (3, 7),
    "evaluation.regular_pairs": (1, 4),
    "evaluation.limit": (100, 1000),
    "evaluation.test_limit": (100, 1000),
    "evaluation.bn_batches": (2, 8),
}
# Layers are narrower by so much, but not below their width of `WIDTHS`.
NARROWER = 8


@dataclass(frozen=True)
class Width:
    """The setting of an architecture that says how wide its layers are, its default, and its least at each scale."""

    key: str
    default: float
    least: tuple[float, float]


# By architecture, the first that fits.
WIDTHS = {
    "mlp": Width("width", 32, (8, 32)),
    "vit": Width("dim", 64, (16, 64)),
    "densenet*": Width("growth", 12, (4, 4)),
    "wrn*": Width("width", 1.0, (0.25, 0.5)),
    "*": Width("width", 1.0, (0.125, 0.125)),
}


def scaled(content: Mapping[str, Any], name: str, *, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings at scale `name`.

    Nothing becomes larger than it was. The learning rate of SGD falls with the batch size, in proportion.

    Args:
        content: settings, as a YAML file holds them.
        defaults: of dotted keys that `content` does not have.

    Raises:
        FastarError: an unknown scale.
    """
    if name == "full":
        return dict(content)
    if name not in SCALES:
        raise FastarError(f"--scale {name}: choose smoke, small or full")
    column = SCALES.index(name)
    old = {**defaults, **flatten(content)}
    most = {key: values[column] for key, values in MOST.items()}
    dataset = dataset_spec(str(old["dataset.name"]))
    for key in ("dataset.limit", "evaluation.limit", "evaluation.test_limit"):
        most[key] = max(most[key], dataset.class_count or 1)  # an image of each class
    if dataset.train is not None and MOST["dataset.limit"][column] >= dataset.train:
        del most["dataset.limit"]  # it has fewer anyway
    if not dataset.variable_size:
        del most["dataset.resolution"]
    new: dict[str, Any] = {key: _at_most(old.get(key), value) for key, value in most.items()}
    if old["train.batch_size"] > new["train.batch_size"] and old["train.optimizer"] == "sgd":
        for key in ("train.lr", "star.lr"):
            if old.get(key) is not None:
                new[key] = old[key] * new["train.batch_size"] / old["train.batch_size"]
    new |= _shortened(old, new["train.epochs"], MOST["dataset.resolution"][column])
    new |= _narrowed(old, column)
    return merge(content, nested(new))


def _at_most(old: Any, most: Any) -> Any:
    """The smaller one; `most` for all there are, and for pairs of many (cross:5x5)."""
    return most if old is None or isinstance(old, str) else min(old, most)


def _shortened(old: Mapping[str, Any], after: int, resolution: int) -> dict[str, Any]:
    """Settings in epochs, in proportion to `after`, the epochs that are left."""
    before = old["train.epochs"]
    new: dict[str, Any] = {}
    if old.get("star.epochs") is not None:
        new["star.epochs"] = max(1, old["star.epochs"] * after // before)
    if old.get("train.warmup_epochs"):
        new["train.warmup_epochs"] = old["train.warmup_epochs"] * after / before
    if old.get("train.milestones"):
        new["train.milestones"] = sorted({max(1, round(epoch * after / before)) for epoch in old["train.milestones"]})
    if old.get("train.resolutions"):
        epochs = [epoch * after // before for epoch, _ in old["train.resolutions"]]
        sides = [max(32, round(side * resolution / 224 / 32) * 32) for _, side in old["train.resolutions"]]
        new["train.resolutions"] = [list(pair) for pair in dict(zip(epochs, sides, strict=True)).items()]
    return new


def _narrowed(old: Mapping[str, Any], column: int) -> dict[str, Any]:
    """The width of the architecture."""
    width = next(found for pattern, found in WIDTHS.items() if fnmatch(str(old["model.arch"]), pattern))
    value = old.get(f"model.{width.key}", width.default)
    if not isinstance(value, int | float):  # validation says so
        return {}
    narrow = max(value / NARROWER, min(value, width.least[column]))
    return {f"model.{width.key}": round(narrow) if isinstance(width.default, int) else narrow}
