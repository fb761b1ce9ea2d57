"""Finding a dataset's raw data: in the data root that is given, else where it usually lies."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path

from fastar.config import DatasetSpec
from fastar.data.raw.cifar import find_cifar
from fastar.data.raw.class_folders import find_folders
from fastar.data.raw.digits import read_digits
from fastar.data.raw.idx import find_idx
from fastar.data.raw.raw_split import RawDataset, readable
from fastar.errors import FastarError
from fastar.runtime.progress import SILENT, Progress

Finder = Callable[[Path, DatasetSpec], RawDataset | None]

FINDERS: dict[str, tuple[Finder, ...]] = {
    "idx": (find_idx, find_folders),
    "cifar10": (find_cifar, find_folders),
    "cifar100": (find_cifar, find_folders),
}
_BLOCK = 1 << 22
_LONG = 1 << 30  # bytes whose reading is shown


def find_raw(spec: DatasetSpec, data_root: Path | None) -> RawDataset:
    """The raw data of `spec`; FastarError says where it looked and how to get it."""
    if spec.reader == "digits":
        return read_digits(spec)
    places = _places(spec, data_root)
    for place, finders in places:
        with readable(place):
            if not place.exists():
                continue
            for finder in finders:
                found = finder(place, spec)
                if found is not None:
                    return found
    looked = ", ".join(str(place) for place, _ in places)
    advice = "" if data_root is not None else " and point at it with --data-root"
    raise FastarError(f"{spec.name}: no raw data found (looked in {looked}); {spec.obtain}{advice}")


def _finders(spec: DatasetSpec) -> tuple[Finder, ...]:
    module, _, function = spec.reader.partition(":")
    return (getattr(import_module(module), function),) if function else FINDERS[spec.reader]


def _places(spec: DatasetSpec, data_root: Path | None) -> list[tuple[Path, tuple[Finder, ...]]]:
    """Places to look, and for what. A folder that was not named by the user may belong to another dataset: only the
    dataset's own folders in it are searched for every format, the folder itself for official file names alone."""
    finders = _finders(spec)
    if data_root is not None:
        return [(data_root, finders), *((data_root / folder, finders) for folder in spec.folders)]
    places: list[tuple[Path, tuple[Finder, ...]]] = []
    for root in ("data", *spec.usual):
        if spec.reader.startswith("cifar"):
            places.append((Path(root), finders[:1]))
        places += [(Path(root) / folder, finders) for folder in spec.folders]
    return places


def note_other_files(md5: Mapping[str, str], files: Iterable[Path], progress: Progress) -> None:
    """One line for the raw `files` that have an official name (a key of `md5`) and are not what was published under it.

    Reads them whole, so it is for when their data are written, which is once. They are used all the same: images that
    were encoded again, or archives that were packed again, may be meant.
    """
    others = [path for path in files if path.name in md5 and _md5(path, progress) != md5[path.name]]
    if others:
        names = ", ".join(path.name for path in others)
        progress.line(
            f"{others[0].parent}: {names}: not as published (by MD5); used as found. "
            "If that is not meant, get the official files again"
        )


def _md5(path: Path, progress: Progress) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with readable(path), path.open("rb") as file:
        size = path.stat().st_size
        with (progress if size >= _LONG else SILENT).task(f"hashing {path.name}", size, "bytes") as advance:
            while block := file.read(_BLOCK):
                digest.update(block)
                advance(len(block))
    return digest.hexdigest()
