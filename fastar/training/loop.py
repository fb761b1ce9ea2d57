"""The one training loop; what a step does is plugged in (regular or star)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fastar.config import TrainSettings
from fastar.data import DeviceDataset
from fastar.errors import FastarError
from fastar.memory import peak_bytes
from fastar.parts import EpochClock
from fastar.progress import SILENT, Progress
from fastar.training.profiling import StepsProfile
from fastar.training.schedule import learning_rate

# Images are loaded beside the steps: that steps wait, beyond what handing over costs, means that loading is slower.
LOADER_LIMITED = 0.1


class Step(Protocol):
    """One kind of training step over flat parameters."""

    def begin_epoch(self, epoch: int, steps: int) -> None:
        """Prepare epoch number `epoch` (from 0) of `steps` steps, such as matching the sources."""
        ...

    def __call__(self, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        """Do one step at learning rate `lr` (0-d, on the device); the loss, 0-d, without synchronising."""
        ...

    def describe(self, step: int) -> str:
        """What step number `step` of the current epoch was drawn as, for error messages."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The model's state dict as trained so far. Copies."""
        ...


class NonFiniteLoss(FastarError):
    """Training became NaN or infinite.

    `state` is the model's state dict (on the CPU) after `epochs` epochs, the last that left it finite; None: none did.
    """

    def __init__(self, message: str, state: dict[str, Tensor] | None, epochs: int):
        super().__init__(message)
        self.state = state
        self.epochs = epochs


@dataclass(frozen=True)
class Epoch:
    """What is known of one epoch after it."""

    epoch: int
    loss: float
    lr: float
    images: int
    seconds: float
    """Of the steps alone."""
    begin_seconds: float
    """Of `Step.begin_epoch`: matching."""
    parts: dict[str, float] = field(default_factory=dict)
    """What `seconds` went into: load, interpolate, forward, backward, update, other."""
    peak_bytes: int = 0
    """The most memory taken until then: of a GPU by tensors, or by this process on a host."""

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def load_share(self) -> float:
        """The share of the steps' time in which they waited for images."""
        return self.parts.get("load", 0.0) / self.seconds

    def note(self) -> str:
        """The epoch in a few words, for progress: loss, speed, and what limits it."""
        limit = "loader-limited" if self.load_share > LOADER_LIMITED else "compute-limited"
        return f"loss {self.loss:.4f}, {self.images_per_second:,.0f} images/s, {limit} (load {self.load_share:.0%})"


def timed_batches(batches: Iterable[tuple[Tensor, Tensor]], clock: EpochClock) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches; the wait for each is counted."""
    iterator = iter(batches)
    while True:
        with clock.load():
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fit(
    step: Step,
    data: DeviceDataset,
    settings: TrainSettings,
    *,
    name: str,
    seed: int,
    epochs: int | None = None,
    lr: float | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    profile: StepsProfile | None = None,
    progress: Progress = SILENT,
) -> list[Epoch]:
    """Train: `epochs` passes over `data` in batches, the learning rate set before each step.

    The host waits for the device once an epoch, when the losses are read.

    Args:
        step: what to do with a batch.
        data: training images.
        settings: batch size, schedule and so on.
        name: of the model, for progress and errors.
        seed: of order and augmentation.
        epochs: None for `settings.epochs`.
        lr: None for `settings.lr`.
        on_epoch: told each epoch's figures.
        profile: looks at some steps.

    Raises:
        FastarError: too few images for one batch, or too few steps to be profiled.
        NonFiniteLoss: a loss that is not finite (model, epoch and step are named).
    """
    epochs = epochs or settings.epochs
    base = lr or settings.lr
    device = data.images.device
    steps = data.batch_count(settings.batch_size, settings.drop_last)
    if steps == 0:
        raise FastarError(
            f"train.batch_size={settings.batch_size} is more than the {len(data)} training images; "
            "lower it or set train.drop_last=false"
        )
    if profile is not None:
        profile.check(epochs, steps)
    history: list[Epoch] = []
    good: dict[str, Tensor] | None = None
    good_epochs = 0
    lr_now = torch.zeros((), device=device)
    losses = torch.zeros(steps, device=device)
    with (
        progress.task(f"training {name}", total=epochs, unit="epochs") as advance,
        closing(profile) if profile is not None else nullcontext(),
    ):
        for epoch in range(epochs):
            if profile is not None:
                profile.epoch_begins(epoch, epochs)
            clock = EpochClock(device, steps)
            start = time.perf_counter()
            step.begin_epoch(epoch, steps)
            synchronize(device)
            begun = time.perf_counter()
            images_seen = 0
            rates = torch.tensor(
                [learning_rate(settings, epoch * steps + i, steps, epochs, base) for i in range(steps)]
            ).to(device)
            batches = data.batches(
                settings.batch_size, seed=seed, epoch=epoch, augment=True, drop_last=settings.drop_last
            )
            for i, (images, labels) in enumerate(timed_batches(batches, clock)):
                with clock.step(i):
                    lr_now.copy_(rates[i])
                    losses[i] = step(images, labels, lr_now)
                images_seen += len(labels)
                if profile is not None:
                    profile.step_done()
            values = losses.cpu()  # the epoch's one synchronisation
            end = time.perf_counter()
            if not torch.isfinite(values).all():
                bad = int((~torch.isfinite(values)).nonzero()[0])
                raise NonFiniteLoss(
                    f"training {name}: loss not finite at epoch {epoch + 1}, step {bad + 1}{step.describe(bad)}; "
                    "lower train.lr or use train.precision=fp32",
                    good,
                    good_epochs,
                )
            done = Epoch(
                epoch,
                float(values.double().mean()),
                float(rates[-1]),
                images_seen,
                end - begun,
                begun - start,
                clock.seconds(end - begun),
                peak_bytes(device),
            )
            history.append(done)
            if epoch + 1 < epochs:
                state = {key: value.cpu() for key, value in step.state().items()}
                if all(bool(torch.isfinite(value).all()) for value in state.values()):
                    good, good_epochs = state, epoch + 1
            on_epoch(done)
            advance(1, note=done.note())
    return history
