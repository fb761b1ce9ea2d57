"""The optimizers over flat parameters against torch.optim over the parameters one by one."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch.nn import functional as F
from training_cases import CPU, PlainConvNet, batches, network

from fastar.config import TrainSettings, load_settings
from fastar.errors import FastarError
from fastar.training import RegularStep
from fastar.training.optimizer import FlatAdam
from fastar.training.precision import LossScale

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
    assert isinstance(optimizer, FlatAdam)
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
    assert isinstance(step.optimizer, FlatAdam)
    assert float(step.optimizer.steps_done) == 0
    assert not step.optimizer.second_moment.any()
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
