"""Training of one model of a run, in its folder: resumed, retried, logged, shown; what is left of it if it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastar.config import changes
from fastar.errors import FastarError
from fastar.experiments.session import Session
from fastar.runs import delete, remove_if_empty
from fastar.runs.live_metrics import finite
from fastar.runs.model_files import save_checkpoint
from fastar.training import Epoch, NonFiniteLoss, StepsProfile, resolve_precision
from fastar.training.resume import Saved, TrainingCheckpoints
from fastar.training.retries import Prepared, Trained, fit_with_retries


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


@contextmanager
def trained(
    session: Session,
    subject: Subject,
    make: Callable[[int], Prepared],
    *,
    seed: int,
    epochs: int | None = None,
    lr: float | None = None,
    profile: StepsProfile | None = None,
) -> Iterator[Trained]:
    """Train a model, from its last checkpoint if it has one; its checkpoints go when the block ends well. As long as it
    is since callbacks of the training and the block around it share the checkpoints.

    Args:
        make: model, optimizer and all, anew for an attempt (its number gives the seeds of draws).
        seed: of order and augmentation.

    Raises:
        FastarError: a loss that is not finite (what was left is saved and named), no memory left, a full disk, or a
            checkpoint of another recipe.
        Stopped: on request, when all is saved.
    """
    run, settings, progress = session.run, session.settings, session.progress
    name = subject.name
    checkpoints = TrainingCheckpoints(
        run.in_training(subject.kind, subject.index), subject.recipe, settings.checkpoint, say=progress.line
    )
    newest = checkpoints.newest()
    if newest is not None and not _same_recipe(session, subject, newest):
        checkpoints.remove()
        newest = None
    if newest is not None:
        progress.line(f"training {name}: going on from {newest.place}")

    def entry(epoch: Mapping[str, Any]) -> dict[str, Any]:
        return {"kind": subject.kind, "model": name, **epoch}

    def begin(saved: Saved | None) -> None:
        run.log.repair(name, [entry(epoch) for epoch in saved.history] if saved is not None else [])

    def on_epoch(epoch: Epoch) -> None:
        run.log.append(**entry(vars(epoch)))
        if session.metrics is not None:
            session.metrics.add(subject.kind, subject.index, epoch.epoch + 1, live_figures(epoch))

    def went_back(error: NonFiniteLoss, saved: Saved | None) -> None:
        where = saved.place if saved is not None else "the beginning"
        progress.line(f"{error}; going back to {where} with other draws")
        run.log.append(kind="retry", model=name, attempt=checkpoints.attempt, reason=str(error), back_to=where)
        if session.metrics is not None:
            session.metrics.forget(subject.kind, subject.index, saved.epoch if saved is not None else 0)

    try:
        done = fit_with_retries(
            make,
            session.data.train,
            settings.train,
            checkpoints,
            name=name,
            seed=seed,
            saved=newest,
            begin=begin,
            went_back=went_back,
            epochs=epochs,
            lr=lr,
            rate="star.lr" if subject.kind == "star" else "train.lr",
            on_epoch=on_epoch,
            profile=profile,
            progress=progress,
        )
    except NonFiniteLoss as error:
        raise _what_is_left(session, subject, error, checkpoints.attempt) from error
    except torch.OutOfMemoryError as error:
        elsewhere = ", or keep the sources elsewhere (sources.store=host)" if subject.kind == "star" else ""
        raise FastarError(
            f"training {name}: out of GPU memory at train.batch_size={settings.train.batch_size}; lower it or use "
            f"train.precision=bf16{elsewhere}"
        ) from error
    yield done
    checkpoints.remove()
    last_good = run.last_good(subject.kind, subject.index)
    if last_good.exists():
        delete(last_good)
        remove_if_empty(last_good.parent)


def _same_recipe(session: Session, subject: Subject, saved: Saved) -> bool:
    """True where training may go on from `saved`; False where it ended in losses that were not finite, and another
    recipe is tried now.

    Raises:
        FastarError: another recipe, though nothing was wrong.
    """
    changed = changes(saved.recipe, subject.recipe)
    if not changed:
        return True
    if session.run.failed(saved.path):
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


def _what_is_left(session: Session, subject: Subject, error: NonFiniteLoss, retries: int) -> FastarError:
    """The error for users; the model as it was last known to be good is saved, never as a finished model."""
    message, left = f"{error}{_elsewhere(session, subject)}", error.left
    again = f", after going back {retries} times" if retries else ""
    if left is None:
        return FastarError(f"{message} (no epoch of it was whole, so nothing of it is saved{again})")
    path = session.run.last_good(subject.kind, subject.index)
    save_checkpoint(path, left.state, {**subject.recipe, "epochs": left.epochs, "steps": left.steps})
    return FastarError(f"{message} (the model after {left.after()} is in {path}{again})")


def _elsewhere(session: Session, subject: Subject) -> str:
    """Advice, where other settings of training need another folder: the models that are finished have these."""
    run, settings = session.run, session.settings
    if not (run.finished("source", 0) or run.finished("heldout", 0)):
        return ""
    what = "do so"
    if subject.kind == "star":
        if resolve_precision(settings.train.precision, session.device) == torch.float32:
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
    """Metrics of an epoch that are shown while a run goes on."""
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
