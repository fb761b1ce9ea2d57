"""Training one model of a run so that nothing is lost: resumed, retried, logged, shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fastar.config import changes
from fastar.errors import FastarError
from fastar.experiments.session import Session
from fastar.runs import delete, remove_if_empty
from fastar.runs.live_metrics import finite
from fastar.runs.model_files import save_checkpoint
from fastar.runtime.seeds import derive_seed
from fastar.training import Epoch, Good, NonFiniteLoss, Step, StepsProfile, fit, resolve_precision
from fastar.training.resume import Resumable, Saved, TrainingCheckpoints

# How often a training whose losses are not finite goes back, where train.on_nonfinite=retry.
RETRIES = 3


@dataclass(frozen=True)
class Prepared:
    """A training that is about to begin."""

    step: Step
    parts: Mapping[str, Resumable] = field(default_factory=dict)
    """What else is saved with it."""
    figures: Callable[[], dict[str, float]] = dict
    """What an epoch began with."""


@dataclass(frozen=True)
class Trained:
    """A training that is over."""

    prepared: Prepared
    history: list[Epoch]
    retries: int
    """How often it went back because of losses that were not finite."""


@dataclass(frozen=True)
class Subject:
    """The model to be trained.

    Args:
        kind: source, heldout or star.
        index: its number.
        recipe: all that determines it.
    """

    kind: str
    index: int
    recipe: Mapping[str, Any]

    @property
    def name(self) -> str:
        return "star" if self.kind == "star" else f"{self.kind} {self.index}"


def attempt_seed(seed: int, attempt: int) -> int:
    """The seed of random draws in attempt number `attempt`; the first one's is `seed` itself."""
    return derive_seed(seed, "attempt", attempt) if attempt else seed


@contextmanager
def trained(
    context: Session,
    subject: Subject,
    make: Callable[[int], Prepared],
    *,
    seed: int,
    epochs: int | None = None,
    lr: float | None = None,
    profile: StepsProfile | None = None,
) -> Iterator[Trained]:
    """Train a model, from its last checkpoint if it has one; its checkpoints go when the block ends well.

    Args:
        make: model, optimizer and all, anew for an attempt (its number gives the seeds of draws).
        seed: of order and augmentation.

    Raises:
        FastarError: a loss that is not finite (what was left is saved and named), no memory left, a full disk, or a
            checkpoint of another recipe.
        Stopped: on request, when all is saved.
    """
    run = context.run
    checkpoints = TrainingCheckpoints(
        run.in_training(subject.kind, subject.index),
        subject.recipe,
        context.settings.checkpoint,
        say=context.progress.line,
    )
    saved = checkpoints.newest()
    if saved is not None and not _same_recipe(context, subject, saved):
        checkpoints.remove()
        saved = None
    if saved is not None:
        context.progress.line(f"training {subject.name}: going on from {_place(saved)}")
    checkpoints.recall(saved)
    furthest: Good | None = None  # whatever the last attempt comes to
    while True:
        try:
            prepared, history = _attempt(context, subject, make, checkpoints, saved, seed, epochs, lr, profile)
            break
        except NonFiniteLoss as error:
            furthest = max((one for one in (furthest, error.left) if one is not None), key=_progress, default=None)
            if context.settings.train.on_nonfinite == "stop" or checkpoints.attempt >= RETRIES:
                raise _what_is_left(context, subject, error, furthest, checkpoints) from error
            checkpoints.parts = {}  # which hold the sources: the next attempt needs the memory
            checkpoints.attempt += 1
            checkpoints.remember()  # first: a kill from here on must not bring the same draws again
            saved = checkpoints.newest()
            if saved is not None and saved.path.name == checkpoints.back_to:  # it was no better from there
                checkpoints.drop(saved.path)
                saved = checkpoints.newest()
            checkpoints.back_to = saved.path.name if saved is not None else None
            checkpoints.remember()
            where = _place(saved) if saved is not None else "the beginning"
            context.progress.line(f"{error}; going back to {where} with other draws")
            run.log.append(
                kind="retry", model=subject.name, attempt=checkpoints.attempt, reason=str(error), back_to=where
            )
            if context.metrics is not None:
                context.metrics.forget(subject.kind, subject.index, saved.epoch if saved is not None else 0)
    yield Trained(prepared, history, checkpoints.attempt)
    checkpoints.remove()
    last_good = run.last_good(subject.kind, subject.index)
    if last_good.exists():
        delete(last_good)
        remove_if_empty(last_good.parent)


def _attempt(
    context: Session,
    subject: Subject,
    make: Callable[[int], Prepared],
    checkpoints: TrainingCheckpoints,
    saved: Saved | None,
    seed: int,
    epochs: int | None,
    lr: float | None,
    profile: StepsProfile | None,
) -> tuple[Prepared, list[Epoch]]:
    run, name = context.run, subject.name

    def entry(epoch: Mapping[str, Any]) -> dict[str, Any]:
        return {"kind": subject.kind, "model": name, **epoch}

    def on_epoch(epoch: Epoch) -> None:
        run.log.append(**entry(vars(epoch)))
        if context.metrics is not None:
            context.metrics.add(subject.kind, subject.index, epoch.epoch + 1, live_figures(epoch))

    run.log.repair(name, [entry(epoch) for epoch in saved.history] if saved is not None else [])
    attempt = checkpoints.attempt
    cuda = [context.device] if context.device.type == "cuda" else []
    # Torch's own generators (dropout) begin alike whatever ran before this model, and are saved with it.
    with torch.random.fork_rng(cuda):
        torch.manual_seed(derive_seed(attempt_seed(seed, attempt), "network"))
        try:
            prepared = make(attempt)
            checkpoints.parts = prepared.parts
            history = fit(
                prepared.step,
                context.data.train,
                context.settings.train,
                name=name,
                seed=attempt_seed(seed, attempt),
                epochs=epochs,
                lr=lr,
                rate="star.lr" if subject.kind == "star" else "train.lr",
                on_epoch=on_epoch,
                figures=prepared.figures,
                checkpoints=checkpoints,
                saved=saved,
                profile=profile,
                progress=context.progress,
            )
        except torch.OutOfMemoryError as error:
            elsewhere = ", or keep the sources elsewhere (sources.store=host)" if subject.kind == "star" else ""
            raise FastarError(
                f"training {name}: out of GPU memory at train.batch_size={context.settings.train.batch_size}; lower "
                f"it or use train.precision=bf16{elsewhere}"
            ) from error
    return prepared, history


def _progress(good: Good) -> tuple[int, int]:
    return good.epochs, good.steps


def _place(saved: Saved) -> str:
    """What a training goes on with, for users."""
    return f"epoch {saved.epoch + 1}" + (f", step {saved.step + 1}" if saved.step else "")


def _same_recipe(context: Session, subject: Subject, saved: Saved) -> bool:
    """Whether training may go on from `saved`; False: it ended in losses that were not finite, and another recipe is
    tried now.

    Raises:
        FastarError: another recipe, though nothing was wrong.
    """
    changed = changes(saved.recipe, subject.recipe)
    if not changed:
        return True
    if context.run.failed(saved.path):
        return False
    raise FastarError(
        f"{saved.path.parent}: is the training of another model ({difference(changed)}); delete it to begin "
        f"{subject.name} anew, or choose --out"
    )


def difference(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """The first of some differences between two recipes, in words."""
    key, (was, now) = next(iter(changed.items()))
    if isinstance(was, list) and isinstance(now, list) and key == "sources":  # digests: which, not what
        others = [i for i in range(max(len(was), len(now))) if was[i : i + 1] != now[i : i + 1]]
        return f"{key}: {len(others)} of {max(len(was), len(now))} differ, the first is number {others[0]}"
    return f"{key} was {was!r}, now {now!r}"


def _what_is_left(
    context: Session, subject: Subject, error: NonFiniteLoss, left: Good | None, checkpoints: TrainingCheckpoints
) -> FastarError:
    """Save the model as it was last known to be good: the file is never taken for a finished model."""
    message = f"{error}{_elsewhere(context, subject)}"
    again = f", after going back {checkpoints.attempt} times" if checkpoints.attempt else ""
    if left is None:
        return FastarError(f"{message} (no epoch of it was whole, so nothing of it is saved{again})")
    path = context.run.last_good(subject.kind, subject.index)
    save_checkpoint(path, left.state, {**subject.recipe, "epochs": left.epochs, "steps": left.steps})
    return FastarError(f"{message} (the model after {left.after()} is in {path}{again})")


def _elsewhere(context: Session, subject: Subject) -> str:
    """Why other settings of training need another folder, if they do: the models that are finished have these."""
    run, settings = context.run, context.settings
    if not (run.finished("source", 0) or run.finished("heldout", 0)):
        return ""
    what = "do so"
    if subject.kind == "star":
        if resolve_precision(settings.train.precision, context.device) == torch.float32:
            return ""  # its rate is its own
        what = "change train settings"
    count, others = run.sources_to_take_over()
    if not count:
        return f"; as other models are finished, {what} with another --out"
    them = "it" if count == 1 else "them"
    finished, wanted = f"{count} source{'' if count == 1 else 's'}", settings.sources.number
    smaller = f", for a star of {count} instead of {wanted}" if count < wanted else ""
    are = "is" if count == 1 else "are"
    return f"; as {finished} {are} finished, {what} with another --out: {others} takes {them} over{smaller}"


def live_figures(epoch: Epoch) -> dict[str, float]:
    """What is shown of an epoch while a run goes on."""
    matching = {"matching_seconds": epoch.begin_seconds} if epoch.figures else {}
    found = {
        "loss": epoch.loss,
        "lr": epoch.lr,
        "images_per_second": epoch.images_per_second,
        "load_share": epoch.load_share,
        **matching,
        **epoch.figures,
        "peak_megabytes": epoch.peak_bytes / 1e6,
    }
    return finite(found.items())
