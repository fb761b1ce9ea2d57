"""Folders of class folders of images of any size (ImageNet's layout), and the .beton files made of them."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastar import __version__
from fastar.data.beton import check_beton, fingerprint
from fastar.data.files import METADATA, PARTIAL, SPLITS, locked_folder, refuse_foreign, replace_text
from fastar.data.folders import SUFFIXES
from fastar.data.registry import IMAGENET_MEAN, IMAGENET_STD
from fastar.data.varied import Encoding, VariedLayout, verify_varied
from fastar.errors import FastarError
from fastar.progress import SILENT, Progress

_FORMAT = 1
_KIND = "images of any size"


class ImageFolderSplit:
    """The images below one folder of class folders, any size, decoded to RGB; classes and files in order of name."""

    def __init__(self, root: Path, classes: tuple[str, ...]):
        self.root, self.classes = root, classes
        label_of = {name: label for label, name in enumerate(classes)}
        self.paths: list[Path] = []
        labels: list[int] = []
        for name in class_names(root):
            if name not in label_of:
                raise FastarError(f"{root / name}: no such class in train/; rename or remove it")
            found = sorted(path for path in (root / name).iterdir() if path.suffix.lower() in SUFFIXES)
            self.paths += found
            labels += [label_of[name]] * len(found)
        if not self.paths:
            raise FastarError(f"{root}: holds no images in class folders")
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self.paths[index]
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise FastarError(f"{path}: {image.mode} pixels are not 8-bit; convert the image")
                pixels = np.array(image.convert("RGB"))
        except FastarError:
            raise
        # Pillow's decoders raise more than OSError on damaged files: SyntaxError (PNG), ValueError, struct.error.
        except Exception as error:
            raise FastarError(f"{path}: cannot be read as an image ({error}); replace or remove it") from error
        return pixels, int(self.labels[index])

    def where(self, index: int) -> str:
        return str(self.paths[index])

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, labels and file sizes: reading every byte of ImageNet would take an hour."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for path, label in zip(self.paths, self.labels, strict=True):
            digest.update(f"{path.relative_to(self.root)}\0{label}\0{path.stat().st_size}\0".encode())
        return digest.hexdigest()


def class_names(root: Path) -> tuple[str, ...]:
    """The class folders of `root`, sorted by name."""
    return tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))


def find_images(root: Path) -> dict[str, ImageFolderSplit]:
    """The splits "train" and "test" in `root`/train and `root`/val (or test); FastarError where they are not."""
    if not (root / "train").is_dir():
        raise FastarError(f"{root}: has no train/ folder; expected train/<class>/*.JPEG and val/<class>/*.JPEG")
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if test is None:
        raise FastarError(f"{root}: has train/ but neither val/ nor test/; put the test images there")
    classes = class_names(root / "train")
    return {"train": ImageFolderSplit(root / "train", classes), "test": ImageFolderSplit(test, classes)}


@dataclass(frozen=True)
class ImageFiles:
    """A finished dataset of images of any size: `folder`/{train,test}.beton and what their metadata file says."""

    folder: Path
    metadata: dict[str, Any]

    @property
    def name(self) -> str:
        return self.metadata["dataset"]

    @property
    def digest(self) -> str:
        """SHA-256 of pixels as stored, labels, classes and normalisation of both splits."""
        return self.metadata["digest"]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.metadata["classes"])

    def count(self, split: str) -> int:
        return self.metadata["counts"][split]

    def layout(self, split: str) -> VariedLayout:
        return VariedLayout(self.count(split), len(self.classes), Encoding(**self.metadata["encoding"]))

    def path(self, split: str) -> Path:
        if split not in SPLITS:
            raise ValueError(f"split must be 'train' or 'test', not {split!r}")
        return self.folder / f"{split}.beton"


def prepare_images(
    name: str,
    *,
    data_root: Path | None,
    directory: Path,
    encoding: Encoding | None = None,
    workers: int = 2,
    progress: Progress = SILENT,
) -> ImageFiles:
    """The files `directory`/`name`/{train,test}.beton, written from `data_root` if they are not there yet.

    What is there is reused where it is whole and was written with the same encoding (None: whatever it has, or the
    default) and, where `data_root` is given, from files of the same names and sizes; otherwise FastarError names the
    difference. Two processes may call this at once: the second waits. Nothing unfinished is left behind.
    """
    if workers < 1:
        raise FastarError(f"workers={workers} must be at least 1")
    folder = Path(directory) / name
    splits = find_images(Path(data_root)) if data_root is not None else None
    if _finished(folder):
        return _reuse(folder, splits, encoding)
    if splits is None:
        raise FastarError(f"{folder}: holds no finished dataset; give the images with --data-root")
    with locked_folder(folder):
        if _finished(folder):
            return _reuse(folder, splits, encoding)
        refuse_foreign(folder)
        return _write(folder, name, splits, encoding or Encoding(), workers, progress)


def open_images(folder: Path) -> ImageFiles:
    """The finished dataset in `folder`; FastarError where its metadata or files are missing, damaged or replaced."""
    path = folder / METADATA
    again = f"delete {folder} and write it again"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        if (metadata["kind"], metadata["format"]) != (_KIND, _FORMAT):
            raise FastarError(f"{path}: not of {_KIND} in format {_FORMAT}; {again}")
        files = ImageFiles(folder, metadata)
        for split in SPLITS:
            if fingerprint(files.path(split)) != metadata["files"][split]:
                check_beton(files.path(split), files.layout(split))  # can say what is wrong
                raise FastarError(f"{files.path(split)}: not the file that {METADATA} describes; {again}")
        if metadata["digest"] != _digest(metadata):
            raise FastarError(f"{path}: edited by hand or damaged; {again}")
    except OSError as error:
        raise FastarError(f"{error.filename or path}: cannot be read ({error.strerror}); {again}") from error
    except FastarError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise FastarError(f"{path}: damaged ({error}); {again}") from error
    return files


def _finished(folder: Path) -> bool:
    return all((folder / name).exists() for name in (METADATA, *(f"{split}.beton" for split in SPLITS)))


def _reuse(folder: Path, splits: dict[str, ImageFolderSplit] | None, encoding: Encoding | None) -> ImageFiles:
    files = open_images(folder)
    have = Encoding(**files.metadata["encoding"])
    advice = "delete the folder or use another directory"
    if encoding is not None and encoding != have:
        raise FastarError(f"{folder}: written with {have}, asked for {encoding}; {advice}")
    if splits is not None and {s: split.digest for s, split in splits.items()} != files.metadata["source"]:
        raise FastarError(f"{folder}: written from other images than {splits['train'].root.parent} holds; {advice}")
    return files


def _write(
    folder: Path, name: str, splits: dict[str, ImageFolderSplit], encoding: Encoding, workers: int, progress: Progress
) -> ImageFiles:
    # Imported here: reading finished files needs none of it.
    from fastar.data.writing import disk_full, write_beton

    content = {}
    for split, raw in splits.items():
        layout = VariedLayout(len(raw), len(raw.classes), encoding)
        indices, partial = np.arange(len(raw)), folder / f"{split}.beton{PARTIAL}"
        more: dict[str, Any] = {"progress": progress}
        write_beton(partial, raw, indices, layout, workers=workers, description=f"writing {name} {split}", **more)
        content[split] = verify_varied(partial, raw, indices, layout, description=f"verifying {name} {split}", **more)
    metadata: dict[str, Any] = {
        "format": _FORMAT,
        "kind": _KIND,
        "dataset": name,
        "classes": list(splits["train"].classes),
        "counts": {split: len(raw) for split, raw in splits.items()},
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "encoding": asdict(encoding),
        "source": {split: raw.digest for split, raw in splits.items()},
        "content": content,
        "files": {split: fingerprint(folder / f"{split}.beton{PARTIAL}") for split in SPLITS},
        "versions": {"fastar": __version__, **{p: version(p) for p in ("ffcv", "numpy", "pillow")}},
    }
    metadata["digest"] = _digest(metadata)
    try:
        # Metadata first: a .beton beside it counts only if it is the file described there.
        replace_text(folder / METADATA, json.dumps(metadata, indent=1) + "\n")
        for split in SPLITS:
            os.replace(folder / f"{split}.beton{PARTIAL}", folder / f"{split}.beton")
    except OSError as error:
        raise disk_full(folder / METADATA, error) from error
    return ImageFiles(folder, metadata)


def _digest(metadata: dict[str, Any]) -> str:
    keys = ("dataset", "classes", "counts", "mean", "std", "encoding", "content")
    return hashlib.sha256(json.dumps({key: metadata[key] for key in keys}, sort_keys=True).encode()).hexdigest()
