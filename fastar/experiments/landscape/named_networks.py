"""Networks of a finished run by the names that users give them, matched to each other, and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from torch import Tensor

from fastar.errors import FastarError
from fastar.evaluation import Endpoint, Segment
from fastar.experiments.families import mean_of
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.measure import endpoint, evaluated, permuted_row
from fastar.experiments.session import Session
from fastar.runs.model_files import Checkpoint
from fastar.symmetry import Permutations


class NamedNetworks:
    """A run's networks by name: source:0, heldout:1, star, and mean, the mean of the sources matched to the star."""

    def __init__(self, run: FinishedRun):
        self._run = run
        models = {"source": run.sources, "heldout": run.heldouts}
        self._found = {f"{kind}:{i}": one for kind, some in models.items() for i, one in enumerate(some)}
        self._found["star"] = run.star

    def __getitem__(self, name: str) -> Checkpoint:
        """The checkpoint of a network.

        Raises:
            FastarError: the run has none of this name.
        """
        if name == "mean":
            return self._mean
        if name not in self._found:
            last = [f"source:0 .. source:{len(self._run.sources) - 1}"]
            last += [f"heldout:0 .. heldout:{len(self._run.heldouts) - 1}"] if self._run.heldouts else []
            raise FastarError(
                f"{name}: no network of {self._run.session.run.path}; it has star, mean, {', '.join(last)}"
            )
        return self._found[name]

    def add(self, name: str, checkpoint: Checkpoint) -> None:
        """Take in a network from elsewhere."""
        self._found[name] = checkpoint

    def matched(self, first: str, others: Sequence[str]) -> list[Permutations | None]:
        """The permutations of `others` that match each to `first`, kept ones where the run has them. None: the run does
        not match."""
        if not self._run.session.settings.ends_matched:
            return [None] * len(others)
        known = dict[str, Permutations | None]()
        if first == "star":
            known = {f"source:{i}": one for i, one in enumerate(self._run.permutations)}
        rest = [name for name in others if name not in known]
        known |= zip(rest, self._run.matched(self[first], [self[name] for name in rest]), strict=True)
        return [known[name] for name in others]

    def row(self, name: str, permutation: Permutations | None = None) -> Tensor:
        """A network's parameters [P], its units permuted if `permutation` is given."""
        return permuted_row(self._run.session, self[name], permutation)

    def end(self, name: str, permutation: Permutations | None = None) -> Endpoint:
        """A network as one end of a path, its units permuted if `permutation` is given."""
        found = endpoint(self._run.session, name, self[name], permutation)
        return replace(found, statistics=None) if name == "mean" else found

    @cached_property
    def _mean(self) -> Checkpoint:
        """With the star's buffers, since a state is permuted whole; its batch-norm statistics are always estimated."""
        session, run = self._run.session, self._run
        row = mean_of(session, run.sources, run.permutations)
        return Checkpoint({**run.star.state, **session.network.layout.unflatten(row)})


def values_of(
    session: Session, networks: Sequence[Endpoint], splits: Sequence[str] | None = None
) -> dict[str, dict[str, list[float]]]:
    """The losses and metrics of networks, batch-norm statistics re-estimated as for the run's barriers.

    Args:
        splits: those to measure on; None: all.

    Returns:
        Split -> "loss" or a metric's name -> a value for each network.
    """
    alone = [Segment("network", one, one) for one in networks]
    measured, _ = evaluated(session, alone, points=2, splits=splits)
    names, found = measured[0].values, measured[0].loss
    return {split: {name: [path.values[name][split][0] for path in measured] for name in names} for split in found}
