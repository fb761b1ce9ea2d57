"""Curves along paths on matplotlib's Axes, for notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastar.errors import FastarError
from fastar.report.figures import plain
from fastar.report.results import draw_paths, splits_of


def plot_paths(results: Mapping[str, Any], split: str, axes: Any = None) -> Any:
    """Draw the loss along each kind of path of a run's results, mean and standard deviation; the matplotlib Axes.

    Raises:
        FastarError: a split that was not measured.
    """
    if split not in splits_of(results):
        raise FastarError(f"split={split!r}: the losses of {', '.join(splits_of(results))} were measured")
    axes = axes_or_new(axes)
    draw_paths(axes, results, f"{split}_loss")
    axes.legend(frameon=False, fontsize=9)
    return axes


def axes_or_new(axes: Any) -> Any:
    if axes is not None:
        return axes
    try:
        from matplotlib import pyplot  # its figures are those that notebooks show
    except ImportError as error:
        raise FastarError("a picture needs matplotlib: pip install matplotlib") from error
    return pyplot.subplots(figsize=(5.0, 3.6), layout="constrained")[1]


def labelled(axes: Any, name: str) -> Any:
    axes.set_xlabel("t")
    axes.set_ylabel(name)
    plain(axes)
    axes.legend(frameon=False, fontsize=9)
    return axes
