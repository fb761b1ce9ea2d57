"""Progressive resizing, the linear schedule, and the ImageNet recipes that use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastar.config import TrainSettings, load_settings
from fastar.config.recipes import CONFIGS
from fastar.errors import FastarError
from fastar.models import build_model
from fastar.training import RegularStep, fit, learning_rate, resolution


def test_sides_between_two_epochs_are_multiples_of_32() -> None:
    """FFCV's 88 epochs: 160 until 65, 192 from 76, and its numpy.round in between."""
    settings = TrainSettings(epochs=88, resolutions=((65, 160), (76, 192)))
    sides = [resolution(settings, epoch) for epoch in range(88)]
    assert sides == [160] * 71 + [192] * 17  # 160 + 32 * 5 / 11 is the last below 176
    growing = TrainSettings(epochs=20, resolutions=((2, 64), (10, 192), (14, 128)))
    assert [resolution(growing, epoch) for epoch in (0, 2, 4, 6, 8, 10, 12, 13, 14, 19)] == [
        64, 64, 96, 128, 160, 192, 160, 128, 128, 128
    ]  # fmt: skip
    assert resolution(TrainSettings(), 3) is None
    assert resolution(TrainSettings(resolutions=((0, 96),)), 7) == 96


def test_linear_schedule_falls_to_zero_after_the_warm_up() -> None:
    settings = TrainSettings(schedule="linear", warmup_epochs=2, epochs=6)
    found = [learning_rate(settings, step, 10, 6, 0.5) for step in range(61)]
    assert found[:20] == pytest.approx([0.5 * (step + 1) / 21 for step in range(20)])
    assert found[20] == 0.5
    assert found[20:] == pytest.approx([0.5 * (1 - step / 40) for step in range(41)])
    assert found[60] == 0


@pytest.mark.parametrize(
    ("changes", "steps", "epochs"),
    [
        ({}, 10, 6),
        ({"pct_start": 0.25, "div_factor": 7.0, "final_div_factor": 30.0}, 13, 3),
        ({"pct_start": 0.0}, 5, 2),
        ({"pct_start": 1.0}, 5, 2),
        ({}, 1, 3),  # the peak lies before the first step: 0.3 * 3 - 1
    ],
)
def test_one_cycle_is_torchs(changes: dict[str, float], steps: int, epochs: int) -> None:
    settings = TrainSettings(schedule="onecycle", epochs=epochs, **changes)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=steps * epochs, **changes)
    for step in range(steps * epochs):
        found = learning_rate(settings, step, steps, epochs, 0.3)
        # The same formula in float64, the factors multiplied in another order.
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=0)
        optimizer.step()
        if step + 1 < steps * epochs:
            theirs.step()


def test_one_cycle_rises_and_falls() -> None:
    settings = TrainSettings(schedule="onecycle", epochs=10)
    rates = [learning_rate(settings, step, 10, 10, 0.5) for step in range(100)]
    assert (rates[0], max(rates)) == (pytest.approx(0.5 / 25), 0.5)
    assert rates.index(max(rates)) == 29
    assert rates[99] == pytest.approx(0.5 / 25 / 1e4)
    assert rates[:30] == sorted(rates[:30])
    assert rates[29:] == sorted(rates[29:], reverse=True)
    # One step of one epoch, at the peak at once: torch's own divides 0 by 0.
    assert learning_rate(TrainSettings(schedule="onecycle", epochs=1, pct_start=1.0), 0, 1, 1, 0.5) == 0.5


class _Images:
    """Says which side each epoch was asked for."""

    labels = torch.zeros(8, dtype=torch.int64)
    images = torch.zeros(8, 3, 32, 32)
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sides: list[int | None] = []

    def __len__(self) -> int:
        return 8

    def batch_count(self, batch_size: int, drop_last: bool = True) -> int:
        return 2

    def batches(self, batch_size: int, *, size: int | None = None, **_: Any) -> Iterator[tuple[Tensor, Tensor]]:
        self.sides.append(size)
        for _ in range(2):
            yield torch.zeros(4, 3, size or 32, size or 32), torch.zeros(4, dtype=torch.int64)


class _Still:
    """A step that does nothing."""

    def begin_epoch(self, epoch: int, steps: int) -> None:
        return

    def __call__(self, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        return torch.ones(())

    def describe(self, step: int) -> str:
        return ""

    def state(self) -> dict[str, Tensor]:
        return {"weight": torch.zeros(1)}

    def save(self) -> dict[str, Tensor]:
        return self.state()


@pytest.mark.parametrize(("resolutions", "wanted"), [((), [None] * 4), (((1, 32), (3, 96)), [32, 32, 64, 96])])
def test_training_asks_for_the_side_of_the_epoch(resolutions: Any, wanted: list[int | None]) -> None:
    images = _Images()
    settings = TrainSettings(epochs=4, batch_size=4, resolutions=resolutions)
    fit(_Still(), images, settings, name="x", seed=0)  # type: ignore[arg-type]
    assert images.sides == wanted


def test_images_of_another_side_are_captured_anew() -> None:
    """With a recorder in the place of CUDA graphs: one capture for each side, and the losses of eager steps."""
    captures: list[int] = []

    def record(warm_up: Callable[[], None], run: Callable[[], None]) -> Callable[[], None]:
        warm_up()
        captures.append(len(captures))
        return run

    found = []
    for graph in (False, True):
        model = build_model("imagenet-resnet18", input_shape=(3, 32, 32), classes=4, seed=0, width=0.0625)
        step = RegularStep(model, TrainSettings(precision="fp32", graph=graph), record=record)
        generator = torch.Generator().manual_seed(0)
        losses = []
        for side, count in ((32, 4), (32, 4), (32, 3), (64, 4), (64, 4)):  # the third is an epoch's short last batch
            images = torch.randn(count, 3, side, side, generator=generator)
            losses.append(float(step(images, torch.arange(count), torch.tensor(0.01))))
        found.append(losses)
    assert found[0] == found[1]
    assert captures == [0, 1]


def test_the_papers_imagenet_recipe() -> None:
    train = load_settings(dataset="imagenet").train
    assert (train.epochs, train.batch_size, train.lr, train.weight_decay) == (100, 256, 0.1, 1e-4)
    assert (train.optimizer, train.momentum, train.nesterov, train.decay_1d) == ("sgd", 0.9, True, True)
    rates = {epoch: learning_rate(train, epoch * 7, 7, 100, train.lr) for epoch in (0, 29, 30, 59, 60, 89, 90, 99)}
    assert list(rates.values()) == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])
    assert resolution(train, 50) is None


@pytest.mark.parametrize(("name", "epochs", "grown"), [("", 16, 12), ("32", 32, 25), ("88", 88, 71)])
def test_the_fast_imagenet_recipes(name: str, epochs: int, grown: int) -> None:
    settings = load_settings(file=CONFIGS / f"imagenet-resnet18-fast{name}.yaml")
    train = settings.train
    assert (settings.model.arch, settings.sources.number, train.epochs) == ("imagenet-resnet18", 30, epochs)
    assert (train.batch_size, train.lr, train.weight_decay, train.decay_1d) == (1024, 0.5, 5e-5, False)
    assert (train.label_smoothing, train.nesterov) == (0.1, False)
    assert [resolution(train, epoch) for epoch in (0, grown - 1, grown, epochs - 1)] == [160, 160, 192, 192]
    rates = [learning_rate(train, step, 10, epochs, train.lr) for step in (0, 20, 10 * epochs)]
    assert rates == pytest.approx([0.5 / 21, 0.5, 0])


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["train.resolutions=[[3, 100]]"], "multiples of 32"),
        (["train.resolutions=[[3, 96], [3, 128]]"], "rising order"),
        (["train.resolutions=[[3]]"], "train.resolutions.0"),
        (["train.resolutions=[[0, 0]]"], "train.resolutions.0.1"),
        (["train.label_smoothing=1"], "train.label_smoothing"),
        (["train.schedule=line"], "'linear'"),
        (["train.schedule=onecycle", "train.milestones=[]", "train.warmup_epochs=2"], "leave warmup_epochs out"),
        (["train.pct_start=0.5"], "pct_start belongs to schedule=onecycle"),
        (["train.schedule=onecycle", "train.milestones=[]", "train.pct_start=1.5"], "train.pct_start=1.5"),
        (["train.div_factor=0"], "train.div_factor=0"),
        (["train.gradient_clip=0"], "train.gradient_clip=0"),
        (["train.gradient_clip=.inf"], "train.gradient_clip=inf"),
    ],
)
def test_bad_recipes_are_named(overrides: list[str], part: str) -> None:
    with pytest.raises(FastarError, match=part.replace(".", r"\.")) as error:
        load_settings(dataset="imagenet", overrides=overrides)
    assert "\n" not in str(error.value)


def test_sides_of_a_dataset_that_has_one_are_refused() -> None:
    with pytest.raises(FastarError, match=r"^settings: train\.resolutions needs images of any size .* cifar10"):
        load_settings(dataset="cifar10", overrides=["train.resolutions=[[0, 32]]"])
