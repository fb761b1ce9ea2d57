"""Images in class folders: CLASS/*.jpg below train/ and val/ (or test/), or in one folder that is to be split."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastar.config import DatasetSpec
from fastar.data.raw.archives import DEVKIT, TRAIN_ARCHIVE, VAL_ARCHIVE, train_archive, val_archive
from fastar.data.raw.listing import PassedOver, class_names, images_below
from fastar.data.raw.raw_split import ImageSplit, RawDataset, readable
from fastar.errors import FastarError
from fastar.runtime.json_files import read_file
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.seeds import derive_seed

Listed = list[tuple[str, list[Path]]]
"""Names of class folders, each with its images; a class may come twice."""
TEST_FOLDERS = ("val", "test")
ANNOTATIONS = "val_annotations.txt"
_HINT = ", or of your own set (imagefolder) keep a share of each class for testing: --val-share 0.1"


def find_folders(root: Path, spec: DatasetSpec) -> RawDataset | None:
    """The class folders in `root`/train and `root`/test (or val) of a set of one size, or None where there are none."""
    train = root / "train"
    with readable(root):
        if not train.is_dir() or not class_names(train):
            return None
        test = _first_folder(root, "test", "val")
    if test is None:
        raise FastarError(f"{root}: has train/ but neither test/ nor val/; put the test images there")
    passed, splits, mode = PassedOver(), [], "RGB" if spec.channels == 3 else "L"
    for folder in (train, test):
        label_of = _labels_of_folders(folder, spec)
        listed = in_class_folders(folder, label_of, passed)
        splits.append(folder_split(folder, spec.classes, listed, label_of, mode=mode, content=True))
    return RawDataset(splits[0], splits[1], "class folders", root, f"{root}: {passed}" if passed.count else None)


def _labels_of_folders(root: Path, spec: DatasetSpec) -> Mapping[str, int]:
    """Folder name -> label: the dataset's class names, or the numbers 0..K-1."""
    names = set(class_names(root))
    by_name = {name: label for label, name in enumerate(spec.classes)}
    for labels in (by_name, {str(label): label for label in range(len(spec.classes))}):
        if names == set(labels):
            return labels
    parts = [
        f"{word} {', '.join(sorted(some)[:3])}{' ...' if len(some) > 3 else ''}"
        for word, some in (("missing", set(by_name) - names), ("unknown", names - set(by_name)))
        if some
    ]
    raise FastarError(
        f"{root}: class folders are not {spec.name}'s ({'; '.join(parts)}); rename them or check --dataset"
    )


def folder_split(
    root: Path, classes: tuple[str, ...], listed: Listed, label_of: Mapping[str, int] | None = None, **form: Any
) -> ImageSplit:
    """The images in files below `root`, as they are `listed`; `label_of` the folders' names (None: the classes')."""
    label_of = label_of or {name: label for label, name in enumerate(classes)}
    names = [path.relative_to(root).as_posix() for _, paths in listed for path in paths]
    labels = [label_of[name] for name, paths in listed for _ in paths]
    if not names:
        raise FastarError(f"{root}: holds no images in class folders")
    return ImageSplit(root, classes, names, np.array(labels, dtype=np.int64), **form)


def in_class_folders(root: Path, classes: tuple[str, ...] | Mapping[str, int], passed: PassedOver) -> Listed:
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


def find_images(
    root: Path, progress: Progress = SILENT, *, val_share: float | None = None, upright: bool = False
) -> RawDataset:
    """The splits of a data root of images of any size; FastarError where they are not.

    Each is a folder of class folders, `root`/train and `root`/val (or test), or where there is none one of ImageNet's
    official archives in `root`, which is read where it lies: ILSVRC2012_img_train.tar, and ILSVRC2012_img_val.tar with
    ILSVRC2012_devkit_t12 (a folder, or its .tar.gz) for the labels. `root`/val may also hold images/ and
    val_annotations.txt, as Tiny-ImageNet's does. With `val_share` there is one folder of class folders, `root`/train or
    `root` itself, and that share of each class is for testing. With `upright` images are turned as their EXIF
    orientation says. What is passed over is told in one line.
    """
    passed = PassedOver()
    with readable(root):
        if not root.is_dir():
            expected = "the class folders" if val_share is not None else "train/ and val/, or ImageNet's archives"
            raise FastarError(f"{root}: no such folder; give the one that holds {expected}")
        if val_share is not None:
            train, test = _split_folder(root, val_share, passed)
        else:
            train, test = _both_splits(root, passed, progress)
    train.upright = test.upright = upright
    if passed.count:
        progress.line(f"{root}: {passed}")
    official = [split.origin for split in (train, test) if split.places is not None]
    if test.places is not None and (root / f"{DEVKIT}.tar.gz").is_file():
        official.append(root / f"{DEVKIT}.tar.gz")
    return RawDataset(train, test, "images", root, files=tuple(official))


def _first_folder(root: Path, *names: str) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _both_splits(root: Path, passed: PassedOver, progress: Progress) -> tuple[ImageSplit, ImageSplit]:
    if (root / "train").is_dir():
        classes = class_names(root / "train")
        train = folder_split(root / "train", classes, in_class_folders(root / "train", classes, passed))
    elif (root / TRAIN_ARCHIVE).is_file():
        train = train_archive(root / TRAIN_ARCHIVE, passed, progress)
    else:
        raise FastarError(
            f"{root}: has no train/ folder; expected train/<class>/*.JPEG and val/<class>/*.JPEG, or {TRAIN_ARCHIVE}"
            f"{_HINT if class_names(root) else ''}"
        )
    test = _first_folder(root, *TEST_FOLDERS)
    if test is not None:
        annotated = (test / ANNOTATIONS).exists() and class_names(test) == ("images",)
        listed = (in_one_folder if annotated else in_class_folders)(test, train.classes, passed)
        return train, folder_split(test, train.classes, listed)
    if (root / VAL_ARCHIVE).is_file():
        return train, val_archive(root, train.classes, passed, progress)
    hint = _HINT if train.places is None else ""
    raise FastarError(f"{root}: has neither val/ nor test/ nor {VAL_ARCHIVE}; put the test images there{hint}")


def _split_folder(root: Path, share: float, passed: PassedOver) -> tuple[ImageSplit, ImageSplit]:
    """Both splits of one folder of class folders."""
    folder = _first_folder(root, "train") or root
    if folder != root and (there := _first_folder(root, *TEST_FOLDERS)) is not None:
        raise FastarError(f"{there}: holds test images already; leave out --val-share (dataset.val_share)")
    classes = class_names(folder)
    listed = in_class_folders(folder, classes, passed)
    test = [(name, split_class(paths, share, folder)) for name, paths in listed]
    kept = {path for _, paths in test for path in paths}
    train = [(name, [path for path in paths if path not in kept]) for name, paths in listed]
    return folder_split(folder, classes, train), folder_split(folder, classes, test)


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
    escaped = [path.relative_to(root).as_posix().encode("utf-8", "backslashreplace").decode() for path in paths]
    seeds = [derive_seed(0, "val_share", name) for name in escaped]
    chosen = sorted(sorted(range(len(paths)), key=seeds.__getitem__)[:count])
    return [paths[number] for number in chosen]


def count_images(root: Path, *, val_share: float | None = None) -> tuple[int, int, int] | None:
    """(training images, test images, classes) of a data root, decoding none; None where any are in archives, which
    take minutes to list. FastarError as `find_images`."""
    with readable(root):
        folders = (root / "train").is_dir() and _first_folder(root, *TEST_FOLDERS) is not None
        packed = (root / TRAIN_ARCHIVE).is_file() or (root / VAL_ARCHIVE).is_file()
    if val_share is None and packed and not folders:  # where there are both, folders come first
        return None
    raw = find_images(root, val_share=val_share)
    return len(raw.train), len(raw.test), len(raw.train.classes)
