"""The one training loop; the step (regular or star) is plugged in."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastar.config import TrainSettings
from fastar.data.dataset import Batch, Dataset, Share, first_not_finite
from fastar.errors import FastarError
from fastar.losses import sample_count
from fastar.runtime import ranks
from fastar.runtime.device import synchronize
from fastar.runtime.memory import freed_memory_kept, peak_bytes
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.signals import Stopped, deferred, requested
from fastar.runtime.timing import SpanClock, span
from fastar.training.amp import resolve_precision
from fastar.training.epochs import Epoch, Good, NonFiniteLoss, SoFar, check_batch
from fastar.training.profiling import StepsProfile
from fastar.training.resume import Resumable, Saved, TrainingCheckpoints
from fastar.training.schedule import learning_rate, resolution
from fastar.training.steps import Step, StepDraws

# Seconds from which on an epoch is told of in a line of its own; shorter ones show in the progress and in the log.
WORTH_A_LINE = 30.0


def timed_batches(batches: Iterable[Batch | None], clock: SpanClock) -> Iterator[tuple[Any, Any]]:
    """The same batches (None: one without samples of this rank, whose inputs are None); the wait for each is counted.
    Whatever reads them ahead is ended with this."""
    iterator: Iterator[Any] = iter(batches)
    end = object()
    try:
        while True:
            with clock, span("load"):
                batch: Any = next(iterator, end)
            if batch is end:
                return
            yield (None, None) if batch is None else batch
            del batch
    finally:
        if isinstance(iterator, Generator):
            iterator.close()


def learning_rates(settings: TrainSettings, epoch: int, steps: int, epochs: int, base: float) -> Tensor:
    """The learning rate of each step of an epoch: fp32 [steps], on the CPU."""
    found = [learning_rate(settings, epoch * steps + i, steps, epochs, base) for i in range(steps)]
    return torch.tensor(found, dtype=torch.float32, device="cpu")


def fit(
    step: Step,
    data: Dataset,
    settings: TrainSettings,
    *,
    name: str,
    seed: int,
    epochs: int | None = None,
    lr: float | None = None,
    rate: str = "train.lr",
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    checkpoints: TrainingCheckpoints | None = None,
    saved: Saved | None = None,
    profile: StepsProfile | None = None,
    progress: Progress = SILENT,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Epoch]:
    """Train: `epochs` passes over `data` in batches, the learning rate set before each step.

    The host waits for the device once an epoch, when the losses are read, and when a checkpoint is written. On several
    ranks each trains on its samples of every batch, and all save and stop after the same step. The loop is long, as its
    order is its meaning: what an epoch begins with, its steps, and what is saved after which of them.

    Args:
        step: what to do with a batch.
        data: what is trained on.
        settings: batch size, schedule and so on.
        name: of the model, for progress and errors.
        seed: of order, augmentation and dropout; torch's generators are left as they were.
        epochs: None for `settings.epochs`.
        lr: None for `settings.lr`.
        rate: the setting that says the learning rate of this training, for errors.
        on_epoch: told each epoch's figures.
        checkpoints: where to save the training; a request to stop then waits for the end of a step.
        saved: what to go on from; needs `checkpoints`.
        profile: looks at some steps.
        clock: seconds.

    Raises:
        FastarError: too few images for one batch, or a disk that is full.
        NonFiniteLoss: a loss, or what the last step of an epoch left, is not finite (model, epoch and step are named).
        Stopped: on request, after everything was saved.
    """
    base = lr or settings.lr
    advice = f"lower {rate} (it is {base:g})"
    if resolve_precision(settings.precision, data.device) != torch.float32:
        advice += " or use train.precision=fp32"
    training = ModelTraining(step, data, settings, name, seed, checkpoints, epochs or settings.epochs, advice, clock)
    steps = training.steps
    device = data.device
    lr_now = torch.zeros((), device=device, dtype=torch.float32)
    agreement = ranks.Agreement()
    with (
        StepDraws(seed, device) as draws,
        progress.task(f"training {name}", total=training.epochs, unit="epochs") as advance,
        closing(profile) if profile is not None else nullcontext(),
        deferred() if checkpoints is not None else nullcontext(),
        freed_memory_kept(),
    ):
        begin = 0 if saved is None else training.go_on(saved)
        if training.history:
            advance(len(training.history))
        for epoch in range(len(training.history), training.epochs):
            if profile is not None:
                profile.epoch_begins(epoch, training.epochs)
            start = clock()
            if begin:
                step.resume_epoch(epoch, steps, begin)
                synchronize(device)
            else:
                found = step.begin_epoch(epoch, steps)
                synchronize(device)
                training.so_far = SoFar(begin_seconds=clock() - start, figures=found)
            rates = learning_rates(settings, epoch, steps, training.epochs, base).to(device)
            share = (ranks.rank(), ranks.world())
            batches = training.batches(begin, share if share[1] > 1 else None)
            training.clock_steps()
            for i, (inputs, targets) in enumerate(timed_batches(batches, training.clock), start=begin):
                with training.clock:
                    lr_now.copy_(rates[i])
                    draws.begin(epoch, i)
                    if ranks.world() > 1:
                        step.begin_batch(training.images_of(i), draws.seed(epoch, i))
                    training.losses[i] = step(inputs, targets, lr_now)
                    draws.end()
                training.so_far.images += sample_count(inputs) if ranks.world() == 1 else training.images_of(i)
                if profile is not None:
                    profile.step_done()
                if checkpoints is None or i + 1 == steps:
                    continue
                asked = agreement(wanted(checkpoints.due_within()))
                if asked:
                    if data.exact:
                        synchronize(device)  # what is queued is the steps' time
                        saving = clock()
                        saved_last = training.save_within(i + 1)
                        training.saving += clock() - saving
                    else:  # a pass over these data cannot be begun here again
                        saved_last = ""
                    stop_if_asked(saved_last, asked)
            begin = 0
            del inputs, targets  # not for as long as the next epoch's matching takes
            done = training.end_epoch(float(rates[-1]))
            on_epoch(done)
            asked = 0 if checkpoints is None else agreement.now(wanted(checkpoints.due_after(epoch + 1)))
            if asked:
                stop_if_asked(training.save_after(), asked)
            advance(1, note=done.note())
            if done.seconds >= WORTH_A_LINE:
                progress.line(f"{name}, epoch {epoch + 1} of {training.epochs}: {done.note()}")
    return training.history


class OfModel(Resumable, Protocol):
    """The part of a step that belongs to one model: as of `Step`."""

    def parts(self) -> Mapping[str, Resumable]: ...

    def state(self) -> dict[str, Tensor]: ...

    def describe(self, step: int) -> str: ...


class ModelTraining:
    """State of one model's training: the losses of the epoch, the epochs before, the last good state.

    Args:
        share: models whose steps are done at once; each counts that part of their seconds as its own. Above 1 the
            caller looks whether what steps move is finite.
    """

    def __init__(
        self,
        step: OfModel,
        data: Dataset,
        settings: TrainSettings,
        name: str,
        seed: int,
        checkpoints: TrainingCheckpoints | None,
        epochs: int,
        advice: str,
        clock: Callable[[], float],
        share: int = 1,
    ):
        check_batch(settings, len(data))
        self.steps = data.batch_count(settings.batch_size, settings.drop_last)
        # Images of a step, and of an epoch's last one.
        self._batch = settings.batch_size
        self._last = self._batch if settings.drop_last else len(data) - self._batch * (self.steps - 1)
        self.epochs = epochs
        self.history: list[Epoch] = []
        self.so_far = SoFar()
        self.losses = torch.zeros(self.steps, device=data.device, dtype=torch.float32)
        self._step = step
        self._data, self._settings, self._seed = data, settings, seed
        self._name = name
        self._device = data.device
        self._checkpoints = checkpoints
        self._advice = advice
        self._now = clock
        self._share = share
        self._good: Good | None = None

    def go_on(self, saved: Saved) -> int:
        """Become what was saved, and return the step of the epoch to begin with."""
        assert self._checkpoints is not None
        if saved.epoch > self.epochs or saved.step >= self.steps:
            raise FastarError(
                f"{saved.path}: of a training of other length (damaged?); delete it to go on from another"
            )
        self._checkpoints.restore(saved, self._step.parts(), self._device)
        self.history = [Epoch(**entry) for entry in saved.history]
        self.so_far = SoFar(**saved.so_far)
        self.losses[: saved.step] = saved.tensors["losses"].to(self._device)
        self._keep(saved.step)
        return saved.step

    def images_of(self, step: int) -> int:
        """The images of a step, on all ranks."""
        return self._last if step + 1 == self.steps else self._batch

    def batches(self, begin: int, share: Share | None = None) -> Iterator[Batch]:
        """The batches of the epoch, from number `begin` on; of each a rank's `share`."""
        settings, epoch = self._settings, len(self.history)
        more: dict[str, Any] = {} if share is None else {"share": share}
        return self._data.batches(
            settings.batch_size,
            seed=self._seed,
            epoch=epoch,
            augment=True,
            drop_last=settings.drop_last,
            begin=begin,
            size=resolution(settings, epoch),
            **more,
        )

    def clock_steps(self, clock: SpanClock | None = None) -> None:
        """Begin to time steps, by a clock of its own or by `clock`."""
        self.clock = SpanClock(self._device) if clock is None else clock
        self._begun = self._now()
        self.saving = 0.0

    def save_within(self, steps: int) -> str:
        """Save after so many steps of the epoch; what was saved, in words.

        The seconds that it takes are no steps': the caller adds them to `saving`.
        """
        start = self._now()
        self._check(steps)
        if not self._save(steps, self._until(start)):
            return ""
        self._keep(steps)
        return f"epoch {len(self.history) + 1}, step {steps + 1} of {self._name}"

    def save_after(self) -> str:
        """Save after the last whole epoch; what was saved, in words."""
        written = self._save(0, SoFar(), loss=self.history[-1].loss)
        return f"epoch {len(self.history)} of {self._name}, which is whole" if written else ""

    def _save(self, steps: int, so_far: SoFar, **loss: float) -> bool:
        assert self._checkpoints is not None
        return self._checkpoints.save(
            self._step.parts(),
            self._device,
            epoch=len(self.history),
            steps=steps,
            history=[vars(epoch) for epoch in self.history],
            so_far=asdict(so_far),
            losses=self.losses[:steps],
            **loss,
        )

    def end_epoch(self, lr: float) -> Epoch:
        """The epoch, whose steps are all done."""
        alone = self._share == 1  # else all that steps move is looked at together, and nothing is asked for if it fails
        moved, finite = self._finite() if alone else ([], self.losses.new_ones(0))
        losses = self._check(self.steps)  # the epoch's one wait
        spoiled = [name for name, good in zip(moved, finite.tolist(), strict=True) if not good]
        if spoiled:  # the loss is of before the update: nothing else would tell of the last step's
            raise self._not_finite(_in_words(spoiled[0]), self.steps - 1)
        so_far = self._until(self._now())
        done = Epoch(
            len(self.history),
            self._mean(losses),
            lr,
            peak_bytes=peak_bytes(self._device),
            **asdict(so_far),
        )
        self.history.append(done)
        if alone and len(self.history) < self.epochs:
            self._keep(0)
        return done

    def _mean(self, losses: Tensor) -> float:
        """Over the epoch's images: its last step may be of fewer."""
        if self._last == self._batch:
            return float(losses.double().mean())
        images = torch.full_like(losses, self._batch, dtype=torch.float64)
        images[-1] = self._last
        return float((losses.double() * images).sum() / images.sum())

    def _until(self, now: float) -> SoFar:
        seconds = (now - self._begun - self.saving) / self._share
        spans = {name: took / self._share for name, took in self.clock.seconds().items()}
        return self.so_far.then(seconds, {**spans, "other": max(seconds - sum(spans.values()), 0.0)})

    def _keep(self, steps: int) -> None:
        """Note the model, known to be finite after so many steps of the epoch."""
        self._good = None  # never two at a time
        self._good = Good(self._step.state(), len(self.history), steps)

    def _finite(self) -> tuple[list[str], Tensor]:
        """The names of all that steps move, and whether each is finite: bool, on the device."""
        moved = {name: value for name, value in self._step.save().items() if value.is_floating_point()}
        bad = torch.stack([~torch.isfinite(value).all() for value in moved.values()]).int()
        ranks.sum_(bad)  # batch-norm statistics are each rank's own
        return list(moved), bad == 0

    def _check(self, steps: int) -> Tensor:
        """The first `steps` losses, on the host: waits for the device. NonFiniteLoss where one is not finite."""
        losses = self.losses[:steps].cpu()
        finite = torch.isfinite(losses)
        if not bool(finite.all()):
            raise self._not_finite("loss", int((~finite).nonzero()[0]))
        return losses

    def _not_finite(self, what: str, step: int) -> NonFiniteLoss:
        """The error that step number `step` of the epoch left `what` not finite, with the last good state."""
        good, bad = self._good, self._bad_sample(step)
        return NonFiniteLoss(
            f"training {self._name}: {what} not finite at epoch {len(self.history) + 1}, step {step + 1}"
            f"{self._step.describe(step)}; {self._advice if bad is None else bad}",
            None if good is None else replace(good, state={name: one.cpu() for name, one in good.state.items()}),
            of_data=bad is not None,
        )

    def _bad_sample(self, step: int) -> str | None:
        """A line on the first number of a step's batch that is not finite; None: all are, or the batch does not come
        again."""
        found = first_not_finite(next(self.batches(step))) if self._data.exact else None
        if found is None:
            return None
        place, index, value = found
        number = self._data.sample_number(self._seed, len(self.history), step * self._settings.batch_size + index[0])
        return f"tensor {place} of sample {number} of the training data holds {value}: replace it, or leave that out"


# What a rank asks of all: nothing (0), to save (1), or to stop by signal number n (1 + n).
SAVE = 1


def wanted(due: bool) -> int:
    """What this rank asks for: to stop, where it was told to; else to save, if that is due."""
    request = requested()
    return int(due) if request is None else SAVE + request.number


def stop_if_asked(saved: str, asked: int | None = None) -> None:
    """Raise a request to stop, if there is one; `saved` says what was saved.

    Args:
        asked: what the ranks have agreed on: this one's own request waits until the others have heard of it.
    """
    request = requested()
    if asked is not None:
        request = None if asked <= SAVE else request or Stopped(asked - SAVE)
    if request is not None:
        request.saved = saved
        raise request


def _in_words(name: str) -> str:
    """The name that `Step.save` gives, in words for users."""
    kind, _, rest = name.partition(".")
    return {"optimizer": "the optimizer's moments", "loss_scale": "the loss scale", "buffer": rest}.get(kind, name)
