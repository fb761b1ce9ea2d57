"""ImageNet's official archives, made small: what they hold is what the usual folders hold."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fastar.data.convert import Form, prepare
from fastar.data.encode import Encoding
from fastar.data.raw.class_folders import find_images
from fastar.errors import FastarError

CLASSES = ("n01", "n02", "n03")


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((50 - number % 7, 40 + number % 5)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, content in files.items():
            add(archive, name, content)
    return stream.getvalue()


def devkit(labels: list[int]) -> dict[str, bytes]:
    """Numbers are given to the classes in another order than their names', as ImageNet has it; 4 is a node above."""
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    table = np.zeros((4, 1), dtype=kind)
    for row, (number, name, children) in enumerate(((1, "n02", 0), (2, "n03", 0), (3, "n01", 0), (4, "n00", 3))):
        table[row, 0] = (np.array([[number]]), name, f"word {number}", np.array([[children]]))
    stream = io.BytesIO()
    savemat(stream, {"synsets": table})
    return {
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{n}\n" for n in labels).encode(),
        "ILSVRC2012_devkit_t12/data/meta.mat": stream.getvalue(),
    }


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    """(archives, folders) of the same images; members are in no order."""
    archives, folders = tmp_path / "archives", tmp_path / "folders"
    train = {c: {f"{c}_{n}.JPEG": jpeg(10 * k + n) for n in (3, 1, 2)} for k, c in enumerate(CLASSES)}
    val = {f"ILSVRC2012_val_{n:08}.JPEG": jpeg(100 + n) for n in (2, 1, 4, 3)}
    names = {1: "n02", 2: "n03", 3: "n01"}
    labels = [3, 1, 2, 1]
    archives.mkdir()
    content = {f"{c}.tar": tar(train[c]) for c in reversed(CLASSES)}
    (archives / "ILSVRC2012_img_train.tar").write_bytes(tar(content))
    (archives / "ILSVRC2012_img_val.tar").write_bytes(tar(val))
    (archives / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar(devkit(labels), "w:gz"))
    placed = {f"train/{c}/{name}": data for c in CLASSES for name, data in train[c].items()}
    placed |= {f"val/{names[labels[k]]}/{name}": val[name] for k, name in enumerate(sorted(val))}
    for name, data in placed.items():
        (folders / name).parent.mkdir(parents=True, exist_ok=True)
        (folders / name).write_bytes(data)
    return archives, folders


def test_archives_hold_what_folders_hold(roots: tuple[Path, Path], tmp_path: Path) -> None:
    found = [find_images(root) for root in roots]
    for split in ("train", "test"):
        archive, folder = (getattr(each, split) for each in found)
        assert archive.classes == folder.classes == CLASSES
        assert archive.labels.tolist() == folder.labels.tolist()
        assert archive.digest == folder.digest
        for index in range(len(folder)):
            assert np.array_equal(archive[index][0], folder[index][0])
            assert archive[index][1] == folder[index][1]
            assert archive.where(index).endswith(folder.where(index).split("/", folder.where(index).count("/") - 1)[-1])
    files = [
        prepare(
            "imagefolder",
            own_name="x",
            raw=root,
            directory=tmp_path / f"out{n}",
            form=Form(Encoding(30)),
            workers=2,
        )
        for n, root in enumerate(roots)
    ]
    assert files[0].metadata["content"] == files[1].metadata["content"]
    # The other form of the same data is the same data.
    assert prepare("imagefolder", own_name="x", raw=roots[1], directory=tmp_path / "out0").digest == files[0].digest


def test_an_unpacked_devkit_and_mixed_forms(roots: tuple[Path, Path]) -> None:
    archives, folders = roots
    want = find_images(archives).test.labels.tolist()
    packed = archives / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(packed) as archive:
        # Python before 3.10.12 and 3.11.4 has no filters.
        archive.extractall(archives, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    packed.unlink()
    assert find_images(archives).test.labels.tolist() == want
    os.rename(folders / "train", archives / "train")
    (archives / "ILSVRC2012_img_train.tar").unlink()
    assert len(find_images(archives).train) == 9


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ILSVRC2012_img_train.tar", b"no archive" * 100, r"img_train\.tar: not a whole, uncompressed tar"),
        ("ILSVRC2012_img_train.tar", tar({"a.JPEG": b"x"}), r"holds no archives of classes"),
        ("ILSVRC2012_img_train.tar", tar({"n01.tar": b"x" * 700}), r"n01\.tar in it is damaged"),
        ("ILSVRC2012_img_train.tar", tar({"n09.tar": tar({"a.JPEG": b"x"})}), r"holds images of n01, no class"),
        ("ILSVRC2012_img_val.tar", tar({"a.JPEG": b"x"}), r"holds 1 images, ILSVRC2012_devkit_t12 has 4 labels"),
        ("ILSVRC2012_devkit_t12.tar.gz", tar(devkit([1, 2, 4, 1]), "w:gz"), r"labels or meta\.mat are damaged"),
        ("ILSVRC2012_devkit_t12.tar.gz", tar({"x": b""}, "w:gz"), r"ground_truth\.txt cannot be read"),
        ("ILSVRC2012_devkit_t12.tar.gz", None, r"but not ILSVRC2012_devkit_t12\.tar\.gz, which holds its labels"),
        ("ILSVRC2012_img_val.tar", None, r"has neither val/ nor test/ nor ILSVRC2012_img_val\.tar"),
    ],
    ids=lambda value: "content" if isinstance(value, bytes) else None,  # which holds the time: a name must not
)
def test_damage_is_named(roots: tuple[Path, Path], name: str, content: bytes | None, message: str) -> None:
    (roots[0] / name).unlink() if content is None else (roots[0] / name).write_bytes(content)
    with pytest.raises(FastarError, match=message) as caught:
        find_images(roots[0])
    assert "\n" not in str(caught.value)


def test_an_archive_that_is_cut_off(roots: tuple[Path, Path]) -> None:
    path = roots[0] / "ILSVRC2012_img_val.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content.rstrip(b"\0")) - 100])
    with pytest.raises(FastarError, match=r"img_val\.tar: not a whole"):
        find_images(roots[0])
    path.write_bytes(content)
    split = find_images(roots[0]).test
    path.write_bytes(content[:600])  # while it is read: the first header and a little
    with pytest.raises(FastarError, match="is cut off inside n"):
        split[0]
