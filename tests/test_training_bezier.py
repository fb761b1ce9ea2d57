"""The step of a Bezier curve's bend against its formula, differentiated by the bend in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from training_cases import PlainConvNet, PlainMlp, batches, largest_difference, network, store

from fastar.config import StarSettings, TrainSettings
from fastar.flat import FlatLayout
from fastar.runtime.seeds import derive_seed
from fastar.training import draw
from fastar.training.bezier import BezierStep

SETTINGS = TrainSettings(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.02, precision="fp32")
SHAPES: dict[type[nn.Module], tuple[int, ...]] = {PlainMlp: (12,), PlainConvNet: (3, 5, 5)}
# As of the star's step: 16 steps of fp32 on parameters of size 1.
TOLERANCE = 5e-6
SEED, STEPS = 5, 8


@pytest.mark.quick
@pytest.mark.parametrize("kind", [PlainMlp, PlainConvNet])
def test_equals_the_formula(kind: type[nn.Module]) -> None:
    model, ends = network(kind, 0), [network(kind, 1), network(kind, 2)]
    step = BezierStep(
        copy.deepcopy(model), SETTINGS, StarSettings(), store(ends, FlatLayout.from_module(model)), seed=SEED
    )
    module = copy.deepcopy(model).double().train()
    bend = {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}
    a, b = ({name: value.detach().double() for name, value in one.named_parameters()} for one in ends)
    plain = torch.optim.SGD(bend.values(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.02)
    for epoch in range(2):
        step.begin_epoch(epoch, STEPS)
        _, ts = draw(StarSettings(), 2, STEPS, derive_seed(SEED, "draws", epoch))
        for (images, labels), t in zip(batches(STEPS, epoch, SHAPES[kind]), ts, strict=True):
            point = {name: (1 - t) ** 2 * a[name] + 2 * t * (1 - t) * bend[name] + t**2 * b[name] for name in bend}
            loss = F.cross_entropy(functional_call(module, point, (images.double(),)), labels)
            plain.zero_grad()
            loss.backward()
            plain.step()
            assert float(step(images, labels, torch.tensor(0.05))) == pytest.approx(float(loss.detach()), abs=TOLERANCE)
    wanted = {name: value.detach() for name, value in bend.items()}
    assert largest_difference(step.layout.unflatten(step.theta), wanted) < TOLERANCE
    assert largest_difference(step.layout.unflatten(step.sources.rows[1]), b) == 0
    assert step.describe(0) == f" (t={draw(StarSettings(), 2, STEPS, derive_seed(SEED, 'draws', 1))[1][0]:.4f})"
