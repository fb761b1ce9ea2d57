"""Training images kept for validation: the same in every run, of every class its share, never trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import augmented_in_order, raw_dataset
from PIL import Image

from fastar.config import Augmentation
from fastar.config.datasets import IMAGENET_MEAN, IMAGENET_STD
from fastar.data.convert import Form, prepare
from fastar.data.encode import Encoding
from fastar.data.ffcv.folder import DatasetFiles
from fastar.data.in_memory import load
from fastar.data.raw.raw_split import RawDataset
from fastar.data.sampling import balanced_subset
from fastar.data.splits import chosen_images, held_out
from fastar.data.streaming import StreamingDataset
from fastar.errors import FastarError

LETTERS = tuple("abcdefghij")


def chosen(labels: np.ndarray, split: str, share: float, limit: int | None = None, name: str = "x") -> np.ndarray:
    return chosen_images(labels, split, validation=share, limit=limit, classes=LETTERS, name=name)


@pytest.mark.parametrize("share", [0.05, 0.1, 1 / 3, 0.9])
@pytest.mark.parametrize("counts", [[100] * 10, [20, 30, 500], [41]])
def test_every_class_keeps_its_share(counts: list[int], share: float) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    rest, held = chosen(labels, "train", share), chosen(labels, "validation", share)
    assert sorted([*rest, *held]) == list(range(len(labels)))  # each image on one side
    assert len(held) == round(share * len(labels)) == held_out(len(labels), share, "x")
    assert np.abs(np.bincount(labels[held], minlength=len(counts)) - share * np.array(counts)).max() < 1
    for index in (rest, held):
        assert (np.diff(index) > 0).all()


def test_the_choice_is_fixed_for_ever_and_the_dataset_s_own() -> None:
    labels = np.arange(1000) % 7
    assert chosen(labels, "validation", 0.01).tolist() == [9, 47, 366, 550, 552, 567, 595, 841, 962, 974]
    other = chosen(labels, "validation", 0.1, name="y")
    assert len(np.intersect1d(other, chosen(labels, "validation", 0.1))) < 30  # ten by chance


def test_a_limit_takes_from_what_validation_leaves() -> None:
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(5), [200, 40, 40, 40, 40]))
    held = chosen(labels, "validation", 0.25)
    rest = chosen(labels, "train", 0.25)
    few, more = (chosen(labels, "train", 0.25, limit) for limit in (50, 120))
    assert np.bincount(labels[few]).tolist() == [10] * 5
    assert set(few) < set(more) < set(rest)
    assert not set(rest) & set(held)
    some = chosen(labels, "validation", 0.25, limit=20)  # as evaluation.limit has it
    assert np.bincount(labels[some]).tolist() == [4] * 5
    assert set(some) < set(held)


def test_without_a_share_nothing_is_chosen_otherwise_than_before() -> None:
    labels = np.random.default_rng(2).permutation(np.arange(90) % 9)
    assert chosen(labels, "train", 0.0).tolist() == list(range(90))
    for share in (0.0, 0.5):  # test images are nobody's validation images
        assert chosen(labels, "test", share).tolist() == list(range(90))
    assert chosen(labels, "train", 0.0, limit=20).tolist() == balanced_subset(labels, 20, "x", "train").tolist()
    with pytest.raises(ValueError, match="no images are kept"):
        chosen(labels, "validation", 0.0)


@pytest.mark.parametrize(
    ("share", "limit", "said"),
    [
        (0.004, None, r"^validation=0.004 of the 100 training samples of x is not one sample; raise it$"),
        (0.996, None, r"^validation=0.996 leaves none of the 100 training samples of x; lower it$"),
        (0.9, None, r"^validation=0.9 leaves no training image of class b of x; lower it$"),
        (0.2, 81, r"^limit=81 is more than the 80 train images of x that validation=0.2 leaves; lower it$"),
        (0.2, 9, r"^limit=9 is below one image per class; x needs at least 10$"),
        (0.0, 101, r"^limit=101 is more than the 100 train images of x; lower it$"),
    ],
)
def test_what_cannot_be_kept_is_refused(share: float, limit: int | None, said: str) -> None:
    labels = np.array([0] * 98 + [1] * 2)
    with pytest.raises(FastarError, match=said):
        chosen(labels, "train", share, limit)


# Images of one size, held on the device


@pytest.fixture
def held(tmp_path: Path) -> tuple[RawDataset, DatasetFiles]:
    raw = raw_dataset("cifar10", 200, 30)
    return raw, prepare("cifar10", directory=tmp_path, raw=raw)


def test_held_data_come_apart_and_follow_the_whole_set_s_augmentation(held: tuple[RawDataset, DatasetFiles]) -> None:
    raw, files = held
    whole = load(files, "train", "cpu")
    rest, kept = (load(files, split, "cpu", validation=0.1) for split in ("train", "validation"))
    assert sorted([*rest.index.tolist(), *kept.index.tolist()]) == list(range(200))
    assert torch.bincount(kept.labels).tolist() == [2] * 10
    for part in (rest, kept):
        assert np.array_equal(part.images.numpy(), raw.train.images[part.index.numpy()])  # type: ignore[attr-defined]
        assert part.labels.tolist() == raw.train.labels[part.index.numpy()].tolist()
    augmented = [torch.cat([x for x, _ in augmented_in_order(d, 64, 1, 3)]) for d in (whole, rest)]
    assert torch.equal(augmented[1], augmented[0][rest.index])
    some = load(files, "train", "cpu", validation=0.1, limit=50)
    assert torch.bincount(some.labels).tolist() == [5] * 10
    assert set(some.index.tolist()) < set(rest.index.tolist())
    test = load(files, "test", "cpu", validation=0.1)
    assert np.array_equal(test.images.numpy(), raw.test.images)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="no images are kept"):
        load(files, "validation", "cpu")


def test_a_training_epoch_shows_the_rest_and_nothing_else(held: tuple[RawDataset, DatasetFiles]) -> None:
    _, files = held
    whole, rest = (load(files, "train", "cpu", validation=share) for share in (0, 0.1))
    rest.augmentation = Augmentation()
    assert len(rest) == rest.batch_count(1) == 180
    shown = torch.cat([x for x, _ in rest.batches(64, seed=0, epoch=0, drop_last=False)])
    (images,) = (x for x, _ in whole.sequential(200))
    assert len(images.flatten(1).unique(dim=0)) == 200  # all differ
    assert torch.equal(shown.flatten(1).unique(dim=0), images[rest.index].flatten(1).unique(dim=0))


# Images of any size, which stream


@pytest.fixture
def streamed(tmp_path: Path) -> DatasetFiles:
    """Forty training images of two classes, each of one grey of its own."""
    for number in range(44):
        path = tmp_path / "raw" / ("train" if number < 40 else "val") / f"c{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9 + number % 5, 12, 3), 5 * number, np.uint8)).save(path)
    raw = Encoding(max_resolution=None, compress_probability=0)
    return prepare("imagefolder", own_name="set", raw=tmp_path / "raw", directory=tmp_path / "out", form=Form(raw))


def greys(data: StreamingDataset, *, epoch: int | None = None) -> list[int]:
    """The images that a pass shows: of an epoch, or in file order."""
    passes = data.sequential(7) if epoch is None else data.batches(7, seed=0, epoch=epoch, drop_last=False)
    pixels = torch.cat([x[:, 0, 4, 4] for x, _ in passes])
    return [round(grey / 5) for grey in ((pixels * IMAGENET_STD[0] + IMAGENET_MEAN[0]) * 255).tolist()]


@pytest.mark.parametrize("order", ["random", "pages"])
def test_streamed_data_come_apart(streamed: DatasetFiles, order: str) -> None:
    def dataset(split: str, **options: object) -> StreamingDataset:
        return StreamingDataset(streamed, split, "cpu", size=8, threads=1, **options)  # type: ignore[arg-type]

    assert sorted(greys(dataset("train"))) == list(range(40))
    kept = greys(dataset("validation", validation=0.25))
    assert len(kept) == len(dataset("validation", validation=0.25)) == 10
    assert sum(grey % 2 for grey in kept) == 5  # of both classes
    rest = dataset("train", validation=0.25, order=order)
    for epoch in (None, 0, 1):
        assert sorted([*greys(rest, epoch=epoch), *kept]) == list(range(40))
    limited = greys(dataset("train", validation=0.25, limit=6))
    assert len(limited) == 6
    assert not set(limited) & set(kept)
    assert sorted(greys(dataset("test", validation=0.25))) == [40, 41, 42, 43]
