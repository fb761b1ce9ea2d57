"""Barriers, as the functions of `fastar` return them, and frames of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastar.errors import FastarError
from fastar.evaluation import PathLosses
from fastar.evaluation.paths import accuracy_barrier, accuracy_name, barrier
from fastar.report.notebook_curves import axes_or_new, labelled


@dataclass(frozen=True, repr=False)
class Barrier:
    """The loss and metrics along the straight path between two models, and its barrier.

    Args:
        t: points of the path, 0 at the first model, 1 at the second.
        loss: mean loss at each t.
        metrics: name -> values at each t.
        value: the largest gap between the loss and the straight line between the ends' losses (paper, eq. 10).
        loss_name: of the loss.
    """

    t: list[float]
    loss: list[float]
    metrics: dict[str, list[float]]
    value: float
    loss_name: str = "cross_entropy"

    @classmethod
    def of(cls, path: PathLosses, split: str, loss_name: str) -> Barrier:
        """The barrier of a measured path on a split."""
        metrics = {name: values[split] for name, values in path.values.items() if name != "loss"}
        return cls(path.t, path.loss[split], metrics, path.barrier(split), loss_name)

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"Barrier({self.value:.4g}, {self.loss_name} {self.loss[0]:.4g} to {self.loss[-1]:.4g})"

    @property
    def accuracy(self) -> list[float]:
        """The accuracy at each t.

        Raises:
            FastarError: it was not measured.
        """
        if "accuracy" not in self.metrics:
            raise FastarError(f"accuracy was not measured; the metrics are {', '.join(self.metrics) or 'none'}")
        return self.metrics["accuracy"]

    @property
    def largest_loss(self) -> float:
        """The largest loss at any t: a barrier alone is small where an end is bad."""
        return max(self.loss)

    @property
    def accuracy_barrier(self) -> float:
        """The least of the accuracy minus the straight line between the ends' accuracies; never positive. Of the first
        metric that is an accuracy.

        Raises:
            FastarError: none was measured.
        """
        name = accuracy_name(self.metrics)
        return accuracy_barrier(self.t, self.accuracy if name is None else self.metrics[name])

    def plot(self, axes: Any = None) -> Any:
        """Draw the loss along the path, and the straight line between the ends; the matplotlib Axes."""
        axes = axes_or_new(axes)
        axes.plot(self.t, self.loss, marker="o", markersize=4, label=f"barrier {self.value:.3g}")
        axes.plot([0, 1], [self.loss[0], self.loss[-1]], linestyle="--", color="0.6")
        return labelled(axes, self.loss_name)

    def to_frame(self) -> Any:
        """A pandas DataFrame: t, loss and the metrics, a row for each t."""
        return frame({"t": self.t, "loss": self.loss, **self.metrics})


def paths_frame(results: Mapping[str, Any]) -> Any:
    """A pandas DataFrame of a run's results: a row for each path, with its barrier on each split."""
    splits = [key.removesuffix("_loss") for key in results["paths"][0] if key.endswith("_loss")]
    return frame(
        {
            **{key: [path[key] for path in results["paths"]] for key in ("kind", "first", "second")},
            **{f"{s}_barrier": [barrier(path["t"], path[f"{s}_loss"]) for path in results["paths"]] for s in splits},
        }
    )


def frame(columns: Mapping[str, Sequence[Any]]) -> Any:
    """A pandas DataFrame of these columns; FastarError where pandas is missing."""
    try:
        import pandas
    except ImportError as error:
        raise FastarError("a frame needs pandas: pip install pandas") from error
    return pandas.DataFrame(columns)
