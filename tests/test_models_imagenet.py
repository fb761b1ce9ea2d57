"""ResNet-18 and ResNet-50 in torchvision's form: names, shapes, what they compute, and their permutation groups.

What is expected was taken once from torchvision 0.29.2, which the tests do not need.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from matching_calls import match_one
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.errors import FastarError
from fastar.models import MODELS, build_model, parameter_count
from fastar.symmetry import derive_symmetry

# Parameters; tensors of the state dict; digest of its names and shapes; logits 0 to 3 of `fixed_state` (float64).
TORCHVISION = {
    "imagenet-resnet18": (
        11_689_512,
        122,
        "84fb10d9c6905a1cbb020b284537dc97c4f4ec55fb2a780a41152a23a2dd0e9d",
        [2.4335226106058734, 48.49108499822583, -5.432744625418126, -7.036893747574301],
    ),
    "imagenet-resnet50": (
        25_557_032,
        320,
        "d7e4f8bb0a5363446a59c81c3887ccf66900a11651a0ae2dec96d1bb1eb6ea81",
        [85.49109657031528, 33.85571225954152, -292.17863055594125, -310.6998613012648],
    ),
}


def fixed_state(model: nn.Module) -> dict[str, Tensor]:
    """Random values that depend on the position of a tensor in the state dict alone."""
    state = {}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if not tensor.is_floating_point():
            state[name] = tensor
            continue
        draw = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
        if tensor.ndim > 1:
            state[name] = draw / tensor[0].numel() ** 0.5
        else:
            state[name] = draw.abs() + 0.5 if name.endswith(("var", "weight")) else 0.1 * draw
    return state


@pytest.mark.parametrize("arch", list(TORCHVISION))
def test_is_torchvisions(arch: str) -> None:
    parameters, tensors, digest, logits = TORCHVISION[arch]
    model = MODELS[arch](input_shape=(3, 224, 224), classes=1000)
    state = model.state_dict()
    assert (parameter_count(model), len(state)) == (parameters, tensors)
    listed = "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items())
    assert hashlib.sha256(listed.encode()).hexdigest() == digest
    model.load_state_dict(fixed_state(model))
    images = torch.randn(1, 3, 65, 70, generator=torch.Generator().manual_seed(1))  # odd sides, and not square
    with torch.no_grad():
        found = model.eval().double()(images.double())[0, :4]
    torch.testing.assert_close(found, torch.tensor(logits, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arch", list(TORCHVISION))
@pytest.mark.parametrize("side", [32, 33, 160, 192])
def test_takes_images_of_any_side(arch: str, side: int) -> None:
    model = build_model(arch, input_shape=(3, 224, 224), classes=7, seed=0, width=0.0625)
    with torch.no_grad():
        assert model(torch.zeros(2, 3, side, side)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arch", "count"), [("imagenet-resnet18", 12), pytest.param("imagenet-resnet50", 37, marks=pytest.mark.slow)]
)
def test_all_hidden_units_belong_to_groups_that_are_proven(arch: str, count: int) -> None:
    """Four residual streams (five where the stem's is projected), and one or two groups inside each block."""
    model = build_model(arch, input_shape=(3, 32, 32), classes=5, seed=0, width=0.0625)
    symmetry = derive_symmetry(model, (torch.zeros(2, 3, 32, 32),))
    assert len(symmetry.groups) == count
    placed = {(m.tensor, m.axis) for group in symmetry.groups for m in group.members}
    expected = set()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name != "fc.bias":
            expected |= {(name, axis) for axis in range(min(tensor.ndim, 2))}
    assert placed == expected - {("conv1.weight", 1), ("fc.weight", 0)}
    shuffle, state = symmetry.random(0), model.state_dict()
    matched, found, _ = match_one(symmetry, state, symmetry.apply(shuffle, state))
    assert found == shuffle.inverse()
    assert all(torch.equal(value, matched[name]) for name, value in state.items())


@pytest.mark.parametrize("arch", list(TORCHVISION))
def test_every_layer_learns(arch: str) -> None:
    model = build_model(arch, input_shape=(3, 64, 64), classes=5, seed=0, width=0.125)
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(model(images), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_begins_as_torchvision_does() -> None:
    """Convolutions normal with variance 2 / fan-out; the rest as torch's modules begin."""
    model = build_model("imagenet-resnet18", input_shape=(3, 64, 64), classes=10, seed=0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            # The sample deviation of n normals is within 4 / sqrt(2 n) of its value.
            room = 4 / (2 * module.weight.numel()) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=room), name
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))


def test_a_width_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(FastarError, match=r"model\.width=0\.001 of imagenet-resnet50 leaves no channels"):
        build_model("imagenet-resnet50", input_shape=(3, 64, 64), classes=10, width=0.001)
