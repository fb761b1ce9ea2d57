"""What the functions of `fastar` return: barriers, trained networks, stars and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastar.errors import FastarError
from fastar.evaluation import PathLosses


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

    def plot(self, axes: Any = None) -> Any:
        """Draw the loss along the path, and the straight line between the ends; the matplotlib Axes."""
        axes = _axes(axes)
        axes.plot(self.t, self.loss, marker="o", markersize=4, label=f"barrier {self.value:.3g}")
        axes.plot([0, 1], [self.loss[0], self.loss[-1]], linestyle="--", color="0.6")
        return _labelled(axes, self.loss_name)

    def to_frame(self) -> Any:
        """A pandas DataFrame: t, loss and the metrics, a row for each t."""
        return _frame({"t": self.t, "loss": self.loss, **self.metrics})


def plot_paths(results: Mapping[str, Any], split: str, axes: Any = None) -> Any:
    """Draw the mean loss along each kind of path of a run's results; the matplotlib Axes."""
    axes = _axes(axes)
    for kind in dict.fromkeys(path["kind"] for path in results["paths"]):
        curves = [path[f"{split}_loss"] for path in results["paths"] if path["kind"] == kind]
        mean = [sum(column) / len(column) for column in zip(*curves, strict=True)]
        label = f"{kind.replace('_', ' ')} (n={len(curves)})"
        axes.plot(results["t"], mean, marker="o", markersize=4, label=label)
    return _labelled(axes, f"{split} loss")


def paths_frame(results: Mapping[str, Any]) -> Any:
    """A pandas DataFrame of a run's results: a row for each path, with its barrier on each split."""
    from fastar.evaluation.paths import barrier

    splits = [key.removesuffix("_loss") for key in results["paths"][0] if key.endswith("_loss")]
    rows = [
        {
            "kind": path["kind"],
            "first": path["first"],
            "second": path["second"],
            **{f"{split}_barrier": barrier(path["t"], path[f"{split}_loss"]) for split in splits},
        }
        for path in results["paths"]
    ]
    return _frame({key: [row[key] for row in rows] for key in rows[0]})


def _axes(axes: Any) -> Any:
    if axes is not None:
        return axes
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FastarError("a picture needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(5.0, 3.6), layout="constrained").subplots()


def _labelled(axes: Any, name: str) -> Any:
    axes.set_xlabel("t")
    axes.set_ylabel(name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return axes


def _frame(columns: Mapping[str, Sequence[Any]]) -> Any:
    try:
        import pandas
    except ImportError as error:
        raise FastarError("a frame needs pandas: pip install pandas") from error
    return pandas.DataFrame(columns)
