"""The official CIFAR-10 and CIFAR-100 files: python pickles and binary, extracted or still in their .tar.gz."""

import io
import pickle
import pickletools
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastar.config import DatasetSpec
from fastar.data.raw.raw_split import ArraySplit, RawDataset, readable
from fastar.data.raw.tars import read_members
from fastar.errors import FastarError, first_line, printable
from fastar.runtime.json_files import read_file

_PIXELS = 3 * 32 * 32
_LARGEST = 1 << 30  # bytes of an archive, unpacked; the official ones have 180 MB


@dataclass(frozen=True)
class _Layout:
    """Names of one official distribution; `label_key` in the pickles, `label_bytes` before each binary image."""

    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_key: bytes
    label_bytes: int


LAYOUTS = {
    "cifar10": _Layout("cifar-10", tuple(f"data_batch_{n}" for n in range(1, 6)), ("test_batch",), b"labels", 1),
    "cifar100": _Layout("cifar-100", ("train",), ("test",), b"fine_labels", 2),  # coarse, then fine: the last counts
}


def find_cifar(root: Path, spec: DatasetSpec) -> RawDataset | None:
    """The official files in `root` (extracted, or an archive; `root` may be the archive itself), or None."""
    layout = LAYOUTS[spec.reader]
    for kind, form, suffix, parse in (
        ("CIFAR python pickles", "python", "", _parse_pickle),
        ("CIFAR binary files", "binary", ".bin", _parse_binary),
    ):
        train, test = ([name + suffix for name in names] for names in (layout.train, layout.test))
        archive, wanted = f"{layout.archive}-{form}.tar.gz", [*train, *test]
        path = root if root.name == archive and root.is_file() else root / archive
        if any((root / name).is_file() for name in wanted):
            contents, where, read = _read_folder(root, wanted), root, [root / name for name in wanted]
        elif path.is_file():
            contents, where, read = _read_archive(path, wanted), path, [path]
        else:
            continue
        splits = [_split(spec, layout, where, files, contents, parse) for files in (train, test)]
        return RawDataset(splits[0], splits[1], kind, where, files=tuple(read))
    return None


def _split(
    spec: DatasetSpec,
    layout: _Layout,
    where: Path,
    files: list[str],
    contents: dict[str, bytes],
    parse: Callable[[bytes, str, _Layout], tuple[np.ndarray, np.ndarray]],
) -> ArraySplit:
    parts = []
    for name in files:
        pixels, labels = parse(contents[name], f"{where}/{name}", layout)
        # Checked file by file, so that a bad label is named by its own file and index.
        images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts.append(ArraySplit(images, labels, spec.classes, f"{where}/{name}"))
    images = np.concatenate([part.images for part in parts])
    return ArraySplit(images, np.concatenate([part.labels for part in parts]), spec.classes, f"{where}/{files[0]}...")


def _read_folder(root: Path, wanted: list[str]) -> dict[str, bytes]:
    contents = {}
    for name in wanted:
        if not (root / name).exists():
            raise FastarError(f"{root / name}: missing beside the other CIFAR files; get the archive again")
        with readable(root / name):
            contents[name] = read_file(root / name, _LARGEST)
    return contents


def _read_archive(path: Path, wanted: list[str]) -> dict[str, bytes]:
    try:
        contents = read_members(path, wanted, _LARGEST, lambda name: Path(name).name)
    except (OSError, tarfile.TarError) as error:
        raise FastarError(f"{path}: cannot be read ({first_line(error)}); get the archive again") from error
    missing = [name for name in wanted if name not in contents]
    if missing:
        raise FastarError(f"{path}: holds no {', '.join(missing)}; get the archive again")
    return contents


def _parse_binary(data: bytes, where: str, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    row = layout.label_bytes + _PIXELS
    if not data or len(data) % row:
        raise FastarError(f"{where}: {len(data):,} bytes are not whole images of {row} bytes; get the file again")
    table = np.frombuffer(data, np.uint8).reshape(-1, row)
    return table[:, layout.label_bytes :], table[:, layout.label_bytes - 1].astype(np.int64)


def _parse_pickle(data: bytes, where: str, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    try:
        _check_places(data)
        batch = CifarUnpickler(io.BytesIO(data)).load()
    except FastarError as error:
        raise FastarError(f"{where}: {error}") from None
    # A damaged pickle can fail in any way the pickle machine can (EOFError, IndexError, UnpicklingError, ...).
    except Exception as error:
        why = printable(str(error))[:200]
        raise FastarError(f"{where}: not a readable CIFAR pickle ({why}); get the file again") from error
    batch = {_as_bytes(key): value for key, value in batch.items()} if isinstance(batch, dict) else {}
    pixels, labels = batch.get(b"data"), batch.get(layout.label_key)
    array = pixels.array if isinstance(pixels, _Array) else None
    if array is None or array.ndim != 2 or array.shape[1] != _PIXELS:
        raise FastarError(f"{where}: no 'data' of n x {_PIXELS} bytes; not a CIFAR batch, check --dataset")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise FastarError(f"{where}: no list {layout.label_key.decode()!r}; not a CIFAR batch, check --dataset")
    bad = next((number for number, label in enumerate(labels) if not 0 <= label < 1 << 31), None)
    if bad is not None:  # not shown: it may have any number of digits
        raise FastarError(f"{where}, sample {bad}: its label is no class's number; the file is damaged")
    return array, np.array(labels, dtype=np.int64)


def _check_places(data: bytes) -> None:
    """Refuse a pickle that remembers things at a place beyond its size: Python takes memory up to the largest place."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in ("PUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise FastarError("remembers something at a place beyond its own size; get the file again")


def _as_bytes(key: Any) -> Any:
    return key.encode("latin-1") if isinstance(key, str) else key


class _Dtype:
    """Stands in for numpy.dtype: admits unsigned bytes only."""

    def __init__(self, code: bytes | str, *_: object):
        if _as_bytes(code) not in (b"u1", b"|u1", b"uint8"):
            raise FastarError(f"array of type {code!r:.20} where unsigned bytes are due; get the file again")

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment, which mean nothing for single bytes."""


class _Array:
    """Stands in for numpy.ndarray, so that no state from the file reaches numpy unchecked."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
            raise FastarError("array without plain bytes; get the file again")
        if not all(type(size) is int and size >= 0 for size in shape) or int(np.prod(shape, dtype=object)) != len(data):
            raise FastarError(f"array of {len(data):,} bytes does not fill its shape; get the file again")
        self.array = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind: object, *_: object) -> _Array:
    if kind is not _Array:
        raise FastarError("array of an unknown kind; get the file again")
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode`, by which Python 3 stores bytes in pickles of protocol 2."""
    if encoding not in ("latin1", "latin-1"):
        raise FastarError(f"bytes stored as {encoding!r:.20}; get the file again")
    return text.encode("latin-1")


class CifarUnpickler(pickle.Unpickler):
    """Admits what the official files hold: dicts, lists, strings, integers, and arrays of bytes. No other name."""

    _ADMITTED = {  # noqa: RUF012 (never changed)
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
    }

    def __init__(self, stream: io.BytesIO):
        super().__init__(stream, encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ADMITTED[module, name]
        except KeyError:
            asked = printable(f"{module:.60}.{name:.60}")
            raise FastarError(f"asks for {asked}, which CIFAR files never hold; do not trust this file") from None

    def persistent_load(self, pid: object) -> Any:
        raise FastarError("asks for an outside object, which CIFAR files never do; do not trust this file")
