"""Making sure that the .beton files of a set of images of any size (ImageNet, class folders) exist and are whole."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from fastar._version import __version__
from fastar.config.datasets import IMAGENET_MEAN, IMAGENET_STD, dataset_spec
from fastar.data.ffcv.checksums import Checksums, checksums_path, kept_checksums, take_checksums
from fastar.data.ffcv.folder import PARTIAL, Files, is_finished, locked_folder, open_finished, publish, refuse_foreign
from fastar.data.ffcv.format import check_beton
from fastar.data.raw.archives import official_files
from fastar.data.raw.imagefolder import find_images
from fastar.data.raw.official import note_other_files
from fastar.data.raw.raw_split import RawSplit, UnusableImage
from fastar.data.sampling import balanced_subset, file_order
from fastar.data.variable_size import Encoding, VariedLayout, verify_varied
from fastar.errors import FastarError
from fastar.runs import write_atomically
from fastar.runtime.progress import SILENT, Progress, size_text

OnError = Literal["stop", "skip"]
Exif = Literal["ignore", "apply"]


@dataclass(frozen=True)
class ImageFiles(Files):
    """A finished dataset of images of any size."""

    KIND: ClassVar[str | None] = "images of any size"
    DIGESTED: ClassVar[tuple[str, ...]] = (
        "dataset",
        "classes",
        "counts",
        "mean",
        "std",
        "encoding",
        "shuffled",
        "skipped",
        "content",
    )

    @property
    def encoding(self) -> Encoding:
        return Encoding(**self.metadata["encoding"])

    @property
    def shuffled(self) -> bool:
        """The images lie in the files in a fixed shuffled order, else by class."""
        return self.metadata["shuffled"]

    @property
    def skipped(self) -> dict[str, list[dict[str, str]]]:
        """The images of each split that could not be used: path and reason."""
        return self.metadata["skipped"]

    @property
    def val_share(self) -> float | None:
        """The share of each class that was taken for testing from one folder; None: the raw data had both splits."""
        return self.metadata["settings"].get("val_share")

    @property
    def exif(self) -> Exif:
        """apply: the images were turned as their EXIF orientation says."""
        return self.metadata["settings"].get("exif", "ignore")

    def layout(self, split: str) -> VariedLayout:
        return VariedLayout(self.count(split), len(self.classes), self.encoding)

    def checksums(self, split: str, progress: Progress = SILENT) -> Checksums:
        """Those kept beside the split's file. Where there are none that count (an earlier version wrote the file, or
        they are damaged), all of it is read once, compared with the digest of its content, and they are kept."""
        if split not in self._checksums:
            kept = kept_checksums(self.path(split), self.metadata["content"][split])
            self._checksums[split] = kept or self._new_checksums(split, progress)
        return self._checksums[split]

    @cached_property
    def _checksums(self) -> dict[str, Checksums]:
        return {}

    def _new_checksums(self, split: str, progress: Progress) -> Checksums:
        path, layout = self.path(split), self.layout(split)
        progress.line(f"{path}: no checksums of its images are kept; it is read once to make them")
        new = take_checksums(path, layout, check_beton(path, layout), progress, f"checking {self.name} {split}")
        if new.content != self.metadata["content"][split]:
            raise FastarError(
                f"{path}: its images are not those that were written (damaged or replaced); "
                f"delete {self.folder} and write it again"
            )
        try:
            write_atomically(checksums_path(path), new.to_bytes())
        except FastarError as error:
            progress.line(f"{error}; each run reads the whole file until they can be kept")
        return new


def prepare_images(
    name: str,
    *,
    data_root: Path | None,
    directory: Path,
    encoding: Encoding | None = None,
    workers: int = 2,
    limit: int | None = None,
    shuffled: bool | None = None,
    on_error: OnError = "stop",
    val_share: float | None = None,
    exif: Exif | None = None,
    progress: Progress = SILENT,
) -> ImageFiles:
    """The files `directory`/`name`/{train,test}.beton, written from `data_root` if they are not there yet.

    What is there is reused where it is whole and was written with the same encoding, order, share and exif (None:
    whatever it has, or the default) and limit and, where `data_root` is given, from files of the same names and sizes;
    otherwise FastarError names the difference. Two processes may call this at once: the second waits. Nothing
    unfinished is left behind.

    Args:
        name: of the dataset, and of its folder.
        data_root: train/<class>/* and val/<class>/*, or ImageNet's official archives (see `find_images`).
        directory: where folders of datasets lie.
        encoding: how the images are stored.
        workers: writer processes.
        limit: at most so many images per split, classes balanced.
        shuffled: write in a fixed shuffled order (the default), so that any part of a file holds all classes; False
            keeps the raw order, by class, which slow disks read faster.
        on_error: what to do with an image that cannot be used: stop with its path, or skip it and list it in the
            metadata.
        val_share: of each class, for testing, where `data_root` is one folder of class folders (see `split_class`).
        exif: "apply" turns images as their EXIF orientation says; "ignore" (the default) keeps pixels as they are
            stored, as torchvision's ImageFolder does.
        progress: told of everything that takes long.
    """
    if workers < 1:
        raise FastarError(f"workers={workers} must be at least 1")
    if limit is not None and limit < 1:
        raise FastarError(f"limit={limit} must be at least 1")
    if val_share is not None and not 0 < val_share < 1:
        raise FastarError(f"val-share={val_share} must be above 0 and below 1, such as 0.1")
    folder = Path(directory) / name
    if data_root is not None and val_share is None and is_finished(folder):  # split as it was
        val_share = open_images(folder).val_share
    splits = None
    if data_root is not None:
        splits = find_images(Path(data_root), progress, val_share=val_share, upright=exif == "apply")
    if is_finished(folder):
        return _reuse(folder, splits, encoding, limit, shuffled, val_share, exif)
    if splits is None:
        raise FastarError(f"{folder}: holds no finished dataset; give the images with --data-root")
    with locked_folder(folder):
        if is_finished(folder):
            return _reuse(folder, splits, encoding, limit, shuffled, val_share, exif)
        refuse_foreign(folder)
        settings: dict[str, Any] = {"limit": limit, "on_error": on_error, "val_share": val_share}
        if exif == "apply":
            settings["exif"] = exif
        try:
            return _write(
                folder, name, splits, encoding or Encoding(), workers, shuffled is not False, settings, progress
            )
        except UnusableImage as error:
            raise FastarError(
                f"{error}, or leave such images out: python tools/write_ffcv.py --on-error skip"
            ) from error


def open_images(folder: Path) -> ImageFiles:
    """The finished dataset in `folder`; FastarError where its metadata or files are missing, damaged or replaced."""
    return open_finished(folder, ImageFiles)


def _reuse(
    folder: Path,
    splits: Mapping[str, RawSplit] | None,
    encoding: Encoding | None,
    limit: int | None,
    shuffled: bool | None,
    val_share: float | None,
    exif: Exif | None,
) -> ImageFiles:
    files = open_images(folder)
    advice = "delete the folder or use another directory"
    for what, have, asked in (
        ("encoding", files.encoding, encoding),
        ("limit", files.metadata["settings"]["limit"], limit),
        ("shuffled", files.shuffled, shuffled),
        ("val-share", files.val_share, val_share),
        ("exif", files.exif, exif),
    ):
        if have != asked and (asked is not None or what == "limit"):
            raise FastarError(f"{folder}: written with {what}={have}, asked for {what}={asked}; {advice}")
    if splits is not None and {s: split.digest for s, split in splits.items()} != files.metadata["source"]:
        raise FastarError(f"{folder}: written from other images than --data-root holds; {advice}")
    return files


def _write(
    folder: Path,
    name: str,
    splits: Mapping[str, RawSplit],
    encoding: Encoding,
    workers: int,
    shuffled: bool,
    settings: dict[str, Any],
    progress: Progress,
) -> ImageFiles:
    # Imported here: reading finished files needs none of it.
    from fastar.data.ffcv.write import predicted_bytes, write_beton

    skip = settings["on_error"] == "skip"
    chosen = {split: _chosen(split, raw, settings["limit"], shuffled) for split, raw in splits.items()}
    layouts = {s: VariedLayout(len(chosen[s]), len(raw.classes), encoding) for s, raw in splits.items()}
    # Both splits before the first is begun: hours lie between their beginnings.
    predicted = sum(predicted_bytes(layouts[s], raw, chosen[s], workers, skip=skip) for s, raw in splits.items())
    free = shutil.disk_usage(folder).free
    needs = f"{sum(map(len, chosen.values())):,} images need about {size_text(predicted)}"
    if predicted > free:
        raise FastarError(f"{folder}: {needs}, the disk has {size_text(free)} free; free some, or use a smaller preset")
    progress.line(f"{name}: {needs} in {folder} ({size_text(free)} free)")
    if settings["limit"] is None:  # of a few images most of an archive is not read
        note_other_files(dataset_spec("imagenet").md5, official_files(splits.values()), progress)
    checksums, counts = {}, {}
    skipped: dict[str, list[dict[str, str]]] = {}
    for split, raw in splits.items():
        partial = folder / f"{split}.beton{PARTIAL}"
        more: dict[str, Any] = {"progress": progress}
        bad = write_beton(
            partial,
            raw,
            chosen[split],
            layouts[split],
            workers=workers,
            skip=skip,
            description=f"writing {name} {split}",
            **more,
        )
        kept = np.delete(chosen[split], list(bad))
        layout = replace(layouts[split], count=len(kept))
        checksums[split] = verify_varied(partial, raw, kept, layout, description=f"verifying {name} {split}", **more)
        counts[split] = len(kept)
        skipped[split] = [
            {"path": raw.where(int(chosen[split][position])), "reason": bad[position]} for position in sorted(bad)
        ]
    metadata: dict[str, Any] = {
        "format": ImageFiles.FORMAT,
        "kind": ImageFiles.KIND,
        "dataset": name,
        "classes": list(splits["train"].classes),
        "counts": counts,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "encoding": asdict(encoding),
        "shuffled": shuffled,
        "skipped": skipped,
        "settings": settings,
        "source": {split: raw.digest for split, raw in splits.items()},
        "content": {split: sums.content for split, sums in checksums.items()},
        "versions": {"fastar": __version__, **{p: version(p) for p in ("ffcv", "numpy", "pillow")}},
    }
    return publish(folder, metadata, ImageFiles, checksums)


def _chosen(split: str, raw: RawSplit, limit: int | None, shuffled: bool) -> np.ndarray:
    """The images to write, as indices into `raw`, in the order of the file."""
    indices = np.arange(len(raw))
    if limit is not None and limit < len(raw):
        indices = balanced_subset(raw.labels, limit, "images", split)
    return indices[file_order(len(indices), split)] if shuffled else indices
