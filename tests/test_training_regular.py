"""Regular training against plain torch: the step, the loop, the schedules, number formats, errors, repeatability."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_cases import CPU, PlainConvNet, PlainMlp, batches, dataset, network, store

from fastar.config import StarSettings, TrainSettings
from fastar.data.in_memory import DeviceDataset
from fastar.errors import FastarError
from fastar.flat import FlatLayout
from fastar.models import build_model
from fastar.training import Epoch, RegularStep, StarStep, fit, learning_rate, resolve_precision
from fastar.training.amp import LossScale

SETTINGS = TrainSettings(epochs=3, batch_size=16, lr=0.1, weight_decay=5e-3, precision="fp32")


def resnet(seed: int = 0) -> nn.Module:
    return build_model("resnet8", input_shape=(3, 8, 8), classes=4, seed=seed, width=0.25)


class Recorded:
    """A step that remembers its losses and learning rates."""

    def __init__(self, step: Any):
        self.step = step
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.calls: list[tuple[int, int]] = []

    def begin_epoch(self, epoch: int, steps: int) -> dict[str, float]:
        self.calls.append((epoch, steps))
        return dict(self.step.begin_epoch(epoch, steps))

    def __call__(self, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        loss: Tensor = self.step(images, labels, lr)
        self.losses.append(float(loss))
        self.rates.append(float(lr))
        return loss

    def describe(self, step: int) -> str:
        return str(self.step.describe(step))

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.step.state()
        return state

    def save(self) -> dict[str, Tensor]:
        saved: dict[str, Tensor] = self.step.save()
        return saved


def plain_training(model: nn.Module, data: Any, settings: TrainSettings, seed: int) -> list[float]:
    """torch.optim.SGD as anyone would write it; every step's loss."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
    )
    steps = data.batch_count(settings.batch_size, settings.drop_last)
    losses = []
    model.train()
    for epoch in range(settings.epochs):
        for images, labels in data.batches(
            settings.batch_size, seed=seed, epoch=epoch, augment=True, drop_last=settings.drop_last
        ):
            rate = settings.lr * 0.5 * (1 + math.cos(math.pi * len(losses) / (steps * settings.epochs)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


@pytest.mark.quick
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_plain_torch_training(nesterov: bool, drop_last: bool) -> None:
    settings = SETTINGS.model_copy(update={"nesterov": nesterov, "drop_last": drop_last})
    data = dataset(count=88)  # five batches of 16, and one of 8
    model, plain = resnet(), resnet()
    step = Recorded(RegularStep(model, settings))
    history = fit(step, data, settings, name="x", seed=7)
    losses = plain_training(plain, data, settings, seed=7)
    assert len(losses) == 3 * (5 if drop_last else 6)
    # The same operations on the same numbers; only the update rounds differently (fused, 0-d fp32 learning rate).
    assert step.losses == pytest.approx(losses, abs=2e-5)
    state = step.step.state()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=2e-5)
    assert losses[-1] < losses[0] - 0.1  # something was trained
    each = len(losses) // 3
    sizes = [16] * 5 + ([] if drop_last else [8])
    of_images = [
        sum(a * b for a, b in zip(sizes, step.losses[k * each :], strict=False)) / sum(sizes) for k in range(3)
    ]
    assert [epoch.loss for epoch in history] == pytest.approx(of_images)
    assert [epoch.images for epoch in history] == [80 if drop_last else 88] * 3
    assert step.calls == [(0, each), (1, each), (2, each)]


def test_the_model_holds_what_was_trained() -> None:
    model = resnet()
    step = RegularStep(model, SETTINGS)
    fit(step, dataset(), SETTINGS, name="x", seed=0, epochs=1)
    state = step.state()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)
    assert not torch.equal(state["conv1.weight"], resnet().state_dict()["conv1.weight"])
    assert not torch.equal(state["bn1.running_mean"], torch.zeros_like(state["bn1.running_mean"]))


def test_epochs_and_lr_replace_the_settings() -> None:
    step = Recorded(RegularStep(resnet(), SETTINGS))
    told: list[Epoch] = []
    history = fit(step, dataset(), SETTINGS, name="x", seed=0, epochs=2, lr=0.02, on_epoch=told.append)
    assert told == history
    assert [(epoch.epoch, epoch.images) for epoch in history] == [(0, 96), (1, 96)]
    assert step.rates == pytest.approx([0.01 * (1 + math.cos(math.pi * i / 12)) for i in range(12)])
    assert [epoch.lr for epoch in history] == pytest.approx([step.rates[5], step.rates[11]])


# Schedules


def rates(settings: TrainSettings, epochs: int = 10, steps: int = 4) -> list[float]:
    return [learning_rate(settings, i, steps, epochs, 0.4) for i in range(epochs * steps + 1)]


def test_cosine_schedule() -> None:
    found = rates(TrainSettings(schedule="cosine", epochs=10))
    assert found == pytest.approx([0.4 * math.cos(math.pi * i / 80) ** 2 for i in range(41)])  # half-angle form
    assert found[0] == 0.4
    assert found[20] == pytest.approx(0.2)
    assert found[40] == 0  # after the last step
    assert 0 < found[39] < 0.001


def test_constant_schedule() -> None:
    assert rates(TrainSettings(schedule="constant")) == [0.4] * 41


def test_step_schedule() -> None:
    found = rates(TrainSettings(schedule="step", milestones=(3, 7), gamma=0.2, epochs=10))
    assert found == pytest.approx([0.4] * 12 + [0.08] * 16 + [0.016] * 13)


def test_warm_up_is_linear_and_then_the_schedule_runs_over_what_is_left() -> None:
    found = rates(TrainSettings(schedule="cosine", warmup_epochs=2, epochs=10))
    assert found[:8] == pytest.approx([0.4 * (i + 1) / 9 for i in range(8)])
    assert found[8:] == pytest.approx([0.2 * (1 + math.cos(math.pi * i / 32)) for i in range(33)])
    assert found.index(max(found)) == 8
    half = rates(TrainSettings(schedule="constant", warmup_epochs=0.5, epochs=10))
    assert half == pytest.approx([0.4 / 3, 0.8 / 3] + [0.4] * 39)


# Number formats


def test_bf16_trains_like_fp32_within_its_precision() -> None:
    data = dataset()
    steps = {}
    for precision in ("fp32", "bf16"):
        settings = SETTINGS.model_copy(update={"precision": precision})
        steps[precision] = Recorded(RegularStep(resnet(), settings))
        fit(steps[precision], data, settings, name="x", seed=7)
    fp32, bf16 = steps["fp32"], steps["bf16"]
    assert bf16.step.dtype == torch.bfloat16
    assert next(bf16.step.model.parameters()).dtype == torch.bfloat16
    # bf16 has 8 bits (4e-3); nine layers and the batch's mean make about 1e-2 of a first loss near 1.4.
    assert bf16.losses[0] == pytest.approx(fp32.losses[0], abs=3e-2)
    assert bf16.losses[0] != fp32.losses[0]
    # Eighteen steps on, rounding has been fed back through the weights.
    assert bf16.losses == pytest.approx(fp32.losses, abs=0.15)
    assert bf16.losses[-1] < bf16.losses[0] - 0.1
    state = bf16.step.state()
    assert {value.dtype for name, value in state.items() if "num_batches" not in name} == {torch.float32}
    # The master copy keeps what bf16 would drop.
    assert not torch.equal(state["conv1.weight"], state["conv1.weight"].bfloat16().float())


def test_bf16_star_step() -> None:
    settings = SETTINGS.model_copy(update={"precision": "bf16"})
    found = {}
    for precision in ("fp32", "bf16"):
        settings = SETTINGS.model_copy(update={"precision": precision})
        model = resnet()
        z = store([resnet(1), resnet(2)], FlatLayout.from_module(model))
        step = Recorded(StarStep(model, settings, StarSettings(), z, seed=3))
        fit(step, dataset(), settings, name="x", seed=7)
        found[precision] = step
    assert found["bf16"].losses != found["fp32"].losses
    assert found["bf16"].losses == pytest.approx(found["fp32"].losses, abs=0.15)  # as above


def test_precisions_on_a_cpu() -> None:
    assert resolve_precision("auto", CPU) == torch.float32
    assert resolve_precision("fp32", CPU) == torch.float32
    assert resolve_precision("bf16", CPU) == torch.bfloat16
    with pytest.raises(FastarError, match=r"train\.precision=fp16 needs a GPU"):
        resolve_precision("fp16", CPU)
    with pytest.raises(FastarError, match="fp16 needs a GPU"):
        RegularStep(resnet(), SETTINGS.model_copy(update={"precision": "fp16"}))


def test_loss_scale_backs_off_and_grows() -> None:
    scale = LossScale(CPU, enabled=True, initial=8.0, growth_interval=3)
    good, bad = [torch.ones(3), torch.zeros(2)], [torch.ones(3), torch.tensor([1.0, float("inf")])]
    assert scale.found_nonfinite is not None
    seen = []
    for gradients in (good, bad, good, good, good, good, good, good, bad):
        scale.check(gradients)
        assert float(scale.found_nonfinite) == (gradients is bad)
        scale.update()
        seen.append(float(scale.scale))
        assert float(scale.inverse) == 1 / seen[-1]
    # A good step before a bad one does not count; three in a row double it, and counting starts again.
    assert seen == [8, 4, 4, 4, 8, 8, 8, 16, 8]


def test_loss_scale_off_stays_one() -> None:
    scale = LossScale(CPU, enabled=False)
    scale.check([torch.tensor([float("nan")])])
    scale.update()
    assert (float(scale.scale), float(scale.inverse), scale.found_nonfinite) == (1, 1, None)


def test_a_scaled_loss_gives_the_same_training() -> None:
    """Scaling by a power of two and back is exact in fp32, so only a mistake can make a difference."""
    plain, scaled = RegularStep(network(PlainConvNet, 0), SETTINGS), RegularStep(network(PlainConvNet, 0), SETTINGS)
    scaled.loss_scale = LossScale(CPU, enabled=True, initial=1024.0, growth_interval=2)
    for images, labels in batches(6, 0, (3, 5, 5)):
        lr = torch.tensor(0.05)
        assert plain(images, labels, lr) == scaled(images, labels, lr)  # the loss reported is the unscaled one
    torch.testing.assert_close(plain.theta, scaled.theta, rtol=1e-6, atol=1e-7)
    assert float(scaled.loss_scale.scale) == 1024 * 2**3


def test_an_overflowing_step_changes_nothing_and_halves_the_scale() -> None:
    step, twin = RegularStep(network(PlainMlp, 0), SETTINGS), RegularStep(network(PlainMlp, 0), SETTINGS)
    lr = torch.tensor(0.05)
    (images, labels), (more, others) = batches(2, 0, (12,))
    for one in (step, twin):
        one.loss_scale = LossScale(CPU, enabled=True, initial=1024.0, growth_interval=100)
        one(images, labels, lr)
    before = step.theta.clone()
    step.loss_scale.scale.fill_(2.0**127)  # gradients of 2 and more overflow, the loss does not
    step.loss_scale.inverse.fill_(2.0**-127)
    assert torch.isfinite(step(more * 100, others, lr))
    assert torch.equal(step.theta, before)
    assert float(step.loss_scale.scale) == 2.0**126
    step.loss_scale.scale.fill_(1024.0)
    step.loss_scale.inverse.fill_(1 / 1024)
    for one in (step, twin):  # the twin never saw that batch: momentum is untouched too
        one(more, others, lr)
    assert torch.equal(step.theta, twin.theta)
    assert not torch.equal(step.theta, before)


# Errors


def test_a_batch_larger_than_the_data_is_refused() -> None:
    settings = SETTINGS.model_copy(update={"batch_size": 97})
    with pytest.raises(FastarError, match=r"train\.batch_size=97 is more than the 96 training samples; .*drop_last"):
        fit(RegularStep(resnet(), settings), dataset(), settings, name="x", seed=0)
    whole = settings.model_copy(update={"drop_last": False})  # as the error says
    assert fit(RegularStep(resnet(), whole), dataset(), whole, name="x", seed=0, epochs=1)[0].images == 96


class Poisoned(Recorded):
    """Is shown images that are not numbers in call number `when`."""

    def __init__(self, step: Any, when: int):
        super().__init__(step)
        self.when = when

    def __call__(self, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        if len(self.losses) == self.when:
            images = images * float("nan")
        return super().__call__(images, labels, lr)


def test_a_loss_that_is_not_finite_names_model_epoch_and_step() -> None:
    told: list[Epoch] = []
    step = Poisoned(RegularStep(resnet(), SETTINGS), when=8)  # six steps an epoch
    with pytest.raises(FastarError, match=r"^training source 4: loss not finite at epoch 2, step 3; lower train\.lr"):
        fit(step, dataset(), SETTINGS, name="source 4", seed=0, on_epoch=told.append)
    assert [epoch.epoch for epoch in told] == [0]
    assert len(step.calls) == 2  # no third epoch


def test_a_star_loss_that_is_not_finite_names_source_and_t() -> None:
    model = resnet()
    z = store([resnet(1)], FlatLayout.from_module(model))
    star = StarSettings(t="constant", value=0.25)
    step = Poisoned(StarStep(model, SETTINGS, star, z, seed=3), when=1)
    wanted = r"^training star: loss not finite at epoch 1, step 2 \(source source 0, t=0\.2500\); "
    with pytest.raises(FastarError, match=wanted):
        fit(step, dataset(), SETTINGS, name="star", seed=0)


# Repeatability


def trained_star(seed: int, draws: int = 3) -> Tensor:
    model = resnet()
    z = store([resnet(1), resnet(2)], FlatLayout.from_module(model))
    step = StarStep(model, SETTINGS, StarSettings(), z, seed=draws)
    fit(step, dataset(), SETTINGS, name="star", seed=seed)
    return step.theta


def test_training_is_a_function_of_its_seeds() -> None:
    first = trained_star(seed=0)
    torch.manual_seed(123)  # the global generator has no say
    assert torch.equal(trained_star(seed=0), first)
    assert not torch.equal(trained_star(seed=1), first)
    assert not torch.equal(trained_star(seed=0, draws=4), first)


def test_an_epoch_s_last_batch_is_let_go_before_the_next_epoch_begins() -> None:
    """Which may match for minutes: the batch would be held all the while."""
    handed: list[weakref.ref[Tensor]] = []

    class Handing(DeviceDataset):
        def batches(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
            for images, labels in super().batches(*args, **kwargs):
                mine = images.clone()
                handed.append(weakref.ref(mine))
                yield mine, labels
                del mine

    class Looking(RegularStep):
        def begin_epoch(self, epoch: int, steps: int) -> None:
            gc.collect()
            alive.append(sum(one() is not None for one in handed))

    alive: list[int] = []
    images = dataset()
    images.__class__ = Handing
    fit(Looking(resnet(), SETTINGS), images, SETTINGS, name="x", seed=0)
    assert len(handed) == 18
    assert alive == [0, 0, 0]


def test_a_short_last_batch_counts_by_its_images() -> None:
    """In the loss of an epoch, which is a mean over images."""
    settings = SETTINGS.model_copy(update={"drop_last": False, "batch_size": 40, "epochs": 1})
    step = Recorded(RegularStep(resnet(), settings))
    (done,) = fit(step, dataset(), settings, name="x", seed=0)  # 40, 40 and 16 images
    wanted = (40 * step.losses[0] + 40 * step.losses[1] + 16 * step.losses[2]) / 96
    assert done.loss == pytest.approx(wanted, rel=1e-12)
    assert abs(done.loss - sum(step.losses) / 3) > 1e-4
