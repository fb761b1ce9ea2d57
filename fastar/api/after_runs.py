"""Results of commands on finished runs, as the methods of `fastar.Run` return them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fastar.api.curves import frame
from fastar.report.average_panels import draw_family
from fastar.report.landscape.curve_picture import draw_curves
from fastar.report.landscape.graph_picture import draw_graph
from fastar.report.landscape.plane_picture import draw_plane
from fastar.report.notebook_curves import axes_or_new
from fastar.report.perturbed_stars import draw_perturbed
from fastar.report.results import table_text
from fastar.report.study_forms import FORMS


@dataclass(frozen=True, repr=False)
class Study:
    """Results of a command.

    Args:
        results: what its JSON file holds.
    """

    results: Mapping[str, Any]
    file: ClassVar[str]
    """The JSON file's name, without its end."""

    def table(self) -> str:
        """The tables that the command prints."""
        return "\n".join(table_text(one) for one in FORMS[self.file].tables(self.results))


class Uncertainty(Study):
    """Metrics of averages of K networks of families around a star: for each family K, and every metric's mean and
    standard deviation over repetitions at each K; `corruptions` and `ood` where they were asked for."""

    file = "uncertainty"

    @property
    def value(self) -> float:
        """The negative log likelihood of the star domain's largest average, nats."""
        return float(self.results["families"]["star domain"]["nll"]["mean"][-1])

    def __repr__(self) -> str:
        families = ", ".join(f"{name} {of['nll']['mean'][-1]:.3g}" for name, of in self.results["families"].items())
        return f"Uncertainty(NLL on {self.results['split']}: {families})"

    def plot(self, axes: Any = None, *, metric: str = "nll") -> Any:
        """Draw a metric over K, a curve for each family; the matplotlib Axes."""
        axes = axes_or_new(axes)
        for family, of in self.results["families"].items():
            draw_family(axes, family, of, metric)
        axes.set_xlabel("networks in the average, K")
        axes.set_ylabel(metric)
        axes.legend(frameon=False)
        return axes

    def to_frame(self) -> Any:
        """A pandas DataFrame of the means: a row for each family and K, a column for each metric."""
        columns: dict[str, list[Any]] = {}
        for name, of in self.results["families"].items():
            columns.setdefault("family", []).extend([name] * len(of["k"]))
            columns.setdefault("k", []).extend(of["k"])
            for metric, found in of.items():
                if metric not in ("k", "repetitions"):
                    columns.setdefault(metric, []).extend(found["mean"])
        return frame(columns)


class Fusion(Study):
    """Ways to make one predictor of a run's sources, on its last split: for each its networks, accuracy, NLL, and the
    difference of its accuracy from the star's with its standard error."""

    file = "fusion"

    @property
    def value(self) -> float:
        """The star's accuracy."""
        return float(self.results["predictors"]["star"]["accuracy"])

    def __repr__(self) -> str:
        predictors = ", ".join(f"{name} {of['accuracy']:.3g}" for name, of in self.results["predictors"].items())
        return f"Fusion(accuracy on {self.results['split']}: {predictors})"

    def to_frame(self) -> Any:
        """A pandas DataFrame: a row for each predictor."""
        rows = self.results["predictors"]
        keys = next(iter(rows.values()))
        columns: dict[str, list[Any]] = {key: [of.get(key) for of in rows.values()] for key in keys}
        return frame({"predictor": list(rows), **columns})


class Perturbation(Study):
    """Losses of perturbed stars, and barriers from them to the heldouts: a point for each radius, the star itself the
    first."""

    file = "perturb"

    @property
    def value(self) -> float:
        """The mean barrier on the training data from the stars of the smallest radius."""
        return float(self.results["points"][1]["train"]["barrier"]["mean"])

    def __repr__(self) -> str:
        points = ", ".join(f"{of['train']['barrier']['mean']:.3g} at {of['radius']:g}" for of in self.results["points"])
        return f"Perturbation(barrier to heldouts: {points})"

    def plot(self, axes: Any = None) -> Any:
        """Draw losses and barriers over the radius; the matplotlib Axes."""
        axes = axes_or_new(axes)
        draw_perturbed(axes, self.results)
        axes.legend(frameon=False)
        return axes

    def to_frame(self) -> Any:
        """A pandas DataFrame of means: a row for each radius and split."""
        rows = [
            {"radius": of["radius"], "length": of["length"], "split": split, **{k: s["mean"] for k, s in one.items()}}
            for of in self.results["points"]
            for split, one in of.items()
            if isinstance(one, Mapping)
        ]
        return frame({key: [row[key] for row in rows] for key in rows[0]})


class Graph(Study):
    """Barriers between all pairs of a run's networks, and hubs compared."""

    file = "graph"

    def __repr__(self) -> str:
        below = self.results["below"]["train"]
        shares = ", ".join(f"{eps:g}: {share:.2f}" for eps, share in zip(below["eps"], below["star"], strict=True))
        return f"Graph({len(self.results['names'])} networks; share of the star's train barriers below {shares})"

    def plot(self, axes: Any = None, *, split: str = "train", key: str = "barrier") -> Any:
        """Draw the matrix of barriers of a split, or with `key="largest_loss"` of largest losses; the Axes."""
        axes = axes_or_new(axes)
        draw_graph(axes, self.results, split, key)
        return axes


class Plane(Study):
    """The loss over the plane through three networks of a run."""

    file = "plane"

    def __repr__(self) -> str:
        names = ", ".join(one["name"] for one in self.results["networks"])
        return f"Plane({names}; {', '.join(self.results['splits'])})"

    def plot(self, axes: Any = None, *, split: str = "train") -> Any:
        """Draw the loss of a split that was measured; the matplotlib Axes."""
        axes = axes_or_new(axes)
        draw_plane(axes, self.results, split)
        return axes


class Curve(Study):
    """Losses along curves between two networks of a run."""

    file = "curve"

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
