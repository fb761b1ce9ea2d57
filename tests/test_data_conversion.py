"""Converting images of any size: presets, unusable images, full disks, kills; and reading them in training."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import namedtuple
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from fastar.config.datasets import IMAGENET_MEAN, IMAGENET_STD
from fastar.data.convert import Form, prepare
from fastar.data.crops import random_boxes
from fastar.data.encode import PRESETS, Encoding
from fastar.data.ffcv.folder import DatasetFiles, locked_folder, open_files
from fastar.data.raw.class_folders import (
    class_names,
    count_images,
    find_images,
    folder_split,
    in_class_folders,
    split_class,
)
from fastar.data.raw.listing import PassedOver
from fastar.data.raw.raw_split import ImageSplit
from fastar.data.sampling import draw, file_order, paged_order
from fastar.data.streaming import StreamingDataset
from fastar.errors import FastarError
from fastar.runs import hold
from fastar.runtime.progress import SilentProgress
from fastar.runtime.seeds import derive_seed

RAW = Encoding(max_resolution=None, compress_probability=0)
COUNT = 24


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of 8 training images, each of noise and of its own size, and of 2 test images."""
    generator = np.random.default_rng(0)
    for split, count in (("train", COUNT), ("val", 6)):
        for number in range(count):
            path = tmp_path / "raw" / split / f"c{number % 3}" / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (int(generator.integers(20, 60)), int(generator.integers(20, 60)), 3)
            Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(path)
    return tmp_path / "raw"


def prepared(root: Path, name: str = "set", **changes: Any) -> DatasetFiles:
    options: dict[str, Any] = {"workers": 2, "encoding": RAW, **changes}
    form = Form(**{key: options.pop(key) for key in vars(Form()) if key in options})
    return prepare("imagefolder", own_name=name, raw=root, directory=root.parent / "out", form=form, **options)


def in_folders(root: Path) -> ImageSplit:
    classes = class_names(root)
    return folder_split(root, classes, in_class_folders(root, classes, PassedOver()))


def shown(data: StreamingDataset, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """An augmented epoch: pixels back in 0..255, and labels."""
    parts = list(data.batches(7, seed=3, epoch=1, drop_last=False, **options))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = ((torch.cat([part[0] for part in parts]) * std + mean) * 255).permute(0, 2, 3, 1)
    return pixels.numpy(), torch.cat([part[1] for part in parts]).numpy()


@pytest.mark.parametrize("crop", ["random-resized", "resize256-crop224"])
def test_training_images_are_the_boxes_resized_and_mirrored(root: Path, crop: Any) -> None:
    files = prepared(root)
    data = StreamingDataset(files, "train", "cpu", size=24, crop=crop, threads=2)
    pixels, labels = shown(data)
    raw = in_folders(root / "train")
    stored = [raw[int(index)] for index in file_order(COUNT, "train")]
    key = derive_seed(3, "augmentation", 1)
    index = np.arange(COUNT)
    heights, widths = (np.array([image.shape[axis] for image, _ in stored]) for axis in (0, 1))
    boxes = random_boxes(crop, key)(index, heights, widths)
    left = set(range(COUNT))
    mirrors = draw(key, index, 2) >> 31 == 1
    assert {False, True} == set(mirrors.tolist())
    for found, label in zip(pixels, labels, strict=True):
        for number in left:
            (image, known), (top, first, height, width) = stored[number], boxes[number]
            want = cv2.resize(image[top : top + height, first : first + width], (24, 24), interpolation=cv2.INTER_AREA)
            want = want[:, ::-1] if mirrors[number] else want
            if np.abs(found - want).max() < 0.01:  # normalising and back, in fp32
                assert label == known
                left.remove(number)
                break
        else:
            pytest.fail("an image that is none of the set's")
    assert not left


def test_threads_limits_and_orders_leave_a_sample_s_pixels_alone(root: Path) -> None:
    files = prepared(root)
    want = {image.tobytes() for image in shown(StreamingDataset(files, "train", "cpu", size=16, threads=1))[0]}
    assert len(want) == COUNT
    for options in ({"threads": 3}, {"order": "pages"}, {"limit": 9}):
        found, labels = shown(StreamingDataset(files, "train", "cpu", size=16, **options))
        assert len(found) == len(labels) == options.get("limit", COUNT)
        assert {image.tobytes() for image in found} <= want
    assert np.bincount(labels).tolist() == [3, 3, 3]


def test_page_order_reads_windows_of_pages(root: Path) -> None:
    pages = np.repeat(np.arange(50), 7)[np.random.default_rng(0).permutation(350)]
    orders = [paged_order(pages, 8, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert sorted(order) == list(range(350))
        for start in range(0, 350, 56):  # 8 pages of 7
            window = pages[order[start : start + 56]]
            assert len(set(window)) == min(8, 50 - start // 7)
            assert (np.diff(window) != 0).mean() > 0.6 or start == 336  # shuffled within
    assert len({tuple(order) for order in orders}) == 3
    files = prepared(root)
    data = StreamingDataset(files, "train", "cpu", size=8, order="pages", threads=1, window=1)
    data._pages = np.arange(COUNT) // 6
    order = paged_order(data._pages, 1, 3, 1)
    _, labels = shown(data)
    assert labels.tolist() == data._labels[order].tolist()
    assert [len(set(order[start : start + 6] // 6)) for start in range(0, COUNT, 6)] == [1] * 4
    by_class = prepared(root, "sorted", shuffled=False)
    assert not by_class.shuffled
    plain = StreamingDataset(by_class, "train", "cpu", size=8)
    assert plain._labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    with pytest.raises(FastarError, match=r"holds its images by class.*dataset\.order=random"):
        StreamingDataset(by_class, "train", "cpu", size=8, order="pages")


def test_limits_that_cannot_be(root: Path) -> None:
    files = prepared(root)
    with pytest.raises(FastarError, match="limit=25 is more than the 24 train images of set"):
        StreamingDataset(files, "train", "cpu", limit=25)
    with pytest.raises(FastarError, match="limit=2 is below one image per class"):
        StreamingDataset(files, "train", "cpu", limit=2)
    few = prepared(root, "few", limit=6)
    assert (few.count("train"), few.count("test")) == (6, 6)
    with pytest.raises(FastarError, match="written with limit=6, asked for limit=None"):
        prepared(root, "few")


def spoil(root: Path) -> dict[str, str]:
    """Three training images that cannot be used, and a word of each one's reason."""
    paths = {name: root / "train" / name for name in ("c0/00.png", "c1/13.png", "c2/02.png")}
    paths["c0/00.png"].write_bytes(b"not an image")
    paths["c1/13.png"].write_bytes(paths["c1/13.png"].read_bytes()[:-900])
    Image.fromarray(np.zeros((30, 30), np.uint16)).save(paths["c2/02.png"])
    return {"c0/00.png": "cannot identify", "c1/13.png": "cannot be read", "c2/02.png": "not 8-bit"}


def test_images_that_cannot_be_used_are_left_out_and_listed(root: Path) -> None:
    reasons = spoil(root)
    with pytest.raises(FastarError, match=r"train/c\d/\d\d\.png: "):
        prepared(root)
    assert not (root.parent / "out").exists()
    files = prepared(root, on_error="skip")
    assert (files.count("train"), files.count("test")) == (COUNT - 3, 6)
    found = {entry["path"].split("train/")[1]: entry["reason"] for entry in files.skipped["train"]}
    assert found.keys() == reasons.keys()
    assert all(reasons[name] in found[name] for name in reasons)
    for reason in found.values():  # alone: the path stands beside it, and advice is for those who can still take it
        assert str(root) not in reason
        assert not re.search("replace|convert", reason)
    assert files.skipped["test"] == []
    raw = in_folders(root / "train")
    kept = [int(k) for k in file_order(COUNT, "train") if not raw.where(int(k)).endswith(tuple(reasons))]
    parts = list(StreamingDataset(files, "train", "cpu", size=20, threads=1).sequential(4))
    assert torch.cat([labels for _, labels in parts]).tolist() == raw.labels[kept].tolist()
    assert prepared(root, "again", on_error="skip", workers=1).metadata["content"] == files.metadata["content"]
    assert open_files(files.folder).digest == files.digest
    for path in (root / "val").glob("*/*"):
        path.write_bytes(b"")
    with pytest.raises(FastarError, match="none of the 6 images can be used"):
        prepared(root, "none", on_error="skip")


def test_a_disk_too_small_is_told_before_anything_is_written(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 40 << 20))
    needs = 2 * 3 * (8 << 20)  # for each split a page, one that may be begun, and the front
    with pytest.raises(FastarError, match=r"30 images need about \d+\.\d MB, the disk has 41\.9 MB free") as caught:
        prepared(root, workers=4)
    assert float(str(caught.value).split("about ")[1].split(" ")[0]) * 1e6 >= needs - 50_000  # as it is rounded
    assert not (root.parent / "out").exists()


class Listening(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_predictions_come_near(root: Path) -> None:
    told = Listening()
    generator = np.random.default_rng(0)
    for number in range(60):  # noise of 3 x 360,000 bytes: 7 to a page
        pixels = generator.integers(0, 256, (600, 600, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "train" / "c0" / f"large{number}.bmp")
    files = prepared(root, encoding=Encoding(None, 0.0), progress=told)
    predicted = float(told.lines[0].split("about ")[1].split(" ")[0])
    written = sum(entry["bytes"] for entry in files.metadata["files"].values()) / 1e6
    # A sample of 64 out of 84 images of two sizes; and a page or two too many for each split, 8.4 MB each.
    assert 0.85 * written < predicted < 1.15 * written + 40, (predicted, written)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Class folders and nothing else: 10 and 5 images, each of its own grey."""
    for name, count in (("a", 10), ("b", 5)):
        for number in range(count):
            path = tmp_path / "classes" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20 + number, 20), (25 * number, 7, 30 if name == "a" else 60)).save(path)
    return tmp_path / "classes"


def test_class_folders_alone_are_split_by_a_share_of_each_class(classes: Path, tmp_path: Path) -> None:
    splits = find_images(classes, val_share=0.2)
    train, test = ({split.where(n) for n in range(len(split))} for split in (splits.train, splits.test))
    assert not train & test
    assert train | test == {str(path) for path in classes.rglob("*.png")}
    assert np.bincount(splits.test.labels).tolist() == [2, 1]
    assert np.bincount(splits.train.labels).tolist() == [8, 4]
    assert splits.train.classes == splits.test.classes == ("a", "b")
    assert count_images(classes, val_share=0.2) == (12, 3, 2)
    digest = splits.digest
    # A hash of the names alone: elsewhere, and below train/, it is the same split; and not the first files.
    moved = tmp_path / "elsewhere" / "train"
    moved.parent.mkdir()
    classes.rename(moved)
    again = find_images(moved.parent, val_share=0.2)
    assert again.digest == digest
    assert test != {str(classes / name) for name in ("a/0.png", "a/1.png", "b/0.png")}
    paths = [Path(f"c/{n}") for n in range(100)]
    chosen = split_class(paths, 0.3, Path())
    assert chosen == [path for path in paths if path in set(split_class(paths[::-1], 0.3, Path()))]
    assert set(split_class(paths, 0.1, Path())) < set(chosen)


def test_an_other_share_is_not_reused_in_silence(classes: Path) -> None:
    files = prepared(classes, val_share=0.2)
    assert (files.count("train"), files.count("test"), files.val_share) == (12, 3, 0.2)
    assert json.loads((files.folder / "metadata.json").read_text())["settings"]["val_share"] == 0.2
    assert prepared(classes, val_share=0.2).digest == files.digest
    for root in (classes, None):  # as it was written, where nothing is asked for
        assert prepare("imagefolder", own_name="set", raw=root, directory=classes.parent / "out").digest == files.digest
        with pytest.raises(FastarError, match=r"set: written with val-share=0\.2, asked for val-share=0\.4; delete"):
            prepare("imagefolder", own_name="set", raw=root, directory=classes.parent / "out", form=Form(val_share=0.4))


def test_a_share_where_there_is_none_to_take_is_refused(classes: Path, root: Path) -> None:
    with pytest.raises(FastarError, match=r"classes: has no train/ folder; .*--val-share 0\.1$"):
        prepared(classes)
    with pytest.raises(FastarError, match=r"val: holds test images already; leave out --val-share"):
        prepared(root, val_share=0.1)
    (root / "val").rename(root.parent / "val")
    with pytest.raises(FastarError, match=r"has neither val/ nor test/ .*--val-share 0\.1$"):
        prepared(root)
    assert prepared(root, val_share=0.01).count("test") == 3  # one of each class at least
    (root / "train" / "c9").mkdir()
    Image.new("RGB", (9, 9)).save(root / "train" / "c9" / "one.png")
    with pytest.raises(FastarError, match=r"c9: holds one image, and needs one for training and one for testing"):
        prepared(root, "other", val_share=0.5)
    with pytest.raises(FastarError, match=r"val-share=1 must be above 0 and below 1"):
        prepared(root, "other", val_share=1)


def test_presets_and_metadata(root: Path) -> None:
    assert {
        "rn50": Encoding(500, 0.5, 90),
        "rn18": Encoding(400, 0.1, 90),
        "jpeg": Encoding(512, 1.0, 90),
    } == PRESETS
    files = prepared(root, encoding=None)
    assert files.encoding == PRESETS["rn50"]
    assert prepared(root, encoding=None).digest == files.digest
    with pytest.raises(FastarError, match=r"written with encoding=.*asked for encoding="):
        prepared(root, encoding=PRESETS["rn18"])
    with pytest.raises(FastarError, match="written with shuffled=True, asked for shuffled=False"):
        prepared(root, encoding=None, shuffled=False)
    metadata = json.loads((files.folder / "metadata.json").read_text())
    assert metadata["settings"] == {"limit": None, "on_error": "stop", "val_share": None}
    assert metadata["skipped"] == {"train": [], "test": []}


@pytest.mark.parametrize("removed", [False, True], ids=["written", "removed"])
def test_a_folder_that_another_process_writes_is_waited_for(tmp_path: Path, removed: bool) -> None:
    """Or one that it removes, since it failed."""
    folder, said, other = tmp_path / "new" / "set", list[str](), ExitStack()
    folder.mkdir(parents=True)
    other.enter_context(hold(folder))

    def say(line: str) -> None:
        said.append(line)
        other.close()
        if removed:
            shutil.rmtree(folder.parent)

    with locked_folder(folder, say):
        (folder / "train.beton.partial").touch()
    assert len(said) == 1
    assert said[0].startswith(f"waiting: {folder}: in use by another fastar (process {os.getpid()} on ")
    assert list(folder.iterdir()) == []


def test_a_folder_in_which_nothing_was_finished_goes(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "new" / "set"):
        (tmp_path / "new" / "set" / "train.beton.partial").touch()
    assert list(tmp_path.iterdir()) == []
