"""Making sure that a dataset's .beton files exist, are whole, and are the ones asked for."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fastar import __version__
from fastar.data.beton import BetonLayout, check_beton, fingerprint
from fastar.data.find import find_raw
from fastar.data.raw import RawDataset, RawSplit
from fastar.data.registry import Augmentation, DatasetSpec, dataset_spec
from fastar.data.sampling import balanced_subset
from fastar.data.verify import SplitSummary, verify_beton
from fastar.errors import FastarError
from fastar.progress import SILENT, Progress

SPLITS = ("train", "test")
METADATA = "metadata.json"
_FORMAT = 1
PARTIAL = ".partial"


@dataclass(frozen=True)
class DatasetFiles:
    """A finished dataset on disk: two .beton files and what their metadata file says of them."""

    train: Path
    test: Path
    metadata: dict[str, Any]

    @property
    def name(self) -> str:
        return self.metadata["dataset"]

    @property
    def digest(self) -> str:
        """SHA-256 of what a network sees: pixels, labels, classes, shape and normalisation of both splits."""
        return self.metadata["digest"]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.metadata["classes"])

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.metadata["channels"], self.metadata["height"], self.metadata["width"]

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(**self.metadata["augmentation"])

    def count(self, split: str) -> int:
        return self.metadata["counts"][split]

    def layout(self, split: str) -> BetonLayout:
        channels, height, width = self.input_shape
        return BetonLayout(self.count(split), height, width, channels, len(self.classes))

    def path(self, split: str) -> Path:
        if split not in SPLITS:
            raise ValueError(f"split must be 'train' or 'test', not {split!r}")
        return self.train if split == "train" else self.test


def prepare(
    name: str,
    *,
    data_root: Path | None,
    directory: Path,
    workers: int = 2,
    progress: Progress = SILENT,
    limit: int | None = None,
) -> DatasetFiles:
    """The files `directory`/`name`/{train,test}.beton, written from raw data if they are not there yet.

    What is there is reused where it is whole and was written from the same settings (and, where `data_root` is given,
    from the same raw data); otherwise FastarError names the difference. `limit` keeps at most so many images of each
    split, classes balanced. Two processes may call this at once: the second waits. Nothing unfinished is left behind.
    """
    spec = dataset_spec(name)
    if limit is not None and limit < len(spec.classes):
        raise FastarError(f"limit={limit} is below one image per class; {name} needs at least {len(spec.classes)}")
    if workers < 1:
        raise FastarError(f"workers={workers} must be at least 1")
    folder = Path(directory) / name
    if (folder / METADATA).exists() and all((folder / f"{split}.beton").exists() for split in SPLITS):
        return _reuse(folder, spec, data_root, limit)
    raw = find_raw(spec, Path(data_root) if data_root is not None else None)
    with locked_folder(folder):
        if (folder / METADATA).exists() and all((folder / f"{split}.beton").exists() for split in SPLITS):
            return _reuse(folder, spec, data_root, limit)
        refuse_foreign(folder)
        return _write(folder, spec, raw, limit, workers, progress)


def open_files(folder: Path) -> DatasetFiles:
    """The finished dataset in `folder`; FastarError where its metadata or files are missing, damaged or replaced."""
    path = folder / METADATA
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        files = DatasetFiles(folder / "train.beton", folder / "test.beton", metadata)
        if metadata["format"] != _FORMAT:
            raise FastarError(
                f"{path}: format {metadata['format']}, this fastar reads {_FORMAT}; delete {folder} and write it again"
            )
        for split in SPLITS:
            if not files.path(split).exists():
                raise FastarError(f"{files.path(split)}: missing; delete {folder} and write it again")
            if fingerprint(files.path(split)) != metadata["files"][split]:
                # The structural check comes first: it can say what is wrong.
                check_beton(files.path(split), files.layout(split))
                raise FastarError(
                    f"{files.path(split)}: not the file that {METADATA} describes (replaced or damaged); "
                    f"delete {folder} and write it again"
                )
        if metadata["digest"] != _digest(metadata):
            raise FastarError(f"{path}: edited by hand or damaged; delete {folder} and write it again")
    except OSError as error:
        raise FastarError(f"{path}: cannot be read ({error.strerror}); check the folder") from error
    except FastarError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise FastarError(f"{path}: damaged ({error}); delete {folder} and write it again") from error
    return files


def _reuse(folder: Path, spec: DatasetSpec, data_root: Path | None, limit: int | None) -> DatasetFiles:
    files = open_files(folder)
    have = files.metadata
    wanted: dict[str, Any] = {
        "dataset": spec.name,
        "classes": list(spec.classes),
        "channels": spec.channels,
        "height": spec.height,
        "width": spec.width,
    }
    if spec.mean is not None and spec.std is not None:
        wanted |= {"mean": list(spec.mean), "std": list(spec.std)}
    for key, value in wanted.items():
        if have[key] != value:
            raise FastarError(
                f"{folder}: written with {key}={have[key]}, {spec.name} has {key}={value}; "
                "delete the folder or use another directory"
            )
    if have["settings"]["limit"] != limit:
        raise FastarError(
            f"{folder}: written with limit={have['settings']['limit']}, asked for limit={limit}; "
            "delete the folder or use another directory"
        )
    if data_root is not None and spec.reader != "digits":
        digest = find_raw(spec, Path(data_root)).digest
        if digest != have["source"]["digest"]:
            raise FastarError(
                f"{folder}: written from other raw data (source digest {have['source']['digest'][:12]}) than "
                f"{data_root} holds ({digest[:12]}); delete the folder or use another directory"
            )
    return files


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold `folder` (created if needed) for this process; remove what is unfinished in it, before and after."""
    created = []
    try:
        for path in [*reversed(folder.parents), folder]:
            if not path.exists():
                path.mkdir(exist_ok=True)
                created.append(path)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise FastarError(f"{folder}: cannot be created ({error.strerror}); choose another directory") from error
    try:
        # Some network file systems know no locks; there two writers at once are the user's own risk.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        folder.mkdir(parents=True, exist_ok=True)  # one that failed while this one waited may have removed it
        _remove_partial(folder)
        try:
            yield
        finally:
            _remove_partial(folder)
            for path in reversed(created):
                if not any(path.iterdir()):
                    path.rmdir()
    finally:
        os.close(handle)


def _remove_partial(folder: Path) -> None:
    for path in folder.glob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)


def refuse_foreign(folder: Path) -> None:
    """A .beton that no metadata file describes is not ours to overwrite. (Metadata is written before the renames.)"""
    if (folder / METADATA).exists():
        return
    for split in SPLITS:
        path = folder / f"{split}.beton"
        if path.exists():
            raise FastarError(f"{path}: has no {METADATA} beside it, so fastar did not write it; move it away")


def _write(
    folder: Path, spec: DatasetSpec, raw: RawDataset, limit: int | None, workers: int, progress: Progress
) -> DatasetFiles:
    # Imported here: reading finished files needs none of it.
    from fastar.data.writing import disk_full, write_beton

    layouts, summaries = {}, {}
    splits: dict[str, RawSplit] = {"train": raw.train, "test": raw.test}
    for split, source in splits.items():
        indices = np.arange(len(source))
        if limit is not None and limit < len(source):
            indices = balanced_subset(source.labels, limit, spec.name, split)
        layout = BetonLayout(len(indices), spec.height, spec.width, spec.channels, len(spec.classes))
        partial = folder / f"{split}.beton{PARTIAL}"
        description = f"{spec.name} {split}"
        write_beton(
            partial, source, indices, layout, workers=workers, progress=progress, description=f"writing {description}"
        )
        summaries[split] = verify_beton(
            partial, source, indices, layout, progress=progress, description=f"verifying {description}"
        )
        layouts[split] = layout
    metadata = _metadata(folder, spec, raw, limit, summaries)
    try:
        # Metadata first: a .beton beside it counts only if it is the file described there, so that a kill between
        # any two of these steps leaves a folder that is either finished or known to be unfinished.
        replace_text(folder / METADATA, json.dumps(metadata, indent=1) + "\n")
        for split in SPLITS:
            os.replace(folder / f"{split}.beton{PARTIAL}", folder / f"{split}.beton")
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise disk_full(folder / METADATA, error) from error
    return DatasetFiles(folder / "train.beton", folder / "test.beton", metadata)


def replace_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def _metadata(
    folder: Path, spec: DatasetSpec, raw: RawDataset, limit: int | None, summaries: dict[str, SplitSummary]
) -> dict[str, Any]:
    own = spec.mean is None or spec.std is None
    mean, std = (summaries["train"].mean, summaries["train"].std) if own else (spec.mean, spec.std)
    assert mean is not None
    assert std is not None
    metadata = {
        "format": _FORMAT,
        "dataset": spec.name,
        "classes": list(spec.classes),
        "channels": spec.channels,
        "height": spec.height,
        "width": spec.width,
        "counts": {split: summary.count for split, summary in summaries.items()},
        "mean": list(mean),
        "std": list(std),
        "statistics": "measured on the train split" if own else "fixed (ImageNet)",
        "augmentation": asdict(spec.augmentation),
        "settings": {"limit": limit, "encoding": "raw"},
        "source": {"kind": raw.kind, "digest": raw.digest},
        "content": {split: summary.digest for split, summary in summaries.items()},
        "files": {split: fingerprint(folder / f"{split}.beton{PARTIAL}") for split in SPLITS},
        "versions": {
            "fastar": __version__,
            **{package: version(package) for package in ("ffcv", "numpy", "pillow")},
        },
    }
    return metadata | {"digest": _digest(metadata)}


def _digest(metadata: dict[str, Any]) -> str:
    keys = ("dataset", "classes", "channels", "height", "width", "counts", "mean", "std", "content")
    return hashlib.sha256(json.dumps({key: metadata[key] for key in keys}, sort_keys=True).encode()).hexdigest()
