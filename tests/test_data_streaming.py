"""Images of differing sizes: what is written comes back, once each, cropped as said, and nothing damaged passes."""

from __future__ import annotations

import os
import tarfile
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastar.config.datasets import IMAGENET_MEAN, IMAGENET_STD
from fastar.data import streaming
from fastar.data.convert import Form, prepare
from fastar.data.crops import centre
from fastar.data.encode import PRESETS, Encoding
from fastar.data.ffcv.folder import DatasetFiles, open_files
from fastar.data.ffcv.format import JPEG_MODE, RAW_MODE, check_beton
from fastar.data.sampling import file_order
from fastar.data.streaming import StreamingDataset
from fastar.errors import FastarError

SAMPLE = Path(__file__).parents[2] / "shared/data/imagenet-sample.tar"
RAW = Encoding(max_resolution=None, compress_probability=0)
JPEG = Encoding(max_resolution=40, compress_probability=1)


def smooth(height: int, width: int, number: int) -> Image.Image:
    """A gradient whose brightness says which image it is; smooth, so that JPEG hardly changes it."""
    y, x = np.mgrid[:height, :width]
    planes = [60 + 6 * number + 40 * y / height, 60 + 6 * number + 40 * x / width, np.full((height, width), 90)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes; 10 and 6 training images, landscape and portrait, among them a grey and a CMYK JPEG."""
    root = tmp_path / "raw"
    for split, counts in (("train", (10, 6)), ("val", (2, 1))):
        for label, count in enumerate(counts):
            folder = root / split / f"n{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = smooth(32 + 3 * number, 50 - number, number + 10 * label)
                if (label, number) == (0, 3):
                    image = image.convert("L")
                if (label, number) == (0, 4):
                    image = image.convert("CMYK")
                image.save(folder / f"{number:02}.JPEG", quality=95)
    return root


def prepared(root: Path, encoding: Encoding | None, name: str = "images") -> DatasetFiles:
    return prepare(
        "imagefolder", own_name=name, raw=root, directory=root.parent / "out", form=Form(encoding), workers=2
    )


def pixels(images: torch.Tensor) -> np.ndarray:
    """Normalised [b, C, H, W] back to 0..255 [b, H, W, C]."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((images.double() * std + mean) * 255).permute(0, 2, 3, 1).numpy()


def everything(data: StreamingDataset, batch: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [(images.clone(), labels) for images, labels in data.sequential(batch)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def in_order(root: Path) -> list[Path]:
    return sorted((root / "train").rglob("*.JPEG"))


def stored(root: Path) -> list[Path]:
    """The training images in the order of the file."""
    paths = in_order(root)
    return [paths[index] for index in file_order(len(paths), "train")]


def square(path: Path) -> Image.Image:
    """The centred square of an image, RGB."""
    with Image.open(path) as image:
        side, rgb = min(image.size), image.convert("RGB")
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    return rgb.crop((left, top, left + side, top + side))


def cut(monkeypatch: pytest.MonkeyPatch, kept: float) -> None:
    """Cut images that are not augmented to the centred `kept` of the shorter side."""
    monkeypatch.setattr(streaming, "centre", partial(centre, kept=kept))


def test_every_sample_once_in_order_with_raw_pixels_exact(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 1.0)
    for path in in_order(root):  # one shorter side for all, so that nothing is resized
        square(path).crop((0, 0, 30, 30)).resize((30, 30 + int(path.stem))).save(path, quality=95)
    data = StreamingDataset(prepared(root, RAW), "train", "cpu", size=30, threads=1)
    images, labels = everything(data)
    assert labels.tolist() == [int(path.parent.name[1:]) for path in stored(root)]
    assert labels.tolist() != sorted(labels.tolist())  # shuffled
    assert images.shape == (16, 3, 30, 30)
    assert images.is_contiguous(memory_format=torch.channels_last)
    want = np.stack([np.asarray(square(path)) for path in stored(root)])
    # Normalising and back: fp32 rounding of numbers up to 255, far below the 1 between neighbouring levels.
    np.testing.assert_allclose(pixels(images), want, atol=1e-3)


def test_jpegs_are_shrunk_cropped_and_resized(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 0.75)
    data = StreamingDataset(prepared(root, JPEG), "train", "cpu", size=24, threads=1)
    images, labels = everything(data)
    assert len(labels) == 16
    for got, path in zip(pixels(images), stored(root), strict=True):
        whole = square(path)
        edge = whole.width * 0.125
        want = np.asarray(whole.resize((24, 24), Image.Resampling.BOX, (edge, edge, *(whole.width - edge,) * 2)))
        # Gradients of 40 levels over some 30 pixels: a crop that is a pixel off, JPEG and another resizing filter
        # give about 2 levels on average. The next image in order is 6 levels brighter.
        assert np.abs(got - want).mean() < 3, path


def test_grey_and_cmyk_come_out_as_pillow_shows_them(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, 1.0)
    images, _ = everything(StreamingDataset(prepared(root, RAW), "train", "cpu", size=24, threads=1))
    grey, cmyk = (pixels(images)[stored(root).index(in_order(root)[number])] for number in (3, 4))
    np.testing.assert_allclose(grey, grey[..., :1].repeat(3, -1), atol=1e-3)  # three equal channels
    want = np.asarray(square(in_order(root)[4])).mean((0, 1))
    np.testing.assert_allclose(cmyk.mean((0, 1)), want, atol=1.5)  # resizing keeps a gradient's mean, to a level


def test_workers_and_batch_sizes_do_not_change_a_bit(root: Path) -> None:
    files = prepared(root, JPEG)
    one = StreamingDataset(files, "train", "cpu", size=24, threads=1)
    two = StreamingDataset(files, "train", "cpu", size=24, threads=2)
    images, labels = everything(one)
    for other in (everything(one, 16), everything(two)):
        assert torch.equal(images, other[0])
        assert torch.equal(labels, other[1])
    epochs = [list(data.batches(5, seed=3, epoch=2)) for data in (one, two)]
    for first, second in zip(*epochs, strict=True):
        assert torch.equal(first[0], second[0])


def test_epochs_are_permutations_with_keyed_mirroring(tmp_path: Path) -> None:
    """Wherever an image is cut, its blue is its number, and its red grows to the right."""
    root = tmp_path / "raw"
    for number in range(20):
        image = np.zeros((30, 40, 3), np.uint8)
        image[..., 0], image[..., 2] = 5 * np.arange(40), 10 * number
        path = root / ("train" if number < 16 else "val") / f"n{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    data, turned = (
        StreamingDataset(prepared(root, RAW), "train", "cpu", size=24, threads=1, alternate=alternate)
        for alternate in (False, True)
    )

    def epoch(number: int, batch: int = 16, data: StreamingDataset = data) -> list[tuple[int, bool]]:
        found = []
        for images, _ in data.batches(batch, seed=1, epoch=number, drop_last=False):
            for image in pixels(images):
                number = image[..., 2].mean() / 10
                assert number == pytest.approx(round(number), abs=0.01)
                found.append((round(number), bool(image[0, 0, 0] > image[0, -1, 0])))
        return found

    first, second = epoch(0), epoch(1)
    assert sorted(k for k, _ in first) == sorted(k for k, _ in second) == list(range(16))
    assert first != second
    assert dict(first) != dict(second)  # mirrored anew
    assert {m for _, m in first} == {True, False}
    assert epoch(0, data=turned) == first
    assert dict(epoch(1, data=turned)) == {k: not m for k, m in first}
    assert epoch(0, batch=5) == first
    assert sum(len(labels) for _, labels in data.batches(5, seed=1, epoch=0)) == 15  # the last, short one dropped
    still = StreamingDataset(prepared(root, RAW), "train", "cpu", size=24, threads=1, limit=4)
    shown = torch.cat([labels for _, labels in still.batches(2, seed=0, epoch=0)])
    assert sorted(shown.tolist()) == [0, 0, 1, 1]  # balanced


def test_batches_begin_anywhere_and_come_in_any_size(root: Path) -> None:
    data = StreamingDataset(prepared(root, JPEG), "train", "cpu", size=24, threads=2)
    for size in (None, 12):
        whole = list(data.batches(5, seed=1, epoch=4, drop_last=False, size=size))
        assert [len(labels) for _, labels in whole] == [5, 5, 5, 1]
        assert whole[0][0].shape[1:] == (3, size or 24, size or 24)
        for begin in (0, 2, 4):
            rest = list(data.batches(5, seed=1, epoch=4, drop_last=False, size=size, begin=begin))
            assert len(rest) == 4 - begin
            for (images, labels), (found, known) in zip(whole[begin:], rest, strict=True):
                assert torch.equal(images, found)
                assert torch.equal(labels, known)
    with pytest.raises(FastarError, match="batch 5 is outside the epoch's 4 batches"):
        data.batches(5, seed=1, epoch=4, drop_last=False, begin=5)


def test_conversion_is_repeatable_and_mixes_jpeg_and_raw(root: Path) -> None:
    half = Encoding(compress_probability=0.5)
    first, second = prepared(root, half, "a"), prepared(root, half, "b")
    assert first.metadata["content"] == second.metadata["content"]
    table = check_beton(first.path("train"), first.layout("train")).images
    modes = table["mode"].tolist()
    assert 3 <= modes.count(JPEG_MODE) <= 13
    assert modes.count(JPEG_MODE) + modes.count(RAW_MODE) == 16
    assert prepared(root, Encoding(jpeg_quality=50), "c").metadata["content"] != first.metadata["content"]


def test_torch_keeps_its_threads_and_no_thread_stays_behind(root: Path) -> None:
    data = StreamingDataset(prepared(root, RAW), "train", "cpu", size=24, threads=1)
    before, running = torch.get_num_threads(), threading.active_count()
    try:
        torch.set_num_threads(3)
        epoch = data.sequential(2)
        for _ in range(3):
            next(epoch)
            assert torch.get_num_threads() == 3
        epoch.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert threading.active_count() == running


def test_images_of_no_use_are_refused(root: Path) -> None:
    path = root / "train" / "n0" / "00.JPEG"
    Image.new("RGB", (2000, 1500)).save(path)
    with pytest.raises(FastarError, match=r"n0/00\.JPEG: 1500x2000 pixels are too many.*max-resolution"):
        prepared(root, RAW)
    Image.new("RGB", (2000, 2)).save(path)
    with pytest.raises(FastarError, match=r"n0/00\.JPEG: 2x2000 pixels leave nothing"):
        prepared(root, JPEG)


def test_folders_that_do_not_fit(root: Path, tmp_path: Path) -> None:
    (root / "val" / "other").mkdir()
    with pytest.raises(FastarError, match=r"val/other: no such class in train"):
        prepared(root, JPEG)
    (root / "val" / "other").rmdir()
    (root / "train" / "other").mkdir()
    with pytest.raises(FastarError, match="train/other: holds no images; put some there"):
        prepared(root, JPEG)
    with pytest.raises(FastarError, match="has no train/ folder"):
        prepared(tmp_path / "raw" / "val", JPEG)
    with pytest.raises(FastarError, match="no finished dataset; give the images"):
        prepare("imagefolder", own_name="nothing", directory=tmp_path)


def test_finished_files_are_reused_or_the_difference_is_named(root: Path) -> None:
    files = prepared(root, JPEG)
    before = files.path("train").stat().st_mtime_ns
    assert prepared(root, JPEG).digest == prepared(root, None).digest == files.digest
    assert files.path("train").stat().st_mtime_ns == before
    with pytest.raises(FastarError, match="written with encoding=no preset's \\(at most 40 pixels, 100% as JPEG of"):
        prepared(root, RAW)
    (root / "train" / "n0" / "00.JPEG").unlink()
    with pytest.raises(
        FastarError, match=r"asked for encoding=rn18 \(at most 400 pixels, 10% as JPEG of quality 90\);"
    ):
        prepared(root, PRESETS["rn18"])
    with pytest.raises(FastarError, match="written from other images"):
        prepared(root, JPEG)


def test_damaged_files_are_refused(root: Path) -> None:
    files = prepared(root, JPEG)
    path = files.path("test")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(FastarError, match=r"test\.beton: truncated"):
        open_files(files.folder)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(FastarError, match="not the file that"):
        open_files(files.folder)
    path.write_bytes(whole)
    metadata = files.folder / "metadata.json"
    metadata.write_text(metadata.read_text().replace('"jpeg_quality": 90', '"jpeg_quality": 91'))
    with pytest.raises(FastarError, match="edited by hand"):
        open_files(files.folder)


def test_a_jpeg_that_rots_in_the_file_is_told(root: Path) -> None:
    files = prepared(root, JPEG)
    data, fresh = (StreamingDataset(files, "train", "cpu", size=24, threads=2) for _ in range(2))
    everything(data)  # compares each image with its checksum; later epochs have the decoder's word alone
    beton = check_beton(files.path("train"), files.layout("train"))
    start, size = int(beton.pointers[11]), int(beton.sizes[11])
    whole = files.path("train").read_bytes()
    files.path("train").write_bytes(whole[:start] + bytes(size) + whole[start + size :])
    for reader, said in ((data, "not a whole JPEG"), (fresh, "not what was written")):
        running = threading.active_count()
        with pytest.raises(FastarError, match=rf"train\.beton: sample 11 is {said}; delete .* and write it"):
            everything(reader)
        # Those of decoding stay with the data set, the loader's does not.
        assert threading.active_count() <= running + 2


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("emptied", [False, True])
def test_a_file_cut_short_in_mid_epoch_is_one_error(root: Path, threads: int, emptied: bool) -> None:
    files = prepared(root, JPEG)
    data = StreamingDataset(files, "train", "cpu", size=24, threads=threads)
    path = files.path("train")
    running = threading.active_count()
    epoch = data.sequential(1)
    next(epoch)
    # A few batches are decoded ahead; all images lie behind the cut.
    os.truncate(path, 0 if emptied else check_beton(path, files.layout("train")).pointers.min())
    with pytest.raises(FastarError, match=r"train\.beton: sample \d+ cannot be read whole: the file was cut") as caught:
        list(epoch)
    assert "\n" not in str(caught.value)
    with pytest.raises(FastarError, match="cannot be read whole"):
        everything(data)
    # Those of decoding stay with the data set, the loader's does not.
    assert threading.active_count() <= running + threads


def test_a_file_replaced_in_mid_epoch_does_not_reach_the_epoch(root: Path) -> None:
    """The one that was checked stays open: its images go on coming, and the next opening tells."""
    files = prepared(root, JPEG)
    data = StreamingDataset(files, "train", "cpu", size=24, threads=2)
    want, _ = everything(data, 1)
    epoch = data.sequential(1)
    found = [next(epoch)[0].clone()]
    other = root / "other"
    other.write_bytes(bytes(files.path("train").stat().st_size))
    other.replace(files.path("train"))
    assert torch.equal(torch.cat(found + [images.clone() for images, _ in epoch]), want)
    with pytest.raises(FastarError, match=r"train\.beton: "):
        open_files(files.folder)


def test_all_that_goes_to_a_gpu_is_pinned(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one: what is moved, and from what memory, is recorded instead of done."""
    data = StreamingDataset(prepared(root, RAW), "train", "cpu", size=24, threads=1)
    whole, pinned, moved = torch.empty, set(), []

    def empty(*shape: object, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        made = whole(*shape, **more)
        if pin_memory:
            pinned.add(made.data_ptr())
        return made

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.add(tensor.data_ptr())
        return tensor

    def to(tensor: torch.Tensor, device: object, non_blocking: bool = False) -> torch.Tensor:
        moved.append((tensor.dtype, tensor.data_ptr() in pinned, non_blocking))
        return tensor

    normalisation = data._normalisation(24)
    data.device = torch.device("cuda")
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in pinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    assert len(list(data.batches(16, seed=0, epoch=0))) == 1
    assert data._normalisation(24) is normalisation
    assert moved == [(dtype, True, True) for dtype in (torch.bool, torch.uint8, torch.int64)]


@pytest.mark.data
def test_real_imagenet_jpegs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 JPEGs, three of them grey, at the default preset: counts, labels, pixels against Pillow's, and once more."""
    if not SAMPLE.exists():
        pytest.skip(f"{SAMPLE} is not there")
    with tarfile.open(SAMPLE) as archive:
        for number, member in enumerate(m for m in archive if m.name.endswith(".JPEG")):
            for split in ("train", "val") if number % 20 == 0 else ("train",):
                _, _, name, file = member.name.split("/")
                path = tmp_path / "raw" / split / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                path.write_bytes(content.read())
    files = prepared(tmp_path / "raw", None)
    assert (files.count("train"), files.count("test"), len(files.classes)) == (200, 10, 200)
    paths = stored(tmp_path / "raw")
    cut(monkeypatch, 1.0)
    images, labels = everything(StreamingDataset(files, "train", "cpu", size=64, threads=2), 16)
    assert labels.tolist() == [files.classes.index(path.parent.name) for path in paths]
    squares = [square(path) for path in paths]
    want = np.stack([np.asarray(image.resize((64, 64), Image.Resampling.BOX)) for image in squares])
    # Half are JPEGs of quality 90, those above 500 pixels twice resized: a few levels on photographs, where another
    # image is some 60 away.
    difference = np.abs(pixels(images) - want).mean((1, 2, 3))
    assert difference.max() < 8
    assert np.median(difference) < 2
    assert np.abs(pixels(images)[1:] - want[:-1]).mean((1, 2, 3)).min() > 12
    grey = [number for number, path in enumerate(paths) if Image.open(path).mode == "L"]
    assert len(grey) == 3
    for image in pixels(images)[grey]:
        # A JPEG's chroma of a grey image is zero but for rounding: one level.
        assert np.abs(image - image[..., :1]).max() < 1.01
    table = check_beton(files.path("train"), files.layout("train")).images
    assert 80 < (table["mode"] == JPEG_MODE).sum() < 120
    assert prepared(tmp_path / "raw", None, "again").metadata["content"] == files.metadata["content"]
