"""Training that goes back to an earlier state, with other draws, where it became NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastar.config import TrainSettings
from fastar.data import Dataset
from fastar.runtime.seeds import derive_seed
from fastar.training.epochs import Epoch, Good, NonFiniteLoss
from fastar.training.loop import fit
from fastar.training.resume import Resumable, Saved, TrainingCheckpoints
from fastar.training.steps import Step

# How often a training whose losses are not finite goes back, where train.on_nonfinite=retry.
RETRIES = 3


@dataclass(frozen=True)
class Prepared:
    """A training that is about to begin: its step, what else is saved with it, and the metrics of an epoch's begin."""

    step: Step
    parts: Mapping[str, Resumable] = field(default_factory=dict)
    figures: Callable[[], dict[str, float]] = dict


@dataclass(frozen=True)
class Trained:
    """A training that is over, and how often it went back."""

    prepared: Prepared
    history: list[Epoch]
    retries: int


def attempt_seed(seed: int, attempt: int) -> int:
    """The seed of random draws in attempt number `attempt`; the first one's is `seed` itself."""
    return derive_seed(seed, "attempt", attempt) if attempt else seed


def fit_with_retries(
    make: Callable[[int], Prepared],
    data: Dataset,
    settings: TrainSettings,
    checkpoints: TrainingCheckpoints,
    *,
    name: str,
    seed: int,
    saved: Saved | None = None,
    begin: Callable[[Saved | None], None] = lambda saved: None,
    went_back: Callable[[NonFiniteLoss, Saved | None], None] = lambda error, saved: None,
    **more: Any,
) -> Trained:
    """Train as `fit`, going back up to three times where a loss is not finite and `on_nonfinite` says retry.

    Args:
        make: model, optimizer and all, anew for an attempt (its number gives the seeds of draws).
        data: training images.
        settings: the recipe.
        checkpoints: where the training is saved, and which attempt it is in.
        name: of the model.
        seed: of order and augmentation.
        saved: what to go on from.
        begin: called before each attempt with what it goes on from; None: from the beginning.
        went_back: called with the error of an attempt, and what the next one goes on from.
        more: as of `fit`.

    Raises:
        NonFiniteLoss: the last attempt's; `left` is the furthest good state of all attempts.
    """

    def attempt() -> Trained:  # a function of its own: what a failed one held is gone when the next one begins
        number = checkpoints.attempt
        own = attempt_seed(seed, number)
        # Torch's own generators (dropout) begin alike whatever ran before this model, and are saved with it.
        with torch.random.fork_rng([data.device] if data.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(own, "network"))
            prepared = make(number)
            checkpoints.parts = prepared.parts
            kept: dict[str, Any] = {"figures": prepared.figures, "checkpoints": checkpoints, "saved": saved}
            history = fit(prepared.step, data, settings, name=name, seed=own, **kept, **more)
        return Trained(prepared, history, number)

    checkpoints.recall(saved)
    furthest: Good | None = None
    while True:
        begin(saved)
        try:
            return attempt()
        except NonFiniteLoss as error:
            good = [one for one in (furthest, error.left) if one is not None]
            furthest = max(good, key=lambda one: (one.epochs, one.steps), default=None)
            if settings.on_nonfinite == "stop" or checkpoints.attempt >= RETRIES:
                raise NonFiniteLoss(str(error), furthest) from error
            saved = checkpoints.go_back()
            went_back(error, saved)
