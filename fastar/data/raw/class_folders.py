"""A folder of class folders of images: train/<class>/*.jpg, test/<class>/*.png, and so on."""

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from fastar.config.datasets import DatasetSpec
from fastar.data.raw.listing import PassedOver, class_names, images_below, readable
from fastar.data.raw.raw_split import FORMATS, RawDataset
from fastar.errors import FastarError

_TEST_NAMES = ("test", "val")


class FolderSplit:
    """The images below one folder of class folders, classes and files in order of name.

    Decoded to the dataset's channels when asked for; `size` is the (height, width) that every image must have.
    """

    def __init__(self, root: Path, class_folders: dict[str, int], spec: DatasetSpec, passed: PassedOver):
        self.root, self.classes = root, spec.classes
        self.channels, self.size = spec.channels, (spec.height, spec.width)
        self.paths: list[Path] = []
        labels: list[int] = []
        for folder, label in sorted(class_folders.items()):
            found = images_below(root / folder, passed)
            if not found:
                raise FastarError(f"{root / folder}: holds no images; every class needs some")
            self.paths += found
            labels += [label] * len(found)
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self.paths[index]
        try:
            with Image.open(path, formats=FORMATS) as image:
                size = (image.height, image.width)
                if size != self.size:
                    raise FastarError(
                        f"{path}: image is {size[0]}x{size[1]}, must be {self.size[0]}x{self.size[1]}; "
                        "resize it or check --dataset"
                    )
                if image.mode.startswith(("I", "F")):
                    raise FastarError(f"{path}: {image.mode} pixels are not 8-bit; convert the image")
                pixels = np.asarray(image.convert("RGB" if self.channels == 3 else "L"))
        except FastarError:
            raise
        # Pillow's decoders raise more than OSError on damaged files: SyntaxError (PNG), ValueError, struct.error.
        except Exception as error:
            raise FastarError(f"{path}: cannot be read as an image ({error}); replace or remove it") from error
        return pixels.reshape(*self.size, self.channels), int(self.labels[index])

    def where(self, index: int) -> str:
        return str(self.paths[index])

    @cached_property
    def digest(self) -> str:
        digest = hashlib.sha256(repr(self.classes).encode())
        for path, label in zip(self.paths, self.labels, strict=True):
            with readable(path):
                content = path.read_bytes()
            name = f"{path.relative_to(self.root)}\0{label}\0{len(content)}\0"
            digest.update(name.encode("utf-8", "surrogateescape"))
            digest.update(content)
        return digest.hexdigest()


def find_folders(root: Path, spec: DatasetSpec) -> RawDataset | None:
    """The class folders in `root`/train and `root`/test (or val), or None where there are none."""
    train = root / "train"
    with readable(root):
        if not train.is_dir() or not class_names(train):
            return None
        test = next((root / name for name in _TEST_NAMES if (root / name).is_dir()), None)
    if test is None:
        raise FastarError(f"{root}: has train/ but neither test/ nor val/; put the test images there")
    passed = PassedOver()
    splits = [FolderSplit(folder, _class_folders(folder, spec, passed), spec, passed) for folder in (train, test)]
    return RawDataset(splits[0], splits[1], "class folders", root, f"{root}: {passed}" if passed.count else None)


def _class_folders(root: Path, spec: DatasetSpec, passed: PassedOver) -> dict[str, int]:
    """Folder name -> label: the dataset's class names, or the numbers 0..K-1."""
    names = class_names(root, passed)
    numbers = {str(label): label for label in range(len(spec.classes))}
    by_name = {name: label for label, name in enumerate(spec.classes)}
    for labels in (by_name, numbers):
        if set(names) == set(labels):
            return labels
    missing, extra = sorted(set(by_name) - set(names)), sorted(set(names) - set(by_name))
    parts = [
        f"{word} {', '.join(list_[:3])}{' ...' if len(list_) > 3 else ''}"
        for word, list_ in (("missing", missing), ("unknown", extra))
        if list_
    ]
    raise FastarError(
        f"{root}: class folders are not {spec.name}'s ({'; '.join(parts)}); rename them or check --dataset"
    )
