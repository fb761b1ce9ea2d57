"""Curves along paths on matplotlib's Axes, for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastar.errors import FastarError


def plot_paths(results: Mapping[str, Any], split: str, axes: Any = None) -> Any:
    """Draw the mean loss along each kind of path of a run's results; the matplotlib Axes."""
    axes = axes_or_new(axes)
    for kind in dict.fromkeys(path["kind"] for path in results["paths"]):
        curves = [path[f"{split}_loss"] for path in results["paths"] if path["kind"] == kind]
        mean = [sum(column) / len(column) for column in zip(*curves, strict=True)]
        label = f"{kind.replace('_', ' ')} (n={len(curves)})"
        axes.plot(results["t"], mean, marker="o", markersize=4, label=label)
    return labelled(axes, f"{split} loss")


def axes_or_new(axes: Any) -> Any:
    if axes is not None:
        return axes
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FastarError("a picture needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(5.0, 3.6), layout="constrained").subplots()


def labelled(axes: Any, name: str) -> Any:
    axes.set_xlabel("t")
    axes.set_ylabel(name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return axes
