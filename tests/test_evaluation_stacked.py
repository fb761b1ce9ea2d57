"""Small dense networks evaluated together give what each gives alone."""

from __future__ import annotations

import pytest
import torch
from evaluation_cases import alone, data, mlp, resnet, row
from torch import nn

from fastar.evaluation import evaluate_rows, losses, stacked
from fastar.flat import FlatLayout
from fastar.models import build_model
from fastar.runtime.live_bytes import LiveBytes

CPU = torch.device("cpu")


@pytest.mark.parametrize("at_once", [2, 3, 7, 100])
def test_together_equals_one_at_a_time(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    models = [mlp(seed) for seed in range(7)]
    layout, rows = FlatLayout.from_module(models[0]), torch.stack([row(model) for model in models])
    calls: list[int] = []

    def count(model: nn.Module, parameters: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        calls.append(len(next(iter(parameters.values()))))
        return stacked.stacked_logits(model, parameters, images)

    monkeypatch.setattr(losses, "stacked_logits", count)
    monkeypatch.setattr(losses, "networks_at_once", lambda model, batch, device: at_once)
    together = evaluate_rows(mlp(9), layout, rows, {"a": data()})["a"]
    assert sum(calls) == 7 * 4  # every network on each of the four batches
    assert max(calls) == min(at_once, 7)
    for k, model in enumerate(models):
        single = evaluate_rows(mlp(9), layout, rows[k : k + 1], {"a": data()})["a"]
        # The same products summed in another order: fp32 rounding.
        assert float(together.loss[k]) == pytest.approx(float(single.loss[0]), rel=1e-6)
        assert float(together.accuracy[k]) == float(single.accuracy[0])
        assert float(together.loss[k]) == pytest.approx(alone(model, data())[0], rel=1e-5)
    assert len(set(together.loss.tolist())) == 7


@pytest.mark.parametrize("activation", ["relu", "elu", "silu", "gelu"])
def test_every_activation_is_stacked(monkeypatch: pytest.MonkeyPatch, activation: str) -> None:
    kind = {"input_shape": (3, 8, 8), "classes": 4, "width": 6, "activation": activation}
    models = [build_model("mlp", seed=seed, **kind) for seed in range(3)]
    layout, rows = FlatLayout.from_module(models[0]), torch.stack([row(model) for model in models])
    calls: list[int] = []

    def count(model: nn.Module, parameters: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        calls.append(len(next(iter(parameters.values()))))
        return stacked.stacked_logits(model, parameters, images)

    monkeypatch.setattr(losses, "stacked_logits", count)
    together = evaluate_rows(models[0], layout, rows, {"a": data()})["a"]
    assert set(calls) == {3}
    for k, model in enumerate(models):
        # The same products summed in another order: fp32 rounding.
        assert float(together.loss[k]) == pytest.approx(alone(model, data())[0], rel=1e-5)
    assert len(set(together.loss.tolist())) == 3


def test_equal_networks_get_equal_bits_wherever_they_stand() -> None:
    """What barriers of exactly 0 on level paths rest on, also in a last group that is smaller than the others."""
    rows = row(mlp(1)).repeat(1 + stacked.networks_at_once(mlp(1), 16, CPU), 1)
    found = evaluate_rows(mlp(9), FlatLayout.from_module(mlp(1)), rows, {"a": data(count=32)})["a"]
    assert len(set(found.loss.tolist())) == 1


def test_only_dense_networks_are_stacked() -> None:
    assert stacked.stackable(mlp(0))
    assert not stacked.stackable(resnet(0))
    assert not stacked.stackable(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert not stacked.stackable(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))


def test_large_batches_are_not_stacked() -> None:
    assert stacked.networks_at_once(mlp(0), 250, CPU) == 64
    assert stacked.networks_at_once(mlp(0), 1000, CPU) == 1


def test_what_is_stacked_is_bounded_by_its_bytes() -> None:
    """On a GPU too, whose samples are not: of wide networks fewer, and none where that would be a handful."""
    gpu = torch.device("cuda")

    def at_once(width: int, batch: int) -> int:
        model = build_model("mlp", input_shape=(1, 4, 4), classes=10, seed=0, width=width)
        found = stacked.networks_at_once(model, batch, gpu)
        assert found == 1 or found * stacked.stacked_bytes(model, batch) <= stacked.STACKED_BYTES
        return found

    assert at_once(16, 250) > at_once(256, 250) > at_once(1024, 250) > 16
    assert at_once(8192, 250) == 1


@pytest.mark.parametrize(("width", "batch", "count"), [(32, 250, 20), (300, 40, 18)])
def test_bytes_of_a_stacked_network_are_those_that_are_taken(
    monkeypatch: pytest.MonkeyPatch, width: int, batch: int, count: int
) -> None:
    model = build_model("mlp", input_shape=(1, 20, 20), classes=10, seed=0, width=width)
    layout, one = FlatLayout.from_module(model), row(model)
    monkeypatch.setattr(losses, "networks_at_once", lambda model, batch, device: count)
    rows, given = one.repeat(2 * count, 1), [(torch.zeros(batch, 1, 20, 20), torch.zeros(batch).long())]
    with LiveBytes() as live:
        evaluate_rows(model, layout, rows, {"a": lambda: given})
    # Beside it small tensors of one number per network; labels and losses are not at the fullest moment.
    assert count * stacked.stacked_bytes(model, batch) == pytest.approx(live.peak, rel=0.1)


class Branching(nn.Module):
    """Dense layers in a forward that vmap cannot take: it branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first(x))
        if hidden.mean() > 0.3:
            hidden = hidden * 2
        logits: torch.Tensor = self.last(hidden)
        return logits


def test_networks_that_branch_on_values_are_evaluated_one_at_a_time() -> None:
    model = Branching()
    layout = FlatLayout.from_module(model)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, layout.numel, generator=generator)
    x, y = torch.randn(10, 6, generator=generator), torch.randint(3, (10,), generator=generator)
    assert stacked.stackable(model)
    found = evaluate_rows(model, layout, rows, {"data": lambda: [(x, y)]})["data"].loss
    expected = []
    for own in rows:
        model.load_state_dict(layout.unflatten(own))
        expected.append(nn.functional.cross_entropy(model(x), y).item())
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)  # fp32 sums
