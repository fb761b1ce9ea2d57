"""Class probabilities that networks of a run give on its splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

from fastar.evaluation import Endpoint
from fastar.evaluation.losses import Batches
from fastar.evaluation.predictions import Labels, Probabilities, probabilities
from fastar.experiments.session import Session
from fastar.experiments.statistics_batches import statistics_batches


class Split(Protocol):
    """Data that are no split of the run: so many samples, and passes over them."""

    samples: int

    def __call__(self) -> Iterable[tuple[Any, Any]]: ...


class Look:
    """Looks at networks on some splits of a session, each network once; `labels` are there after the first.

    Args:
        names: of the session's splits.
        more: other data, by their names.
    """

    def __init__(
        self, session: Session, names: Iterable[str], more: Mapping[str, Split] = MappingProxyType[str, Split]({})
    ):
        splits, data = session.data.splits(), session.data
        self.names = list(dict.fromkeys(names))
        self._session = session
        self._splits: dict[str, Batches] = {**{name: splits[name] for name in self.names}, **more}
        self._samples = {name: data.size(name) for name in self.names}
        self._samples |= {name: one.samples for name, one in more.items()}
        self._model, self.labels = session.network.build(seed=0), Labels()

    def __call__(self, members: Iterable[Endpoint], names: Sequence[str] | None = None) -> Iterator[Probabilities]:
        """The probabilities of each network in turn, batch-norm statistics re-estimated as the run does.

        Args:
            names: the splits; None: all.
        """
        session, names = self._session, list(self._splits) if names is None else names
        return probabilities(
            self._model,
            session.network.layout,
            members,
            {name: self._splits[name] for name in names},
            self.labels,
            samples=sum(self._samples[name] for name in names),
            statistics_batches=partial(statistics_batches, session),
            loss=session.loss,
        )

    def accuracy(self, found: Probabilities, split: str) -> float:
        """The share of right predictions on a split."""
        return float((found[split].argmax(1) == self.labels[split]).mean())
