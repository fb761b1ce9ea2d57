"""Trained models as files: safetensors with what they are in the metadata; other people's forms are read too."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Collection, ItemsView, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize

from fastar.errors import FastarError
from fastar.flat.state_check import check_one_value, check_state_of, ties_of
from fastar.runs.atomic import write_atomically
from fastar.runs.model_names import INDEX, SAFETENSORS, checkpoint_files, models_in, shards_of, suffix_of
from fastar.runs.safetensors_file import METADATA_DIGEST, TENSORS_DIGEST, SafetensorsFile
from fastar.runs.torch_files import Found, is_averaged, read_torch, state_within
from fastar.runtime.json_files import content_digest

# Wrappers of a whole network: DataParallel and its like, and torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
_NAMED = 4


@dataclass(frozen=True)
class Checkpoint:
    """A model's state and what is known of it.

    `metadata` of fastar's own files: kind (source, heldout, star), arch, model (its settings), input_shape, classes,
    dataset, dataset_digest, seed, index, recipe, epochs, losses and accuracies, version, commit. Of others: empty.

    Args:
        under: the entries of a larger file that led to the state, outermost first.
        prefix: what was taken off all names.
        left: what else the file holds.
        in_file: the same tensors in their file, where that is a .safetensors.
        digest: see `state_digest`; None: not known yet.
    """

    state: Mapping[str, torch.Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    under: tuple[str, ...] = ()
    prefix: str = ""
    left: tuple[str, ...] = ()
    in_file: StoredState | None = None
    digest: str | None = None

    def released(self) -> Checkpoint:
        """The same with the tensors left in their file, to be read again at each use, and the digest kept. Of a file
        that is no .safetensors: as it is."""
        return self if self.in_file is None else replace(self, state=self.in_file, digest=state_digest(self))

    def __repr__(self) -> str:
        known = [f"{key}={self.metadata[key]!r}" for key in ("kind", "arch") if key in self.metadata]
        path = [] if self.path is None else [repr(str(self.path))]
        return f"Checkpoint({', '.join([*path, f'{len(self.state)} tensors', *known])})"

    def taken(self) -> str | None:
        """A line on what was taken of the file and what was left over; None: all, as it is."""
        said = []
        if self.under or self.prefix:
            within = f" of {'.'.join(self.under)!r}" if self.under else ""
            averaged = ", an average of the weights (EMA)" if any(map(is_averaged, self.under)) else ""
            without = f", without the prefix {self.prefix!r} of their names" if self.prefix else ""
            said.append(f"took the tensors{within}{averaged}{without}")
        if self.left:
            more = f" and {len(self.left) - _NAMED} more" if len(self.left) > _NAMED else ""
            averages = [name for name in self.left[_NAMED:] if is_averaged(name)]
            ema = f", an average (EMA) {averages[0]!r} among them" if averages else ""
            said.append(f"left over: {', '.join(self.left[:_NAMED])}{more}{ema}")
        return f"{self.path}: {'; '.join(said)}" if said else None


class StoredState(Mapping[str, torch.Tensor]):
    """The tensors of a .safetensors file, each read anew whenever it is asked for: many models take no memory.

    Args:
        names: name here -> name in the file.
    """

    def __init__(self, file: SafetensorsFile, names: Mapping[str, str]):
        self._file = file
        self._names = names

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self._names[name]
        return self._file.read([stored])[stored]

    def items(self) -> ItemsView[str, torch.Tensor]:
        """All names and tensors, by one read of the file."""
        found = self._file.read(list(self._names.values()))
        return {name: found[stored] for name, stored in self._names.items()}.items()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def renamed(self, names: Mapping[str, str]) -> StoredState:
        """The same file's tensors under other names: new -> old."""
        return StoredState(self._file, {new: self._names[old] for new, old in names.items()})


def save_checkpoint(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
    """Write `state` and `metadata` (JSON-able) to `path` (.safetensors), atomically, with digests of the tensors and
    of all of it.

    Raises:
        FastarError: `path` cannot be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    seen = set[int]()
    for name, value in tensors.items():  # tied weights: the format has no tensors of one memory
        if value.data_ptr() in seen:
            tensors[name] = value.clone()
        seen.add(value.data_ptr())
    # One text: several would be written in an order that changes from run to run.
    content = json.loads(json.dumps({**metadata, TENSORS_DIGEST: tensors_digest(tensors)}))
    text = json.dumps({**content, METADATA_DIGEST: content_digest(content)}, sort_keys=True)
    write_atomically(path, serialize(tensors, {"fastar": text}))


def state_digest(checkpoint: Checkpoint) -> str:
    """A digest of a model's tensors, whatever file they came from; the counts of batches say nothing of it."""
    if checkpoint.digest is not None:
        return checkpoint.digest
    return tensors_digest({name: value for name, value in checkpoint.state.items() if not _is_count(name)})[:16]


def _is_count(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of names, shapes, types and values, the order of names left aside."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_checkpoint(path: Path, *, own: bool = False) -> Checkpoint:
    """Read a checkpoint: fastar's .safetensors, or other people's: safetensors, what torch.save wrote (a state dict,
    bare or in what a training keeps beside it), either in several files with an index, or a Hugging Face folder.

    Prefixes of DataParallel and torch.compile that all names share are removed. Pickles are read with
    `weights_only=True`: no code runs.

    Args:
        own: fastar must have written it: of files in run folders.

    Raises:
        FastarError: missing, damaged or foreign file, no tensors in it, values that are not finite, or other ones than
            were saved.
    """
    files = checkpoint_files(path)
    kind = suffix_of(files[0])
    if kind is None:
        raise FastarError(
            f"{path}: not a checkpoint; expected a file ending in .safetensors, .pt, .pth, .ckpt, .bin, .pth.tar or "
            f"{INDEX}, or a Hugging Face folder"
        )
    file = SafetensorsFile(files[0]) if kind == SAFETENSORS else None
    metadata, saved = file.fastar_metadata(own=own) if file else ({}, None)
    if file:
        found = Found(file.read(file.names))
    else:
        found = Found(_read_shards(files[0])) if kind == INDEX else state_within(read_torch(files[0]), str(path))
    state, under, left = found.state, found.under, found.left
    if saved is not None and saved != tensors_digest(state):
        raise FastarError(f"{path}: its values are not those that were saved (damaged); delete it or restore it")
    if not state:
        raise FastarError(f"{path}: holds no tensors")
    for name, value in state.items():
        check_values(path, name, value)
    prefix = _wrappers(state)
    names = {name[len(prefix) :]: name for name in state}
    if path.is_dir():
        under, left = (files[0].name, *under), (*left, *models_in(path)[1:])
    return Checkpoint(
        {name: state[stored] for name, stored in names.items()},
        metadata,
        path,
        under,
        prefix,
        left,
        in_file=StoredState(file, names) if file else None,
        digest=saved[:16] if saved and not prefix and not any(map(_is_count, names)) else None,
    )


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for file, names in shards_of(index).items():
        path = index.with_name(file)
        if suffix_of(path) == SAFETENSORS:
            stored = SafetensorsFile(path)
            found = stored.read(stored.names)
        else:
            found = state_within(read_torch(path), str(path)).state
        wrong = sorted(found.keys() ^ set(names))
        if wrong:
            has = "holds a tensor" if wrong[0] in found else "lacks the tensor"
            raise FastarError(f"{path}: {has} {wrong[0]!r}, and {index.name} says otherwise; restore both")
        state |= found
    return state


def check_values(path: Path, name: str, value: torch.Tensor) -> None:
    """Raise FastarError unless a tensor of `path` can be computed with: dense, there, and finite."""
    if value.is_quantized or value.layout != torch.strided:
        kind = f"quantised ({value.dtype})" if value.is_quantized else f"sparse ({value.layout})"
        raise FastarError(f"{path}: {name} is {kind}, and cannot be matched or measured; save plain float weights")
    if value.is_meta:
        raise FastarError(f"{path}: {name} has no values (it was saved from the meta device); save the model's weights")
    if value.is_floating_point() or value.is_complex():
        numbers = value.float() if value.dtype.itemsize == 1 else value  # of float8 torch does not say it
        if not torch.isfinite(numbers).all():
            raise FastarError(f"{path}: {name} has NaN or infinite values; train this model again or leave it out")


def _wrappers(names: Collection[str]) -> str:
    """The prefix that wrappers put before all names."""
    prefix = ""
    while True:
        more = next((one for one in _WRAPPERS if all(name.startswith(prefix + one) for name in names)), None)
        if more is None:
            return prefix
        prefix += more


def load_into(model: torch.nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """Copy a checkpoint's state into `model`, in place; the checkpoint with all tensors under the model's own names.

    One prefix that is all that keeps names apart is taken off, or put before. Of a tensor with two names (tied weights)
    one name is enough.

    Raises:
        FastarError: names or shapes differ (the first differences are named), tied tensors have two values, a parameter
            is not of a floating-point type that matching and interpolating can compute with.
    """
    checkpoint = _as_named_by(model, checkpoint)
    where = str(checkpoint.path or "the checkpoint")
    found = dict(checkpoint.state)  # once: it may lie in a file
    check_state_of(model, found, where)
    remedy = "what it computes is not known; save it with the two tied, or name a network that does not tie them"
    check_one_value(model, found, where, remedy)
    ties = {name: other for name, other in ties_of(model, found).items() if name not in found and other in found}
    names = {name: name for name in found} | ties
    state = OrderedDict((name, found[other]) for name, other in names.items())
    state._metadata = getattr(model.state_dict(), "_metadata", None)  # type: ignore[attr-defined]  # modules' versions
    model.load_state_dict(state, strict=False)  # what may be missing was checked above
    return _renamed(checkpoint, names)


def load_whole_into(model: torch.nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """Do as `load_into`, and return a checkpoint of all that the model has, each tensor in the type of its file.

    Raises:
        FastarError: as `load_into`.
    """
    checkpoint = load_into(model, checkpoint)
    found, whole = checkpoint.state, {}
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            continue
        if name in found:  # in the memory format of the model, for the same order of sums
            whole[name] = torch.empty_like(value, dtype=found[name].dtype).copy_(found[name])
        else:  # counts of batches, which files of others may lack
            whole[name] = value.clone()
    return replace(checkpoint, state=whole, in_file=None, digest=None)


def check_header(model: torch.nn.Module, path: Path) -> None:
    """Raise FastarError unless a checkpoint's names and shapes fit `model`. Of a .safetensors it reads the header."""
    if path.is_dir() or suffix_of(path) != SAFETENSORS:
        load_into(model, load_checkpoint(path))
        return
    state = SafetensorsFile(path).without_values()
    prefix = _wrappers(state)
    found = _as_named_by(model, Checkpoint({name[len(prefix) :]: one for name, one in state.items()}, path=path))
    check_state_of(model, found.state, str(path))


def _renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """The checkpoint with its tensors under other names: new -> old."""
    state, file = checkpoint.state, checkpoint.in_file
    return replace(
        checkpoint,
        state=state.renamed(names)
        if isinstance(state, StoredState)
        else {new: state[old] for new, old in names.items()},
        in_file=file and file.renamed(names),
        digest=checkpoint.digest if all(new == old for new, old in names.items()) else None,
    )


def _as_named_by(model: torch.nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the model's own names, where nothing but a prefix keeps them apart."""
    wanted, found = set(model.state_dict()), list(checkpoint.state)
    if not found or not wanted.isdisjoint(found):
        return checkpoint
    for more in _prefixes(next(iter(wanted), "")):  # the model is wrapped, its file is not
        if all(name.startswith(more) for name in wanted) and any(more + name in wanted for name in found):
            return _renamed(checkpoint, {more + name: name for name in found})
    counts: dict[str, int] = {}
    for name in found:
        for prefix in _prefixes(name):
            if name[len(prefix) :] in wanted:
                counts[prefix] = counts.get(prefix, 0) + 1
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most and 2 * count > len(wanted)]
    best = [prefix for prefix in best if not is_averaged(prefix)] or best
    if len(best) > 1:
        raise FastarError(
            f"{checkpoint.path or 'the checkpoint'}: several of its networks fit the model "
            f"({', '.join(map(repr, best))}); save the one that is meant alone"
        )
    if not best:
        return checkpoint
    prefix = best[0]
    names = {name[len(prefix) :]: name for name in found if name.startswith(prefix)}
    left = [name for name in found if not name.startswith(prefix)]
    return replace(
        _renamed(checkpoint, names),
        prefix=checkpoint.prefix + prefix,
        left=(*left, *checkpoint.left),
    )


def _prefixes(name: str) -> list[str]:
    words = name.split(".")
    return [".".join(words[:n]) + "." for n in range(1, len(words))]
