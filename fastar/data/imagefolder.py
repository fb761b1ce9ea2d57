"""Raw images of any size in class folders, and where a data root keeps its splits."""

from functools import cached_property
from pathlib import Path

import numpy as np

from fastar.data.archives import TRAIN_ARCHIVE, VAL_ARCHIVE, train_archive, val_archive
from fastar.data.folders import SUFFIXES
from fastar.data.raw import RawSplit, class_digest, decode_rgb
from fastar.errors import FastarError
from fastar.progress import SILENT, Progress


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
            if not found:
                raise FastarError(f"{root / name}: holds no images; put some there, or remove the folder")
            self.paths += found
            labels += [label_of[name]] * len(found)
        if not self.paths:
            raise FastarError(f"{root}: holds no images in class folders")
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self.paths[index]
        return decode_rgb(path, str(path)), int(self.labels[index])

    def where(self, index: int) -> str:
        return str(self.paths[index])

    @cached_property
    def digest(self) -> str:
        entries = (
            (path.relative_to(self.root).as_posix(), int(label), path.stat().st_size)
            for path, label in zip(self.paths, self.labels, strict=True)
        )
        return class_digest(self.classes, entries)


def class_names(root: Path) -> tuple[str, ...]:
    """The class folders of `root`, sorted by name."""
    return tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))


def find_images(root: Path, progress: Progress = SILENT) -> dict[str, RawSplit]:
    """The splits "train" and "test" of a data root; FastarError where they are not.

    Each is a folder of class folders, `root`/train and `root`/val (or test), or where there is none one of ImageNet's
    official archives in `root`, which is read where it lies: ILSVRC2012_img_train.tar, and ILSVRC2012_img_val.tar with
    ILSVRC2012_devkit_t12 (a folder, or its .tar.gz) for the labels.
    """
    if not root.is_dir():
        raise FastarError(f"{root}: no such folder; give the one that holds train/ and val/, or ImageNet's archives")
    train: RawSplit
    if (root / "train").is_dir():
        train = ImageFolderSplit(root / "train", class_names(root / "train"))
    elif (root / TRAIN_ARCHIVE).is_file():
        train = train_archive(root / TRAIN_ARCHIVE, progress)
    else:
        raise FastarError(
            f"{root}: has no train/ folder; expected train/<class>/*.JPEG and val/<class>/*.JPEG, or {TRAIN_ARCHIVE}"
        )
    test = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    if test is not None:
        return {"train": train, "test": ImageFolderSplit(test, train.classes)}
    if (root / VAL_ARCHIVE).is_file():
        return {"train": train, "test": val_archive(root, train.classes, progress)}
    raise FastarError(f"{root}: has neither val/ nor test/ nor {VAL_ARCHIVE}; put the test images there")
