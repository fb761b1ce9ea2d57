"""The loss between networks of a run, as the methods of `fastar.Run` return it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastar.report.landscape.curve_picture import draw_curves
from fastar.report.landscape.graph_picture import draw_graph
from fastar.report.landscape.plane_picture import draw_plane
from fastar.report.notebook_curves import axes_or_new


@dataclass(frozen=True, repr=False)
class Graph:
    """Barriers between all pairs of a run's networks, and hubs compared.

    Args:
        results: what `graph.json` holds.
    """

    results: Mapping[str, Any]

    def __repr__(self) -> str:
        below = self.results["below"]["train"]
        shares = ", ".join(f"{eps:g}: {share:.2f}" for eps, share in zip(below["eps"], below["star"], strict=True))
        return f"Graph({len(self.results['names'])} networks; share of the star's train barriers below {shares})"

    def plot(self, axes: Any = None, *, split: str = "train", key: str = "barrier") -> Any:
        """Draw the matrix of barriers of a split, or with `key="largest_loss"` of largest losses; the Axes."""
        axes = axes_or_new(axes)
        draw_graph(axes, self.results, split, key)
        return axes


@dataclass(frozen=True, repr=False)
class Plane:
    """The loss over the plane through three networks of a run.

    Args:
        results: what `plane.json` holds.
    """

    results: Mapping[str, Any]

    def __repr__(self) -> str:
        names = ", ".join(one["name"] for one in self.results["networks"])
        return f"Plane({names}; {', '.join(self.results['splits'])})"

    def plot(self, axes: Any = None, *, split: str = "train") -> Any:
        """Draw the loss of a split that was measured; the matplotlib Axes."""
        axes = axes_or_new(axes)
        draw_plane(axes, self.results, split)
        return axes


@dataclass(frozen=True, repr=False)
class Curve:
    """Losses along curves between two networks of a run.

    Args:
        results: what `curve.json` holds.
    """

    results: Mapping[str, Any]

    def __repr__(self) -> str:
        curves = {name: of["train"] for name, of in self.results["curves"].items()}
        largest = ", ".join(f"{name} {of['largest_loss']:.4g}" for name, of in curves.items())
        return f"Curve({self.results['first']} to {self.results['second']}; largest train loss: {largest})"

    def plot(self, axes: Any = None, *, split: str = "train") -> Any:
        """Draw the loss of a split along each curve; the matplotlib Axes."""
        axes = axes_or_new(axes)
        draw_curves(axes, self.results, split)
        axes.legend(frameon=False, fontsize=9)
        return axes
