"""Files of tensors, whoever wrote them: safetensors by plain reads, and what torch.save made, checked before it is
unpickled."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastar.errors import FastarError

SAFETENSORS = ".safetensors"
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pth.tar")
INDEX = ".index.json"
# Names of the model in a Hugging Face folder; the first one that is there is read.
IN_FOLDERS = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")

_HEADER_AT_MOST = 100_000_000  # bytes, as the format's own reader has it
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def suffix_of(path: Path) -> str | None:
    """The ending by which `path` is read, None for a name that is no checkpoint's."""
    name = path.name
    found = [ending for ending in (SAFETENSORS, *PICKLES, INDEX) if name.endswith(ending) and name != ending]
    return max(found, key=len, default=None)


def stem_of(path: Path) -> str:
    """A checkpoint's name without the ending by which it is read; a folder's name as it is."""
    name = path.name.removesuffix(INDEX)
    return name.removesuffix(suffix_of(Path(name)) or "")


def require_file(path: Path) -> None:
    """Raise FastarError unless `path` is a regular file: opening a pipe would wait for ever."""
    if not path.is_file():
        why = " (it is no regular file)" if path.exists() and not path.is_dir() else ""
        raise FastarError(f"{path}: no such checkpoint{why}")


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Bytes from the beginning of the file."""
    size: int


class TensorFile:
    """A .safetensors file: its metadata, and where each tensor lies.

    Tensors are read, never mapped: a mapped file that is cut short ends the process.

    Raises:
        FastarError: missing, truncated or foreign file.
    """

    def __init__(self, path: Path):
        require_file(path)
        self.path = path
        try:
            with path.open("rb") as file:
                self._identity = _identity(file)
                self.metadata, self._places = _header(file)
        except (OSError, ValueError, RecursionError) as error:
            raise FastarError(f"{path}: not a readable safetensors file ({error}); delete it or restore it") from error

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the file, on the CPU, each in memory of its own.

        Raises:
            FastarError: the file is gone, or is not what it was when its header was read.
        """
        found = {}
        try:
            with self.path.open("rb") as file:
                if _identity(file) != self._identity:
                    raise FastarError(f"{self.path}: was changed while it was in use; run the same command again")
                for name in names:
                    found[name] = _tensor(file, self._places[name])
        except (OSError, EOFError) as error:
            raise FastarError(f"{self.path}: cannot be read any more ({error}); restore it") from error
        return found


def _identity(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _header(file: BinaryIO) -> tuple[dict[str, str], dict[str, _Place]]:
    """The header of a safetensors file: metadata, and places of tensors that fill the rest of it without gaps.

    Raises:
        ValueError: it is none, or cut short.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _HEADER_AT_MOST):
        raise ValueError("its header is cut short")
    content = json.loads(file.read(length).decode(), object_pairs_hook=_once)
    if not isinstance(content, dict):
        raise ValueError("its header names no tensors")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are damaged")
    places = {name: _place(name, entry, 8 + length) for name, entry in content.items()}
    end = 8 + length
    for place in sorted(places.values(), key=lambda place: (place.begin, place.size)):
        if place.begin != end:
            raise ValueError("its tensors overlap or leave gaps")
        end += place.size
    if end != size:
        raise ValueError(f"it has {size} bytes where its header says {end}")
    return metadata, places


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header says something twice")
    return found


def _place(name: str, entry: Any, first: int) -> _Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header is damaged at {name!r}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers) or len(offsets) != 2:
        raise ValueError(f"its header is damaged at {name!r}")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ValueError(f"{name!r} is of a type that is not known, {kind!r}")
    dtype, size = _TYPES[kind], offsets[1] - offsets[0]
    if size != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has {size} bytes, which its shape and type do not make")
    return _Place(dtype, tuple(shape), first + offsets[0], size)


def _tensor(file: BinaryIO, place: _Place) -> Tensor:
    if not place.size:
        return torch.empty(place.shape, dtype=place.dtype, device="cpu")
    found = torch.empty(place.size, dtype=torch.uint8, device="cpu")
    file.seek(place.begin)
    if file.readinto(found.numpy().data) != place.size:  # type: ignore[attr-defined]  # of every buffered file
        raise EOFError("cut short")
    return found.view(place.dtype).reshape(place.shape)


def read_torch(path: Path) -> Any:
    """The content of a file of torch.save, on the CPU; no code of it runs, and its own checksums hold.

    Raises:
        FastarError: missing or damaged, or more than weights.
    """
    require_file(path)
    try:
        _check_members(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # truncated, no pickle, or one that would run code
        wanted = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        why = f"it asks for {wanted[1]}" if wanted else "damaged, or more than tensors"
        raise FastarError(f"{path}: cannot be read as weights only: {why}; save model.state_dict() alone") from error
    except Exception as error:  # what is damaged is met anywhere within torch and pickle: any exception says that
        lines = re.sub(r"\x1b\[\d*m", "", str(error)).split("\n")
        why = f"{type(error).__name__}: {lines[0][:120]}"
        raise FastarError(f"{path}: not a readable PyTorch file ({why}); restore it or leave it out") from error


def _check_members(path: Path) -> None:
    """Raise ValueError unless each member of the zip file `path` has the checksum that is stored with it, which torch
    does not look at, and none is marked as a folder, of which torch reads nothing and gives what memory held.

    Older files are no zip files, and have no checksums.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        bad = archive.testzip()
        folders = [member.filename for member in archive.infolist() if member.is_dir() or member.external_attr & 0x10]
    if folders:
        raise ValueError(f"{folders[0]} is marked as a folder (damaged)")
    if bad is not None:
        raise ValueError(f"{bad} has another checksum than was saved (damaged)")


@dataclass(frozen=True)
class Found:
    """A state dict within what was saved.

    Args:
        state: name -> tensor.
        under: the entries that lead to it, outermost first.
        left: what else was there, by name.
    """

    state: dict[str, Tensor] = field(repr=False)
    under: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


_CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
)
_AVERAGED = re.compile(r"(^|[_.\-])(ema|swa|avg|averaged?|shadow)([_.\-]|$)", re.IGNORECASE)
_NO_MODEL = re.compile(r"optim|sched|scaler|rng|random", re.IGNORECASE)
_DEPTH = 4


def is_averaged(name: str) -> bool:
    """Tell whether an entry or a prefix is called as averages of a training's weights are."""
    return _AVERAGED.search(name) is not None


def state_within(content: Any, where: str) -> Found:
    """The state dict in what torch.save was given: bare, or an entry of what a training keeps beside.

    The plain weights are preferred to an average of them (EMA).

    Args:
        where: what errors call it.

    Raises:
        FastarError: none, or several that may be meant.
    """
    under: list[str] = []
    left: list[str] = []
    while len(under) < _DEPTH:
        if not isinstance(content, Mapping):
            break
        chosen = _chosen(content, where)
        if chosen is None:
            break
        left += [".".join([*under, str(name)]) for name in content if name != chosen]
        under.append(chosen)
        content = content[chosen]
    if not isinstance(content, Mapping):
        raise FastarError(f"{where}: expected a state dict, found {type(content).__name__}; save model.state_dict()")
    # What modules keep of their own (`get_extra_state`) is no weight.
    extra = [name for name in content if isinstance(name, str) and name.rpartition(".")[2] == "_extra_state"]
    state = {name: value for name, value in content.items() if name not in extra}
    other = [name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if other:
        raise FastarError(
            f"{where}: entry {other[0]!r} is no named tensor; save model.state_dict() alone or as 'state_dict'"
        )
    return Found(state, tuple(under), (*left, *extra))


def _chosen(content: Mapping[Any, Any], where: str) -> str | None:
    """The entry of `content` that holds the model; None: it is a state dict itself, or nothing that is known."""
    named = [name for name in _CONTAINERS if isinstance(content.get(name), Mapping)]
    bare = any(isinstance(value, Tensor) for value in content.values())
    full = [name for name in named if _holds_tensors(content[name])]
    others = [name for name, value in content.items() if isinstance(name, str) and _holds_tensors(value)]
    others = [name for name in others if name not in named and not _NO_MODEL.search(name)]
    plain = [name for name in others if not is_averaged(name)]
    for some in (full, *(() if bare or named else (plain, others))):
        if len(some) > 1:
            raise FastarError(
                f"{where}: holds several networks ({', '.join(map(repr, some))}); save the one that is meant alone"
            )
        if some:
            return some[0]
    return named[0] if named else None


def _holds_tensors(value: Any, depth: int = _DEPTH) -> bool:
    if not isinstance(value, Mapping) or depth == 0 or "param_groups" in value:
        return False
    if any(isinstance(one, Tensor) for one in value.values()):
        return True
    return any(_holds_tensors(value[name], depth - 1) for name in _CONTAINERS if name in value)


def shards_of(index: Path) -> dict[str, list[str]]:
    """The files beside `index` (`*.index.json`) that hold a model together: name of the file -> names of its tensors.

    Raises:
        FastarError: unreadable, or it names files elsewhere.
    """
    require_file(index)
    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_once)
        where = content["weight_map"]
        shards: dict[str, list[str]] = {}
        for name, file in where.items():
            if Path(file).name != file or suffix_of(Path(file)) in (None, INDEX):
                raise ValueError(f"{name!r} lies in {file!r}, which is no checkpoint beside it")
            shards.setdefault(file, []).append(name)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FastarError(f"{index}: not a readable index of a model's files ({error}); restore it") from error
    return shards
