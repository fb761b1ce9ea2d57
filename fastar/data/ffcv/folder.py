"""A data set's folder: two .beton files and a metadata file that says what they must be; finished, or not there."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastar.config import Augmentation
from fastar.data.content import dataset_digest
from fastar.data.encode import Encoding
from fastar.data.ffcv.checksums import Checksums, checksums_path, kept_checksums, take_checksums
from fastar.data.ffcv.format import Beton, FixedLayout, Layout, VariableLayout, check_beton, damaged, fingerprint
from fastar.data.ffcv.read import read_chosen
from fastar.data.ffcv.write import disk_full
from fastar.data.raw.raw_split import readable
from fastar.errors import FastarError, refusal
from fastar.runs import hold, remove_if_empty, write_atomically
from fastar.runtime.json_files import content_digest, read_object
from fastar.runtime.progress import SILENT, Progress

Exif = Literal["ignore", "apply"]
SPLITS = ("train", "test")
METADATA = "metadata.json"
PARTIAL = ".partial"
FORMAT = 2


VARIABLE = "images of any size"


class DatasetFiles:
    """A finished dataset on disk: `folder`/{train,test}.beton and what their metadata file says of them.

    Attributes:
        name: of the dataset.
        digest: SHA-256 of what a network can see: images, labels, classes and normalisation of both splits.
        variable_size: images are of any size: they stream.
        classes: their names, in the order of labels.
        mean: per channel, of pixels in 0..1, as is `std`.
        std: see `mean`.
        encoding: storage of images of any size; None: they are of one size.
        shuffled: images of any size lie in the files in a fixed shuffled order, else by class.
        skipped: the images of each split that could not be used: path and reason.
        val_share: the share of each class taken for testing from one folder; None: the raw data had both splits.
        exif: "apply": the images were turned as their EXIF orientation says.
    """

    def __init__(self, folder: Path, metadata: dict[str, Any]):
        self.folder, self.metadata = folder, metadata
        self.name: str = metadata["dataset"]
        self.digest: str = metadata["digest"]
        self.variable_size = metadata.get("kind") == VARIABLE
        self.classes = tuple(metadata["classes"])
        self.mean, self.std = tuple(metadata["mean"]), tuple(metadata["std"])
        self.encoding = Encoding(**metadata["encoding"]) if self.variable_size else None
        self.shuffled: bool | None = metadata.get("shuffled")
        self.skipped: dict[str, list[dict[str, str]]] = metadata.get("skipped", {})
        self.val_share: float | None = metadata["settings"].get("val_share")
        self.exif: Exif = metadata["settings"].get("exif", "ignore")
        self._checksums: dict[str, Checksums] = {}

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W), of images of one size."""
        return self.metadata["channels"], self.metadata["height"], self.metadata["width"]

    @property
    def augmentation(self) -> Augmentation:
        """Augmentation in training, of images of one size."""
        return Augmentation(**self.metadata["augmentation"])

    def count(self, split: str) -> int:
        return self.metadata["counts"][split]

    def path(self, split: str) -> Path:
        if split not in SPLITS:
            raise ValueError(f"split must be 'train' or 'test', not {split!r}")
        return self.folder / f"{split}.beton"

    def layout(self, split: str) -> Layout:
        """The content that the split's file must have."""
        count, classes, encoding = self.count(split), len(self.classes), self.encoding
        if encoding is not None:
            return VariableLayout(count, classes, encoding)
        channels, height, width = self.input_shape
        return FixedLayout(count, classes, (height, width, channels))

    def beton(self, split: str) -> Beton:
        """The split's file, its tables checked."""
        return check_beton(self.path(split), self.layout(split))

    def read(
        self, split: str, choose: Callable[[np.ndarray], np.ndarray], progress: Progress, description: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Images uint8 [n, H, W, C] of one size, their labels int64 [n] and positions (sorted) in the split's file.

        The file is read once, and its pixels compared with the digest taken when they were written.

        Args:
            choose: gives the positions, of the labels of all.
        """
        beton = self.beton(split)
        index = choose(beton.labels)
        images, content = read_chosen(beton, index, progress, description)
        if content != self.metadata["content"][split]:
            raise damaged(beton.path, "its pixels are not those that were written (damaged or replaced)")
        return images, beton.labels[index], index

    def checksums(self, split: str, progress: Progress = SILENT) -> Checksums:
        """Checksums of images of any size, kept beside the split's file. Where there are none that count (an earlier
        version wrote the file, or they are damaged), all of it is read once, compared with the digest of its content,
        and they are kept."""
        if split not in self._checksums:
            kept = kept_checksums(self.path(split), self.metadata["content"][split])
            self._checksums[split] = kept or self._new_checksums(split, progress)
        return self._checksums[split]

    def _new_checksums(self, split: str, progress: Progress) -> Checksums:
        path = self.path(split)
        progress.line(f"{path}: no checksums of its images are kept; it is read once to make them")
        new = take_checksums(self.beton(split), progress, f"checking {self.name} {split}")
        if new.content != self.metadata["content"][split]:
            raise damaged(path, "its images are not those that were written (damaged or replaced)")
        try:
            write_atomically(checksums_path(path), new.to_bytes())
        except FastarError as error:
            progress.line(f"{error}; each run reads the whole file until they can be kept")
        return new


def is_finished(folder: Path) -> bool:
    with readable(folder):
        return all((folder / name).exists() for name in (METADATA, *(f"{split}.beton" for split in SPLITS)))


def open_files(folder: Path) -> DatasetFiles:
    """The finished dataset in `folder`; FastarError where its metadata or files are missing, damaged or replaced."""
    files = open_metadata(folder)
    for split in SPLITS:
        check_unchanged(files, split)
    return files


def open_metadata(folder: Path) -> DatasetFiles:
    """The dataset that the metadata in `folder` describe; FastarError where they are missing or damaged. Nothing of its
    files is read."""
    path = folder / METADATA
    try:
        metadata = read_object(path)
        if metadata.get("kind") not in (None, VARIABLE):
            raise FastarError(f"{path}: holds {metadata['kind']}; use another directory")
        if metadata["format"] not in (1, FORMAT):
            raise damaged(path, f"format {metadata['format']}, this fastar reads {FORMAT}")
        # Format 1 is without a digest of all; it then says nothing of what the dataset's own digest does not cover.
        whole = (metadata["format"] == 1 and "sha256" not in metadata) or metadata["sha256"] == _sha256(metadata)
        if not whole or metadata["digest"] != dataset_digest(metadata):
            raise damaged(path, "edited by hand or damaged")
        files = DatasetFiles(folder, metadata)
        for split in SPLITS:
            files.layout(split), metadata["files"][split]["bytes"]
    except OSError as error:
        raise FastarError(f"{error.filename or path}: cannot be read ({error.strerror}); check the folder") from error
    except FastarError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"damaged ({error})") from error
    return files


def check_unchanged(files: DatasetFiles, split: str) -> None:
    """Raise FastarError where a split's file is not the one that was written, as far as its fingerprint tells."""
    path = files.path(split)
    with readable(path):
        if path.is_file() and fingerprint(path) == files.metadata["files"][split]:
            return
    files.beton(split)  # first: it can say what is wrong
    raise damaged(path, f"not the file that {METADATA} describes (replaced or damaged)")


def _sha256(metadata: dict[str, Any]) -> str:
    """The digest of all metadata but itself."""
    return content_digest({key: value for key, value in metadata.items() if key != "sha256"})


def publish(folder: Path, content: dict[str, Any], checksums: Mapping[str, Checksums]) -> DatasetFiles:
    """Make the partial files in `folder` the finished dataset that the metadata `content` (files and digests are added)
    describes.

    The `checksums` of each split's images of any size are kept beside it. Metadata first: a .beton beside it counts
    only if it is the file described there, so that a kill between any two of these steps leaves a folder that is either
    finished or known to be unfinished.
    """
    metadata: dict[str, Any] = {"format": FORMAT, **content}
    metadata["files"] = {split: fingerprint(folder / f"{split}.beton{PARTIAL}") for split in SPLITS}
    metadata["digest"] = dataset_digest(metadata)
    metadata["sha256"] = _sha256(metadata)
    files = DatasetFiles(folder, metadata)
    try:
        write_atomically(folder / METADATA, (json.dumps(metadata, indent=1) + "\n").encode())
        for split, sums in checksums.items() if files.variable_size else ():
            write_atomically(checksums_path(folder / f"{split}.beton"), sums.to_bytes())
        for split in SPLITS:
            os.replace(folder / f"{split}.beton{PARTIAL}", folder / f"{split}.beton")
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise disk_full(folder / METADATA, error) from error
    return files


@contextmanager
def locked_folder(folder: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold `folder` (created if needed) for this process; remove what is unfinished in it, before and after.

    Args:
        say: is told when another process, on any host, is waited for.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    with ExitStack() as lock:
        while True:
            with refusal(f"{folder}: cannot be created", "choose another directory"):
                folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # one that failed while this one waited has removed it
                lock.enter_context(hold(folder, say, wait=True))
                break
        _remove_partial(folder)
        try:
            yield
        finally:
            _remove_partial(folder)
            lock.close()
            for path in created:
                remove_if_empty(path)


def _remove_partial(folder: Path) -> None:
    for path in (*folder.glob(f"*{PARTIAL}"), *folder.glob(".*.tmp")):  # the latter of `write_atomically`
        # A folder may have that name, or nothing may be removed in one.
        with refusal(f"{path}: cannot be removed", "move it away"):
            path.unlink(missing_ok=True)


def refuse_foreign(folder: Path) -> None:
    """Refuse to overwrite a .beton that no metadata file describes. (Metadata is written before the renames.)"""
    if (folder / METADATA).exists():
        return
    for split in SPLITS:
        path = folder / f"{split}.beton"
        if path.exists():
            raise FastarError(f"{path}: has no {METADATA} beside it, so fastar did not write it; move it away")


def verify_folder(folder: Path, progress: Progress = SILENT) -> list[str]:
    """One line for each thing in a finished dataset's folder that is damaged; none: all is as it was written.

    Reads the metadata, both files to the last image, and the checksums. Where the metadata are damaged nothing says
    what the files must be, and that is the only line.
    """
    try:
        files = open_metadata(Path(folder))
    except FastarError as error:
        return [str(error)]
    return [line for split in SPLITS for line in _damages(files, split, progress)]


def _damages(files: DatasetFiles, split: str, progress: Progress) -> list[str]:
    path, content = files.path(split), files.metadata["content"][split]
    found = []
    try:
        now = take_checksums(files.beton(split), progress, f"checking {files.name} {split}")
        kept = kept_checksums(path, content) if files.variable_size else None
        if kept is None and checksums_path(path).exists():
            found.append(f"{checksums_path(path)}: damaged; delete it, and the next run makes it again")
        if kept is not None and (bad := np.flatnonzero(now.images != kept.images)).size:
            what = f"{len(bad)} of {len(now.images)} images are not what was written (first: sample {bad[0]})"
            raise damaged(path, what)
        if now.content != content or (kept is not None and now.tables != kept.tables):
            raise damaged(path, "its images or labels are not those that were written")
        if not found:
            check_unchanged(files, split)
    except FastarError as error:
        found.append(str(error))
    return found
