"""Safetensors files by plain reads: header, fastar's metadata, digests; torch is imported for the tensors alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError, safe_open

from fastar.errors import FastarError, refusal
from fastar.runs.model_names import SAFETENSORS, require_file
from fastar.runtime.json_files import content_digest

if TYPE_CHECKING:
    from torch import Tensor

# Types of tensors, and torch's names of them.
_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
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

    Tensors are read, never mapped: a mapped file that is cut short ends the process.

    Args:
        tensors: they will be read, so the whole header is checked first, by the format's own reader (imports torch).

    Raises:
        FastarError: missing, truncated or foreign file.
    """

    def __init__(self, path: Path, *, tensors: bool = True):
        require_file(path)
        self.path = path
        try:
            if tensors:
                with safe_open(path, "pt"):
                    pass
            with path.open("rb") as file:
                self._identity = _identity(file)
                self.metadata, self._sites = _header(file)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, SafetensorError) as error:
            raise FastarError(f"{path}: not a readable safetensors file ({error}); delete it or restore it") from error

    @property
    def names(self) -> list[str]:
        return list(self._sites)

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
    return SafetensorsFile(path, tensors=False).fastar_metadata(own=own)[0]


def stored_digest(path: Path, *, own: bool = False) -> str:
    """A digest of what a model file holds: the one that was written into it, or else of all its bytes.

    Raises:
        FastarError: missing, truncated or damaged file; with `own` one that fastar did not write.
    """
    stored = SafetensorsFile(path, tensors=False).fastar_metadata(own=own)[1] if path.suffix == SAFETENSORS else None
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
    """The header of a safetensors file: metadata, and sites of tensors.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: it is none, cut short, or has a type that is not known.
    """
    size = os.fstat(file.fileno()).st_size
    first = 8 + int.from_bytes(file.read(8), "little")
    content = json.loads(file.read(min(first, size) - 8).decode(), object_pairs_hook=_once)
    metadata = content.pop("__metadata__", None) or {}
    sites = {}
    for name, entry in content.items():
        kind, (begin, end) = entry["dtype"], entry["data_offsets"]
        if kind not in _TYPES:
            raise ValueError(f"{name!r} is of a type that is not known, {kind!r}")
        sites[name] = _Site(_TYPES[kind], tuple(entry["shape"]), first + begin, end - begin)
    if size != max((site.begin + site.size for site in sites.values()), default=first):
        raise ValueError(f"it has {size} bytes, and its header says otherwise")
    return metadata, sites


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # which the format's own reader passes over
        raise ValueError("its header says something twice")
    return found


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
