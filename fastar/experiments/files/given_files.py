"""Checkpoints given by their files, whoever trained them: the session of their network, and whole states of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastar.config import dataset_spec, load_settings
from fastar.errors import FastarError
from fastar.experiments.plan.preflight import check_network
from fastar.experiments.regular import check_fits, tell
from fastar.experiments.session import Session, new_session
from fastar.experiments.task import DATA_KEYS
from fastar.experiments.user_task import PYTHON, Given
from fastar.runs import RunFolder
from fastar.runs.model_files import Checkpoint, load_checkpoint, load_whole_into
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.user_code import can_be_found, check_reference, is_reference


@dataclass(frozen=True)
class Named:
    """Options that say what checkpoints are of, beyond what they say themselves.

    Args:
        model: `module:function` that builds the network; `input_shape`: of the inputs that it is traced with.
        data: `module:function` that returns the data.
        changes: settings by their dotted keys.
    """

    dataset: str | None = None
    arch: str | None = None
    model: str | None = None
    input_shape: str | None = None
    data: str | None = None
    changes: Mapping[str, object] = field(default_factory=dict)


def open_first(path: Path, named: Named, progress: Progress = SILENT, *, same_data: bool) -> tuple[Session, Checkpoint]:
    """The session of the network that a checkpoint is of, and the checkpoint as a whole state of it, on the CPU.

    Args:
        same_data: the session's data must be those that the checkpoint was trained on.

    Raises:
        FastarError: nothing says what it is, contradicting options, or a file that cannot be read or does not fit.
    """
    if named.model is None and named.input_shape is not None:
        raise FastarError("--input-shape belongs to --model; fastar's own architectures need none")
    if named.model is not None and named.arch is not None:
        raise FastarError("--model and --arch both say what network it is: leave one out")
    if named.data is not None and named.dataset is not None:
        raise FastarError("--data and --dataset both say what the data are: leave one out")
    for option, own in (("--model", named.model), ("--data", named.data)):
        if own is not None:
            check_reference(own, option)
    checkpoint = load_checkpoint(path)
    session = _session_of(checkpoint, named, progress, measured=same_data)
    return session, _whole(session, checkpoint, same_data)  # before its symmetry is derived, which is slow


def load_whole(session: Session, path: Path, *, same_data: bool) -> Checkpoint:
    """A checkpoint as a whole state of the session's network, on the CPU."""
    return _whole(session, load_checkpoint(path), same_data)


def _whole(session: Session, checkpoint: Checkpoint, same_data: bool) -> Checkpoint:
    check_fits(session, checkpoint, same_data=same_data)
    whole = load_whole_into(session.network.build(seed=0, device="cpu"), checkpoint)
    tell(whole, session.progress)
    return whole


def _session_of(first: Checkpoint, named: Named, progress: Progress, *, measured: bool) -> Session:
    """The session of a checkpoint: from its metadata, or as it is named.

    Args:
        measured: its loss and data are needed.
    """
    known, classes = dict(first.metadata), None
    for key, what, chosen, option in (
        ("arch", "network", named.model or named.arch, "--model"),
        ("dataset", "data", named.data or named.dataset or not measured, "--data"),
        ("loss", "loss", named.changes.get("loss") or not measured, "--loss"),
    ):
        if not can_be_found(str(known.get(key, ""))):
            given = known.pop(key)
            if not chosen:
                raise FastarError(
                    f"{first.path}: its {what} came from Python ({given}); say what returns it: {option} "
                    "module:function"
                )
    dataset = named.data or named.dataset or known.get("dataset")
    arch = named.model or named.arch or known.get("arch")
    for option, value in (("--dataset, or --data of your own", dataset), ("--arch, or --model of your own", arch)):
        if value is None and (arch is None or not is_reference(arch)):
            raise FastarError(f"{first.path}: does not say what it is; give {option}")
    free = ("matching.", "model.", "loss", "metrics", "seed", "workers", "device", "gpu_memory")
    for key, value in named.changes.items() if dataset is None else ():
        if not key.startswith(free):
            raise FastarError(f"{key}={value}: without data, only matching.*, seed, workers and device mean anything")
    options = {f"model.{key}": value for key, value in known.get("model", {}).items() if arch == known.get("arch")}
    if "loss" in known:
        options["loss"] = known["loss"]
    if dataset is not None and dataset == known.get("dataset"):
        options |= {f"dataset.{key}": known.get(name) for name, key in DATA_KEYS.items()}
        # Batch-norm statistics are taken in batches as in its training.
        options["train.batch_size"] = known.get("train", {}).get("batch_size")
        if dataset_spec(str(dataset)).variable_size and "input_shape" in known and "classes" in known:
            classes = known["classes"]
            options["dataset.resolution"] = known["input_shape"][1]
    given = {key: value for key, value in options.items() if value is not None}
    settings = load_settings(dataset=dataset or PYTHON, arch=arch, values={**given, **named.changes})
    example = None if named.input_shape is None else zeros(shape_of(named.input_shape))
    # The checkpoint says enough of its images where they are not needed, as in matching.
    session = new_session(
        settings, RunFolder(Path(".")), progress, classes=classes, given=Given(example=example, no_data=dataset is None)
    )
    if classes is None and settings.dataset.spec.variable_size:
        check_network(session)  # a conversion of the data may take hours: what is wrong is said before
    return session


def shape_of(text: str) -> tuple[int, ...]:
    """The shape that `2x3x32x32` says."""
    parts = text.replace(",", "x").split("x")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise FastarError(f"--input-shape {text}: write lengths joined by x, such as 2x3x32x32")
    return tuple(int(part) for part in parts)


def zeros(shape: tuple[int, ...]) -> Tensor:
    """Inputs of a shape that a network is traced with."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")
