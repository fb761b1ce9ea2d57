"""Raw images of any size in class folders, and where a data root keeps its splits."""

from functools import cached_property
from pathlib import Path

import numpy as np

from fastar.data.raw.archives import TRAIN_ARCHIVE, VAL_ARCHIVE, ArchiveSplit, train_archive, val_archive
from fastar.data.raw.listing import PassedOver, class_names, images_below, readable
from fastar.data.raw.raw_split import class_digest, decode_rgb, read_file
from fastar.errors import FastarError
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.seeds import derive_seed

Listed = list[tuple[str, list[Path]]]
"""Class names, each with its images; a class may come twice."""


class ImageFolderSplit:
    """Images in files below `root`, any size, decoded to RGB, as they are `listed` (`in_class_folders`)."""

    upright = False
    """Images are turned as their EXIF orientation says."""

    def __init__(self, root: Path, classes: tuple[str, ...], listed: Listed):
        self.root, self.classes = root, classes
        label_of = {name: label for label, name in enumerate(classes)}
        self.paths: list[Path] = []
        labels: list[int] = []
        for name, paths in listed:
            self.paths += paths
            labels += [label_of[name]] * len(paths)
        if not self.paths:
            raise FastarError(f"{root}: holds no images in class folders")
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self.paths[index]
        return decode_rgb(path, str(path), upright=self.upright), int(self.labels[index])

    def where(self, index: int) -> str:
        return str(self.paths[index])

    @cached_property
    def digest(self) -> str:
        entries = (
            (path.relative_to(self.root).as_posix(), int(label), _size(path))
            for path, label in zip(self.paths, self.labels, strict=True)
        )
        return class_digest(self.classes, entries)


def _size(path: Path) -> int:
    """Bytes of a file; -1 for an image that is not there or not to be had: such may be left out."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def in_class_folders(root: Path, classes: tuple[str, ...], passed: PassedOver) -> Listed:
    """The images of the class folders of `root`; what lies there and is none goes to `passed`."""
    listed = []
    for name in class_names(root, passed):
        if name not in classes:
            raise FastarError(f"{root / name}: no such class in train/; rename or remove it")
        found = images_below(root / name, passed)
        if not found:
            raise FastarError(f"{root / name}: holds no images; put some there, or remove the folder")
        listed.append((name, found))
    return listed


def in_one_folder(root: Path, classes: tuple[str, ...], passed: PassedOver) -> Listed:
    """The images of `root`/images, whose classes `root`/val_annotations.txt holds, as Tiny-ImageNet has it: lines of
    file, class, and a box, parted by tabs."""
    path = root / ANNOTATIONS
    with readable(path):
        lines = read_file(path, 1 << 28).decode("utf-8", "surrogateescape").splitlines()
    class_of = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, *rest = line.split("\t")
        if not rest or rest[0] not in classes or Path(name).name != name:
            raise FastarError(f"{path}, line {number}: not an image's name and a class of train/; get the file again")
        class_of[name] = rest[0]
    listed: dict[str, list[Path]] = {}
    for image in images_below(root / "images", passed):
        if image.name in class_of:
            listed.setdefault(class_of.pop(image.name), []).append(image)
        else:
            passed.add(f"{root.name}/images/{image.name}", f"not in {ANNOTATIONS}")
    if class_of:
        raise FastarError(f"{root / 'images' / min(class_of)}: missing, {ANNOTATIONS} names it; get the images again")
    return sorted(listed.items())


Split = ImageFolderSplit | ArchiveSplit


def find_images(
    root: Path, progress: Progress = SILENT, *, val_share: float | None = None, upright: bool = False
) -> dict[str, Split]:
    """The splits "train" and "test" of a data root; FastarError where they are not.

    Each is a folder of class folders, `root`/train and `root`/val (or test), or where there is none one of ImageNet's
    official archives in `root`, which is read where it lies: ILSVRC2012_img_train.tar, and ILSVRC2012_img_val.tar with
    ILSVRC2012_devkit_t12 (a folder, or its .tar.gz) for the labels. `root`/val may also hold images/ and
    val_annotations.txt, as Tiny-ImageNet's does. With `val_share` there is one folder of class folders, `root`/train or
    `root` itself, and that share of each class is "test". With `upright` images are turned as their EXIF orientation
    says. What is passed over is told in one line.
    """
    passed = PassedOver()
    with readable(root):
        if val_share is not None:
            splits = _split_folder(root, val_share, passed)
        else:
            splits = _both_splits(root, passed, progress)
    for split in splits.values():
        split.upright = upright
    if passed.count:
        progress.line(f"{root}: {passed}")
    return splits


def _both_splits(root: Path, passed: PassedOver, progress: Progress) -> dict[str, Split]:
    if not root.is_dir():
        raise FastarError(f"{root}: no such folder; give the one that holds train/ and val/, or ImageNet's archives")
    train: Split
    if (root / "train").is_dir():
        classes = class_names(root / "train")
        listed = in_class_folders(root / "train", classes, passed)
        train = ImageFolderSplit(root / "train", classes, listed)
    elif (root / TRAIN_ARCHIVE).is_file():
        train = train_archive(root / TRAIN_ARCHIVE, passed, progress)
    else:
        raise FastarError(
            f"{root}: has no train/ folder; expected train/<class>/*.JPEG and val/<class>/*.JPEG, or {TRAIN_ARCHIVE}"
            f"{_HINT if class_names(root) else ''}"
        )
    test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if test is not None:
        annotated = (test / ANNOTATIONS).exists() and class_names(test) == ("images",)
        listed = (in_one_folder if annotated else in_class_folders)(test, train.classes, passed)
        return {"train": train, "test": ImageFolderSplit(test, train.classes, listed)}
    if (root / VAL_ARCHIVE).is_file():
        return {"train": train, "test": val_archive(root, train.classes, passed, progress)}
    hint = _HINT if isinstance(train, ImageFolderSplit) else ""
    raise FastarError(f"{root}: has neither val/ nor test/ nor {VAL_ARCHIVE}; put the test images there{hint}")


TEST_FOLDERS = ("val", "test")
ANNOTATIONS = "val_annotations.txt"
_HINT = ", or of your own set (imagefolder) keep a share of each class for testing: --val-share 0.1"


def _split_folder(root: Path, share: float, passed: PassedOver) -> dict[str, Split]:
    """Both splits of one folder of class folders."""
    if not root.is_dir():
        raise FastarError(f"{root}: no such folder; give the one that holds the class folders")
    there = next((root / name for name in TEST_FOLDERS if (root / "train").is_dir() and (root / name).is_dir()), None)
    if there is not None:
        raise FastarError(f"{there}: holds test images already; leave out --val-share (dataset.val_share)")
    folder = root / "train" if (root / "train").is_dir() else root
    classes = class_names(folder)
    train: Listed = []
    test: Listed = []
    for name, paths in in_class_folders(folder, classes, passed):
        kept = split_class(paths, share, folder)
        left_out = set(kept)
        test.append((name, kept))
        train.append((name, [path for path in paths if path not in left_out]))
    return {"train": ImageFolderSplit(folder, classes, train), "test": ImageFolderSplit(folder, classes, test)}


def split_class(paths: list[Path], share: float, root: Path) -> list[Path]:
    """The `share` of one class's images that are for testing, at least one and not all, in the order of `paths`.

    Those whose CLASS/FILE, as seen from `root`, has the smallest hashes: it does not matter where the folder lies, in
    which order it is read, or what a run's seed is.
    """
    if len(paths) < 2:
        raise FastarError(
            f"{paths[0].parent}: holds one image, and needs one for training and one for testing; add some"
        )
    count = min(max(round(share * len(paths)), 1), len(paths) - 1)
    seeds = {path: derive_seed(0, "val_share", _escaped(path.relative_to(root))) for path in paths}
    chosen = set(sorted(paths, key=lambda path: seeds[path])[:count])
    return [path for path in paths if path in chosen]


def _escaped(path: Path) -> str:
    """A path as text, bytes that are not UTF-8 as escapes."""
    return path.as_posix().encode("utf-8", "backslashreplace").decode()


def is_packed(root: Path, *, val_share: float | None = None) -> bool:
    """Whether any of a data root's images are read from an archive: as `find_images` chooses, folders come first."""
    if val_share is not None:
        return False
    with readable(root):
        train = not (root / "train").is_dir() and (root / TRAIN_ARCHIVE).is_file()
        return train or (not any((root / name).is_dir() for name in TEST_FOLDERS) and (root / VAL_ARCHIVE).is_file())


def count_images(root: Path, *, val_share: float | None = None) -> tuple[int, int, int] | None:
    """(training images, test images, classes) of a data root, decoding none; None where any are in archives, which
    take minutes to list. FastarError as `find_images`."""
    if is_packed(root, val_share=val_share):
        return None
    splits = find_images(root, val_share=val_share)
    return len(splits["train"]), len(splits["test"]), len(splits["train"].classes)
