"""Records of epochs: whole, unfinished, and of the last good state of a training that failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fastar.config import TrainSettings
from fastar.errors import FastarError

# Images are loaded beside the steps: that steps wait, beyond what handing over costs, means that loading is slower.
LOADER_LIMITED = 0.1


def limited(load_share: float) -> str:
    """The limit of steps that wait for images in this share of their time, in a word."""
    return "loader-limited" if load_share > LOADER_LIMITED else "compute-limited"


def check_batch(settings: TrainSettings, samples: int) -> None:
    """Raise FastarError unless so many training samples make a batch."""
    if settings.drop_last and settings.batch_size > samples:
        raise FastarError(
            f"train.batch_size={settings.batch_size} is more than the {samples} training samples; "
            "lower it or set train.drop_last=false"
        )


@dataclass(frozen=True)
class Good:
    """A model's state dict after `epochs` whole epochs and `steps` steps of the next one, all of it finite."""

    state: dict[str, Tensor] = field(repr=False)
    epochs: int
    steps: int

    def after(self) -> str:
        """The length of its training, in words.

        >>> Good({}, 2, 0).after(), Good({}, 2, 1).after(), Good({}, 0, 3).after()
        ('epoch 2', 'epoch 2 and 1 step of the next', '3 steps of the first epoch')
        """
        if not self.steps:
            return f"epoch {self.epochs}"
        steps = f"{self.steps} step{'s' if self.steps > 1 else ''} of the"
        return f"epoch {self.epochs} and {steps} next" if self.epochs else f"{steps} first epoch"


class NonFiniteLoss(FastarError):
    """A training that became NaN or infinite.

    `left` is the model as it was last known to be good, on the CPU; None: not since it began. `of_data`: its batch
    holds such numbers, so that another attempt would end alike.
    """

    def __init__(self, message: str, left: Good | None, *, of_data: bool = False):
        super().__init__(message)
        self.left, self.of_data = left, of_data


@dataclass(frozen=True)
class Epoch:
    """Record of a whole epoch.

    Args:
        loss: mean over its images, each as its step saw it.
        lr: learning rate of its last step.
        images: number of them.
        seconds: of the steps alone.
        begin_seconds: of `Step.begin_epoch`: matching.
        parts: seconds by part of the steps: load (waiting for images), augment (what the device does to them: upload,
            augmentation, normalisation), interpolate, forward, backward, ranks (the sum over them, and the wait for the
            slowest), update, other.
        peak_bytes: the most memory taken until then: of a GPU by tensors, or by this process on a host.
        figures: metrics of its begin: the matching's objective and the share of units that moved.
    """

    epoch: int
    loss: float
    lr: float
    images: int
    seconds: float
    begin_seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def load_share(self) -> float:
        """The share of the steps' time in which they waited for images."""
        return self.parts.get("load", 0.0) / self.seconds

    def note(self) -> str:
        """The epoch in a few words, for progress: loss, speed, and what limits it."""
        limit = f"{limited(self.load_share)} (load {self.load_share:.0%})"
        return f"loss {self.loss:.4f}, {self.images_per_second:,.0f} samples/s, {limit}"


@dataclass
class SoFar:
    """Record of an epoch that is not whole yet; fields as of `Epoch`."""

    images: int = 0
    seconds: float = 0.0
    begin_seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def then(self, seconds: float, parts: Mapping[str, float]) -> SoFar:
        """This and some more steps."""
        both = {name: self.parts.get(name, 0.0) + parts.get(name, 0.0) for name in {**self.parts, **parts}}
        return replace(self, seconds=self.seconds + seconds, parts=both)
