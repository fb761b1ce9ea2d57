"""Batch-norm's counts of batches: the same numbers as torch's, by one addition."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastar.training.batch_counts import BatchCounts


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(3, momentum=None),  # its factor is 1 / its count
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.BatchNorm1d(3),
    )


class Additions(TorchDispatchMode):
    """Counts additions to int64 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.number += func is torch.ops.aten.add_.Tensor and args[0].dtype == torch.int64
        return func(*args, **(kwargs or {}))


def test_as_torch_counts_with_fewer_additions() -> None:
    plain, counted = network(), network()
    counts = BatchCounts(counted)
    names = list(counted.state_dict())
    assert names == list(plain.state_dict())
    generator = torch.Generator().manual_seed(0)
    with Additions() as seen:
        for _ in range(5):
            batch = torch.randn(8, 3, generator=generator)
            plain(batch)
            before = seen.number
            with counts.counting():
                counted(batch)
            assert seen.number - before == 2  # all together, and the layer that needs its own
    for name, value in plain.state_dict().items():
        assert torch.equal(counted.state_dict()[name], value), name
    assert int(counted[3].num_batches_tracked) == 5


def test_a_pass_that_fails_leaves_the_layers_whole() -> None:
    model = network()
    counts = BatchCounts(model)
    try:
        with counts.counting():
            model(torch.zeros(8, 4))
    except RuntimeError:
        assert int(model[0].num_batches_tracked) == 0
    else:
        raise AssertionError("a batch of another width was taken")


def test_a_network_without_batch_norm() -> None:
    model = nn.Linear(2, 2)
    with BatchCounts(model).counting():
        model(torch.zeros(1, 2))
    assert set(model.state_dict()) == {"weight", "bias"}
