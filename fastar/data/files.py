"""Making sure that a dataset's .beton files exist, are whole, and are the ones asked for."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastar._version import __version__
from fastar.config.datasets import Augmentation, DatasetSpec, dataset_spec
from fastar.data.ffcv.folder import PARTIAL, Files, is_finished, locked_folder, open_finished, publish, refuse_foreign
from fastar.data.ffcv.format import BetonLayout
from fastar.data.ffcv.verify import SplitSummary, verify_beton
from fastar.data.raw.find import find_raw
from fastar.data.raw.official import note_other_files
from fastar.data.raw.raw_split import RawDataset, RawSplit
from fastar.data.sampling import balanced_subset
from fastar.errors import FastarError
from fastar.runtime.progress import SILENT, Progress


@dataclass(frozen=True)
class DatasetFiles(Files):
    """A finished dataset of images of one size."""

    DIGESTED: ClassVar[tuple[str, ...]] = (
        "dataset",
        "classes",
        "channels",
        "height",
        "width",
        "counts",
        "mean",
        "std",
        "content",
    )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.metadata["channels"], self.metadata["height"], self.metadata["width"]

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(**self.metadata["augmentation"])

    def layout(self, split: str) -> BetonLayout:
        channels, height, width = self.input_shape
        return BetonLayout(self.count(split), height, width, channels, len(self.classes))


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
    if is_finished(folder):
        return _reuse(folder, spec, data_root, limit)
    raw = find_raw(spec, Path(data_root) if data_root is not None else None)
    if raw.note is not None:
        progress.line(raw.note)
    note_other_files(spec.md5, raw.files, progress)
    with locked_folder(folder):
        if is_finished(folder):
            return _reuse(folder, spec, data_root, limit)
        refuse_foreign(folder)
        return _write(folder, spec, raw, limit, workers, progress)


def open_files(folder: Path) -> DatasetFiles:
    """The finished dataset in `folder`; FastarError where its metadata or files are missing, damaged or replaced."""
    return open_finished(folder, DatasetFiles)


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


def _write(
    folder: Path, spec: DatasetSpec, raw: RawDataset, limit: int | None, workers: int, progress: Progress
) -> DatasetFiles:
    # Imported here: reading finished files needs none of it.
    from fastar.data.ffcv.write import write_beton

    summaries = {}
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
    return publish(folder, _metadata(spec, raw, limit, summaries), DatasetFiles)


def _metadata(
    spec: DatasetSpec, raw: RawDataset, limit: int | None, summaries: dict[str, SplitSummary]
) -> dict[str, Any]:
    own = spec.mean is None or spec.std is None
    mean, std = (summaries["train"].mean, summaries["train"].std) if own else (spec.mean, spec.std)
    assert mean is not None
    assert std is not None
    return {
        "format": DatasetFiles.FORMAT,
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
        "versions": {
            "fastar": __version__,
            **{package: version(package) for package in ("ffcv", "numpy", "pillow")},
        },
    }
