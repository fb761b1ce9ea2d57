"""Trained models as files: safetensors with what they are in the metadata; other people's .pt and .pth are read too."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize

from fastar.atomic import write_atomically
from fastar.errors import FastarError
from fastar.states import check_state_of

SUFFIXES = (".safetensors", ".pt", ".pth")
_DIGEST = "tensors_digest"
_ALL = "digest"


@dataclass(frozen=True)
class Checkpoint:
    """A model's state and what is known of it.

    `metadata` of fastar's own files: kind (source, heldout, star), arch, model (its settings), input_shape, classes,
    dataset, dataset_digest, seed, index, recipe, epochs, losses and accuracies, version, commit. Of others: empty.
    """

    state: Mapping[str, torch.Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None


class StoredState(Mapping[str, torch.Tensor]):
    """The tensors of a .safetensors file, each read anew whenever it is asked for: many models take no memory."""

    def __init__(self, path: Path):
        self._path = path
        with self._open() as file:
            self._names = list(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        with self._open() as file:
            found: torch.Tensor = file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _open(self) -> Any:
        try:
            return safe_open(self._path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise FastarError(f"{self._path}: cannot be read any more ({error}); restore it") from error


def save_checkpoint(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write `state` and `metadata` (JSON-able) to `path` (.safetensors), atomically, with digests of the tensors and
    of all of it.

    Raises:
        FastarError: `path` cannot be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    # One text: several would be written in an order that changes from run to run.
    content = json.loads(json.dumps({**metadata, _DIGEST: tensors_digest(tensors)}))
    text = json.dumps({**content, _ALL: _metadata_digest(content)}, sort_keys=True)
    write_atomically(path, serialize(tensors, {"fastar": text}))


def _metadata_digest(content: Mapping[str, Any]) -> str:
    """A digest of metadata as JSON gives them back; the tensors' own digest is among them, so it is of all."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of names, shapes, types and values, the order of names left aside."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a .safetensors file, without reading its tensors.

    Raises:
        FastarError: missing, truncated or foreign file.
    """
    return _metadata_and_digest(path)[0]


def stored_digest(path: Path) -> str:
    """A digest of what a checkpoint holds, without reading the tensors where they were given one when it was saved.

    Raises:
        FastarError: missing, truncated or damaged file.
    """
    stored = _metadata_and_digest(path)[1] if path.suffix == ".safetensors" else None
    if stored is not None:
        return stored
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise FastarError(f"{path}: cannot be read ({error.strerror}); restore it") from error
    return digest.hexdigest()


def _metadata_and_digest(path: Path) -> tuple[dict[str, Any], str | None]:
    """The metadata, and the digest that the tensors must have (None: saved without)."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("fastar", "{}")
        content = json.loads(text)
    except FileNotFoundError as error:
        raise FastarError(f"{path}: no such checkpoint") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise FastarError(f"{path}: not a readable safetensors file ({error}); delete it or restore it") from error
    if not isinstance(content, dict) or not isinstance(content.get("model", {}), dict):
        raise FastarError(f"{path}: its fastar metadata is damaged; delete it or restore it")
    whole = content.pop(_ALL, None)  # files of older versions, and of others, have none
    if whole is not None and whole != _metadata_digest(content):
        raise FastarError(f"{path}: its metadata are not those that were saved (damaged); delete it or restore it")
    digest = content.pop(_DIGEST, None)
    return content, digest


def load_checkpoint(path: Path, *, resident: bool = True) -> Checkpoint:
    """Read a checkpoint: fastar's .safetensors, or a .pt/.pth state dict, bare or under `state_dict`.

    `module.` prefixes (DataParallel) are removed. Pickles are read with `weights_only=True`: no code runs.

    Args:
        resident: false leaves the tensors of a .safetensors file there after checking them: see `StoredState`.

    Raises:
        FastarError: missing, damaged or foreign file, no tensors in it, values that are not finite, or other ones than
            were saved.
    """
    if path.suffix not in SUFFIXES:
        raise FastarError(f"{path}: not a checkpoint; expected a file ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FastarError(f"{path}: no such checkpoint")
    metadata: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        metadata, digest = _metadata_and_digest(path)
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if digest is not None and digest != tensors_digest(state):
            raise FastarError(f"{path}: its values are not those that were saved (damaged); delete it or restore it")
    else:
        state = _read_pickle(path)
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if not state:
        raise FastarError(f"{path}: holds no tensors")
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise FastarError(f"{path}: {name} has NaN or infinite values; train this model again or leave it out")
    if not resident and path.suffix == ".safetensors":
        stored = StoredState(path)
        if set(stored) == set(state):  # no prefixes were removed
            return Checkpoint(stored, metadata, path)
    return Checkpoint(state, metadata, path)


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # truncated, no pickle, or one that would run code
        raise FastarError(
            f"{path}: cannot be read as weights only: damaged, or more than tensors; save model.state_dict() alone"
        ) from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, OSError, KeyError, IndexError, ValueError) as error:
        raise FastarError(f"{path}: not a readable PyTorch file; restore it or leave it out") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise FastarError(f"{path}: expected a state dict, found {type(content).__name__}; save model.state_dict()")
    other = [name for name, value in content.items() if not (isinstance(name, str) and isinstance(value, torch.Tensor))]
    if other:
        raise FastarError(
            f"{path}: entry {other[0]!r} is no named tensor; save model.state_dict() alone or as 'state_dict'"
        )
    return dict(content)


def load_into(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's state into `model`, in place.

    Of a tensor with two names (tied weights) one name is enough.

    Raises:
        FastarError: names or shapes differ; the first differences are named.
    """
    check_state_of(model, checkpoint.state, str(checkpoint.path or "the checkpoint"))
    model.load_state_dict(checkpoint.state, strict=False)  # what may be missing was checked above
