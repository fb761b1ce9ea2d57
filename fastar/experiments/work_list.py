"""A run folder as a list of work that processes share: each takes what is missing, and waits for what others do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from fastar.errors import FastarError
from fastar.experiments.session import Session
from fastar.runs import read_holder
from fastar.runtime import ranks

# Seconds between two looks at what other processes do.
LOOK_SECONDS = 1.0

Model = tuple[str, int]
"""Kind and number of a source, a heldout or the star."""


def train_missing(
    session: Session, models: Iterable[Model], train: Callable[[Model], object], done: Callable[[int], object]
) -> None:
    """Train those of some models that are missing, but for those that other processes finish meanwhile.

    One that another process lets go unfinished, or dies with, is trained here: from its last checkpoint. Where one
    fails and other processes are at work, which will fail at it too, all others are trained before its error is raised.

    Args:
        train: trains and saves a model, which is this process's while it does.
        done: told of the number of models that were finished since, by anybody.

    Raises:
        FastarError: a training failed; the first error.
    """
    run, failed, wait = session.run, list[FastarError](), Wait(session)

    def finished(model: Model) -> bool:
        return ranks.by_first(lambda: run.finished(*model))

    missing = [model for model in models if not finished(model)]
    while missing:
        trained = False
        for model in list(missing):
            if not finished(model):
                with claimed(session, *model) as ours:
                    if ours and not finished(model):
                        trained = True
                        try:
                            train(model)
                        except FastarError as error:
                            if ranks.world() > 1 or not run.processes.others():
                                raise
                            failed.append(error)
                            missing.remove(model)
            if model in missing and finished(model):
                missing.remove(model)
                done(1)
        if missing and not trained:
            wait(missing)
    if failed:
        raise failed[0]


@contextmanager
def claimed(session: Session, kind: str, index: int = 0) -> Iterator[bool]:
    """Take a part of the work (`RunFolder.claim`): several ranks are one process at it, and the first takes it for
    all."""
    with ExitStack() as held:
        yield ranks.by_first(lambda: held.enter_context(session.run.claim(kind, index)))


@contextmanager
def alone_at(session: Session, kind: str) -> Iterator[None]:
    """Wait until no other process works on a part of the run (the star, its results), and hold it."""
    wait = Wait(session)
    while True:
        with claimed(session, kind) as ours:
            if ours:
                yield
                return
        wait([(kind, 0)])


class Wait:
    """Waits for what other processes work on, a little at a time, and says for whom whenever that changes."""

    def __init__(self, session: Session):
        self._session = session
        self._said = ""

    def __call__(self, models: list[Model]) -> None:
        ranks.by_first(lambda: self._wait(models))

    def _wait(self, models: list[Model]) -> None:
        run = self._session.run
        holders = {str(one) for model in models if (one := read_holder(run.in_training(*model))) is not None}
        kind, index = models[0]
        first = f"{kind} {index}" if kind in ("source", "heldout") else kind
        others = f" and {len(models) - 1} more" if len(models) > 1 else ""
        text = f"waiting for {first}{others} ({', '.join(sorted(holders))})"
        if holders and text != self._said:
            self._session.progress.line(text)
            self._said = text
        time.sleep(LOOK_SECONDS)
