"""A data set's folder: two .beton files and a metadata file that says what they must be; finished, or not there."""

import fcntl
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fastar.data.ffcv.checksums import Checksums, checksums_path
from fastar.data.ffcv.format import Layout, check_beton, fingerprint
from fastar.data.raw.listing import readable
from fastar.errors import FastarError
from fastar.runs import write_atomically
from fastar.runtime.json_files import content_digest, read_object

SPLITS = ("train", "test")
METADATA = "metadata.json"
PARTIAL = ".partial"


@dataclass(frozen=True)
class Files(ABC):
    """A finished dataset on disk: `folder`/{train,test}.beton and what their metadata file says of them."""

    folder: Path
    metadata: dict[str, Any]

    FORMAT: ClassVar[int] = 2
    KIND: ClassVar[str | None] = None
    """What the metadata calls this kind of dataset; None: it says nothing."""
    DIGESTED: ClassVar[tuple[str, ...]]
    """Keys of the metadata that the digest covers."""

    @property
    def name(self) -> str:
        return self.metadata["dataset"]

    @property
    def digest(self) -> str:
        """SHA-256 of what a network can see: images, labels, classes and normalisation of both splits."""
        return self.metadata["digest"]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.metadata["classes"])

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of pixels in 0..1, as is `std`."""
        return tuple(self.metadata["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        return tuple(self.metadata["std"])

    @property
    def train(self) -> Path:
        return self.path("train")

    @property
    def test(self) -> Path:
        return self.path("test")

    def count(self, split: str) -> int:
        return self.metadata["counts"][split]

    def path(self, split: str) -> Path:
        if split not in SPLITS:
            raise ValueError(f"split must be 'train' or 'test', not {split!r}")
        return self.folder / f"{split}.beton"

    @abstractmethod
    def layout(self, split: str) -> Layout:
        """What the split's file must hold."""

    @classmethod
    def digest_of(cls, metadata: dict[str, Any]) -> str:
        return content_digest({key: metadata[key] for key in cls.DIGESTED})


Kind = TypeVar("Kind", bound=Files)


def is_finished(folder: Path) -> bool:
    with readable(folder):
        return all((folder / name).exists() for name in (METADATA, *(f"{split}.beton" for split in SPLITS)))


def open_finished(folder: Path, kind: type[Kind]) -> Kind:
    """The finished dataset in `folder`; FastarError where its metadata or files are missing, damaged or replaced."""
    files = open_metadata(folder, kind)
    for split in SPLITS:
        check_unchanged(files, split)
    return files


def open_metadata(folder: Path, *kinds: type[Kind]) -> Kind:
    """The dataset that the metadata in `folder` describe, of one of these kinds; FastarError where they are missing or
    damaged. Nothing of its files is read."""
    path, again = folder / METADATA, f"delete {folder} and write it again"
    try:
        metadata = read_object(path)
        found = next((kind for kind in kinds if metadata.get("kind") == kind.KIND), None)
        if found is None:
            raise FastarError(f"{path}: holds {metadata.get('kind') or 'images of one size'}; use another directory")
        if metadata["format"] not in (1, found.FORMAT):
            raise FastarError(f"{path}: format {metadata['format']}, this fastar reads {found.FORMAT}; {again}")
        # Format 1 is without a digest of all; it then says nothing of what the dataset's own digest does not cover.
        whole = (metadata["format"] == 1 and "sha256" not in metadata) or metadata["sha256"] == _sha256(metadata)
        if not whole or metadata["digest"] != found.digest_of(metadata):
            raise FastarError(f"{path}: edited by hand or damaged; {again}")
    except OSError as error:
        raise FastarError(f"{error.filename or path}: cannot be read ({error.strerror}); check the folder") from error
    except FastarError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FastarError(f"{path}: damaged ({error}); {again}") from error
    return found(folder, metadata)


def check_unchanged(files: Files, split: str) -> None:
    """Raise FastarError where a split's file is not the one that was written, as far as its fingerprint tells."""
    path, again = files.path(split), f"delete {files.folder} and write it again"
    try:
        known, layout = files.metadata["files"][split], files.layout(split)
    except (KeyError, TypeError, ValueError) as error:
        raise FastarError(f"{files.folder / METADATA}: damaged ({error}); {again}") from error
    with readable(path):
        if not path.is_file():  # a pipe would be waited for
            raise FastarError(f"{path}: {'is no file' if path.exists() else 'missing'}; {again}")
        if fingerprint(path) != known:
            check_beton(path, layout)  # first: it can say what is wrong
            raise FastarError(f"{path}: not the file that {METADATA} describes (replaced or damaged); {again}")


def _sha256(metadata: dict[str, Any]) -> str:
    """The digest of all metadata but itself."""
    return content_digest({key: value for key, value in metadata.items() if key != "sha256"})


def publish(
    folder: Path, metadata: dict[str, Any], kind: type[Kind], checksums: Mapping[str, Checksums] | None = None
) -> Kind:
    """Make the partial files in `folder` the finished dataset that `metadata` (files and digests are added) describes.

    The `checksums` of each split's images are kept beside it. Metadata first: a .beton beside it counts only if it is
    the file described there, so that a kill between any two of these steps leaves a folder that is either finished or
    known to be unfinished.
    """
    from fastar.data.ffcv.write import disk_full  # reading finished files needs none of it

    metadata = metadata | {"files": {split: fingerprint(folder / f"{split}.beton{PARTIAL}") for split in SPLITS}}
    metadata["digest"] = kind.digest_of(metadata)
    metadata["sha256"] = _sha256(metadata)
    try:
        write_atomically(folder / METADATA, (json.dumps(metadata, indent=1) + "\n").encode())
        for split, sums in (checksums or {}).items():
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
    return kind(folder, metadata)


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
    for path in (*folder.glob(f"*{PARTIAL}"), *folder.glob(".*.tmp")):  # the latter of `write_atomically`
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # a folder of that name, or one in which nothing may be removed
            raise FastarError(f"{path}: cannot be removed ({error.strerror}); move it away") from error


def refuse_foreign(folder: Path) -> None:
    """A .beton that no metadata file describes is not ours to overwrite. (Metadata is written before the renames.)"""
    if (folder / METADATA).exists():
        return
    for split in SPLITS:
        path = folder / f"{split}.beton"
        if path.exists():
            raise FastarError(f"{path}: has no {METADATA} beside it, so fastar did not write it; move it away")
