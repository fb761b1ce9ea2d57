"""Training of one model of a run, in its folder: resumed, retried, logged, shown; what is left of it if it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from fastar.config import Settings, TrainSettings, changes
from fastar.data.dataset import Dataset
from fastar.errors import FastarError
from fastar.experiments.session import Session
from fastar.runs import delete, remove_checkpoints, remove_if_empty
from fastar.runs.live_metrics import finite
from fastar.runs.model_files import save_checkpoint
from fastar.runtime import ranks
from fastar.runtime.seeds import derive_seed
from fastar.runtime.user_code import users_code
from fastar.training import Epoch, Good, NonFiniteLoss, Step, StepsProfile, fit, resolve_precision
from fastar.training.resume import Saved, TrainingCheckpoints

AnyStep = TypeVar("AnyStep", bound=Step)

# Times that a training whose losses are not finite goes back, where train.on_nonfinite=retry.
RETRIES = 3


@dataclass(frozen=True)
class Subject:
    """The model to be trained, by its recipe: all that determines it, its `kind` and `index` among it."""

    recipe: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """The model's kind: source, heldout, star, swag or student."""
        return str(self.recipe["kind"])

    @property
    def index(self) -> int:
        return int(self.recipe["index"])

    @property
    def name(self) -> str:
        return f"{self.kind} {self.index}" if self.kind in ("source", "heldout") else self.kind

    def entry(self, epoch: Mapping[str, Any]) -> dict[str, Any]:
        """An epoch as the log holds it."""
        return {"kind": self.kind, "model": self.name, **epoch}


@dataclass(frozen=True)
class Trained(Generic[AnyStep]):
    """A training that is over, and how often it went back."""

    step: AnyStep
    history: list[Epoch]
    retries: int


def attempt_seed(seed: int, attempt: int) -> int:
    """The seed of random draws in attempt number `attempt`; the first one's is `seed` itself."""
    return derive_seed(seed, "attempt", attempt) if attempt else seed


@contextmanager
def training(settings: Settings, name: str) -> Iterator[None]:
    """Inside, memory of a GPU that runs out while model `name` is trained is an error for users."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        elsewhere = ", or keep the sources elsewhere (sources.store=host)" if name == "star" else ""
        raise FastarError(
            f"training {name}: out of GPU memory at train.batch_size={settings.train.batch_size}; lower it or use "
            f"train.precision=bf16{elsewhere}"
        ) from error


@contextmanager
def trained(
    session: Session,
    subject: Subject,
    make: Callable[[int], AnyStep],
    *,
    seed: int,
    epochs: int | None = None,
    lr: float | None = None,
    train: TrainSettings | None = None,
    profile: StepsProfile | None = None,
    data: Dataset | None = None,
) -> Iterator[Trained[AnyStep]]:
    """Train a model, from its last checkpoint if it has one; its checkpoints go when the block ends well.

    Where a loss is not finite and `train.on_nonfinite` says retry, it goes back up to three times. Long, since what a
    training may end in stands in one place.

    Args:
        make: model, optimizer and all, anew for an attempt (its number gives the seeds of draws).
        seed: of order and augmentation.
        train: how it is trained; None: as the run's settings say.
        data: what it is trained on; None: the run's training data.

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

    def attempt(saved: Saved | None) -> Trained[AnyStep]:
        """A function of its own: what a failed attempt held is gone when the next one begins."""
        number = checkpoints.attempt
        own = attempt_seed(seed, number)
        # Torch's own generators (dropout) begin alike whatever ran before this model, and are saved with it.
        with torch.random.fork_rng([session.device] if session.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(own, "network"))
            step = make(number)
            history = fit(
                step,
                session.data.train if data is None else data,
                settings.train if train is None else train,
                name=name,
                seed=own,
                epochs=epochs,
                lr=lr,
                rate="star.lr" if subject.kind == "star" else "train.lr",
                on_epoch=lambda epoch: record(session, [(subject, epoch)]),
                checkpoints=checkpoints,
                saved=saved,
                profile=profile,
                progress=progress,
            )
        return Trained(step, history, number)

    users = users_code(f"training {name}") if session.runs_user_code else nullcontext()
    with users, training(settings, name):
        done = _with_retries(session, subject, checkpoints, attempt)
    yield done
    ranks.by_first(partial(remove_what_is_left, session, subject))


def remove_what_is_left(session: Session, subject: Subject) -> None:
    """Delete what the training of a model that is saved now left: its checkpoints, and those of failed attempts."""
    remove_checkpoints(session.run.in_training(subject.kind, subject.index))
    last_good = session.run.last_good(subject.kind, subject.index)
    if last_good.exists():
        delete(last_good)
        remove_if_empty(last_good.parent)


def _with_retries(
    session: Session,
    subject: Subject,
    checkpoints: TrainingCheckpoints,
    attempt: Callable[[Saved | None], Trained[AnyStep]],
) -> Trained[AnyStep]:
    """The attempt that succeeds: from the newest checkpoint, then from those that `checkpoints` goes back to."""
    log, progress, name = session.run.log, session.progress, subject.name
    saved = checkpoints.newest()

    def of_another() -> bool:
        """Tell whether what is saved is of no use, and is deleted."""
        useless = saved is not None and not same_recipe(session, subject, saved)
        if useless:
            remove_checkpoints(checkpoints.folder)
        return useless

    if ranks.by_first(of_another):
        saved = None
    if saved is not None:
        progress.line(f"training {name}: going on from {saved.place}")
    checkpoints.recall(saved)
    furthest: Good | None = None
    while True:
        known = {name: [subject.entry(epoch) for epoch in saved.history] if saved is not None else []}
        ranks.by_first(partial(log.repair, known))
        try:
            return attempt(saved)
        except NonFiniteLoss as error:
            good = [one for one in (furthest, error.left) if one is not None]
            furthest = max(good, key=lambda one: (one.epochs, one.steps), default=None)
            stop = error.of_data or session.settings.train.on_nonfinite == "stop"
            if stop or checkpoints.attempt >= RETRIES:
                left = partial(_what_is_left, session, subject, str(error), furthest, checkpoints.attempt)
                raise ranks.by_first(left) from error
            saved = checkpoints.go_back()
            where = saved.place if saved is not None else "the beginning"
            progress.line(f"{error}; going back to {where} with other draws")
            if ranks.is_first():
                log.append(kind="retry", model=name, attempt=checkpoints.attempt, reason=str(error), back_to=where)
            if session.metrics is not None:
                session.metrics.forget(subject.kind, subject.index, saved.epoch if saved is not None else 0)


def record(session: Session, epochs: Sequence[tuple[Subject, Epoch]]) -> None:
    """Write epochs into the log, and show them; the first rank does."""
    if not ranks.is_first():
        return
    session.run.log.extend([subject.entry(vars(epoch)) for subject, epoch in epochs])
    if session.metrics is not None:
        session.metrics.add([(one.kind, one.index, epoch.epoch + 1, live_figures(epoch)) for one, epoch in epochs])


def same_recipe(session: Session, subject: Subject, saved: Saved) -> bool:
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
        f"{subject.name} anew, or choose another run folder (out)"
    )


def difference(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """The first of some differences between two recipes, in words."""
    key, (was, now) = next(iter(changed.items()))
    if isinstance(was, list) and isinstance(now, list) and key == "sources":  # digests: which, not what
        others = [i for i in range(max(len(was), len(now))) if was[i : i + 1] != now[i : i + 1]]
        return f"{key}: {len(others)} of {max(len(was), len(now))} differ, the first is number {others[0]}"
    written = {"source": "network", "loss_source": "loss"}
    if key in written:
        return f"the source of its {written[key]}, or a value in it, has changed"
    return f"{key} was {was!r}, now {now!r}"


def _what_is_left(session: Session, subject: Subject, said: str, left: Good | None, retries: int) -> FastarError:
    """The error for users; the model as it was last known to be good is saved, never as a finished model."""
    message = f"{said}{_elsewhere(session, subject)}"
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
        return f"; as other models are finished, {what} with another run folder (out)"
    them = "it" if count == 1 else "them"
    finished, wanted = f"{count} source{'' if count == 1 else 's'}", settings.sources.number
    smaller = f", for a star of {count} instead of {wanted}" if count < wanted else ""
    are = "is" if count == 1 else "are"
    return f"; as {finished} {are} finished, {what} with another run folder (out): {others} takes {them} over{smaller}"


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
