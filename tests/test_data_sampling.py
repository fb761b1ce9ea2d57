"""The counter-based random choices: the same bits everywhere, uniform, and independent of how they are asked for."""

import numpy as np
import pytest
import torch

from fastar.data.sampling import balanced_subset, draw, draw_below, epoch_order, stratified_split
from fastar.runtime.seeds import derive_seed

KEY = derive_seed(7, "test")
GOLDEN_ORDER = [2, 8, 0, 7, 3, 9, 4, 6, 1, 5]
GOLDEN_SUBSET = [5, 12, 22, 32, 33, 35]


def plain_draw(key: int, index: int, stream: int) -> int:
    """The hash written out with Python's unbounded integers."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
        x = ((x ^ (x >> 15)) * 0x735A2D97) % 2**32
        return x ^ (x >> 15)

    return mix((mix(index ^ (key % 2**32)) + (key >> 32) + stream * 0x9E3779B9) % 2**32)


@pytest.mark.parametrize("stream", [0, 1, 2, 77])
def test_numpy_torch_and_plain_integers_agree(stream):
    index = np.array([0, 1, 2, 50_000, 2**31, 2**32 - 1], dtype=np.int64)
    expected = [plain_draw(KEY, int(i), stream) for i in index]
    assert draw(KEY, index, stream).tolist() == expected
    assert draw(KEY, torch.from_numpy(index), stream).tolist() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_draws_the_same_bits():
    index = torch.arange(100_000)
    assert torch.equal(draw(KEY, index, 1), draw(KEY, index.cuda(), 1).cpu())
    assert torch.equal(epoch_order(50_000, 3, 4, index.device), epoch_order(50_000, 3, 4, torch.device("cuda")).cpu())


def test_draws_are_uniform_and_streams_independent():
    index = np.arange(90_000, dtype=np.int64)
    a, b = draw_below(9, KEY, index, 0), draw_below(9, KEY, index, 1)
    counts = np.zeros((9, 9))
    np.add.at(counts, (a, b), 1)
    expected = 90_000 / 81
    # Chi-square with 80 degrees of freedom: mean 80, standard deviation 12.6; 5 of those away is chance below 1e-6.
    assert ((counts - expected) ** 2 / expected).sum() < 80 + 5 * 12.65


def test_keys_that_differ_in_either_half_give_other_draws():
    index = np.arange(1000, dtype=np.int64)
    for other in (KEY ^ 1, KEY ^ (1 << 40)):
        assert (draw(KEY, index) == draw(other, index)).mean() < 0.01


@pytest.mark.quick
def test_orders_are_permutations_and_differ_by_seed_and_epoch():
    cpu = torch.device("cpu")
    orders = {(seed, epoch): epoch_order(1000, seed, epoch, cpu) for seed in range(3) for epoch in range(3)}
    for order in orders.values():
        assert torch.equal(order.sort().values, torch.arange(1000))
    flat = list(orders.values())
    for i, first in enumerate(flat):
        for second in flat[:i]:
            # Two independent permutations agree at 1 place on average (Poisson): 10 has chance 1e-7.
            assert (first == second).sum() < 10
    # FFCV's own RANDOM order is seeded with seed + epoch, so that (0, 1) and (1, 0) coincide.
    assert not torch.equal(orders[0, 1], orders[1, 0])


def test_order_positions_are_uniform():
    cpu = torch.device("cpu")
    first = torch.stack([epoch_order(20, 0, epoch, cpu)[0] for epoch in range(2000)])
    counts = torch.bincount(first, minlength=20).double()
    # Chi-square with 19 degrees of freedom: mean 19, standard deviation 6.2.
    assert ((counts - 100) ** 2 / 100).sum() < 19 + 5 * 6.2


def test_choices_are_fixed_for_ever():
    """Checkpoints and published numbers rest on these bits."""
    assert epoch_order(10, 0, 0, torch.device("cpu")).tolist() == GOLDEN_ORDER
    assert balanced_subset(np.arange(40) % 4, 6, "x", "train").tolist() == GOLDEN_SUBSET


def test_balanced_subset():
    labels = np.random.default_rng(0).choice(4, size=500, p=[0.6, 0.3, 0.08, 0.02])
    smaller, larger = balanced_subset(labels, 30, "x"), balanced_subset(labels, 200, "x")
    assert np.bincount(labels[smaller], minlength=4).tolist() == [8, 8, 7, 7]
    assert set(smaller) <= set(larger)
    assert (np.diff(larger) > 0).all()
    assert np.bincount(labels[larger])[3] == (labels == 3).sum()  # the rare class is used up
    assert balanced_subset(labels, 500, "x").tolist() == list(range(500))
    assert not np.array_equal(smaller, balanced_subset(labels, 30, "y"))


def test_stratified_split_keeps_shares():
    labels = np.random.default_rng(0).choice(5, size=1003)
    rest, held = stratified_split(labels, 201, "x")
    assert len(held) == 201
    assert sorted([*rest, *held]) == list(range(1003))
    share = np.bincount(labels) * 201 / 1003
    assert (np.abs(np.bincount(labels[held]) - share) < 1).all()
