"""Losses along straight paths between models, and barriers (paper, eq. 1 and 10)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice

import torch
from torch import Tensor, nn

from fastar.evaluation.batch_norm import Statistics, statistics_bytes
from fastar.evaluation.losses import Batches, Measured, evaluate_rows
from fastar.flat import FlatLayout, check_kernels
from fastar.kernels import interpolate
from fastar.losses import Loss, find_loss
from fastar.runtime.live_bytes import LiveBytes
from fastar.runtime.memory import resident_models
from fastar.runtime.progress import SILENT, Progress

# Rows of the ends of paths that are kept on the device, since the next path may end in them too.
ENDS = 4
# Batches of each pass that are evaluated to see what they take: the second one is made while the first is there.
MEASURED_BATCHES = 2


Values = dict[str, dict[str, float]]
"""Values of one network: split -> "loss" or a metric's name -> its value."""
Share = Callable[[int, int, Callable[[range], list[Values]]], list[Values]]
"""Values of all points, from their number, how many are held at once, and a function that measures some."""


@dataclass(frozen=True, eq=False)
class Endpoint:
    """One end of a path: a model's parameters as a row [P], already permuted to match the other end.

    The row may lie in the host's memory, or be a function that makes it: it is brought to the device when its path's
    turn comes, so that many ends take no more memory than a few.
    """

    name: str
    row: Tensor | Callable[[], Tensor] = field(repr=False)
    statistics: Statistics | None = field(default=None, repr=False)
    """Its own batch-norm statistics, permuted alike; used by the reference's way of evaluating only."""

    def row_on(self, device: torch.device) -> Tensor:
        """The row [P] on `device`."""
        return (self.row if isinstance(self.row, Tensor) else self.row()).to(device)


@dataclass(frozen=True, eq=False)
class Segment:
    """The straight path from `first` (t = 0) to `second` (t = 1)."""

    kind: str
    first: Endpoint
    second: Endpoint


@dataclass(frozen=True)
class PathLosses:
    """Losses and metrics at each t along a path.

    Args:
        values: "loss" or a metric's name -> split -> its values.
    """

    kind: str
    first: str
    second: str
    t: list[float]
    values: dict[str, dict[str, list[float]]]

    @property
    def loss(self) -> dict[str, list[float]]:
        """The losses of each split."""
        return self.values["loss"]

    def barrier(self, split: str) -> float:
        """Barrier of this path on `split` (eq. 10)."""
        return barrier(self.t, self.loss[split])

    def accuracy_barrier(self, split: str) -> float | None:
        """Accuracy barrier of this path on `split`, of the first metric that is an accuracy; None: there is none."""
        name = accuracy_name(self.values)
        return None if name is None else accuracy_barrier(self.t, self.values[name][split])

    def largest_loss(self, split: str) -> float:
        """The largest loss on this path on `split`: a barrier alone is small where an end is bad."""
        return max(self.loss[split])


def barrier_gaps(t: Sequence[float], loss: Sequence[float]) -> list[float]:
    """At each t, the loss (or a metric) minus the straight line between the ends' losses (eq. 1)."""
    first, rise = loss[0], loss[-1] - loss[0]
    # From the nearer end: exact at both, and on level lines, where (1 - t) a + t a is not always a.
    line = [first + s * rise if s < 0.5 else loss[-1] - (1 - s) * rise for s in t]
    return [value - straight for value, straight in zip(loss, line, strict=True)]


def barrier(t: Sequence[float], loss: Sequence[float]) -> float:
    """The largest gap over the sampled t (eq. 10); never negative, since the ends have gap 0.

    >>> barrier([0.0, 0.5, 1.0], [1.0, 4.0, 3.0])
    2.0
    """
    return max(barrier_gaps(t, loss))


def accuracy_barrier(t: Sequence[float], accuracy: Sequence[float]) -> float:
    """The least of the accuracy minus the straight line between the ends' accuracies, over the sampled t; never
    positive.

    >>> accuracy_barrier([0.0, 0.5, 1.0], [1.0, 0.25, 0.5])
    -0.5
    """
    return min(barrier_gaps(t, accuracy))


def accuracy_name(metrics: Iterable[str]) -> str | None:
    """The first of some metrics that is an accuracy, by its name; None: none is."""
    return next((name for name in metrics if name.endswith("accuracy")), None)


def evaluate_paths(
    model: nn.Module,
    layout: FlatLayout,
    paths: Sequence[Segment],
    splits: Mapping[str, Batches],
    *,
    points: int = 11,
    statistics_batches: Batches | None = None,
    method: str = "population",
    loss: Loss | None = None,
    resident: int | None = None,
    graph: bool = False,
    share: Share | None = None,
    progress: Progress = SILENT,
) -> list[PathLosses]:
    """Evaluate every path at `points` equispaced t, ends included, sharing each batch among all models.

    A model that ends several paths is evaluated once. Where all models fit in memory this takes two passes over
    the data (statistics, losses) however many paths there are. Long for its arguments: the statements are short.

    Args:
        model: gives the architecture and the device; left as it was.
        layout: where parameters lie in a row.
        paths: ends already matched to each other.
        splits: name of a split to its data.
        points: number of t, at least 2.
        statistics_batches: data for batch-norm statistics; `method` as of `evaluate_rows`, where "reference" takes
            `Endpoint.statistics` at the ends.
        loss: as of `evaluate_rows`.
        resident: models held at once; None: as many as free memory holds.
        graph: replay the work of each batch as a CUDA graph.
        share: shares the points out to processes; None: all are done here.

    Raises:
        FastarError: kernels are asked for that cannot run (FASTAR_KERNELS).
    """
    if points < 2:
        raise ValueError(f"points={points}: a path needs its two ends")
    ts = [i / (points - 1) for i in range(points)]
    of_paths = [[_Point.of(path, t) for t in ts] for path in paths]
    todo = list(dict.fromkeys(point for points in of_paths for point in points))
    if not todo:
        return []
    device = next(model.parameters()).device
    check_kernels(device)

    @lru_cache(maxsize=ENDS)
    def row_of(end: Endpoint) -> Tensor:
        return end.row_on(device)

    def measure(some: Sequence[_Point], rows: Tensor, most: int | None = None) -> dict[str, Measured]:
        """The losses of some points; of so many batches of each pass."""

        def chosen(batches: Batches) -> Batches:
            return batches if most is None else lambda: islice(batches(), most)

        return evaluate_rows(
            model,
            layout,
            rows,
            {split: chosen(batches) for split, batches in splits.items()},
            statistics=[point.statistics(method) for point in some],
            statistics_batches=None if statistics_batches is None else chosen(statistics_batches),
            method=method,
            loss=loss,
            graph=graph and most is None,
            called=[point.name for point in some],
        )

    def trial() -> None:
        measure(todo[:1], row_of(todo[0].first)[None], MEASURED_BATCHES)

    chunk = resident or _models_at_once(model, layout, len(todo), trial)
    with progress.task("evaluating", total=len(todo), unit="models") as advance:

        def values_of(part: range) -> list[Values]:
            """The losses and metrics of the points of these numbers."""
            found: list[Values] = []
            for some, rows in _interpolated(todo[part.start : part.stop], chunk, layout.numel, row_of, device):
                results = measure(some, rows).items()
                found += [
                    {split: {name: float(one[k]) for name, one in m.items()} for split, m in results}
                    for k in range(len(some))
                ]
                advance(len(some))
            return found

        every = values_of(range(len(todo))) if share is None else share(len(todo), chunk, values_of)
    measured = dict(zip(todo, every, strict=True))
    found = []
    for path, here in zip(paths, of_paths, strict=True):
        values = {
            name: {split: [measured[point][split][name] for point in here] for split in splits}
            for name in (find_loss() if loss is None else loss).names
        }
        found.append(PathLosses(path.kind, path.first.name, path.second.name, ts, values))
    return found


@dataclass(frozen=True)
class _Point:
    """A point of a path; an end is a point between itself and itself, so that it is one for all its paths."""

    first: Endpoint
    second: Endpoint
    t: float

    @classmethod
    def of(cls, path: Segment, t: float) -> _Point:
        first, second = path.second if t == 1 else path.first, path.first if t == 0 else path.second
        return cls(first, second, 0.0 if first is second else t)

    @property
    def name(self) -> str:
        first, second = self.first.name, self.second.name
        return first if self.first is self.second else f"the point t={self.t:g} from {first} to {second}"

    def statistics(self, method: str) -> Statistics | None:
        """The batch-norm statistics that it is measured with; None: they are re-estimated."""
        return self.first.statistics or None if method == "reference" and self.first is self.second else None


def _interpolated(
    points: Sequence[_Point], chunk: int, numel: int, row_of: Callable[[Endpoint], Tensor], device: torch.device
) -> Iterator[tuple[Sequence[_Point], Tensor]]:
    """At most `chunk` points at a time, and their parameters [K, P], which the next ones are written over."""
    rows = torch.empty(min(chunk, len(points)), numel, device=device, dtype=torch.float32)
    for start in range(0, len(points), chunk):
        some = points[start : start + chunk]
        for row, point in zip(rows, some, strict=False):
            t = torch.tensor(point.t, device=device, dtype=torch.float32)
            interpolate(row_of(point.first), row_of(point.second), t, row)
        yield some, rows[: len(some)]


def _models_at_once(model: nn.Module, layout: FlatLayout, wanted: int, trial: Callable[[], object]) -> int:
    """The number of `wanted` models to hold at once; on a GPU what is left for batches and activations is measured, in
    `trial`."""
    device, extra = next(model.parameters()).device, None
    if device.type == "cuda" and wanted > 1:
        with LiveBytes() as live:
            trial()
        extra = live.peak + ENDS * 4 * layout.numel
    return resident_models(4 * layout.numel + statistics_bytes(model), device, wanted, extra)
