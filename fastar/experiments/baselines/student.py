"""A student of the ensemble: one network trained on its probabilities, the fair rival of the star in test cost."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastar.data.dataset import Batch, Dataset
from fastar.data.splits import leaving_no_single
from fastar.errors import FastarError
from fastar.evaluation.predictions import Labels, probabilities
from fastar.evaluation.uncertainty import Average
from fastar.experiments.families import Families
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.regular import check_recipe, measured_alone, recipe, save_model
from fastar.experiments.resumable import Subject, trained
from fastar.experiments.session import measuring
from fastar.experiments.statistics_batches import statistics_batches
from fastar.runs.model_files import Checkpoint, load_checkpoint, load_into, state_digest
from fastar.runtime.seeds import derive_seed
from fastar.training import RegularStep


class Taught(Dataset):
    """A split whose targets are a teacher's probabilities.

    Args:
        data: the split; its order is known.
        taught: float32 [n, classes], in the order of `sequential`.
        whole: targets are whole batches.
    """

    def __init__(self, data: Dataset, taught: Tensor, *, whole: bool):
        self._data, self._taught, self._whole, self.device = data, taught, whole, data.device

    def __len__(self) -> int:
        return len(self._data)

    def batch_count(self, batch_size: int, drop_last: bool = True) -> int:
        return self._data.batch_count(batch_size, drop_last)

    def batches(self, batch_size: int, *, seed: int, epoch: int, begin: int = 0, **how: Any) -> Iterator[Batch]:
        order = self._data.order(seed, epoch).to(self.device)
        found = self._data.batches(batch_size, seed=seed, epoch=epoch, begin=begin, **how)
        for number, (inputs, _) in enumerate(found, start=begin):
            targets = self._taught[order[number * batch_size : (number + 1) * batch_size]]
            yield inputs, (inputs, targets) if self._whole else targets

    def sequential(self, batch_size: int) -> Iterator[Batch]:
        raise NotImplementedError

    def sample_number(self, seed: int, epoch: int, place: int) -> int:
        return self._data.sample_number(seed, epoch, place)


def student(run: FinishedRun) -> Checkpoint:
    """A network of the run's architecture, trained on the mean probabilities of all sources with the star's epochs and
    recipe; `student.safetensors` in the run folder, trained where it is missing.

    Each training image has the probabilities of the image without augmentation, made once.

    Raises:
        FastarError: one that is there was made otherwise; training data whose order is their own; see
            `fastar.experiments.resumable.trained`.
    """
    session, settings = run.session, run.session.settings
    path, data = session.run.student, session.data.train
    epochs, lr = settings.star_epochs, settings.star_lr
    sources = [state_digest(source) for source in run.sources]
    wanted = {**recipe(session, "student", 0), "epochs": epochs, "lr": lr, "sources": sources}
    wanted |= {} if settings.star.schedule is None else {"schedule": settings.star.schedule}
    seed = derive_seed(settings.seed, "student")

    def make(attempt: int) -> RegularStep:
        return RegularStep(session.network.build(seed=seed), session.train, loss=session.loss)

    if not path.is_file():
        if not data.exact:
            raise FastarError(
                f"{session.run.path}: its training data come in an order of their own, so that a student's targets "
                "cannot be found: give tensors or a dataset with a length"
            )
        taught = Taught(data, _taught(run), whole=session.loss.whole)
        seeds, subject = derive_seed(seed, "data"), Subject(wanted)
        train = settings.star_train
        with trained(session, subject, make, seed=seeds, epochs=epochs, lr=lr, train=train, data=taught) as done:
            state = done.step.state()
            done.step.release()
            model = session.network.build(seed=seed)
            load_into(model, Checkpoint(state))
            with measuring("the student"):
                measured = measured_alone(session, model, "the student")
            save_model(session, subject, state, measured, done.history, done.retries)
    found = load_checkpoint(path, own=True)
    check_recipe(path, found.metadata.get("recipe", {}), wanted)
    return found


def _taught(run: FinishedRun) -> Tensor:
    """The mean probabilities of all sources on the training images, float32 [n, classes] on the device."""
    session, around, average = run.session, Families(run), Average()
    data = session.data.train
    size = leaving_no_single(len(data), session.settings.evaluation.batch_size)
    members = map(around.source, range(len(run.sources)))
    with session.progress.task("teaching", total=len(run.sources), unit="networks") as advance:
        for found in probabilities(
            session.network.build(seed=0),
            session.network.layout,
            members,
            {"train": partial(data.sequential, size)},
            Labels(),
            samples=len(data),
            statistics_batches=partial(statistics_batches, session),
            loss=session.loss,
        ):
            average.add(found["train"])
            advance(1)
    return torch.from_numpy(average.mean).float().to(data.device)
