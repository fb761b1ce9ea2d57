"""A recipe made smaller, to see it run from end to end: `--scale smoke` in seconds, `--scale small` in minutes.

What makes it the recipe stays: depth, optimizer, schedule (its epochs in proportion), how t is drawn, how sources are
matched. What is cut: epochs, images, models, width, and how much is measured. Its figures say that it works, and at
`small` which barrier is lower than which; they are not the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from fastar.config.datasets import dataset_spec
from fastar.errors import FastarError


@dataclass(frozen=True)
class Scale:
    """The most that is left of a recipe: counts, sides in pixels, and by how much layers are narrower."""

    epochs: int
    images: int
    batch_size: int
    sources: int
    heldout: int
    points: int
    regular_pairs: int
    measured: int
    """Images of each split that losses are measured on."""
    bn_batches: int
    resolution: int
    narrower: int


SCALES = {
    "smoke": Scale(
        epochs=1,
        images=128,
        batch_size=32,
        sources=2,
        heldout=1,
        points=3,
        regular_pairs=1,
        measured=100,
        bn_batches=2,
        resolution=64,
        narrower=8,
    ),
    "small": Scale(
        epochs=12,
        images=5000,
        batch_size=64,
        sources=4,
        heldout=3,
        points=7,
        regular_pairs=4,
        measured=1000,
        bn_batches=8,
        resolution=96,
        narrower=4,
    ),
}


@dataclass(frozen=True)
class Width:
    """The setting of an architecture that says how wide its layers are, its default, and what a scale leaves of it."""

    key: str
    default: float
    smoke: float
    small: float


# By architecture, the first that fits.
WIDTHS = {
    "mlp": Width("width", 32, smoke=8, small=32),
    "vit": Width("dim", 64, smoke=16, small=64),
    "densenet*": Width("growth", 12, smoke=4, small=6),
    "wrn*": Width("width", 1.0, smoke=0.25, small=0.5),
    "*": Width("width", 1.0, smoke=0.125, small=0.25),
}


def require_scale(name: str) -> None:
    """Raise FastarError unless `name` is a scale."""
    if name != "full" and name not in SCALES:
        raise FastarError(f"--scale {name}: choose smoke, small or full")


def scaled(
    content: Mapping[str, Any],
    name: str,
    *,
    defaults: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Nested settings at scale `name`.

    Args:
        content: settings, as a YAML file holds them.
        defaults: of the sections' keys that `content` does not have.

    Nothing becomes larger than it was. The learning rate of SGD falls with the batch size, in proportion.

    Raises:
        FastarError: an unknown scale.
    """
    require_scale(name)
    if name == "full":
        return dict(content)
    scale = SCALES[name]
    out: dict[str, Any] = {
        section: dict(value) if isinstance(value, Mapping) else value for section, value in content.items()
    }

    def known(section: str, key: str) -> Any:
        return out.get(section, {}).get(key, defaults.get(section, {}).get(key))

    def at_most(section: str, key: str, most: int) -> None:
        value = known(section, key)
        out.setdefault(section, {})[key] = most if value is None else min(value, most)

    dataset = dataset_spec(str(known("dataset", "name")))
    if dataset.variable_size:
        at_most("dataset", "resolution", scale.resolution)
    _shorten(out.setdefault("train", {}), out.setdefault("star", {}), scale, known)
    batch = known("train", "batch_size")
    if batch > scale.batch_size and known("train", "optimizer") == "sgd":
        out["train"]["lr"] = known("train", "lr") * scale.batch_size / batch
    at_most("train", "batch_size", scale.batch_size)
    # A set that has fewer images anyway takes no limit; there is at least one image of each class.
    if dataset.train is None or scale.images < dataset.train:
        at_most("dataset", "limit", max(scale.images, dataset.class_count or 1))
    at_most("sources", "number", scale.sources)
    at_most("sources", "heldout", scale.heldout)
    for key in ("points", "regular_pairs"):
        at_most("evaluation", key, getattr(scale, key))
    for key in ("limit", "test_limit"):
        at_most("evaluation", key, max(scale.measured, dataset.class_count or 1))
    at_most("evaluation", "bn_batches", scale.bn_batches)
    model = dict(out.get("model", {}))
    arch = str(model.pop("arch", ""))
    out["model"] = {"arch": arch, **_narrower(arch, model, name)}
    return out


def _shorten(train: dict[str, Any], star: dict[str, Any], scale: Scale, known: Callable[[str, str], Any]) -> None:
    """Fewer epochs; what is said in epochs in proportion."""
    before = known("train", "epochs")
    train["epochs"] = after = min(before, scale.epochs)
    if star.get("epochs") is not None:
        star["epochs"] = max(1, star["epochs"] * after // before)
    if train.get("warmup_epochs"):
        train["warmup_epochs"] = train["warmup_epochs"] * after / before
    if train.get("milestones"):
        train["milestones"] = sorted({max(1, round(epoch * after / before)) for epoch in train["milestones"]})
    if train.get("resolutions"):
        epochs = [epoch * after // before for epoch, _ in train["resolutions"]]
        sides = [max(32, round(side * scale.resolution / 224 / 32) * 32) for _, side in train["resolutions"]]
        train["resolutions"] = [list(pair) for pair in dict(zip(epochs, sides, strict=True)).items()]


def _narrower(arch: str, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of an architecture at scale `name`."""
    width = next(found for pattern, found in WIDTHS.items() if fnmatch(arch, pattern))
    value = options.get(width.key, width.default)
    if not isinstance(value, int | float):  # validation says so
        return dict(options)
    narrow = max(value / SCALES[name].narrower, min(value, getattr(width, name)))
    return {**options, width.key: round(narrow) if isinstance(width.default, int) else narrow}
