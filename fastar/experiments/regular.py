"""The regular models of a run: sources Z and heldouts H. Trained where missing, reused where they match."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastar._version import __version__
from fastar.config import changes
from fastar.errors import FastarError
from fastar.evaluation import Measured, evaluate_rows
from fastar.evaluation.batch_norm import own_statistics
from fastar.experiments.resumable import Subject, difference, trained
from fastar.experiments.reuse import model_paths
from fastar.experiments.session import Session, measuring
from fastar.experiments.together import may_train_together, train_together
from fastar.experiments.user_task import loss_recipe, metrics_digest
from fastar.experiments.work_list import Model, train_missing
from fastar.runs import commit, read_metadata, versions
from fastar.runs.model_files import Checkpoint, load_checkpoint, load_into, save_checkpoint
from fastar.runtime import ranks
from fastar.runtime.json_files import content_digest
from fastar.runtime.progress import Progress
from fastar.runtime.seeds import derive_seed
from fastar.runtime.user_code import is_reference
from fastar.training import Epoch, RegularStep, resolve_precision

# Keys of `train` that say how, not what.
HOW = {"compile", "graph", "on_nonfinite"}
# Models that a process holds at once, each with an open file and a thread: some stacks of them.
MOST_CLAIMED = 200


def recipe(session: Session, kind: str, index: int) -> dict[str, Any]:
    """Everything that determines a regular model; one on disk is reused only if its recipe is the same."""
    settings = session.settings
    return {
        **task_recipe(session),
        "train": settings.train.model_dump(mode="json", exclude={*HOW, "precision"}),
        # Resolved: auto differs between devices, and a run must not mix what it means.
        "precision": str(resolve_precision(settings.train.precision, session.device)).removeprefix("torch."),
        "seed": settings.seed,
        "kind": kind,
        "index": index,
    }


def task_recipe(session: Session) -> dict[str, Any]:
    """What is the same in all models of a run: their network, their data and their loss."""
    network, data = session.network.architecture(), session.data.recipe()
    return {**network, **data, **loss_recipe(session.settings, session.loss)}


def task_digest(session: Session) -> str:
    """A digest of all that results depend on beside models and settings: the data, and functions of the user's."""
    if not session.runs_user_code:
        return str(session.data.recipe()["dataset_digest"])
    metrics = metrics_digest(session.settings, session.given)
    return content_digest({**task_recipe(session), "splits": session.data.digests(), "metrics": metrics})


def check_recipe(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise FastarError naming what differs, unless `found` is the recipe `wanted`."""
    if not found:
        raise FastarError(f"{path}: has no recipe in its metadata, so it cannot be reused; move it away")
    changed = changes(found, wanted)
    if changed:
        raise FastarError(
            f"{path}: is another model ({difference(changed)}); move it away or choose another run folder (out)"
        )


def check_regular(session: Session, kind: str, indices: Iterable[int]) -> None:
    """Raise FastarError where a source or heldout that is there was made otherwise."""
    for index in indices:
        path = session.run.model(kind, index)
        if path.is_file():
            check_recipe(path, read_metadata(path, own=True).get("recipe", {}), recipe(session, kind, index))


def regular_models(session: Session, kind: str, count: int) -> Iterator[Checkpoint]:
    """Sources (`kind` "source") or heldouts number 0 .. count - 1, trained where they are not there yet, here or by
    other processes. They are read one at a time, each when it is asked for.

    Raises:
        FastarError: one that is there was made otherwise, or cannot be read.
    """
    ranks.by_first(partial(check_regular, session, kind, range(count)))  # all checks before any training
    train_regulars(session, [(kind, index) for index in range(count)])
    return map(partial(load_checkpoint, own=True), [session.run.model(kind, index) for index in range(count)])


def train_regulars(session: Session, models: Sequence[Model]) -> None:
    """Train the sources and heldouts among `models` that are missing, or wait for the processes that do."""
    missing = ranks.by_first(lambda: [model for model in models if not session.run.finished(*model)])
    kinds = " and ".join(dict.fromkeys(kind for kind, _ in models))
    with session.progress.task(f"{kinds} models", total=len(missing), unit="models") as advance:
        train_missing(session, missing, lambda model: train_regular(session, *model), advance)


def train_small(session: Session, models: Sequence[Model]) -> None:
    """Train the sources and heldouts that are missing, that no other process trains, and that can be trained together;
    `train_regulars` trains others, and on several ranks all."""
    run = session.run
    for kind, indices in itertools.groupby(models, key=lambda model: model[0]):
        ranks.by_first(partial(check_regular, session, kind, [index for _, index in indices]))
    if ranks.world() > 1:
        return
    missing = [model for model in models if not run.finished(*model)]
    if not missing or not may_train_together(session, session.network.build(seed=0)):
        return
    for begin in range(0, len(missing), MOST_CLAIMED):
        with ExitStack() as claims:
            some = missing[begin : begin + MOST_CLAIMED]
            free = [model for model in some if claims.enter_context(run.claim(*model))]
            here = [planned(session, *model) for model in free if not run.finished(*model)]
            train_together(session, here, partial(finish_regular, session))


def planned(session: Session, kind: str, index: int) -> tuple[Subject, Callable[[], nn.Module], int]:
    """A regular model: its recipe, a function that builds its network, and the seed of its order and augmentation."""
    seed = derive_seed(session.settings.seed, kind, index)
    return Subject(recipe(session, kind, index)), partial(session.network.build, seed=seed), derive_seed(seed, "data")


def train_regular(session: Session, kind: str, index: int) -> None:
    """Train one regular model, from where it was left if it was, and save it into the run folder."""
    subject, build, seed = planned(session, kind, index)

    def make(attempt: int) -> RegularStep:
        return RegularStep(build(), session.train, loss=session.loss)

    with trained(session, subject, make, seed=seed) as done:
        state = done.step.state()
        done.step.release()  # the optimizer, a graph: the memory is measuring's now
        ranks.by_first(partial(finish_regular, session, subject, state, done.history, done.retries))


def finish_regular(
    session: Session, subject: Subject, state: Mapping[str, Tensor], history: list[Epoch], retries: int = 0
) -> None:
    """Measure a trained regular model, and save it into the run folder."""
    _, build, _ = planned(session, subject.kind, subject.index)
    model = build()
    load_into(model, Checkpoint(state))
    with measuring(subject.name):
        measured = measured_alone(session, model, subject.name)
    save_model(session, subject, state, measured, history, retries)


def measured_alone(session: Session, model: nn.Module, name: str) -> Mapping[str, Measured]:
    """A network's losses and accuracies on the splits, with its own batch-norm statistics."""
    own, row = own_statistics(model), session.network.row(Checkpoint(model.state_dict()))
    splits, statistics = session.data.splits(), [own] if own else None
    return evaluate_rows(
        model, session.network.layout, row[None], splits, statistics=statistics, loss=session.loss, called=[name]
    )


def save_model(
    session: Session,
    subject: Subject,
    state: Mapping[str, Tensor],
    measured: Mapping[str, Measured],
    history: Sequence[Epoch],
    retries: int,
) -> None:
    """Write a trained model into the run folder, with what it is and `measured` on the splits."""
    save_checkpoint(
        session.run.model(subject.kind, subject.index),
        state,
        {
            **recipe(session, subject.kind, subject.index),
            "recipe": dict(subject.recipe),
            "epochs": len(history),
            "retries": retries,
            "training_loss": history[-1].loss,
            **{
                f"{split}_{name}": float(m[name][0])
                for name in session.loss.measures()
                for split, m in measured.items()
            },
            "device": device_name(session.device),
            **({"ranks": ranks.started()} if ranks.started() > 1 else {}),
            "version": __version__,
            "commit": commit(),
            "versions": versions(),
        },
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def models_of(session: Session, kind: str) -> Iterator[Checkpoint]:
    """The run's models of a kind ("source" or "heldout"): those that are given, or trained where missing."""
    number, folder = session.settings.sources.of_kind(kind)
    return regular_models(session, kind, number) if folder is None else given_models(session, kind)


def given_models(session: Session, kind: str) -> Iterator[Checkpoint]:
    """The checkpoints of `sources.folder` or `sources.heldout_folder`, checked against the run; read one at a time,
    each when it is asked for.

    Raises:
        FastarError: too few of them, or one of another architecture, other data, or not finite.
    """
    model = session.network.build(seed=0)

    def given(path: Path) -> Checkpoint:
        checkpoint = load_checkpoint(path)
        check_fits(session, checkpoint)
        checkpoint = load_into(model, checkpoint)
        tell(checkpoint, session.progress)
        return checkpoint

    return map(given, model_paths(session.settings, session.run, kind))


def tell(checkpoint: Checkpoint, progress: Progress) -> None:
    """Say what was taken of another's file, where it holds more than the model's tensors under their names."""
    line = checkpoint.taken()
    if line is not None:
        progress.line(line)


def check_fits(session: Session, checkpoint: Checkpoint, *, same_data: bool = True) -> None:
    """Raise FastarError if a checkpoint says that it is of another architecture or (`same_data`) of other data.

    A user's networks and data have whatever names they were given by, so names say nothing: networks are the same whose
    tensors fit, and data whose digests are the same.
    """
    network, dataset = session.network.architecture(), session.settings.dataset
    wanted = {} if "source" in network else network
    if same_data:
        users = [is_reference(str(name)) for name in (checkpoint.metadata.get("dataset", ""), dataset.name)]
        if not any(users):
            wanted |= {"dataset": dataset.name}
        if "dataset_digest" in checkpoint.metadata and all(users) == any(users):
            wanted |= {"dataset_digest": session.data.recipe()["dataset_digest"], "validation": dataset.validation}
    kept = {"validation": checkpoint.metadata.get("validation", 0.0)}  # one that names none was trained on all images
    known = {key: value for key, value in {**checkpoint.metadata, **kept}.items() if key in wanted}
    changed = changes(known, {key: wanted[key] for key in known})
    if changed:
        key, (was, now) = next(iter(changed.items()))
        raise FastarError(f"{checkpoint.path}: does not fit this run ({key} is {was!r} there, {now!r} here)")
    if checkpoint.metadata.get("source", network.get("source")) != network.get("source"):
        session.progress.line(
            f"{checkpoint.path}: its network was written otherwise than {network['arch']} is now; be sure that it "
            "computes the same"
        )
