"""Raw images of any size in class folders, and where a data root keeps its splits."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from fastar.data.archives import TRAIN_ARCHIVE, VAL_ARCHIVE, train_archive, val_archive
from fastar.data.folders import SUFFIXES
from fastar.data.raw import RawSplit, class_digest, decode_rgb
from fastar.errors import FastarError
from fastar.progress import SILENT, Progress
from fastar.seeds import derive_seed


class ImageFolderSplit:
    """The images below one folder of class folders, any size, decoded to RGB; classes and files in order of name.

    `part` chooses which of a class's images belong to the split; all by default.
    """

    def __init__(
        self, root: Path, classes: tuple[str, ...], part: Callable[[list[Path]], list[Path]] = lambda paths: paths
    ):
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
            chosen = part(found)
            self.paths += chosen
            labels += [label_of[name]] * len(chosen)
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


def find_images(root: Path, progress: Progress = SILENT, *, val_share: float | None = None) -> dict[str, RawSplit]:
    """The splits "train" and "test" of a data root; FastarError where they are not.

    Each is a folder of class folders, `root`/train and `root`/val (or test), or where there is none one of ImageNet's
    official archives in `root`, which is read where it lies: ILSVRC2012_img_train.tar, and ILSVRC2012_img_val.tar with
    ILSVRC2012_devkit_t12 (a folder, or its .tar.gz) for the labels. With `val_share` there is one folder of class
    folders, `root`/train or `root` itself, and that share of each class is "test".
    """
    if val_share is not None:
        return _split_folder(root, val_share)
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
            f"{_HINT if class_names(root) else ''}"
        )
    test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if test is not None:
        return {"train": train, "test": ImageFolderSplit(test, train.classes)}
    if (root / VAL_ARCHIVE).is_file():
        return {"train": train, "test": val_archive(root, train.classes, progress)}
    hint = _HINT if isinstance(train, ImageFolderSplit) else ""
    raise FastarError(f"{root}: has neither val/ nor test/ nor {VAL_ARCHIVE}; put the test images there{hint}")


TEST_FOLDERS = ("val", "test")
_HINT = ", or of your own set (imagefolder) keep a share of each class for testing: --val-share 0.1"


def _split_folder(root: Path, share: float) -> dict[str, RawSplit]:
    """Both splits of one folder of class folders."""
    if not root.is_dir():
        raise FastarError(f"{root}: no such folder; give the one that holds the class folders")
    there = next((root / name for name in TEST_FOLDERS if (root / "train").is_dir() and (root / name).is_dir()), None)
    if there is not None:
        raise FastarError(f"{there}: holds test images already; leave out --val-share (dataset.val_share)")
    folder = root / "train" if (root / "train").is_dir() else root
    classes = class_names(folder)

    def test(paths: list[Path]) -> list[Path]:
        return split_class(paths, share)

    def train(paths: list[Path]) -> list[Path]:
        left_out = set(test(paths))
        return [path for path in paths if path not in left_out]

    return {"train": ImageFolderSplit(folder, classes, train), "test": ImageFolderSplit(folder, classes, test)}


def split_class(paths: list[Path], share: float) -> list[Path]:
    """The `share` of one class's images that are for testing, at least one and not all, in the order of `paths`.

    Those whose CLASS/FILE has the smallest hashes: it does not matter where the folder lies, in which order it is
    read, or what a run's seed is.
    """
    if len(paths) < 2:
        raise FastarError(
            f"{paths[0].parent}: holds one image, and needs one for training and one for testing; add some"
        )
    count = min(max(round(share * len(paths)), 1), len(paths) - 1)
    chosen = set(sorted(paths, key=lambda path: derive_seed(0, "val_share", f"{path.parent.name}/{path.name}"))[:count])
    return [path for path in paths if path in chosen]


def is_packed(root: Path, *, val_share: float | None = None) -> bool:
    """Whether any of a data root's images are read from an archive: as `find_images` chooses, folders come first."""
    if val_share is not None:
        return False
    train = not (root / "train").is_dir() and (root / TRAIN_ARCHIVE).is_file()
    return train or (not any((root / name).is_dir() for name in TEST_FOLDERS) and (root / VAL_ARCHIVE).is_file())


def count_images(root: Path, *, val_share: float | None = None) -> tuple[int, int, int] | None:
    """(training images, test images, classes) of a data root, from names alone; None where any are in archives, which
    take minutes to list. FastarError as `find_images`."""
    if is_packed(root, val_share=val_share):
        return None
    splits = find_images(root, val_share=val_share)
    return len(splits["train"]), len(splits["test"]), len(splits["train"].classes)
