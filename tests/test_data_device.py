"""Batches on the device: every sample once, in an order augmented as nothing but their keys decides."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import arrays, augmented_in_order, raw_dataset

from fastar.config import Augmentation, load_settings
from fastar.data.augment import augmented, crop_and_mirror, draw_augmentation
from fastar.data.convert import prepare
from fastar.data.in_memory import DeviceDataset, load
from fastar.data.sampling import augmentation_keys, draw, draw_below
from fastar.errors import FastarError
from fastar.experiments.task import RunData
from fastar.runtime.progress import SILENT
from fastar.runtime.seeds import derive_seed

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CROP_AND_FLIP = Augmentation(pad=2, flip=True)


def dataset(count=101, augmentation=CROP_AND_FLIP, shape=(6, 8, 3), device="cpu", **options) -> DeviceDataset:
    images, _ = arrays(count, shape, 7)
    # The label of a sample is made its number, so that batches tell which samples they hold.
    return DeviceDataset(
        torch.from_numpy(images).to(device),
        torch.arange(count, device=device),
        mean=MEAN[: shape[2]],
        std=STD[: shape[2]],
        augmentation=augmentation,
        **options,
    )


def by_sample(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = map(torch.cat, zip(*batches, strict=True))
    order = labels.argsort()
    return images[order], labels[order]


def plain(data: DeviceDataset, sample: int, seed: int | None, epoch: int) -> np.ndarray:
    """One normalised sample [C, H, W] by the definition, in float64; seed None: not augmented."""
    image = data.images[sample].cpu().numpy().astype(np.float64)
    height, width, _ = image.shape
    if seed is not None:
        key, index, pad = derive_seed(seed, "augmentation", epoch), np.array([sample]), data.augmentation.pad
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        top, left = (int(draw_below(2 * pad + 1, key, index, stream)[0]) for stream in (0, 1))
        image = padded[top : top + height, left : left + width]
        if data.augmentation.flip and draw(key, index, 2)[0] >= 2**31:
            image = image[:, ::-1]
    return ((image / 255 - MEAN[: image.shape[2]]) / STD[: image.shape[2]]).transpose(2, 0, 1)


@pytest.mark.parametrize("augmentation", [CROP_AND_FLIP, Augmentation(pad=1), Augmentation(flip=True)])
@pytest.mark.parametrize("shape", [(6, 8, 3), (5, 5, 1)])
def test_augmentation_by_its_definition(augmentation, shape):
    data = dataset(augmentation=augmentation, shape=shape)
    images, labels = by_sample(data.batches(10, seed=3, epoch=5, drop_last=False))
    expected = np.stack([plain(data, int(label), 3, 5) for label in labels])
    # fp32 against float64: two roundings of values up to 5.
    np.testing.assert_allclose(images.numpy(), expected, atol=2e-6)
    assert not np.allclose(images.numpy(), np.stack([plain(data, int(label), 3, 6) for label in labels]), atol=1e-3)


@pytest.mark.parametrize("keep_normalised", [True, False])
def test_without_augmentation_by_its_definition(keep_normalised):
    options = {} if keep_normalised else {"normalised_bytes": 0}
    data = dataset(**options)
    expected = np.stack([plain(data, sample, None, 0) for sample in range(101)])
    for batches in (
        data.sequential(10),
        data.batches(10, seed=0, epoch=0, augment=False, drop_last=False),
        dataset(augmentation=Augmentation(), **options).batches(10, seed=0, epoch=0, drop_last=False),
    ):
        np.testing.assert_allclose(by_sample(batches)[0].numpy(), expected, atol=2e-6)


def test_form_of_batches():
    data = dataset()
    assert len(data) == 101
    for images, labels in (next(data.batches(16, seed=0, epoch=0)), next(data.sequential(16))):
        assert (images.shape, images.dtype) == ((16, 3, 6, 8), torch.float32)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (labels.shape, labels.dtype) == ((16,), torch.int64)


@pytest.mark.quick
@pytest.mark.parametrize("batch_size", [1, 10, 50, 101])
def test_counts_and_last_batches(batch_size):
    data = dataset()
    for drop_last in (True, False):
        sizes = [len(labels) for _, labels in data.batches(batch_size, seed=0, epoch=0, drop_last=drop_last)]
        assert len(sizes) == data.batch_count(batch_size, drop_last)
        assert set(sizes[:-1]) <= {batch_size}
        assert sum(sizes) == (101 // batch_size * batch_size if drop_last else 101)
    seen = [int(label) for _, labels in data.sequential(batch_size) for label in labels]
    assert seen == list(range(101))


@pytest.mark.quick
def test_every_sample_once_in_an_order_of_its_own():
    data = dataset()

    def order(seed, epoch):
        return [
            int(label) for _, labels in data.batches(10, seed=seed, epoch=epoch, drop_last=False) for label in labels
        ]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(one) == list(range(101)) for one in orders)
    assert len({tuple(one) for one in orders}) == 4
    assert order(1, 1) == orders[3]


@pytest.mark.parametrize("block", [1, 5000, 10**9])
def test_nothing_depends_on_blocks_batches_or_order(block):
    reference = by_sample(dataset().batches(10, seed=1, epoch=2, drop_last=False))
    data = dataset(block_bytes=block)
    for batches in (
        data.batches(7, seed=1, epoch=2, drop_last=False),
        data.batches(101, seed=1, epoch=2, drop_last=False),
        augmented_in_order(data, 13, 1, 2),
    ):
        images, labels = by_sample(batches)
        assert torch.equal(images, reference[0])
        assert torch.equal(labels, reference[1])


def test_augmentation_follows_the_sample_into_a_subset():
    data, keep = dataset(), torch.tensor([3, 50, 77])
    subset = DeviceDataset(
        data.images[keep], data.labels[keep], mean=MEAN, std=STD, augmentation=CROP_AND_FLIP, index=keep
    )
    all_images, _ = by_sample(augmented_in_order(data, 9, 4, 1))
    images, _ = by_sample(augmented_in_order(subset, 2, 4, 1))
    assert torch.equal(images, all_images[keep])


def test_compiled_loop_and_torch_give_the_same_bits():
    data = dataset(500)
    keys = augmentation_keys(0, 0)
    chosen = torch.arange(499, -1, -1)
    draws = draw_augmentation(CROP_AND_FLIP, keys, chosen)
    compiled = augmented(data.images, chosen, draws, data._normalise)
    assert torch.equal(compiled, data._normalise(crop_and_mirror(data.images, chosen, *draws)))


def test_alternate_mirroring_is_turned_round_each_epoch_and_begins_as_at_random():
    plain, turned = (dataset(augmentation=Augmentation(flip=True), alternate=alternate) for alternate in (False, True))

    def epochs(data, seed, begin=0):
        parts = [list(data.batches(10, seed=seed, epoch=epoch, drop_last=False, begin=begin)) for epoch in range(3)]
        return [by_sample(part)[0] for part in parts] if not begin else parts

    (first, second, third), at_random = epochs(turned, 3), epochs(plain, 3)
    assert torch.equal(first, at_random[0])
    assert torch.equal(second, first.flip(3))
    assert torch.equal(third, first)
    assert not torch.equal(at_random[1], second)
    assert not torch.equal(epochs(turned, 4)[0], first)
    rest = epochs(turned, 3, begin=7)[1]  # where a training goes on
    assert torch.equal(torch.cat([images for images, _ in rest]), second[torch.cat([labels for _, labels in rest])])


def test_alternate_mirroring_leaves_the_crops():
    here, there = (list(dataset(alternate=alternate).batches(10, seed=1, epoch=1)) for alternate in (False, True))
    mirrored = 0
    for (images, _), (others, _) in zip(here, there, strict=True):
        for one, other in zip(images, others, strict=True):
            mirrored += not torch.equal(one, other)
            assert torch.equal(one, other) or torch.equal(one.flip(2), other)
    assert 20 < mirrored < 80  # of 100, each with probability 1/2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_bits():
    cpu, cuda = dataset(500), dataset(500, device="cuda")
    for augment in (True, False):
        here = list(cpu.batches(32, seed=1, epoch=1, augment=augment))
        there = list(cuda.batches(32, seed=1, epoch=1, augment=augment))
        for (images, labels), (other_images, other_labels) in zip(here, there, strict=True):
            assert torch.equal(images, other_images.cpu())
            assert torch.equal(labels, other_labels.cpu())


def test_bad_arguments():
    data = dataset()
    with pytest.raises(FastarError, match="batch size 0"):
        data.sequential(0)
    with pytest.raises(FastarError, match="batch size 102 exceeds the 101 samples"):
        data.batches(102, seed=0, epoch=0)
    with pytest.raises(ValueError, match="uint8"):
        DeviceDataset(data.images.float(), data.labels, mean=MEAN, std=STD, augmentation=Augmentation())


@pytest.fixture
def files(tmp_path):
    raw = raw_dataset("cifar10", 200, 50)
    return raw, prepare("cifar10", directory=tmp_path, raw=raw)


def test_load(files):
    raw, written = files
    train = load(written, "train", "cpu")
    assert np.array_equal(train.images.numpy(), raw.train.images)
    assert train.labels.tolist() == raw.train.labels.tolist()
    assert train.augmentation == Augmentation(pad=4, flip=True)
    with pytest.raises(ValueError, match="split must be"):
        load(written, "val", "cpu")


def test_load_with_a_limit_keeps_classes_balanced_and_draws(files):
    _, written = files
    some, all_ = load(written, "train", "cpu", limit=50), load(written, "train", "cpu")
    assert torch.bincount(some.labels).tolist() == [5] * 10
    assert torch.equal(some.images, all_.images[some.index])
    whole = torch.cat([images for images, _ in augmented_in_order(all_, 64, 1, 3)])
    part = torch.cat([images for images, _ in augmented_in_order(some, 64, 1, 3)])
    assert torch.equal(part, whole[some.index])
    assert len(load(written, "train", "cpu", limit=200)) == 200
    with pytest.raises(FastarError, match="limit=201 is more than the 200 train images"):
        load(written, "train", "cpu", limit=201)
    with pytest.raises(FastarError, match="below one image per class"):
        load(written, "train", "cpu", limit=9)


def test_a_recipe_tells_of_alternate_mirroring_and_not_of_the_default(files, tmp_path):
    def data(*overrides):
        settings = load_settings(dataset="cifar10", overrides=[f"dataset.directory={tmp_path}", *overrides])
        return RunData(settings, torch.device("cpu"), SILENT)

    plain, turned = data(), data("dataset.flip=alternate")
    assert "flip" not in plain.recipe()  # older models have no such key
    assert turned.recipe() == {**plain.recipe(), "flip": "alternate"}
    assert (plain.train.alternate, turned.train.alternate) == (False, True)


@pytest.mark.parametrize("limit", [None, 50])
def test_a_file_that_was_read_is_no_longer_mapped(files, limit):
    """Its pages would count as memory until Python's collector comes to FFCV's objects."""
    _, written = files
    gc.disable()
    try:
        load(written, "train", "cpu", limit=limit)
        assert str(written.path("train")) not in Path("/proc/self/maps").read_text()
    finally:
        gc.enable()


def test_own_statistics_normalise_the_training_split(tmp_path):
    raw = raw_dataset("mnist", 300, 50)
    train = load(prepare("mnist", directory=tmp_path, raw=raw), "train", "cpu")
    images = torch.cat([images for images, _ in train.sequential(100)]).double()
    assert abs(images.mean()) < 1e-6  # fp32 rounding, averaged
    assert abs(images.std(correction=0) - 1) < 1e-6


def test_batches_begin_anywhere_in_the_same_epoch() -> None:
    data = dataset()
    for drop_last, count in ((True, 10), (False, 11)):
        whole = [(i.clone(), k.clone()) for i, k in data.batches(10, seed=3, epoch=2, drop_last=drop_last)]
        assert len(whole) == count
        for begin in (0, 1, 7, count - 1, count):
            rest = list(data.batches(10, seed=3, epoch=2, drop_last=drop_last, begin=begin))
            assert len(rest) == count - begin
            for (images, labels), (found, known) in zip(whole[begin:], rest, strict=True):
                assert torch.equal(images, found)
                assert torch.equal(labels, known)
    for begin in (-1, 11):
        with pytest.raises(FastarError, match=rf"batch {begin} is outside the epoch's 10 batches"):
            data.batches(10, seed=3, epoch=2, begin=begin)


def test_another_size_is_refused() -> None:
    square = dataset(shape=(8, 8, 3))
    assert len(list(square.batches(10, seed=0, epoch=0, size=8))) == 10
    with pytest.raises(FastarError, match="images of 6x6 asked for, the data set's are 8x8"):
        square.batches(10, seed=0, epoch=0, size=6)
