"""Architectures: sizes, shapes, initialisation, and refusals that name the nearest valid setting."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastar.errors import FastarError
from fastar.models import MODELS, build_model, model_options, option_choices, parameter_count, require_arch


def small(arch: str) -> dict[str, object]:
    """Options that make `arch` narrow."""
    if arch == "mlp":
        return {"width": 6}
    if arch == "vit":
        return {"dim": 8, "heads": 2, "depth": 2}
    return {"growth": 2} if arch.startswith("densenet") else {"width": 0.125}


def build(arch: str, seed: int | None = 0, **options: object) -> nn.Module:
    return build_model(arch, input_shape=(3, 32, 32), classes=10, seed=seed, **options)


@pytest.mark.parametrize(("depth", "width"), [(1, 5), (2, 16), (4, 7)])
def test_parameter_count_of_mlp(depth: int, width: int) -> None:
    model = build_model("mlp", input_shape=(1, 8, 8), classes=10, seed=0, depth=depth, width=width)
    assert parameter_count(model) == 64 * width + width + (depth - 1) * (width * width + width) + width * 10 + 10


def test_width_multiplies_the_channels() -> None:
    model = build("resnet8", width=0.5)
    found = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert found == [8, 8, 8, 16, 16, 16, 32, 32, 32]  # the stem, then two a block and a projection
    assert [layer.out_channels for layer in build("resnet8").modules() if isinstance(layer, nn.Conv2d)] == [
        2 * channels for channels in found
    ]


@pytest.mark.parametrize("arch", sorted(MODELS))
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_forward_shapes(arch: str, shape: tuple[int, int, int]) -> None:
    if arch.startswith("vgg") and shape[1] < 17:
        pytest.skip("five halvings need images of at least 17 pixels")
    model = build_model(arch, input_shape=shape, classes=7, seed=0, **small(arch))
    assert model.training
    assert model(torch.zeros(5, *shape)).shape == (5, 7)
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.ndim != 4 or parameter.is_contiguous(memory_format=torch.channels_last)


def test_every_layer_takes_part() -> None:
    """Each parameter has a gradient, and the resolution halves twice (thrice in ResNet-18)."""
    for arch, last in (("resnet8", 8), ("resnet20", 8), ("resnet18", 4)):
        model = build(arch, width=0.25)
        seen: list[int] = []
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        layers[-1].register_forward_hook(lambda layer, args, out, seen=seen: seen.append(out.shape[-1]))
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(4, 3, 32, 32, generator=generator)
        F.cross_entropy(model(images), torch.arange(4)).backward()
        assert seen == [last]
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_a_narrow_projection_computes_what_a_strided_convolution_does() -> None:
    block = build("resnet8", width=0.25).get_submodule("stages.1.0")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 4, 7, 7, generator=generator)  # odd: both round up
    projection, norm = block.get_submodule("shortcut")  # type: ignore[misc]
    strided = norm(F.conv2d(images, projection.weight, stride=2))
    direct = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(images)))))  # type: ignore[operator]
    torch.testing.assert_close(block(images), F.relu(direct + strided), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [0.125, 0.25, 0.3])
def test_narrow_residual_networks_do_not_corrupt_memory(width: float) -> None:
    """A strided channels-last 1x1 convolution of fewer than 8 channels aborts the process within some 50 steps."""
    model = build("resnet8", width=width)
    images = torch.zeros(16, 3, 8, 8).to(memory_format=torch.channels_last)
    for _ in range(100):
        model.zero_grad()
        model(images).sum().backward()
    strided = [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride != (1, 1)
    ]
    assert all(layer.in_channels >= 8 for layer in strided)


# Initialisation


@pytest.mark.parametrize("arch", ["mlp", "resnet8"])
def test_the_seed_determines_the_initialisation(arch: str) -> None:
    first, again, other = (build(arch, seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    weights = [name for name, value in first.items() if value.ndim > 1]
    assert weights
    assert not any(torch.equal(first[name], other[name]) for name in weights)


def test_a_seeded_build_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    build("resnet8", seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(FastarError):
        build("resnet8", seed=3, width=0.01)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_generator_does_not_matter_to_a_seeded_build() -> None:
    torch.manual_seed(1)
    first = build("mlp", seed=3).state_dict()
    torch.manual_seed(2)
    assert all(torch.equal(value, first[name]) for name, value in build("mlp", seed=3).state_dict().items())


def test_without_a_seed_builds_differ() -> None:
    first, second = build("mlp", seed=None), build("mlp", seed=None)
    assert not torch.equal(first.classifier.weight, second.classifier.weight)  # type: ignore[arg-type, union-attr]
    torch.manual_seed(7)
    third = build("mlp", seed=None)
    torch.manual_seed(7)
    fourth = build("mlp", seed=None)
    assert torch.equal(third.classifier.weight, fourth.classifier.weight)  # type: ignore[arg-type, union-attr]


# Refusals


def test_unknown_architecture() -> None:
    with pytest.raises(
        FastarError,
        match=r"unknown architecture 'resnet81': did you mean 'resnet8'\? choose one of densenet100_bc, densenet40",
    ):
        build("resnet81")
    listed = ", ".join(sorted(MODELS))
    with pytest.raises(FastarError, match=rf"^unknown architecture 'zzz': choose one of {listed}$"):
        require_arch("zzz")


def test_options_and_unknown_ones() -> None:
    assert model_options("mlp") == {"width": 32, "depth": 2, "activation": "relu"}
    assert model_options("resnet18") == {"width": 1.0, "activation": "relu", "norm": "batch"}
    assert option_choices("resnet18") == {
        "activation": ("relu", "elu", "silu", "gelu"),
        "norm": ("batch", "group", "layer"),
    }
    assert option_choices("vgg11") == {
        "activation": ("relu", "elu", "silu", "gelu")
    }  # it has nothing to normalise with
    with pytest.raises(
        FastarError, match=r"model\.widht is not a setting of mlp: did you mean 'width'\? it takes width, depth"
    ):
        build("mlp", widht=3)
    with pytest.raises(FastarError, match=r"model\.blocks is not a setting of resnet8: it takes width"):
        build("resnet8", blocks=3)


@pytest.mark.parametrize(
    ("arch", "option", "value"),
    [
        ("mlp", "width", 0),
        ("mlp", "width", 2.5),
        ("mlp", "width", "wide"),
        ("mlp", "depth", 0),
        ("mlp", "depth", 1.5),
        ("mlp", "depth", None),
        ("mlp", "depth", True),
        ("resnet8", "width", 0.01),
        ("resnet8", "width", -1),
        ("resnet8", "width", float("nan")),
        ("resnet8", "width", [1]),
        ("resnet8", "activation", "tanh"),
        ("resnet8", "activation", True),
        ("resnet8", "activation", None),
        ("resnet8", "norm", 1),
        ("vgg11", "dropout", 1.0),
        ("vgg11_bn", "dropout", -0.1),
        ("wrn16", "dropout", 2),
        ("wrn22", "width", 0.01),
        ("densenet40", "growth", 0),
        ("densenet40", "growth", 2.5),
        ("densenet40_bc", "stem", -1),
        ("vit", "patch", 5),
        ("vit", "patch", 0),
        ("vit", "heads", 5),
        ("vit", "dim", 0),
        ("vit", "depth", 0),
        ("vit", "mlp_ratio", 0),
        ("vit", "mlp_ratio", -1),
        ("vit", "dropout", 1),
    ],
)
def test_values_out_of_range(arch: str, option: str, value: object) -> None:
    with pytest.raises(FastarError, match=rf"^model\.{option}=") as error:
        build(arch, **{option: value})
    assert "\n" not in str(error.value)


def test_words_name_the_nearest() -> None:
    with pytest.raises(
        FastarError,
        match=r"^model\.activation='selu' of resnet8: did you mean 'elu'\? choose one of relu, elu, silu, gelu$",
    ):
        build("resnet8", activation="selu")
    with pytest.raises(
        FastarError, match=r"^model\.norm='Groups' of wrn16: did you mean 'group'\? choose one of batch"
    ):
        build("wrn16", norm="Groups")


def test_options_that_are_free_words_or_true_or_false(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(input_shape: tuple[int, int, int], classes: int, name: str = "layer", bias: bool = True) -> nn.Module:
        return nn.Sequential(OrderedDict({name: nn.Linear(input_shape[0], classes, bias=bias)}))

    monkeypatch.setitem(MODELS, "plain", plain)
    assert [name for name, _ in build("plain", name="other", bias=False).named_parameters()] == ["other.weight"]
    with pytest.raises(FastarError, match=r"^model\.name=3 of plain must be a word$"):
        build("plain", name=3)
    for wrong in (0, 1.0, "false", None):
        with pytest.raises(FastarError, match=r"^model\.bias=.* of plain must be true or false$"):
            build("plain", bias=wrong)


@pytest.mark.parametrize(("arch", "side", "least"), [("vgg11", 16, 17), ("vgg19_bn", 8, 17), ("densenet40", 3, 4)])
def test_images_too_small_are_refused(arch: str, side: int, least: int) -> None:
    wanted = rf"^model\.arch={arch} halves images .* at least {least} pixels a side, these are {side}x40$"
    with pytest.raises(FastarError, match=wanted):
        build_model(arch, input_shape=(3, side, 40), classes=10, seed=0, **small(arch))
    model = build_model(arch, input_shape=(3, least, 40), classes=10, seed=0, **small(arch))
    assert model(torch.zeros(2, 3, least, 40)).shape == (2, 10)
