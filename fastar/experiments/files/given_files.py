"""Checkpoints given by their files, whoever trained them: the session of their network, and whole states of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from fastar.config import Settings, dataset_spec, load_settings
from fastar.data.dataset import Dataset
from fastar.errors import FastarError
from fastar.experiments.plan.preflight import check_network
from fastar.experiments.regular import check_fits, tell
from fastar.experiments.session import Session, new_session
from fastar.experiments.task import DATA_KEYS, Network, RunData, Shape
from fastar.flat.state_check import copied
from fastar.models.user_network import Example, own_model
from fastar.runs import RunFolder
from fastar.runs.model_files import Checkpoint, load_checkpoint, load_whole_into
from fastar.runtime.progress import SILENT, Progress
from fastar.symmetry import Symmetry, symmetry_by_settings


@dataclass(frozen=True)
class Named:
    """Options that say what checkpoints are of, beyond what they say themselves.

    Args:
        model: `module:function` (see `own_model`).
        input_shape: of `model`, as is `allow_partial`.
        changes: settings by their dotted keys.
    """

    dataset: str | None = None
    arch: str | None = None
    model: str | None = None
    input_shape: str | None = None
    allow_partial: bool = False
    changes: Mapping[str, object] = field(default_factory=dict)


def open_first(path: Path, named: Named, progress: Progress = SILENT, *, same_data: bool) -> tuple[Session, Checkpoint]:
    """The session of the network that a checkpoint is of, and the checkpoint as a whole state of it, on the CPU.

    Args:
        same_data: the session's data must be those that the checkpoint was trained on.

    Raises:
        FastarError: nothing says what it is, contradicting options, or a file that cannot be read or does not fit.
    """
    if named.model is None:
        if named.input_shape is not None or named.allow_partial:
            option = "--input-shape" if named.input_shape is not None else "--allow-partial"
            raise FastarError(f"{option} belongs to --model; fastar's own architectures need none")
        checkpoint = load_checkpoint(path)
        session = _session_of(checkpoint, named, progress)
    else:
        if named.dataset is not None or named.arch is not None:
            raise FastarError("--model says what the checkpoints are of: leave out --dataset and --arch")
        session = _session_of_model(named.model, named, progress)
        checkpoint = load_checkpoint(path)
    return session, _whole(session, checkpoint, same_data)  # before its symmetry is derived, which is slow


def load_whole(session: Session, path: Path, *, same_data: bool) -> Checkpoint:
    """A checkpoint as a whole state of the session's network, on the CPU."""
    return _whole(session, load_checkpoint(path), same_data)


def _whole(session: Session, checkpoint: Checkpoint, same_data: bool) -> Checkpoint:
    check_fits(session, checkpoint, same_data=same_data)
    whole = load_whole_into(session.network.build(seed=0, device="cpu"), checkpoint)
    tell(whole, session.progress)
    return whole


def _session_of(first: Checkpoint, named: Named, progress: Progress) -> Session:
    """The session of a checkpoint of fastar's architectures: from its metadata, or as it is named."""
    known, shape = first.metadata, None
    dataset, arch = named.dataset or known.get("dataset"), named.arch or known.get("arch")
    for option, value in (("--dataset", dataset), ("--arch", arch)):
        if value is None:
            raise FastarError(f"{first.path}: does not say what it is; give {option}")
    options = {f"model.{key}": value for key, value in known.get("model", {}).items()}
    if dataset == known.get("dataset"):
        options |= {f"dataset.{key}": known.get(name) for name, key in DATA_KEYS.items()}
        # Batch-norm statistics are taken in batches as in its training.
        options["train.batch_size"] = known.get("train", {}).get("batch_size")
        if dataset_spec(str(dataset)).variable_size and "input_shape" in known and "classes" in known:
            shape = Shape(tuple(known["input_shape"]), known["classes"])
            options["dataset.resolution"] = shape.image[1]
    given = {key: value for key, value in options.items() if value is not None}
    settings = load_settings(dataset=dataset, arch=arch, values={**given, **named.changes})
    # The checkpoint says enough of its images where they are not needed, as in matching.
    session = new_session(settings, RunFolder(Path(".")), progress, shape=shape)
    if shape is None and settings.dataset.spec.variable_size:
        check_network(session)  # a conversion of the data may take hours: what is wrong is said before
    return session


def _session_of_model(reference: str, named: Named, progress: Progress) -> Session:
    """The session of a network of the user's own, which has no data."""
    for key, value in named.changes.items():
        if not key.startswith("matching.") and key not in ("seed", "workers", "device", "gpu_memory"):
            raise FastarError(f"{key}={value}: with --model, only matching.*, seed, workers and device mean anything")
    settings = load_settings(dataset="digits", values=named.changes)  # any dataset: it is not used
    model, example = own_model(reference, named.input_shape)
    session = new_session(settings, RunFolder(Path(".")), progress)
    none = NoData(settings, session.device, progress)
    network = UserNetwork(settings, session.device, none, model, example, named.allow_partial)
    return replace(session, data=none, network=network)


class NoData(RunData):
    """The data of a network that came without."""

    @cached_property
    def train(self) -> Dataset:
        raise FastarError("with --model there are no data to look at: match by weights, or use fastar.match in Python")


class UserNetwork(Network):
    """A network of the user's own (`--model module:function`)."""

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        data: RunData,
        model: nn.Module,
        example: Example,
        allow_partial: bool,
    ):
        super().__init__(settings, device, data)
        self._model, self._example, self._allow_partial = model, example, allow_partial

    def build(self, seed: int | None = None, *, device: torch.device | str | None = None) -> nn.Module:
        return copied(self._model).to(self._device if device is None else device)

    @cached_property
    def symmetry(self) -> Symmetry:
        matching, partial = self._settings.matching, self._allow_partial
        return symmetry_by_settings(matching, self._model, self._example, allow_partial=partial)

    def architecture(self) -> dict[str, object]:
        return {}
