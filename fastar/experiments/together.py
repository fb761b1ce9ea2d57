"""Small models of a run trained together, where that gives the same bits as one after the other, and sooner."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from fastar.errors import FastarError, UserCodeError
from fastar.experiments.resumable import Subject, record, remove_what_is_left, same_recipe, training
from fastar.experiments.session import Session
from fastar.losses.side_by_side import of_network
from fastar.runtime.device import synchronize
from fastar.runtime.user_code import users_code
from fastar.training import Epoch, RegularStep, resolve_precision
from fastar.training.resume import Saved, TrainingCheckpoints
from fastar.training.stack_loop import fit_together
from fastar.training.stacked import StackedStep

# Larger networks are busy with their products alone (measured on MLPs: 1.0 to 1.2 times at 85,000 parameters).
MOST_PARAMETERS = 100_000
# Fewer models, or steps, are not worth the trial.
FEWEST_MODELS, FEWEST_STEPS = 3, 200
# Models of a stack: from here on it takes as much longer as it has more of them.
MOST_MODELS = 40
# Bytes of a stack's batches and parameters.
MOST_BYTES = 256 << 20
# Models of a stack, and steps, that are done alone too.
TRIED_MODELS, TRIED_STEPS = 3, 3


Finish = Callable[[Subject, dict[str, Tensor], list[Epoch]], None]
"""Measures and saves a model, of its state and its records."""


@dataclass(frozen=True, eq=False)
class Planned:
    """A model that is to be trained.

    Args:
        build: makes its network.
        seed: of its order and augmentation.
        checkpoints: of its training.
        saved: what it goes on from.
    """

    subject: Subject
    build: Callable[[], nn.Module]
    seed: int
    checkpoints: TrainingCheckpoints
    saved: Saved | None

    @property
    def place(self) -> tuple[int, int]:
        """Epochs and steps of the next one that are done."""
        return (0, 0) if self.saved is None else (self.saved.epoch, self.saved.step)


def train_together(
    session: Session,
    models: Sequence[tuple[Subject, Callable[[], nn.Module], int]],
    finish: Finish,
    *,
    clock: Callable[[], float] = time.process_time,
) -> None:
    """Train those of some models that can be trained together.

    The others are left, to be trained alone, which gives the same bits: too few, too large, of layers that
    `torch.func.vmap` does not take or rounds otherwise, with draws (dropout), or no longer finite.

    Args:
        models: (what it is, what builds it, the seed of its data) of each.
        finish: is given each one's state and records at the end of its training, to measure and save it.
        clock: seconds, by which the trial judges.
    """
    if len(models) < FEWEST_MODELS or not may_train_together(session, models[0][1]()):
        return
    planned = [one for model in models if (one := _plan(session, *model)) is not None]
    for place in sorted({one.place for one in planned}):
        here = [one for one in planned if one.place == place]
        for group in _parts(here, _most_models(session, here[0].build())):
            _train_group(session, group, finish, clock)


def may_train_together(session: Session, model: nn.Module) -> bool:
    """Tell whether the settings, the data and the size of the network allow it."""
    settings, data = session.train, session.data.train
    parameters, device = list(model.parameters()), session.device
    names = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    return (
        not (settings.compile or settings.graph or settings.resolutions)
        and settings.gradient_clip is None
        and resolve_precision(settings.precision, device) == torch.float32
        and data.in_memory
        and data.batch_count(settings.batch_size, settings.drop_last) * settings.epochs >= FEWEST_STEPS
        and sum(one.numel() for one in parameters) <= MOST_PARAMETERS
        and all(one.requires_grad and one.dtype == torch.float32 for one in parameters)
        and set(model.state_dict()) <= names
        # On a CPU those of several networks are no one product.
        and not (device.type == "cpu" and any(isinstance(one, _ConvNd) for one in model.modules()))
    )


def _plan(session: Session, subject: Subject, build: Callable[[], nn.Module], seed: int) -> Planned | None:
    """The model with what it goes on from; None: it has gone back, or has a checkpoint of another recipe, or of another
    version of fastar, which its training alone refuses."""
    folder = session.run.in_training(subject.kind, subject.index)
    say = session.progress.line
    checkpoints = TrainingCheckpoints(folder, subject.recipe, session.settings.checkpoint, say=say)
    try:
        saved = checkpoints.newest()
        if saved is not None and not same_recipe(session, subject, saved):
            return None
    except FastarError:
        return None
    checkpoints.recall(saved)
    return None if checkpoints.attempt else Planned(subject, build, seed, checkpoints, saved)


def _most_models(session: Session, model: nn.Module) -> int:
    inputs, _ = next(iter(session.data.train.sequential(session.train.batch_size)))
    batch = sum(one.nbytes for one in tree_leaves(inputs) if isinstance(one, Tensor))
    own = 4 * sum(one.numel() for one in model.parameters())
    return min(MOST_MODELS, MOST_BYTES // (4 * batch + 8 * own))


def _parts(models: Sequence[Planned], most: int) -> Iterator[Sequence[Planned]]:
    """The models in as few groups as can be, of about one size, each of `FEWEST_MODELS` or more."""
    if most < FEWEST_MODELS:
        return
    groups = -(-len(models) // most)
    for number in range(groups):
        group = models[number::groups]
        if len(group) >= FEWEST_MODELS:
            yield group


def _train_group(session: Session, group: Sequence[Planned], finish: Finish, clock: Callable[[], float]) -> None:
    """Train these models together, if a trial says so."""
    generators = [session.device] if session.device.type == "cuda" else []
    with torch.random.fork_rng(generators), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap's own, of what it does slowly
        try:
            way = _best_way(session, group, clock)
        except Exception:  # noqa: BLE001  # of users' layers, or of vmap's rules for them: alone they are asked again
            way = None
    if way is None:
        return
    settings, run = session.train, session.run
    names = [one.subject.name for one in group]
    what = f"{names[0]} and {len(group) - 1} others together"
    begun = {one: [] if one.saved is None else one.saved.history for one in group}
    run.log.repair({one.subject.name: [one.subject.entry(epoch) for epoch in begun[one]] for one in group})
    if group[0].saved is not None:
        session.progress.line(f"training {what}: going on from {group[0].saved.place}")
    users = users_code(f"training {what}") if session.runs_user_code else nullcontext()
    try:
        with users, training(session.settings, what), torch.random.fork_rng(generators):
            step = StackedStep([one.build() for one in group], settings, loss=session.loss, way=way)
            histories = fit_together(
                step,
                session.data.train,
                settings,
                names=names,
                seeds=[one.seed for one in group],
                checkpoints=[one.checkpoints for one in group],
                saved=[one.saved for one in group],
                on_epoch=lambda epochs: record(session, [(group[k].subject, one) for k, one in epochs.items()]),
                progress=session.progress,
            )
    except UserCodeError as why:  # such as a branch on values that is reached later
        session.progress.line(f"{why}; each goes on alone")
        for one in group:
            _forget(session, one.subject)
        return
    refused: list[FastarError] = []
    with session.progress.task("models trained together", total=len(group), unit="models") as advance:
        for k, (one, history) in enumerate(zip(group, histories, strict=True)):
            if history is None:
                _forget(session, one.subject)
                continue
            try:
                finish(one.subject, step.of(k).state(), history)
            except FastarError as error:  # such as a loss on the test data that is not finite: the others are good
                refused.append(error)
                continue
            remove_what_is_left(session, one.subject)
            advance(1)
    if refused:
        raise refused[0]


def _forget(session: Session, subject: Subject) -> None:
    """Take back a model's live metrics: its training alone shows them again."""
    if session.metrics is not None:
        session.metrics.forget(subject.kind, subject.index, session.settings.train.epochs)


def _best_way(session: Session, group: Sequence[Planned], clock: Callable[[], float]) -> int | None:
    """The way to take the losses in which steps of a stack of these models give the bits that they give alone; None:
    there is none, or one after the other is as fast.

    Some steps are tried, of full batches and of an epoch's last, in the stack and of some of its models alone.
    """
    settings, device = session.train, session.device
    batches = list(_tried(session, group))
    lr = torch.tensor(settings.lr, device=device, dtype=torch.float32)

    def tried(step: Callable[..., Tensor], k: int | None = None) -> tuple[float, Tensor]:
        """The least seconds of a step, and the losses of all [steps, ...]."""
        took, losses = [], []
        for inputs, targets in batches:
            given = (inputs, targets) if k is None else (of_network(inputs, k), of_network(targets, k))
            synchronize(device)
            begin = clock()
            losses.append(step(*given, lr))
            synchronize(device)
            took.append(clock() - begin)
        return min(took), torch.stack(losses)

    chosen = sorted({round(i * (len(group) - 1) / (TRIED_MODELS - 1)) for i in range(TRIED_MODELS)})
    alone = {k: RegularStep(group[k].build(), settings, loss=session.loss) for k in chosen}
    found = {k: tried(step, k) for k, step in alone.items()}
    seconds = min(took for took, _ in found.values()) * len(group)
    way, ways = 0, 1
    while way < ways:
        stack = StackedStep([one.build() for one in group], settings, loss=session.loss, way=way)
        took, losses = tried(stack)
        pairs = [
            ({"loss": found[k][1], **alone[k].save()}, {"loss": losses[:, k], **stack.of(k).save()}) for k in alone
        ]
        if all(torch.equal(value, other[name]) for one, other in pairs for name, value in one.items()):
            return way if took < seconds else None
        way, ways = way + 1, stack.ways
    return None


def _tried(session: Session, group: Sequence[Planned]) -> Iterator[tuple[Any, Any]]:
    """Batches [K, ...] of the first epoch: some from its beginning, and its last."""
    settings, data = session.train, session.data.train
    size, seeds = settings.batch_size, [one.seed for one in group]
    last = data.batch_count(size, settings.drop_last) - 1
    yield from islice(data.side_by_side(size, seeds=seeds, epoch=0, drop_last=settings.drop_last), TRIED_STEPS)
    yield from data.side_by_side(size, seeds=seeds, epoch=0, drop_last=settings.drop_last, begin=last)
