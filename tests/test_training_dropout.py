"""Dropout in training is a function of the seed, the epoch and the step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_checkpoints import Cut, checkpoints, cut_at
from torch import Tensor, nn
from torch.nn import functional as F
from training_cases import CPU, dataset, network, store

from fastar.config import StarSettings, TrainSettings
from fastar.flat import FlatLayout
from fastar.training import RegularStep, StarStep, fit, steps
from fastar.training.steps import StepDraws

SETTINGS = TrainSettings(epochs=3, batch_size=16, lr=0.05, precision="fp32")  # six steps an epoch


class Dropping(nn.Module):
    """Dropout as a module and as a function."""

    def __init__(self, share: float = 0.4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.dropout = nn.Dropout(share)
        self.out = nn.Linear(6, 4)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(F.relu(self.conv(x)) + 1)
        return self.out(F.dropout(out.mean((2, 3)), self.share, self.training))


def regular(settings: TrainSettings = SETTINGS, kind: Callable[[], nn.Module] = Dropping, **more: Any) -> RegularStep:
    return RegularStep(network(kind, 0), settings, **more)  # type: ignore[arg-type]


def star(settings: TrainSettings = SETTINGS, **more: Any) -> StarStep:
    model = network(Dropping, 0)
    z = store([network(Dropping, seed) for seed in (1, 2, 3)], FlatLayout.from_module(model))
    return StarStep(model, settings, StarSettings(), z, seed=4, **more)


def train(step: Any, seed: int = 0, settings: TrainSettings = SETTINGS, **more: Any) -> list[float]:
    return [epoch.loss for epoch in fit(step, dataset(), settings, name="x", seed=seed, **more)]


def goes_on_to_the_same_bits(folder: Path, make: Callable[[], Any], epoch: int, step: int) -> None:
    whole = make()
    wanted = train(whole)
    with pytest.raises(Cut):
        train(make(), checkpoints=cut_at(folder, step, epoch))
    torch.manual_seed(1234)  # another process
    again, kept = make(), checkpoints(folder)
    saved = kept.newest()
    assert saved is not None
    assert (saved.epoch, saved.step) == (epoch, step)
    saved.tensors["random/cpu"] = torch.get_rng_state()  # what the generators stood at does not matter
    assert train(again, checkpoints=kept, saved=saved) == wanted
    assert torch.equal(again.theta, whole.theta)


@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (1, 0), (1, 4), (2, 5)])
@pytest.mark.parametrize("make", [regular, star])
def test_a_training_that_was_cut_off_goes_on_to_the_same_bits(
    tmp_path: Path, make: Callable[[], Any], epoch: int, step: int
) -> None:
    goes_on_to_the_same_bits(tmp_path, make, epoch, step)


@pytest.mark.slow
@pytest.mark.parametrize("make", [regular, star])
def test_compiled_it_goes_on_to_the_same_bits(tmp_path: Path, make: Callable[..., Any]) -> None:
    goes_on_to_the_same_bits(tmp_path, lambda: make(SETTINGS.model_copy(update={"compile": True})), 1, 3)


@pytest.mark.parametrize("make", [regular, star])
def test_what_else_draws_from_torchs_generator_does_not_matter(make: Callable[[], Any]) -> None:
    plain, disturbed = make(), make()
    wanted = train(plain)
    torch.manual_seed(99)
    assert train(disturbed, on_epoch=lambda _: torch.rand(7)) == wanted
    assert torch.equal(disturbed.theta, plain.theta)


def test_the_seed_matters_and_every_step_drops_others() -> None:
    masks = []
    for seed in (0, 0, 1):
        step, found = regular(), []
        # A ReLU and 1 lie before it: zeros are what was dropped.
        step.model.get_submodule("dropout").register_forward_hook(lambda _, args, out, to=found: to.append(out == 0))
        train(step, seed)
        masks.append(found)
    first, again, other = masks
    assert len(first) == 18
    assert all(torch.equal(mask, same) for mask, same in zip(first, again, strict=True))
    assert not any(torch.equal(mask, another) for i, mask in enumerate(first) for another in first[:i] + other)
    dropped = torch.stack(first).float().mean()
    # Of 18 * 16 * 6 * 64 units, each dropped with a chance of 0.4: five standard deviations.
    assert float(dropped) == pytest.approx(0.4, abs=5 * (0.24 / (18 * 16 * 6 * 64)) ** 0.5)


@pytest.mark.parametrize("share", [0.4, 0.0])
@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_generator_stays_where_it_was(share: float, fails: bool) -> None:
    step = regular(kind=lambda: Dropping(share))
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)

    def told(_: Any) -> None:
        if fails:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        train(step, on_epoch=told)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("drawing", [True, False])
def test_generators_are_set_only_where_the_first_step_drew(drawing: bool) -> None:
    with StepDraws(0, CPU) as begun:
        found = []
        for step in range(3):
            torch.manual_seed(5)
            begun.begin(0, step)
            found.append(float(torch.rand(())) if drawing or step else 0.0)
            begun.end()
    torch.manual_seed(5)
    left_alone = float(torch.rand(()))
    assert [value == left_alone for value in found[1:]] == [not drawing] * 2


@pytest.mark.parametrize("make", [regular, star])
def test_a_graph_drops_what_eager_steps_drop(make: Callable[..., Any]) -> None:
    """With a recorder in the place of CUDA graphs: what the warm-up drew does not count."""
    captures: list[int] = []

    def record(warm_up: Callable[[], None], run: Callable[[], None]) -> Callable[[], None]:
        warm_up()
        captures.append(len(captures))
        return run

    eager, graph = make(), make(SETTINGS.model_copy(update={"graph": True}), record=record)
    assert train(graph) == train(eager)
    assert torch.equal(graph.theta, eager.theta)
    assert captures == [0]


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
def test_on_a_gpu_it_goes_on_to_the_same_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    images = dataset(device=device)
    settings = SETTINGS.model_copy(update={"graph": graph})

    def make() -> RegularStep:
        return RegularStep(network(Dropping, 0).to(device), settings)

    whole, again, other = make(), make(), make()
    fit(whole, images, settings, name="x", seed=0)
    with monkeypatch.context() as patched:
        patched.setattr(steps, "derive_seed", lambda *names: 1)  # other masks alone
        fit(other, images, settings, name="x", seed=0)
    with pytest.raises(Cut):
        fit(make(), images, settings, name="x", seed=0, checkpoints=cut_at(tmp_path, 3, 1))
    kept = checkpoints(tmp_path)
    saved = kept.newest()
    assert saved is not None
    saved.tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    fit(again, images, settings, name="x", seed=0, checkpoints=kept, saved=saved)
    # cuDNN's weight gradients add in an order of their own; nine steps carry such roundings on.
    torch.testing.assert_close(again.theta, whole.theta, rtol=0, atol=1e-4)
    assert (other.theta - whole.theta).abs().max() > 1e-2
