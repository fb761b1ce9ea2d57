"""Safetensors files by plain reads: header, fastar's metadata, digests; torch is imported for the tensors alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fastar.errors import FastarError, refusal
from fastar.runs.model_names import SAFETENSORS, require_file
from fastar.runtime.json_files import content_digest

if TYPE_CHECKING:
    from torch import Tensor

_HEADER_AT_MOST = 100_000_000  # bytes, as the format's own reader has it
# Types of tensors: torch's name, bytes of a number.
_TYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
# Keys of fastar's metadata: a digest of the tensors, and one of all metadata.
TENSORS_DIGEST = "tensors_digest"
METADATA_DIGEST = "digest"


@dataclass(frozen=True)
class _Site:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Bytes from the beginning of the file."""
    size: int


class SafetensorsFile:
    """A .safetensors file: its metadata, and where each tensor lies.

    Tensors are read, never mapped: a mapped file that is cut short ends the process. The format's own reader maps, and
    refuses paths that are not UTF-8.

    Raises:
        FastarError: missing, truncated or foreign file.
    """

    def __init__(self, path: Path):
        require_file(path)
        self.path = path
        try:
            with path.open("rb") as file:
                self._identity = _identity(file)
                self.metadata, self._sites = _header(file)
        except (OSError, ValueError, RecursionError) as error:
            raise FastarError(f"{path}: not a readable safetensors file ({error}); delete it or restore it") from error

    @property
    def names(self) -> list[str]:
        return list(self._sites)

    def without_values(self) -> dict[str, Tensor]:
        """The tensors on the meta device: their types and shapes alone."""
        import torch

        return {
            name: torch.empty(site.shape, dtype=getattr(torch, site.dtype), device="meta")
            for name, site in self._sites.items()
        }

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the file, on the CPU, each in memory of its own.

        Raises:
            FastarError: the file is gone, or is not what it was when its header was read.
        """
        found = {}
        try:
            with self.path.open("rb") as file:
                if _identity(file) != self._identity:
                    raise FastarError(f"{self.path}: was changed while it was in use; run it again")
                for name in names:
                    found[name] = _tensor(file, self._sites[name])
        except (OSError, EOFError) as error:
            raise FastarError(f"{self.path}: cannot be read any more ({error}); restore it") from error
        return found

    def fastar_metadata(self, *, own: bool = False) -> tuple[dict[str, Any], str | None]:
        """The metadata that fastar wrote, and the digest that the tensors must have; ({}, None): another's file.

        Args:
            own: fastar must have written it: of files in run folders.

        Raises:
            FastarError: damaged metadata; with `own` a foreign file.
        """
        path, text = self.path, self.metadata.get("fastar")
        if text is None:
            # One changed byte hides the mark, but not what stands under it.
            if own or any(f'"{TENSORS_DIGEST}"' in value for value in self.metadata.values()):
                raise FastarError(
                    f"{path}: is not as fastar writes its files (damaged, or another's); restore it or delete it"
                )
            return {}, None
        try:
            content = json.loads(text)
            if content.pop(METADATA_DIGEST) != content_digest(content):
                raise ValueError
            return content, content.pop(TENSORS_DIGEST)
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
            what = f"{path}: its metadata are not those that were saved (damaged); delete it or restore it"
            raise FastarError(what) from error


def read_metadata(path: Path, *, own: bool = False) -> dict[str, Any]:
    """The metadata of a .safetensors file, without reading its tensors.

    Args:
        own: fastar must have written it: of files in run folders.

    Raises:
        FastarError: missing, truncated, damaged or foreign file.
    """
    return SafetensorsFile(path).fastar_metadata(own=own)[0]


def stored_digest(path: Path, *, own: bool = False) -> str:
    """A digest of what a model file holds: the one that was written into it, or else of all its bytes.

    Raises:
        FastarError: missing, truncated or damaged file; with `own` one that fastar did not write.
    """
    stored = SafetensorsFile(path).fastar_metadata(own=own)[1] if path.suffix == SAFETENSORS else None
    if stored is not None:
        return stored
    require_file(path)
    digest = hashlib.sha256()
    with refusal(f"{path}: cannot be read", "restore it"), path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _identity(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _header(file: BinaryIO) -> tuple[dict[str, str], dict[str, _Site]]:
    """The header of a safetensors file: metadata, and sites of tensors that fill the rest of it without gaps.

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
    sites = {name: _site(name, entry, 8 + length) for name, entry in content.items()}
    end = 8 + length
    for site in sorted(sites.values(), key=lambda site: (site.begin, site.size)):
        if site.begin != end:
            raise ValueError("its tensors overlap or leave gaps")
        end += site.size
    if end != size:
        raise ValueError(f"it has {size} bytes where its header says {end}")
    return metadata, sites


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header says something twice")
    return found


def _site(name: str, entry: Any, first: int) -> _Site:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"its header is damaged at {name!r}")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers) or len(offsets) != 2:
        raise ValueError(f"its header is damaged at {name!r}")
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ValueError(f"{name!r} is of a type that is not known, {kind!r}")
    (dtype, itemsize), size = _TYPES[kind], offsets[1] - offsets[0]
    if size != math.prod(shape) * itemsize:
        raise ValueError(f"{name!r} has {size} bytes, which its shape and type do not make")
    return _Site(dtype, tuple(shape), first + offsets[0], size)


def _tensor(file: BinaryIO, site: _Site) -> Tensor:
    import torch

    dtype = getattr(torch, site.dtype)
    if not site.size:
        return torch.empty(site.shape, dtype=dtype, device="cpu")
    found = torch.empty(site.size, dtype=torch.uint8, device="cpu")
    file.seek(site.begin)
    if file.readinto(found.numpy().data) != site.size:  # type: ignore[attr-defined]  # of every buffered file
        raise EOFError("cut short")
    return found.view(dtype).reshape(site.shape)
