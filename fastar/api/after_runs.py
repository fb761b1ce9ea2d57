"""What commands on finished runs find, as the methods of `fastar.Run` return it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastar.api.curves import frame
from fastar.report.fusion_table import fusion_table
from fastar.report.notebook_curves import axes_or_new
from fastar.report.perturbed_stars import draw_perturbed, perturbed_table
from fastar.report.results import table_text


@dataclass(frozen=True, repr=False)
class Fusion:
    """Ways to make one predictor of a run's sources, on its last split.

    Args:
        results: what `fusion.json` holds: for each predictor its networks, accuracy, NLL, and the difference of its
            accuracy from the star's with its standard error.
    """

    results: Mapping[str, Any]

    @property
    def value(self) -> float:
        """The star's accuracy."""
        return float(self.results["predictors"]["star"]["accuracy"])

    def __repr__(self) -> str:
        predictors = ", ".join(f"{name} {of['accuracy']:.3g}" for name, of in self.results["predictors"].items())
        return f"Fusion(accuracy on {self.results['split']}: {predictors})"

    def table(self) -> str:
        """All predictors as a table to print."""
        return table_text(fusion_table(self.results))

    def to_frame(self) -> Any:
        """A pandas DataFrame: a row for each predictor."""
        rows = self.results["predictors"]
        keys = next(iter(rows.values()))
        columns: dict[str, list[Any]] = {key: [of.get(key) for of in rows.values()] for key in keys}
        return frame({"predictor": list(rows), **columns})


@dataclass(frozen=True, repr=False)
class Perturbation:
    """Losses of perturbed stars, and barriers from them to the heldouts.

    Args:
        results: what `perturb.json` holds: a point for each radius, the star itself the first.
    """

    results: Mapping[str, Any]

    @property
    def value(self) -> float:
        """The mean barrier on the training data from the stars of the smallest radius."""
        return float(self.results["points"][1]["train"]["barrier"]["mean"])

    def __repr__(self) -> str:
        points = ", ".join(f"{of['train']['barrier']['mean']:.3g} at {of['radius']:g}" for of in self.results["points"])
        return f"Perturbation(barrier to heldouts: {points})"

    def table(self) -> str:
        """All radii as a table to print."""
        return table_text(perturbed_table(self.results))

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
