"""Images as people have them: names, places, links and debris; nothing is passed over without a word."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import os
import pickle
import shutil
import socket
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from data_samples import (
    cifar_python_files,
    idx_bytes,
    raw_dataset,
    write_archive,
    write_files,
    write_folders,
    write_idx,
)
from PIL import Image
from test_data_archives import add, devkit, jpeg, tar

from fastar.config import DATASETS, DatasetSettings
from fastar.data.convert import Form, prepare
from fastar.data.encode import Encoding
from fastar.data.ffcv.folder import DatasetFiles, open_files, verify_folder
from fastar.data.raw import archives, idx
from fastar.data.raw import cifar as cifar_module
from fastar.data.raw.class_folders import count_images, find_images
from fastar.data.raw.find import find_raw
from fastar.data.raw.listing import PassedOver, images_below
from fastar.data.raw.raw_split import UnusableImage, decode_image
from fastar.data.streaming import StreamingDataset
from fastar.errors import FastarError
from fastar.runtime.progress import SilentProgress

RAW = Encoding(max_resolution=None, compress_probability=0)
LATIN = os.fsdecode(b"caf\xe9")


class Told(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def put(path: Path, number: int = 0) -> Path:
    """A small JPEG of its own grey, in folders that are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (number, 9, 9)).save(path, "JPEG")
    return path


def make(root: Path, per_class: int = 2) -> Path:
    """train/ and val/ with classes a and b."""
    for number, split in enumerate(("train", "val")):
        for name in "ab":
            for each in range(per_class):
                put(root / split / name / f"{each}.jpg", 100 * number + each)
    return root


def prepared(root: Path, name: str = "set", **changes: Any) -> DatasetFiles:
    form = Form(**{"encoding": RAW, **changes})
    return prepare("imagefolder", own_name=name, raw=root, directory=root.parent / "out", form=form, workers=1)


def names(root: Path, split: str = "train") -> list[str]:
    found = getattr(find_images(root), split)
    return [os.path.relpath(found.where(k), root) for k in range(len(found))]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "tools" / "write_ffcv.py"
    specification = importlib.util.spec_from_file_location("write_ffcv_field", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["write_ffcv_field"] = module
    specification.loader.exec_module(module)
    return module


def test_all_eight_images_are_found_in_the_order_of_torchvision(tmp_path: Path) -> None:
    root = make(tmp_path / "raw")
    for name in ("x.jfif", "x.jpe", "deep/1.jpg", "deep/0.jpg", "deep/more/2.JPEG", "deep er/4.png", "Z/5.unknown"):
        put(root / "train" / "a" / name)
    # As torchvision's ImageFolder walks: sorted(os.walk(folder)), and the names in each sorted.
    walked = sorted(os.walk(root / "train" / "a"))
    want = [os.path.relpath(Path(place, name), root) for place, _, found in walked for name in sorted(found)]
    assert len(want) == 9
    assert names(root) == [*want, "train/b/0.jpg", "train/b/1.jpg"]
    told = Told()
    assert len(find_images(root, told).train) == 11
    assert told.lines == []
    assert count_images(root) == (11, 4, 2)


def test_folders_that_were_read_before_are_the_same_set(tmp_path: Path) -> None:
    root = tmp_path / "raw"
    for name in ("train/a/10.jpg", "train/a/9.JPG", "train/b b/x.y.png", "train/b b/é.png", "val/a/0.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())  # the digest is of names and sizes
    splits = find_images(root)
    assert splits.train.digest == "734fd4f02993b9f4f24cb7c4e071a96a2bbfbe5083648c804c33dcde1aeab202"
    assert splits.test.digest == "2cf6e45fa965c505dc0749a2baeb9750a223851702fbdcbc077f7ea2a9f77ee1"
    shared = find_images(root / "train", val_share=0.5)
    assert shared.train.digest == "786fbe2e5de3318e0523416e25c446cd8675d49312ad79cc3d588654e068de9d"


def test_what_is_passed_over_is_counted_and_named_in_one_line(tmp_path: Path) -> None:
    root = make(tmp_path / "raw")
    folder = root / "train" / "a"
    for name in (".DS_Store", "._0.jpg", "Thumbs.db", "notes.txt", "more.txt", "list.csv", "last.txt", "0.jpg~"):
        (folder / name).write_bytes(b"BM, but no bitmap")
    put(folder / ".ipynb_checkpoints" / "0-checkpoint.jpg")
    put(folder / ".hidden.jpg")  # an image it is: as before
    put(root / "train" / "stray.jpg")
    told = Told()
    assert len(find_images(root, told).train) == 5
    (line,) = told.lines
    assert line.startswith(f"{root}: passed over 10 that are no images of a class: ")
    for part in (
        "train/stray.jpg (in no class folder)",
        "train/a/.DS_Store, train/a/._0.jpg, train/a/.ipynb_checkpoints (hidden)",
        "train/a/Thumbs.db, train/a/last.txt, train/a/list.csv, ... (no image)",
        "train/a/0.jpg~ (a copy, or a part of one)",
    ):
        assert part in line


def test_pipes_sockets_and_links_to_nothing_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "raw")
    monkeypatch.chdir(root / "train" / "a")  # a socket's name may have 107 characters
    os.mkfifo("pipe.JPEG")
    os.symlink("pipe.JPEG", "link.JPEG")
    os.symlink("/dev/zero", "zero.JPEG")
    os.symlink("nowhere", "nothing")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.JPEG")
        told = Told()
        assert len(find_images(root, told).train) == 4
    assert "train/a/link.JPEG, train/a/pipe.JPEG, train/a/socket.JPEG, ... (no file)" in told.lines[0]
    assert "train/a/nothing (a link to nothing)" in told.lines[0]
    assert "passed over 5 " in told.lines[0]


def test_links_to_folders_are_followed_and_no_loop_is_endless(tmp_path: Path) -> None:
    root = make(tmp_path / "raw")
    elsewhere = put(tmp_path / "elsewhere" / "7.jpg").parent
    a = root / "train" / "a"
    (a / "linked").symlink_to(elsewhere)
    put(a / "sub" / "8.jpg")
    (a / "again").symlink_to("sub")  # sorted before it, and yet the folder's own name counts
    (a / "sub" / "up").symlink_to("..")
    (elsewhere / "round").symlink_to(a)
    assert names(root)[:4] == [f"train/a/{name}" for name in ("0.jpg", "1.jpg", "linked/7.jpg", "sub/8.jpg")]
    (root / "train" / "c").symlink_to(".")
    with pytest.raises(FastarError, match=r"train/c: holds no images; put some there, or remove the folder"):
        find_images(root)


def test_sets_of_one_size_find_them_too_and_say_what_they_pass_over(tmp_path: Path) -> None:
    write_folders(tmp_path / "raw", raw_dataset("cifar10"))
    folder = tmp_path / "raw" / "train" / "cat"
    first = sorted(folder.iterdir())[0]
    (folder / "deep").mkdir()
    first.rename(folder / "deep" / "0.PNG_")
    os.mkfifo(folder / "0.png")
    (folder / os.fsdecode(b"\xff.png")).write_bytes(sorted(folder.glob("*.png"))[1].read_bytes())
    told = Told()
    files = prepare("cifar10", raw=tmp_path / "raw", directory=tmp_path / "out", workers=1, progress=told)
    assert files.count("train") == 61
    assert f"{tmp_path / 'raw'}: passed over 1 that is no image of a class: train/cat/0.png (no file)" in told.lines


def test_exif_orientation_is_ignored_or_applied_as_asked(tmp_path: Path) -> None:
    root = make(tmp_path / "raw", 1)
    path = root / "train" / "a" / "0.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: 90 degrees clockwise puts it right
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:, :4] = 250
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    stored, turned = decode_image(path, "x"), decode_image(path, "x", upright=True)
    assert stored.shape == (6, 8, 3)
    assert np.array_equal(turned, np.rot90(stored, -1))

    plain, other = prepared(root), prepared(root, "turned", exif="apply")
    shapes = {}
    for files in (plain, other):
        pictures, labels = next(StreamingDataset(files, "train", "cpu", size=4, threads=1).sequential(2))
        shapes[files.exif] = pictures[labels == 0]
    assert plain.metadata["content"]["train"] != other.metadata["content"]["train"]
    assert plain.digest != other.digest
    assert "exif" not in plain.metadata["settings"]  # as files have it that were written before
    assert not np.array_equal(shapes["ignore"], shapes["apply"])
    assert prepared(root, "turned", exif=None).digest == other.digest
    for name, was, asked in (("set", "ignore", "apply"), ("turned", "apply", "ignore")):
        with pytest.raises(FastarError, match=f"written with exif={was}, asked for exif={asked}"):
            prepared(root, name, exif=asked)
    assert DatasetSettings(name="imagenet", exif="apply").exif == "apply"
    with pytest.raises(ValueError, match="exif belongs to imagenet and imagefolder"):
        DatasetSettings(name="cifar10", exif="apply")


def test_exif_orientation_in_archives_and_the_tool(tmp_path: Path, tool: ModuleType) -> None:
    root = make(tmp_path / "raw", 1)
    exif = Image.Exif()
    exif[0x0112] = 8
    stream = io.BytesIO()
    Image.new("RGB", (8, 6)).save(stream, "JPEG", exif=exif)
    (root / "train" / "a" / "0.jpg").write_bytes(stream.getvalue())
    arguments = ["--dataset", "imagefolder", "--name", "x", "--source", str(root), "--out", str(tmp_path / "out")]
    assert tool.main([*arguments, "--exif", "apply"]) == 0
    assert tool.main([*arguments, "--exif", "ignore"]) == 2
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar({"a.tar": tar({"0.JPEG": stream.getvalue()})}))
    (root / "train").rename(tmp_path / "away")
    (root / "val" / "b" / "0.jpg").unlink()
    (root / "val" / "b").rmdir()
    for upright, shape in ((False, (6, 8, 3)), (True, (8, 6, 3))):
        assert find_images(root, upright=upright).train[0][0].shape == shape


def test_names_that_are_not_utf_8_are_written_and_listed(
    tmp_path: Path, tool: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    root = make(tmp_path / "raw")
    for split in ("train", "val"):
        (root / split / "b").rename(root / split / LATIN)
    put(root / "train" / "a" / f"{LATIN}.jpg", 77)
    broken = root / "train" / "a" / f"{LATIN}\n.png"
    broken.write_bytes(b"\x89PNG, no more")
    (root / "train" / "a" / f"{LATIN}.txt").write_bytes(b"")
    out = tmp_path / LATIN
    arguments = ["--dataset", "imagefolder", "--name", "x", "--source", str(root), "--out", str(out)]
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) as strict:
        assert tool.main([*arguments, "--on-error", "skip"]) == 0
    strict.seek(0)
    said = strict.read()
    assert r"caf\udce9\n.png: cannot be read as an image" in said
    assert said.count("\n") == 2
    assert r"train/a/caf\udce9.txt (no image)" in capfd.readouterr().err
    files = open_files(out / "x")
    assert files.classes == ("a", LATIN)
    assert files.skipped["train"][0]["path"] == str(broken)
    assert prepare("imagefolder", own_name="x", raw=root, directory=out).digest == files.digest
    again = find_images(root / "train", val_share=0.4)
    assert (len(again.train), len(again.test)) == (3, 3)
    # Without --on-error skip: one line, and nothing half-written.
    assert tool.main([*arguments[:-1], str(tmp_path / "other")]) == 2
    assert capfd.readouterr().err.count("\n") == 2  # what is passed over, and the error
    assert not (tmp_path / "other").exists()


def test_a_link_to_nothing_is_an_error_or_left_out(tmp_path: Path) -> None:
    root = make(tmp_path / "raw")
    (root / "train" / "a" / "gone.jpg").symlink_to("nowhere.jpg")
    (root / "train" / "b" / "self.jpg").symlink_to("self.jpg")
    with pytest.raises(FastarError, match=r"(gone|self)\.jpg: cannot be read as an image"):
        prepared(root)
    assert not (root.parent / "out").exists()
    files = prepared(root, on_error="skip")
    assert files.count("train") == 4
    assert [Path(left["path"]).name for left in sorted(files.skipped["train"], key=str)] == ["gone.jpg", "self.jpg"]
    assert "No such file or directory" in str(files.skipped["train"])
    assert prepared(root, on_error="skip").digest == files.digest


def tiny_imagenet(root: Path) -> Path:
    classes = ("n01", "n02", "n03")
    for number, name in enumerate(classes):
        for each in range(3):
            put(root / "train" / name / "images" / f"{name}_{each}.JPEG", number)
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t62\n")
    lines = []
    for each in range(6):
        put(root / "val" / "images" / f"val_{each}.JPEG", 100 + each)
        lines.append(f"val_{each}.JPEG\t{classes[5 * each % 3]}\t0\t0\t60\t60\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines) + "\r\n")
    put(root / "test" / "images" / "test_0.JPEG")
    (root / "wnids.txt").write_text("n03\nn01\nn02\n")
    return root


def test_tiny_imagenet_is_read_as_it_is_unpacked(tmp_path: Path) -> None:
    root = tiny_imagenet(tmp_path / "raw")
    told = Told()
    splits = find_images(root, told)
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert names(root)[3] == "train/n02/images/n02_0.JPEG"
    test = splits.test
    found = {Path(test.where(k)).name: test.classes[label] for k, label in enumerate(test.labels)}
    assert found == {f"val_{k}.JPEG": ("n01", "n02", "n03")[5 * k % 3] for k in range(6)}
    assert test.labels.tolist() == sorted(test.labels.tolist())
    for index in range(6):  # the image that the line is of
        number = int(Path(test.where(index)).stem.split("_")[1])
        assert abs(int(test[index][0][0, 0, 0]) - 100 - number) <= 1
    boxes = "train/n01/n01_boxes.txt, train/n02/n02_boxes.txt, train/n03/n03_boxes.txt (no image)"
    assert told.lines == [f"{root}: passed over 3 that are no images of a class: {boxes}"]
    assert prepared(root).count("test") == 6


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_0.JPEG\tn09\t0\n", r"val_annotations\.txt, line 8: not an image's name and a class of train/"),
        ("val_0.JPEG\n", r"line 8: not an image's name"),
        ("../val_0.JPEG\tn01\n", r"line 8: not an image's name"),
        ("val_6.JPEG\tn01\n", r"images/val_6\.JPEG: missing, val_annotations\.txt names it"),
    ],
)
def test_annotations_that_do_not_fit_are_named(tmp_path: Path, line: str, message: str) -> None:
    root = tiny_imagenet(tmp_path / "raw")
    with (root / "val" / "val_annotations.txt").open("a") as stream:
        stream.write(line)
    with pytest.raises(FastarError, match=message):
        find_images(root)


def test_pillow_is_asked_for_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin, Image

    Image.init()  # all of Pillow's formats are there to be asked
    started: list[object] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given, **more: started.append(given))
    root = make(tmp_path / "raw")
    path = root / "train" / "a" / "drawing.JPEG"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(UnusableImage, match=r"drawing\.JPEG: cannot be read as an image \(cannot identify image file"):
        decode_image(path, str(path))
    path.rename(path.with_suffix(".eps"))
    assert len(find_images(root).train) == 4
    write_folders(tmp_path / "cifar", raw_dataset("cifar10"))
    first = sorted((tmp_path / "cifar" / "train" / "airplane").iterdir())[0]
    path.with_suffix(".eps").rename(first)
    with pytest.raises(FastarError, match="cannot be read as an image"):
        find_raw(DATASETS["cifar10"], tmp_path / "cifar").train[0]
    assert started == []
    for format_ in ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP"):
        Image.new("RGB", (5, 4)).save(root / "train" / "a" / "other.thing", format_)
        assert len(find_images(root).train) == 5, format_
        assert decode_image(root / "train" / "a" / "other.thing", "").shape == (4, 5, 3)


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the system's answer is made up."""
    root = make(tmp_path / "raw")
    scandir, stat = os.scandir, os.stat
    for closed in (root / "train", root / "val" / "b"):

        def refusing(path: Any, closed: Path = closed) -> Any:
            if str(path) == str(closed):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refusing)
        with pytest.raises(FastarError, match=r"^\S+: cannot be read \(Permission denied\); check it and its perm"):
            find_images(root)
    monkeypatch.setattr(os, "scandir", scandir)

    def refused(path: Any, **more: Any) -> Any:
        if str(path).startswith(f"{root}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **more)

    monkeypatch.setattr(os, "stat", refused)
    for call in (lambda: find_images(root), lambda: count_images(root), lambda: find_raw(DATASETS["cifar10"], root)):
        with pytest.raises(FastarError, match=r"cannot be read \(Permission denied\)"):
            call()


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header that says what is asked, whether tarfile would or not."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[482] = kind == tarfile.GNUTYPE_SPARSE  # its table goes on in the next block
    block[124:136] = (b"%011o\0" % size) if 0 <= size < 8**11 else size.to_bytes(12, "big", signed=True)
    block[124] |= 0 if 0 <= size < 8**11 else 0x80
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(**records: str) -> bytes:
    content = b""
    for key, value in records.items():
        rest = f" {key.replace('__', '.')}={value}\n".encode()
        size = len(rest) + len(str(len(rest) + 2))
        content += str(size).encode() + rest
    return header("pax", len(content), tarfile.XHDTYPE) + padded(content)


LONG = header("././@LongLink", 2, tarfile.GNUTYPE_LONGNAME) + padded(b"x\0")
HARMFUL = {
    "size-2^87": header("a.JPEG", 1 << 87) + bytes(1024),
    "size-below-0": header("a.JPEG", -512) + bytes(1024),
    "size-2^61": header("a.JPEG", 1 << 61) + bytes(1024),
    "long-names": LONG * 5000 + header("a.JPEG", 0) + bytes(1024),
    "long-name-2^50": header("././@LongLink", 1 << 50, tarfile.GNUTYPE_LONGNAME) + bytes(1024),
    "long-name-1-MB": header("././@LongLink", 1 << 20, tarfile.GNUTYPE_LONGNAME) + bytes(1 << 20),
    "pax-2^87": header("pax", 1 << 87, tarfile.XHDTYPE) + bytes(1024),
    "pax-size-2^95": pax(size=str(2**95)) + header("a.JPEG", 0) + bytes(1024),
    "pax-size-below-0": pax(size="-512") + header("a.JPEG", 0) + bytes(1024),
    "sparse": header("a.JPEG", 0, tarfile.GNUTYPE_SPARSE),
    "pax-sparse": pax(GNU__sparse__major="1", GNU__sparse__minor="0") + header("a.JPEG", 512) + b"9" * 512,
}


@pytest.mark.parametrize("inner", [False, True], ids=["val", "train"])
@pytest.mark.parametrize("kind", HARMFUL)
def test_archives_made_to_do_harm_are_one_line(tmp_path: Path, kind: str, inner: bool) -> None:
    root = make(tmp_path / "raw")
    harmful = HARMFUL[kind]
    (root / "train" if inner else root / "val").rename(tmp_path / "away")
    path = root / ("ILSVRC2012_img_train.tar" if inner else "ILSVRC2012_img_val.tar")
    path.write_bytes(tar({"a.tar": harmful}) if inner else harmful)
    with pytest.raises(FastarError, match=r"(not a whole|is damaged|is cut off).*; get it again$") as caught:
        find_images(root)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_members_of_archives_have_any_name_and_what_is_none_is_named(tmp_path: Path) -> None:
    root, names_ = tmp_path / "raw", {1: "n02", 2: "n03", 3: "n01"}
    root.mkdir()
    train = {c: {f"{c}_{LATIN}.JPEG": jpeg(k), f"{c}.jfif": jpeg(9 + k)} for k, c in enumerate(("n01", "n02", "n03"))}
    train["n01"] |= {"notes.txt": b"BM", ".hidden.JPEG": jpeg(1), "unknown": jpeg(50), "x.JPEG~": jpeg(2)}
    labels = [3, 1, 2, 1]
    val = {f"val_{k}_{LATIN}.JPEG": jpeg(20 + k) for k in range(4)} | {"README": b"read me"}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar({f"{c}.tar": tar(train[c]) for c in train} | {"sums": b"1"}))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar(val))
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar(devkit(labels), "w:gz"))
    told = Told()
    splits = find_images(root, told)
    assert len(splits.train) == 7
    assert splits.train.where(0).endswith("train.tar/n01/n01.jfif")
    (line,) = told.lines
    for part in (
        "passed over 5 that",
        "img_train.tar/sums (no archive of a class)",
        "img_train.tar/n01.tar/notes.txt, ILSVRC2012_img_val.tar/README (no image)",
        "img_train.tar/n01.tar/.hidden.JPEG (hidden)",
        "img_train.tar/n01.tar/x.JPEG~ (a copy, or a part of one)",
    ):
        assert part in line
    folders = tmp_path / "folders"
    for name, content in {f"train/{c}/{n}": d for c in train for n, d in train[c].items()}.items():
        (folders / name).parent.mkdir(parents=True, exist_ok=True)
        (folders / name).write_bytes(content)
    (folders / "train" / "n01" / ".hidden.JPEG").unlink()  # in folders it was an image before
    for number, (name, content) in enumerate(list(val.items())[:4]):
        path = folders / "val" / names_[labels[number]] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    same = find_images(folders)
    assert same.digest == splits.digest
    assert prepared(root).metadata["content"] == prepared(folders, "other").metadata["content"]


def test_the_first_few_of_each_kind_are_named(tmp_path: Path) -> None:
    put(tmp_path / "c" / "x" / "0.jpg")
    for number in range(40):
        (tmp_path / "c" / "x" / f"{number:02}.txt").write_bytes(b"")
    passed = PassedOver()
    assert len(images_below(tmp_path / "c" / "x", passed)) == 1
    first = "c/x/00.txt, c/x/01.txt, c/x/02.txt, ... (no image)"
    assert str(passed) == f"passed over 40 that are no images of a class: {first}"


def test_a_damaged_header_ends_no_archive_early(tmp_path: Path) -> None:
    """tarfile takes one for the archive's end, as it takes a cut between members: classes would vanish."""
    root = make(tmp_path / "raw")
    (root / "train").rename(tmp_path / "away")
    path = root / "ILSVRC2012_img_train.tar"
    whole = tar({f"{name}.tar": tar({"0.JPEG": jpeg(1)}) for name in "ab"})
    path.write_bytes(whole)
    assert len(find_images(root).train) == 2
    second = whole.index(b"b.tar\0")
    other = whole[:second] + b"B" + whole[second + 1 :]
    zeros = whole[:second] + bytes(512) + whole[second + 512 :]
    for damaged in (other, zeros, whole[:second], whole[: second + 300], whole + whole):
        path.write_bytes(damaged)
        with pytest.raises(FastarError, match=r"img_train\.tar: not a whole, uncompressed tar archive"):
            find_images(root)


def cifar(root: Path, **changes: Any) -> dict[str, bytes]:
    """The files of a small CIFAR-10; `changes` go into the pickled test batch."""
    files = cifar_python_files(raw_dataset("cifar10"), "cifar10")
    batch = pickle.loads(files["test_batch"], encoding="bytes")
    files["test_batch"] = pickle.dumps(batch | {key.encode(): value for key, value in changes.items()}, protocol=2)
    write_files(root, files)
    return files


@pytest.mark.parametrize("label", [10**30, -(10**30), 2**63, -(2**63), 1 << 20_000], ids=range(5))
def test_labels_that_are_no_numbers_of_classes(tmp_path: Path, label: int) -> None:
    cifar(tmp_path, labels=[0] * 29 + [label])
    with pytest.raises(FastarError, match=r"test_batch, sample 29: its label is no class's number; the file is dam"):
        find_raw(DATASETS["cifar10"], tmp_path)


def test_pickles_cannot_ask_for_memory_or_lines_of_their_own(tmp_path: Path) -> None:
    cifar(tmp_path)
    for content, message in (
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "at a place beyond its own size"),  # 32 GB for what is remembered
        (b"Np99999999999\n.", "at a place beyond its own size"),
        (b"\x80\x04\x8c\x03o\ns\x8c\x07sys\ntem\x93.", r"asks for o\\ns\.sys\\ntem, which"),
        (b"\x80\x02X\xff\xff\xff\x7fab.", "not a readable CIFAR pickle"),
    ):
        (tmp_path / "test_batch").write_bytes(content)
        with pytest.raises(FastarError, match=message) as caught:
            find_raw(DATASETS["cifar10"], tmp_path)
        assert "\n" not in str(caught.value)


class Zeros(io.RawIOBase):
    """So many zero bytes that take no room."""

    def __init__(self, size: int):
        self.left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(self.left, len(buffer))
        buffer[:size] = bytes(size)
        self.left -= size
        return size


def bomb(path: Path, name: str, size: int, *, front: bytes = b"") -> None:
    """A .tar.gz whose member `name` has `size` bytes; without a name, `front` and so many zeros in a .gz."""
    with gzip.open(path, "wb", compresslevel=1) as packed:
        if name:
            with tarfile.open(fileobj=packed, mode="w") as archive:
                member = tarfile.TarInfo(name)
                member.size = size
                archive.addfile(member, io.BufferedReader(Zeros(size)))
        else:
            packed.write(front)
            shutil.copyfileobj(io.BufferedReader(Zeros(size)), packed, 1 << 20)


def memory_of(call: Callable[[], object]) -> int:
    """The most bytes that Python held at once in `call`, beyond those before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(call: Callable[[], object], message: str) -> Callable[[], None]:
    def run() -> None:
        with pytest.raises(FastarError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)

    return run


def test_archives_that_unpack_to_far_more_are_refused_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 1 << 20
    for module in (cifar_module, idx, archives):
        assert module._LARGEST >= 1 << 28
        monkeypatch.setattr(module, "_LARGEST", most)
    size, little = 1 << 25, 1 << 23
    raw = tmp_path / "cifar"
    raw.mkdir()
    path = raw / "cifar-10-python.tar.gz"
    for name in ("cifar-10-batches-py/data_batch_1", "something else"):
        bomb(path, name, size)
        message = r"cifar-10-python\.tar\.gz: cannot be read \(it holds more than 1000 members or 1,048,576 bytes\)"
        assert memory_of(refused(lambda: find_raw(DATASETS["cifar10"], raw), message)) < little
    # Behind the archive's end.
    files = cifar_python_files(raw_dataset("cifar10", 10, 10), "cifar10")
    write_archive(path, "cifar-10-batches-py", files)
    packed = path.read_bytes()
    assert len(find_raw(DATASETS["cifar10"], raw).train) == 10
    bomb(tmp_path / "more.gz", "", size)
    path.write_bytes(packed + (tmp_path / "more.gz").read_bytes())
    message = "it holds more than 1,048,576 bytes"
    assert memory_of(refused(lambda: find_raw(DATASETS["cifar10"], raw), message)) < little
    with tarfile.open(path, "w:gz") as archive:
        for number in range(1001):
            add(archive, f"{number}", b"")
    refused(lambda: find_raw(DATASETS["cifar10"], raw), "more than 1000 members")()

    write_idx(tmp_path / "mnist", raw_dataset("mnist", 30, 30), zipped=True)
    images_path = tmp_path / "mnist" / "train-images-idx3-ubyte.gz"
    for front, message in (
        (idx_bytes(np.zeros((30, 28, 28), np.uint8))[:16], "more than the 23,536 bytes that are due"),
        (b"", "not an IDX file"),
        (bytes((0, 0, 8, 3)) + b"\0\0\xff\xff" * 3, r"its front says that it holds 281,462,092,005,375 bytes"),
    ):
        bomb(images_path, "", size, front=front)
        assert memory_of(refused(lambda: find_raw(DATASETS["mnist"], tmp_path / "mnist"), message)) < little

    root = make(tmp_path / "raw")
    (root / "val").rename(tmp_path / "away")
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar({"0.JPEG": jpeg(0)}))
    bomb(root / "ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12/data/meta.mat", size)
    assert memory_of(refused(lambda: find_images(root), "it holds more than 1000 members or 1,048,576 by")) < little


def test_whatever_a_packed_archive_holds_is_one_line(tmp_path: Path) -> None:
    """One bit of each place in turn, gzip and xz: refused, or every image as it was."""
    files = cifar_python_files(raw_dataset("cifar10", 10, 10), "cifar10")
    path = tmp_path / "cifar-10-python.tar.gz"
    for mode in ("w:gz", "w:xz"):
        with tarfile.open(path, mode) as archive:
            for name, content in files.items():
                add(archive, f"cifar-10-batches-py/{name}", content)
        whole = path.read_bytes()
        known = find_raw(DATASETS["cifar10"], tmp_path).digest
        accepted = 0
        for place in np.random.default_rng(0).integers(0, len(whole), 40):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(place) % 8
            path.write_bytes(damaged)
            found = None
            with contextlib.suppress(FastarError):
                found = find_raw(DATASETS["cifar10"], tmp_path).digest
            assert found in (None, known)
            accepted += found is not None
        assert accepted <= 1  # a name or a time in gzip's front


@pytest.mark.parametrize("kind", ["cifar", "devkit", "unpacked devkit", "annotations"])
def test_a_pipe_where_a_file_is_due_is_not_waited_for(tmp_path: Path, kind: str) -> None:
    root = make(tmp_path / "raw") if kind != "cifar" else tmp_path / "raw"
    if kind == "cifar":
        cifar(root)
        path = root / "data_batch_3"
        path.unlink()
    elif kind == "annotations":
        shutil.rmtree(root / "val")
        put(root / "val" / "images" / "0.jpg")
        path = root / "val" / "val_annotations.txt"
    else:
        shutil.rmtree(root / "val")
        (root / "ILSVRC2012_img_val.tar").write_bytes(tar({"0.JPEG": jpeg(0)}))
        path = root / "ILSVRC2012_devkit_t12.tar.gz"
        if kind.startswith("unpacked"):
            path = root / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(FastarError, match=r"not a file|is no file; |which holds its labels; put it there"):
        find_raw(DATASETS["cifar10"], root) if kind == "cifar" else find_images(root)


def test_a_damaged_meta_mat_kills_a_process_of_its_own_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit(3)")  # what lies where the user is does not count
    content = devkit([1, 2])
    meta = content["ILSVRC2012_devkit_t12/data/meta.mat"]
    where = tmp_path / "ILSVRC2012_devkit_t12"
    assert archives._synsets(meta, where) == [(1, "n02", 0), (2, "n03", 0), (3, "n01", 0), (4, "n00", 3)]
    for place, bit in ((301, 1), (346, 1)):  # each is a SIGSEGV of SciPy 1.17
        damaged = bytearray(meta)
        damaged[place] ^= 1 << bit
        with pytest.raises(FastarError, match=r"ILSVRC2012_devkit_t12: its labels or meta\.mat are damaged \("):
            archives._synsets(bytes(damaged), where)
    with pytest.raises(FastarError, match=r"meta\.mat are damaged \(signal 11\); get it again"):
        archives._synsets(meta, where, "import os; os.kill(os.getpid(), 11)")
    with pytest.raises(FastarError, match=r"reading its meta\.mat takes more than 0\.2 s; get it again"):
        archives._synsets(meta, where, "import time; time.sleep(3600)", 0.2)


def test_a_folder_of_finished_data_may_hold_anything(tmp_path: Path) -> None:
    root = make(tmp_path / "raw")
    files = prepared(root)
    whole = {path: path.read_bytes() for path in files.folder.iterdir()}
    for path, word in (
        (files.folder / "metadata.json", "metadata.json: "),
        (files.path("train"), "train.beton: is no file; "),
    ):
        for put_there in (os.mkfifo, os.mkdir):
            path.unlink()
            put_there(path)
            for call in (lambda: open_files(files.folder), lambda: prepared(root)):
                with pytest.raises(FastarError, match=word):
                    call()
            assert any(word in line for line in verify_folder(files.folder))
            path.unlink() if path.is_fifo() else path.rmdir()
            path.write_bytes(whole[path])
    metadata = files.folder / "metadata.json"
    for content in (b"[" * 100_000, b'{"format": 1' + b"0" * 5000 + b"}", b"7", b'{"kind": {}}'):
        metadata.write_bytes(content)
        with pytest.raises(FastarError, match=r"metadata\.json: "):
            open_files(files.folder)
    metadata.write_bytes(whole[metadata])
    sums = files.folder / "train.checksums"
    sums.unlink()
    os.mkfifo(sums)
    with pytest.raises(FastarError, match=r"train\.checksums: cannot be read \(not a file\)"):
        StreamingDataset(open_files(files.folder), "train", "cpu", size=4, threads=1)


def test_what_stands_in_the_way_of_writing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make(tmp_path / "raw")
    folder = tmp_path / "out" / "set"
    (folder / "train.beton.partial").mkdir(parents=True)
    with pytest.raises(FastarError, match=r"train\.beton\.partial: cannot be removed \(Is a directory\); move it away"):
        prepared(root)
    assert [path.name for path in folder.iterdir()] == ["train.beton.partial"]
    (folder / "train.beton.partial").rmdir()
    stat = os.stat

    def refused(path: Any, **more: Any) -> Any:
        if str(path).startswith(f"{folder}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **more)

    monkeypatch.setattr(os, "stat", refused)
    with pytest.raises(FastarError, match=r"out/set/\S*: cannot be read \(Permission denied\)"):
        prepared(root)
