"""Preparing a dataset: its .beton files are there, are whole, and are the ones asked for; or are written."""

import shutil
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastar._version import __version__
from fastar.config import DatasetSpec, dataset_spec
from fastar.data.encode import Encoding
from fastar.data.ffcv.checksums import Checksums, measured, verify_beton
from fastar.data.ffcv.folder import (
    PARTIAL,
    VARIABLE,
    DatasetFiles,
    Exif,
    is_finished,
    locked_folder,
    open_files,
    publish,
    refuse_foreign,
)
from fastar.data.ffcv.format import FixedLayout, Layout, VariableLayout, check_beton
from fastar.data.ffcv.write import predicted_bytes, write_beton
from fastar.data.raw.class_folders import find_images
from fastar.data.raw.find import find_raw, note_other_files
from fastar.data.raw.raw_split import RawDataset, RawSplit, UnusableImage
from fastar.data.sampling import balanced_subset, file_order
from fastar.errors import FastarError
from fastar.runtime.progress import SILENT, Progress, size_text


@dataclass(frozen=True)
class Form:
    """The form in which images of any size are written; None: as the files are that are there, or the default.

    Args:
        encoding: of an image.
        shuffled: write in a fixed shuffled order (the default), so that any part of a file holds all classes; False
            keeps the raw order, by class, which slow disks read faster.
        val_share: of each class, for testing, where the raw data are one folder of class folders (see `split_class`).
        exif: "apply" turns images as their EXIF orientation says; "ignore" (the default) keeps pixels as they are
            stored, as torchvision's ImageFolder does.
        on_error: what to do with an image that cannot be used: stop with its path, or skip it and list it in the
            metadata.
    """

    encoding: Encoding | None = None
    shuffled: bool | None = None
    val_share: float | None = None
    exif: Exif | None = None
    on_error: Literal["stop", "skip"] = "stop"


def prepare(
    dataset: str,
    *,
    directory: Path,
    raw: RawDataset | Path | None = None,
    own_name: str | None = None,
    form: Form = Form(),
    limit: int | None = None,
    workers: int = 2,
    progress: Progress = SILENT,
) -> DatasetFiles:
    """The files `directory`/NAME/{train,test}.beton, written from raw data if they are not there yet.

    What is there is reused where it is whole and was written in the same form and with the same limit, and, where `raw`
    is given, from the same raw data: of images of one size their content, of others their names and sizes. Otherwise
    FastarError names the difference. Two processes may call this at once: the second waits. Nothing unfinished is left
    behind.

    Args:
        dataset: as `--dataset` takes it.
        directory: where folders of datasets lie.
        raw: the raw data, or where they are; None: where they usually are. Of images of any size see `find_images`.
        own_name: NAME, of the user's own set; None: `dataset`.
        form: of images of any size.
        limit: at most so many images per split, classes balanced.
        workers: processes that encode images of any size.
        progress: told of everything that takes long.
    """
    spec = dataset_spec(dataset)
    for name, value in (("workers", workers), ("limit", limit)):
        if value is not None and value < 1:
            raise FastarError(f"{name}={value} must be at least 1")
    if limit is not None and limit < len(spec.classes):
        raise FastarError(f"limit={limit} is below one image per class; {dataset} needs at least {len(spec.classes)}")
    if form.val_share is not None and not 0 < form.val_share < 1:
        raise FastarError(f"val-share={form.val_share} must be above 0 and below 1, such as 0.1")
    folder = Path(directory) / (own_name or dataset)
    given, finished = raw is not None, is_finished(folder)
    if given and spec.variable_size and form.val_share is None and finished:
        form = replace(form, val_share=open_files(folder).val_share)  # split as it was
    if not isinstance(raw, RawDataset):
        raw = _found(spec, folder, raw, progress, form) if given or not finished else None
    with nullcontext() if finished else locked_folder(folder, progress.line):
        if is_finished(folder):  # or another process has written it meanwhile
            return _reused(folder, spec, raw if given else None, limit, form)
        assert raw is not None
        refuse_foreign(folder)
        return _write(folder, spec, raw, limit, form, workers, progress)


def _found(spec: DatasetSpec, folder: Path, root: Path | None, progress: Progress, form: Form) -> RawDataset:
    if spec.variable_size:
        if root is None:
            raise FastarError(f"{folder}: holds no finished dataset; give the images with --data-root")
        return find_images(Path(root), progress, val_share=form.val_share, upright=form.exif == "apply")
    raw = find_raw(spec, Path(root) if root is not None else None)
    if raw.note is not None:
        progress.line(raw.note)
    return raw


def _reused(folder: Path, spec: DatasetSpec, raw: RawDataset | None, limit: int | None, form: Form) -> DatasetFiles:
    """The finished dataset in `folder`.

    Raises:
        FastarError: damaged, or not in this form.
    """
    files = open_files(folder)
    have = files.metadata
    wanted: list[tuple[str, Any, Any]] = [("limit", have["settings"]["limit"], limit)]
    if spec.variable_size != files.variable_size:
        wanted.insert(0, ("kind", have.get("kind") or "images of one size", VARIABLE if spec.variable_size else None))
    elif spec.variable_size:
        for key in ("encoding", "shuffled", "val_share", "exif"):
            wanted.append((key.replace("_", "-"), getattr(files, key), getattr(form, key)))
    else:
        for key in ("name", "classes", "channels", "height", "width", "mean", "std"):
            value = getattr(spec, key)
            value = list(value) if isinstance(value, tuple) else value
            wanted.insert(-1, (key, have["dataset" if key == "name" else key], value))
    for key, there, value in wanted:
        if there != value and (value is not None or key in ("limit", "kind")):
            raise FastarError(
                f"{folder}: written with {key}={there}, asked for {key}={value}; "
                "delete the folder or use another directory"
            )
    if raw is not None and _source(spec, raw) != (have["source"] if spec.variable_size else have["source"]["digest"]):
        raise FastarError(
            f"{folder}: written from other images than --data-root holds; delete the folder or use another directory"
        )
    return files


def _source(spec: DatasetSpec, raw: RawDataset) -> Any:
    """The digest of the raw data, or those of both splits."""
    return {"train": raw.train.digest, "test": raw.test.digest} if spec.variable_size else raw.digest


def _write(
    folder: Path,
    spec: DatasetSpec,
    raw: RawDataset,
    limit: int | None,
    form: Form,
    workers: int,
    progress: Progress,
) -> DatasetFiles:
    name, skip = folder.name, spec.variable_size and form.on_error == "skip"
    encoding, shuffled = form.encoding or Encoding(), form.shuffled is not False
    splits: dict[str, RawSplit] = {"train": raw.train, "test": raw.test}
    chosen = {split: _chosen(spec, split, images, limit, shuffled) for split, images in splits.items()}
    classes, shape = len(raw.train.classes), (spec.height, spec.width, spec.channels)
    layouts: dict[str, Layout] = {}
    for split, indices in chosen.items():
        count = len(indices)
        variable = VariableLayout(count, classes, encoding)
        layouts[split] = variable if spec.variable_size else FixedLayout(count, classes, shape)
    checksums: dict[str, Checksums] = {}
    skipped = {}
    try:
        # Both splits before the first is begun: hours lie between their beginnings.
        predicted = sum(predicted_bytes(layouts[split], splits[split], chosen[split], skip=skip) for split in splits)
        _check_space(folder, sum(map(len, chosen.values())), predicted, spec.variable_size, progress)
        if limit is None or not spec.variable_size:  # of a few images most of an archive is not read
            note_other_files(dataset_spec("imagenet").md5 if spec.variable_size else spec.md5, raw.files, progress)
        for split, images in splits.items():
            indices, partial, what = chosen[split], folder / f"{split}.beton{PARTIAL}", f"{name} {split}"
            told: dict[str, Any] = {"progress": progress, "description": f"writing {what}"}
            bad = write_beton(partial, images, indices, layouts[split], workers=workers, skip=skip, **told)
            skipped[split] = [{"path": images.where(int(indices[n])), "reason": bad[n]} for n in sorted(bad)]
            indices = np.delete(indices, list(bad))
            layouts[split] = replace(layouts[split], count=len(indices))
            told["description"] = f"verifying {what}"
            checksums[split] = verify_beton(partial, images, indices, layouts[split], **told)
    except UnusableImage as error:
        if not spec.variable_size:
            raise
        raise FastarError(f"{error}, or leave such images out: python tools/write_ffcv.py --on-error skip") from error
    metadata: dict[str, Any] = {
        "dataset": name,
        "classes": list(raw.train.classes),
        "counts": {split: layout.count for split, layout in layouts.items()},
        "settings": {"limit": limit},
        "content": {split: sums.content for split, sums in checksums.items()},
        "versions": {"fastar": __version__, **{package: version(package) for package in ("ffcv", "numpy", "pillow")}},
    }
    if spec.variable_size:
        metadata["settings"] |= {"on_error": form.on_error, "val_share": form.val_share}
        metadata["settings"] |= {"exif": form.exif} if form.exif == "apply" else {}
        metadata |= {"kind": VARIABLE, "encoding": asdict(encoding), "shuffled": shuffled, "skipped": skipped}
        metadata |= {"mean": list(spec.mean or ()), "std": list(spec.std or ()), "source": _source(spec, raw)}
    else:
        metadata |= _metadata_of_one_size(spec, raw, folder / f"train.beton{PARTIAL}", layouts["train"])
        metadata["settings"]["encoding"] = "raw"
    return publish(folder, metadata, checksums)


def _check_space(folder: Path, count: int, predicted: int, variable_size: bool, progress: Progress) -> None:
    """Raise FastarError where the disk has no space for the files."""
    free = shutil.disk_usage(folder).free
    needs = f"{count:,} images need about {size_text(predicted)}"
    if predicted > free:
        advice = "free some, or use a smaller preset" if variable_size else "free some"
        raise FastarError(f"{folder}: {needs}, the disk has {size_text(free)} free; {advice}")
    if variable_size:
        progress.line(f"{folder.name}: {needs} in {folder} ({size_text(free)} free)")


def _metadata_of_one_size(spec: DatasetSpec, raw: RawDataset, train: Path, layout: Layout) -> dict[str, Any]:
    mean, std, statistics = spec.mean, spec.std, "fixed (ImageNet)"
    if mean is None or std is None:
        (mean, std), statistics = measured(check_beton(train, layout)), "measured on the train split"
    return {
        "channels": spec.channels,
        "height": spec.height,
        "width": spec.width,
        "mean": list(mean),
        "std": list(std),
        "statistics": statistics,
        "augmentation": asdict(spec.augmentation),
        "source": {"kind": raw.kind, "digest": raw.digest},
    }


def _chosen(spec: DatasetSpec, split: str, raw: RawSplit, limit: int | None, shuffled: bool) -> np.ndarray:
    """The images to write, as indices into `raw`, in the order of the file."""
    indices = np.arange(len(raw))
    if limit is not None and limit < len(raw):
        indices = balanced_subset(raw.labels, limit, "images" if spec.variable_size else spec.name, split)
    return indices[file_order(len(indices), split)] if shuffled and spec.variable_size else indices
