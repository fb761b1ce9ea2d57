"""The optimizers over flat parameters against torch.optim over the parameters one by one."""

from __future__ import annotations

from typing import Any, Literal, get_args

import pytest
import torch
from fastar.kernels import adam_update, reference, sgd_update
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import CPU, PlainConvNet, batches, clipped, network

from fastar.config import TrainSettings, load_settings
from fastar.errors import FastarError
from fastar.runtime.live_bytes import LiveBytes
from fastar.training import RegularStep
from fastar.training.amp import LossScale, shortening
from fastar.training.optimizers import OPTIMIZERS, Adam

SETTINGS = TrainSettings(lr=0.01, weight_decay=0.02, betas=(0.8, 0.95), eps=1e-3, precision="fp32")
SHAPE = (3, 5, 5)


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_equals_torch_optim(optimizer: Literal["adam", "adamw"]) -> None:
    settings = SETTINGS.model_copy(update={"optimizer": optimizer})
    step, plain = RegularStep(network(PlainConvNet, 0), settings), network(PlainConvNet, 0)
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
    theirs = kind(plain.parameters(), lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.02)
    before = step.theta.clone()
    for images, labels in batches(25, 0, SHAPE):
        loss = F.cross_entropy(plain(images), labels)
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        # The same operations forward and backward; updates differ by roundings, which 25 steps carry on some tenfold.
        assert float(step(images, labels, torch.tensor(0.01))) == pytest.approx(float(loss.detach()), abs=5e-6)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(step.state()[name], value, rtol=1e-5, atol=5e-6)
    assert (step.theta - before).abs().max() > 0.05


def test_adam_in_bf16_has_its_parts_move_together() -> None:
    """Matrices (bf16 gradients) and vectors (fp32) are two updates of one step: counted once, both corrected alike."""
    steps = {}
    for precision in ("fp32", "bf16"):
        settings = SETTINGS.model_copy(update={"optimizer": "adam", "precision": precision})
        steps[precision] = RegularStep(network(PlainConvNet, 0), settings)
    for images, labels in batches(8, 0, SHAPE):
        for step in steps.values():
            step(images, labels, torch.tensor(0.01))
    optimizer = steps["bf16"].optimizer
    assert isinstance(optimizer, Adam)
    assert float(optimizer.steps_done) == 8
    # 8 steps of at most 0.01 each, of which rounding to bf16 changes a part.
    assert (steps["bf16"].theta - steps["fp32"].theta).abs().max() < 0.04
    assert not torch.equal(steps["bf16"].theta, steps["fp32"].theta)


def test_a_skipped_step_of_adam_does_not_count() -> None:
    settings = SETTINGS.model_copy(update={"optimizer": "adam"})
    step, plain = RegularStep(network(PlainConvNet, 0), settings), RegularStep(network(PlainConvNet, 0), settings)
    step.loss_scale = LossScale(CPU, enabled=True, initial=1024.0)
    (images, labels), (more, others) = batches(2, 0, SHAPE)
    step.loss_scale.scale.fill_(float("inf"))
    before = step.theta.clone()
    step(images, labels, torch.tensor(0.01))
    assert torch.equal(step.theta, before)
    assert isinstance(step.optimizer, Adam)
    assert float(step.optimizer.steps_done) == 0
    assert not step.optimizer.moments[1].any()
    step.loss_scale.scale.fill_(1024.0)
    step.loss_scale.inverse.fill_(1 / 1024)
    step(more, others, torch.tensor(0.01))
    plain(more, others, torch.tensor(0.01))
    assert float(step.optimizer.steps_done) == 1
    torch.testing.assert_close(step.theta, plain.theta, rtol=1e-6, atol=1e-6)


def test_settings_of_optimizers() -> None:
    loaded = load_settings(
        dataset="digits", overrides=["train.optimizer=adamw", "train.betas=[0.8, 0.9]", "train.momentum=0"]
    )
    assert (loaded.train.optimizer, loaded.train.betas) == ("adamw", (0.8, 0.9))  # nesterov is none of adamw's business
    for wrong in ("train.optimizer=lion", "train.betas=[0.9, 1.0]", "train.betas=[0.9]", "train.eps=0"):
        with pytest.raises(FastarError, match=wrong.split("=")[0]):
            load_settings(dataset="digits", overrides=[wrong])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_without_decay_of_1d_parameters_equals_torchs_parameter_groups(
    optimizer: Literal["sgd", "adam", "adamw"], precision: Literal["fp32", "bf16"]
) -> None:
    """Gradients are given, so that both see the same: in bf16 the parts are two of themselves, in fp32 one is cut."""
    changes = {"optimizer": optimizer, "decay_1d": False, "weight_decay": 0.5, "precision": precision}
    step, plain = RegularStep(network(PlainConvNet, 0), SETTINGS.model_copy(update=changes)), network(PlainConvNet, 0)
    groups: list[dict[str, object]] = [
        {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 0.5},
        {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    theirs: torch.optim.Optimizer
    if optimizer == "sgd":
        theirs = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
    else:
        kind = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
        theirs = kind(groups, lr=0.05, betas=(0.8, 0.95), eps=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for mine, other in zip(step.model.parameters(), plain.parameters(), strict=True):
            gradient = torch.randn(other.shape, generator=generator).bfloat16()
            mine.grad, other.grad = gradient.to(mine.dtype), gradient.float()
        theirs.step()
        step._update(torch.tensor(0.05), torch.ones(()), torch.zeros(()))
    for name, value in plain.named_parameters():
        # Five updates, each with the rounding of another order of operations.
        torch.testing.assert_close(step.state()[name], value.detach(), rtol=1e-5, atol=1e-6)


class Updates(TorchDispatchMode):
    """Notes the weight decay of each fused update by SGD."""

    def __init__(self) -> None:
        super().__init__()
        self.decays: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.startswith("_fused_sgd"):
            self.decays.append(kwargs["weight_decay"])
        return func(*args, **(kwargs or {}))


def test_the_default_path_updates_each_part_in_one_call() -> None:
    for changes, decays in (({}, [0.02]), ({"decay_1d": False}, [0.02, 0.0]), ({"weight_decay": 0.0}, [0.0])):
        step = RegularStep(network(PlainConvNet, 0), SETTINGS.model_copy(update=changes))
        ((images, labels),) = batches(1, 0, SHAPE)
        with Updates() as seen:
            step(images, labels, torch.tensor(0.01))
        assert seen.decays == decays


def test_label_smoothing_is_torchs() -> None:
    settings = SETTINGS.model_copy(update={"label_smoothing": 0.2})
    ((images, labels),) = batches(1, 0, SHAPE)
    loss = RegularStep(network(PlainConvNet, 0), settings)(images, labels, torch.tensor(0.01))
    logits = network(PlainConvNet, 0)(images)
    logs = logits.log_softmax(1)
    expected = -(0.8 * logs.gather(1, labels[:, None]).mean() + 0.2 * logs.mean())
    assert float(loss) == pytest.approx(float(expected.detach()), abs=1e-5)


# Clipping


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16, torch.float32)])
def test_shortening_is_torchs_clipping(dtypes: tuple[torch.dtype, ...]) -> None:
    """Of scale times the parts together, whatever their dtypes."""
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(size, generator=generator).to(dtype) for size, dtype in zip((1001, 77), dtypes, strict=False)]
    before = [part.clone() for part in parts]
    for scale, longest in ((0.5, 1.0), (0.5, 1e3), (1 / 1024, 1e-3), (0.0, 1.0)):
        plain = [scale * part.double() for part in parts]
        wanted = clipped(plain, longest)
        found = shortening(parts, torch.tensor(scale), longest)
        assert (found.ndim, found.dtype) == (0, torch.float32)
        for one, other in zip(plain, wanted, strict=True):
            # Sums of a thousand squares in fp32.
            torch.testing.assert_close(found.double() * one, other, rtol=1e-5, atol=0)
    assert all(torch.equal(part, was) for part, was in zip(parts, before, strict=True))
    assert float(shortening([torch.ones(4)], torch.tensor(1.0), 2.5)) == 1
    assert float(shortening([torch.ones(4)], torch.tensor(1.0), 0.5)) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_clipping_equals_torchs(optimizer: Literal["sgd", "adam", "adamw"]) -> None:
    settings = SETTINGS.model_copy(update={"optimizer": optimizer, "gradient_clip": 0.7})
    step, plain = RegularStep(network(PlainConvNet, 0), settings), network(PlainConvNet, 0).double()
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if optimizer == "sgd":
        theirs = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.02)
    else:
        theirs = kinds[optimizer](plain.parameters(), lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.02)
    norms = []
    for images, labels in batches(25, 0, SHAPE):
        theirs.zero_grad()
        F.cross_entropy(plain(images.double()), labels).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.7)))
        theirs.step()
        step(images, labels, torch.tensor(0.01))
    assert min(norms) < 0.7 < max(norms)
    for name, value in plain.named_parameters():
        # 25 steps in fp32, whose roundings Adam's division by small roots makes larger.
        torch.testing.assert_close(step.state()[name].double(), value.detach(), rtol=1e-4, atol=2e-5)


def test_clipping_is_after_the_loss_scale_is_removed() -> None:
    settings = SETTINGS.model_copy(update={"gradient_clip": 0.2})
    plain, scaled = (RegularStep(network(PlainConvNet, 0), settings) for _ in range(2))
    scaled.loss_scale = LossScale(CPU, enabled=True, initial=1024.0)
    for images, labels in batches(8, 0, SHAPE):
        for step in (plain, scaled):
            step(images, labels, torch.tensor(0.05))
    # A power of two: scaling rounds nothing.
    torch.testing.assert_close(scaled.theta, plain.theta, rtol=0, atol=1e-7)
    before = scaled.theta.clone()
    scaled.loss_scale.scale.fill_(float("inf"))
    scaled(images, labels, torch.tensor(0.05))
    assert torch.equal(scaled.theta, before)  # a step that overflowed is skipped, clipped or not


@pytest.mark.parametrize("found", [None, torch.zeros(())])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_what_an_update_by_plain_torch_takes_for_a_moment(
    optimizer: str, found: torch.Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU without Triton the gradient once more; on a CPU it is done in blocks."""
    monkeypatch.setattr(reference, "_in_blocks", lambda device: False)
    count = 10_000
    theta, gradient, first, second = (torch.ones(count) for _ in range(4))
    scalars = {"lr": torch.tensor(0.1), "scale": torch.tensor(0.5), "inverse_loss_scale": torch.tensor(1.0)}
    with LiveBytes() as live:
        if optimizer == "sgd":
            sgd_update(
                theta, gradient, first, **scalars, weight_decay=0.1, momentum=0.9, nesterov=True, found_nonfinite=found
            )
        else:
            adam_update(
                theta, gradient, first, second, steps_done=torch.zeros(()), **scalars, weight_decay=0.1,
                betas=(0.9, 0.99), eps=1e-8, decoupled=optimizer == "adamw", found_nonfinite=found,
            )  # fmt: skip
    assert live.peak // (4 * count) == 1


def test_every_optimizer_that_settings_name_is_in_the_table() -> None:
    assert set(OPTIMIZERS) == set(get_args(TrainSettings.model_fields["optimizer"].annotation))
