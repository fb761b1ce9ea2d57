"""A session: the settings, run folder, device, progress, live metrics, data and network that an experiment shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fastar.config import Settings, TrainSettings
from fastar.experiments.task import Network, RunData, TaskData
from fastar.experiments.user_task import Given, NoData, UserData, UserNetwork, find_splits, task_loss
from fastar.flat.forward import on_device
from fastar.losses import Loss
from fastar.runs import RunFolder
from fastar.runs.live_metrics import LiveMetrics
from fastar.runtime import ranks
from fastar.runtime.device import resolve_device
from fastar.runtime.memory import within_memory
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.user_code import find_function, is_reference
from fastar.training import suitable_threads
from fastar.training.step_trial import time_steps, with_fastest_steps


@dataclass(frozen=True)
class Session:
    """Settings, run, device, progress, data and network of an experiment; it holds them, and does nothing.

    Args:
        given: the parts of the task that were given, not named.
        metrics: where the metrics of trainings are shown, if anywhere.
    """

    settings: Settings
    run: RunFolder
    device: torch.device
    progress: Progress
    data: TaskData
    network: Network
    loss: Loss
    given: Given
    metrics: LiveMetrics | None = None

    @property
    def runs_user_code(self) -> bool:
        """The network, the data, the loss or a metric are functions of the user's."""
        given = self.given
        chosen = (given.build, given.data, given.loss, *(given.metrics or ()))
        return self.settings.names_code or any(one is not None and not isinstance(one, str) for one in chosen)

    @cached_property
    def train(self) -> TrainSettings:
        """The recipe that steps are made of: `settings.train`, `auto` decided by a trial when first asked for."""
        train, data = self.settings.train, self.data

        def trial(way: TrainSettings) -> tuple[float, float]:
            return time_steps(way, self.network.build(seed=0), data.made(train.batch_size), self.loss)

        if "auto" not in (train.graph, train.compile):
            return train
        if ranks.world() > 1:  # steps are not captured, and a trial of one rank's would not be the others'
            decided = {key: False for key in ("graph", "compile") if getattr(train, key) == "auto"}
            return train.model_copy(update=decided)
        steps = train.epochs * data.train.batch_count(train.batch_size, train.drop_last)
        return with_fastest_steps(train, self.device, trial, steps, self.progress.line)


def new_session(
    settings: Settings,
    run: RunFolder,
    progress: Progress = SILENT,
    *,
    classes: int | None = None,
    given: Given | None = None,
) -> Session:
    """A session of a run; data are loaded, and the symmetry derived, when first asked for.

    Args:
        classes: of a model at hand, so that images of any size need not be there to say them.
        given: parts of the task that are not named in the settings.

    Raises:
        FastarError: a device that does not exist, or a function that cannot be imported.
    """
    given = Given() if given is None else given
    device, loss = resolve_device(settings.device), task_loss(settings, given)
    name, arch = settings.dataset.name, settings.model.arch
    data: TaskData
    network: Network
    if given.no_data:
        data = NoData(settings, device, progress)
    elif given.data is not None or is_reference(name):
        data = UserData(
            settings,
            device,
            progress,
            lambda: find_splits(name) if given.data is None else given.data,
            lambda: network.build(seed=0, device="cpu"),
            whole=loss.whole,
        )
    else:
        data = RunData(settings, device, progress, classes, whole=loss.whole)
    if given.build is not None or is_reference(arch):
        build = find_function(arch, "--model") if given.build is None else given.build
        network = UserNetwork(settings, device, data, build, given.example)
    else:
        network = Network(settings, device, data)
    return Session(settings, run, device, progress, data, network, loss, given)


@contextmanager
def opened(session: Session) -> Iterator[Session]:
    """The session with its run folder held, and with live metrics, until the block ends. On several ranks the first one
    holds it, and has the metrics; the others go on when it does."""
    settings, run = session.settings, session.run
    if not ranks.is_first():
        ranks.by_first(lambda: None)
        yield session
        return
    with run.open(settings, session.progress):
        metrics = LiveMetrics(run.path, settings.logging, settings.model_dump(mode="json"))
        ranks.by_first(lambda: None)
        try:
            yield replace(session, metrics=metrics)
        finally:
            metrics.close()


@contextmanager
def threads(session: Session) -> Iterator[None]:
    """Inside, CPU work uses as many threads as a training batch of the session's network is worth."""
    # On a GPU there is nothing to choose, and its memory is not held by what would be counted. A network for images
    # of any size is worth all there are, and counting is worth seconds.
    settings, device = session.settings, session.device
    if device.type == "cuda" or settings.dataset.spec.variable_size:
        yield
        return
    batch = on_device(session.network.example(settings.train.batch_size), device)
    with suitable_threads(session.network.build(seed=0), batch):
        yield


def measuring(what: str) -> AbstractContextManager[None]:
    """Inside, memory of a GPU that runs out while `what` is measured is an error for users."""
    return within_memory(
        f"measuring {what}", "lower evaluation.batch_size, or train.batch_size, in which statistics are taken"
    )
