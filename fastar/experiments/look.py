"""Class probabilities that networks of a run give on its splits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from fastar.evaluation import Endpoint
from fastar.evaluation.predictions import Labels, Probabilities, probabilities
from fastar.experiments.session import Session
from fastar.experiments.statistics_batches import statistics_batches


class Look:
    """Looks at networks on some splits of a session, each network once; `labels` are there after the first."""

    def __init__(self, session: Session, names: Iterable[str]):
        splits = session.data.splits()
        self._session, self._splits = session, {name: splits[name] for name in dict.fromkeys(names)}
        self._model, self.labels = session.network.build(seed=0), Labels()

    def __call__(self, members: Iterable[Endpoint]) -> Iterator[Probabilities]:
        """The probabilities of each network in turn, batch-norm statistics re-estimated as the run does."""
        session = self._session
        return probabilities(
            self._model,
            session.network.layout,
            members,
            self._splits,
            self.labels,
            samples=sum(session.data.size(name) for name in self._splits),
            statistics_batches=partial(statistics_batches, session),
            loss=session.loss,
        )

    def accuracy(self, found: Probabilities, split: str) -> float:
        """The share of right predictions on a split."""
        return float((found[split].argmax(1) == self.labels[split]).mean())
