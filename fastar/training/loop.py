"""The one training loop; what a step does is plugged in (regular or star)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastar.config import TrainSettings
from fastar.data import DeviceDataset
from fastar.errors import FastarError
from fastar.progress import SILENT, Progress
from fastar.training.parts import part
from fastar.training.schedule import learning_rate


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


def named_batches(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches; waiting for each belongs to the part `load` of a profile."""
    iterator = iter(batches)
    while True:
        with part("load"):
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

    Raises:
        FastarError: too few images for one batch.
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
    history: list[Epoch] = []
    good: dict[str, Tensor] | None = None
    good_epochs = 0
    lr_now = torch.zeros((), device=device)
    losses = torch.zeros(steps, device=device)
    with progress.task(f"training {name}", total=epochs, unit="epochs") as advance:
        for epoch in range(epochs):
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
            for i, (images, labels) in enumerate(named_batches(batches)):
                lr_now.copy_(rates[i])
                losses[i] = step(images, labels, lr_now)
                images_seen += len(labels)
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
                epoch, float(values.double().mean()), float(rates[-1]), images_seen, end - begun, begun - start
            )
            history.append(done)
            if epoch + 1 < epochs:
                state = {key: value.cpu() for key, value in step.state().items()}
                if all(bool(torch.isfinite(value).all()) for value in state.values()):
                    good, good_epochs = state, epoch + 1
            on_epoch(done)
            advance(1, note=f"loss {done.loss:.4f}")
    return history
