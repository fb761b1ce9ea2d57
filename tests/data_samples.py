"""Small raw datasets in every format, and the arrays they hold, for the tests of the data room."""

import gzip
import io
import os
import pickle
import signal
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastar.config import DATASETS
from fastar.data.dataset import Batch, Dataset
from fastar.data.raw.raw_split import ArraySplit, ImageSplit, RawDataset
from fastar.data.sampling import augmentation_keys
from fastar.errors import FastarError


def arrays(count: int, shape: tuple[int, int, int], classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random images uint8 [count, *shape] and labels in which every class occurs."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.arange(count) % classes)
    return generator.integers(0, 256, (count, *shape), dtype=np.uint8), labels


def augmented_in_order(data: Dataset, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """The augmented batches of an epoch, in the order of the file."""
    return data._made(None, batch_size, augmentation_keys(seed, epoch), None)


def raw_dataset(name: str, train: int = 60, test: int = 30) -> RawDataset:
    spec = DATASETS[name]
    shape, classes = (spec.height, spec.width, spec.channels), len(spec.classes)
    splits = [
        ArraySplit(*arrays(count, shape, classes, seed), spec.classes, f"made-up {split}")
        for seed, (split, count) in enumerate((("train", train), ("test", test)))
    ]
    return RawDataset(splits[0], splits[1], "made up", None)


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_idx(root: Path, raw: RawDataset, zipped: bool) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for stem, split in (("train", raw.train), ("t10k", raw.test)):
        for part, array in (("images-idx3", split.images[..., 0]), ("labels-idx1", split.labels)):
            data = idx_bytes(array)
            name = f"{stem}-{part}-ubyte"
            if zipped:
                (root / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (root / name).write_bytes(data)


def cifar_rows(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


def cifar_python_files(raw: RawDataset, name: str, protocol: int = 2) -> dict[str, bytes]:
    """File name -> content, as the official python version has them."""
    key = b"labels" if name == "cifar10" else b"fine_labels"

    def batch(images: np.ndarray, labels: np.ndarray) -> bytes:
        content = {b"data": cifar_rows(images), key: labels.tolist(), b"batch_label": b"x", b"filenames": [b"a.png"]}
        return pickle.dumps(content, protocol=protocol)

    if name == "cifar100":
        return {split: batch(getattr(raw, split).images, getattr(raw, split).labels) for split in ("train", "test")}
    files = {
        f"data_batch_{number + 1}": batch(images, labels)
        for number, (images, labels) in enumerate(
            zip(np.array_split(raw.train.images, 5), np.array_split(raw.train.labels, 5), strict=True)
        )
    }
    return files | {"test_batch": batch(raw.test.images, raw.test.labels)}


def cifar_binary_files(raw: RawDataset, name: str) -> dict[str, bytes]:
    def batch(images: np.ndarray, labels: np.ndarray) -> bytes:
        front = [labels] if name == "cifar10" else [labels // 5, labels]
        columns = np.stack(front, axis=1).astype(np.uint8)
        return np.concatenate([columns, cifar_rows(images)], axis=1).tobytes()

    if name == "cifar100":
        return {f"{s}.bin": batch(getattr(raw, s).images, getattr(raw, s).labels) for s in ("train", "test")}
    files = {
        f"data_batch_{number + 1}.bin": batch(images, labels)
        for number, (images, labels) in enumerate(
            zip(np.array_split(raw.train.images, 5), np.array_split(raw.train.labels, 5), strict=True)
        )
    }
    return files | {"test_batch.bin": batch(raw.test.images, raw.test.labels)}


def write_files(root: Path, files: dict[str, bytes]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (root / name).write_bytes(content)


def write_archive(path: Path, folder: str, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_folders(root: Path, raw: RawDataset, suffix: str = ".png") -> None:
    for split, part in (("train", raw.train), ("test", raw.test)):
        for number, (image, label) in enumerate(zip(part.images, part.labels, strict=True)):
            folder = root / split / raw.train.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.squeeze()).save(folder / f"{number:04}{suffix}")


class TroubledPicture(NamedTuple):
    """An image that makes trouble where it is decoded, which may be another process."""

    where: str
    number: int
    trouble: str

    def decode(self) -> np.ndarray:
        if self.trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.trouble == "gone":
            os._exit(0)
        if self.trouble == "damaged":
            raise FastarError("image.jpg: damaged; replace it")
        if self.trouble == "fails":
            raise KeyError("x")
        if self.trouble in ("slow", "hangs"):
            time.sleep(3600 if self.trouble == "hangs" else 0.05)
        return np.full((4, 5, 3), self.number % 256, np.uint8) + np.arange(15, dtype=np.uint8).reshape(1, 5, 3)


class TroubledSplit(ImageSplit):
    """So many images, of which the one `at` makes trouble (-1: each)."""

    def __init__(self, count: int, trouble: str = "", at: int = 0):
        super().__init__(Path("made-up"), ("a",), [str(number) for number in range(count)], np.zeros(count, np.int64))
        self.trouble, self.at = trouble, at

    def picture(self, index: int) -> TroubledPicture:  # type: ignore[override]
        return TroubledPicture(self.where(index), index, self.trouble if self.at in (-1, index) else "")
