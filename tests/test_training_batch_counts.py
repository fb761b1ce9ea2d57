"""Batch-norm's counts of batches: the same numbers as torch's, by one addition."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastar.config import TrainSettings
from fastar.models import build_model
from fastar.training import RegularStep
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


class Uneven(nn.Module):
    """Layers used twice, never, in every other batch, perhaps held in eval mode; a cumulative average used twice."""

    def __init__(self, held: bool) -> None:
        super().__init__()
        self.once, self.twice, self.never, self.sometimes, self.held = (nn.BatchNorm1d(3) for _ in range(5))
        self.cumulative = nn.BatchNorm1d(3, momentum=None)
        self.held.train(not held)
        self.batches = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batches += 1
        x = self.held(self.twice(self.twice(self.once(x)) * 2))
        return self.cumulative(self.cumulative(self.sometimes(x) + 1 if self.batches % 2 else x))


@pytest.mark.parametrize("held", [False, True])
def test_layers_that_are_not_used_once_a_pass_are_counted_as_torch_does(held: bool) -> None:
    plain, counted = Uneven(held), Uneven(held)
    counts = BatchCounts(counted)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        batch = torch.randn(8, 3, generator=generator)
        plain(batch)
        with counts.counting():
            counted(batch)
    for name, value in plain.state_dict().items():
        assert torch.equal(counted.state_dict()[name], value), name
    found = {name: int(layer.num_batches_tracked) for name, layer in counted.named_children()}
    assert found == {"once": 5, "twice": 10, "never": 0, "sometimes": 3, "held": 0 if held else 5, "cumulative": 10}


def test_a_layer_that_becomes_a_cumulative_average_later() -> None:
    plain, counted = network(), network()
    counts = BatchCounts(counted)
    generator = torch.Generator().manual_seed(0)
    for momentum in (0.1, None, 0.1):
        plain[0].momentum = counted[0].momentum = momentum
        batch = torch.randn(8, 3, generator=generator)
        plain(batch)
        with counts.counting():
            counted(batch)
    for name, value in plain.state_dict().items():
        assert torch.equal(counted.state_dict()[name], value), name


@pytest.mark.parametrize("compiled", [False, True])
def test_a_training_counts_as_torch_does(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever compiles the network sees buffers that are tensors, and counts them itself."""
    seen: list[bool] = []

    def compile_nothing(model: nn.Module, dynamic: bool) -> nn.Module:
        seen.append(True)
        return model

    monkeypatch.setattr(torch, "compile", compile_nothing)
    model = build_model("resnet8", input_shape=(3, 8, 8), classes=4, seed=0, width=0.25)
    step = RegularStep(model, TrainSettings(precision="fp32", compile=compiled))
    if compiled:
        model.register_forward_pre_hook(
            lambda model, given: seen.append(
                all(isinstance(b, torch.Tensor) for m in model.modules() for b in m._buffers.values())
            )
        )
    for _ in range(3):
        step(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), torch.tensor(0.1))
    assert seen == [True] * (4 if compiled else 0)
    assert {int(value) for name, value in step.state().items() if name.endswith("num_batches_tracked")} == {3}
