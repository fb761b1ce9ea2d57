"""The published MD5 of official files: one of the same name that is another is used, and said."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from fastar.data.raw.listing import readable
from fastar.runtime.progress import SILENT, Progress

PUBLISHED: dict[str, dict[str, str]] = {
    # https://www.cs.toronto.edu/~kriz/cifar.html, and torchvision for what is in the archives.
    "cifar10": {
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
    "cifar100": {
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
    # torchvision's.
    "mnist": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    # https://github.com/zalandoresearch/fashion-mnist
    "fashion-mnist": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    # https://image-net.org
    "imagenet": {
        "ILSVRC2012_img_train.tar": "1d675b47d978889d74fa0da5fadfb00e",
        "ILSVRC2012_img_val.tar": "29b22e2961454d5413ddabcf34fc5622",
        "ILSVRC2012_devkit_t12.tar.gz": "fa75699e90414af021442c21a62c3abf",
    },
}
_BLOCK = 1 << 22
_LONG = 1 << 30  # bytes whose reading is shown


def note_other_files(dataset: str, files: Iterable[Path], progress: Progress) -> None:
    """One line for the raw files of `dataset` that have an official name and are not what was published under it.

    Reads them whole, so it is for when their data are written, which is once. They are used all the same: images that
    were encoded again, or archives that were packed again, may be meant.
    """
    others = []
    for path in files:
        published = PUBLISHED[dataset].get(path.name)
        if published is not None and _md5(path, progress) != published:
            others.append(path)
    if others:
        names = ", ".join(path.name for path in others)
        progress.line(
            f"{others[0].parent}: {names}: not as published (by MD5); used as found. "
            "If that is not meant, get the official files again"
        )


def _md5(path: Path, progress: Progress) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with readable(path), path.open("rb") as file:
        size = path.stat().st_size
        with (progress if size >= _LONG else SILENT).task(f"hashing {path.name}", size, "bytes") as advance:
            while block := file.read(_BLOCK):
                digest.update(block)
                advance(len(block))
    return digest.hexdigest()
