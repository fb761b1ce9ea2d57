"""Activation, normalisation and dropout by setting: every architecture trains with each, and they do what they say."""

from __future__ import annotations

import copy

import pytest
import torch
from test_models import small
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.config import OF_ONE_SIDE, load_settings
from fastar.errors import FastarError
from fastar.models import MODELS, build_model, model_options, option_choices
from fastar.models.layers import group_count

SHAPE = (3, 18, 20)
FUNCTIONS = {"relu": F.relu, "elu": F.elu, "silu": F.silu, "gelu": F.gelu}
KINDS = {"relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU, "gelu": nn.GELU}


def build(arch: str, **options: object) -> nn.Module:
    patch = {"patch": 2} if arch == "vit" else {}
    return build_model(arch, input_shape=SHAPE, classes=4, seed=0, **{**small(arch), **patch, **options})


def images(count: int = 4) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def learns(model: nn.Module) -> None:
    """Each parameter has a gradient that is finite and not zero."""
    torch.manual_seed(0)
    F.cross_entropy(model(images()), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("arch", sorted(MODELS))
def test_every_choice_of_every_architecture_trains(arch: str) -> None:
    for option, choices in option_choices(arch).items():
        for choice in choices:
            if choice != model_options(arch)[option]:
                learns(build(arch, **{option: choice}))
    learns(build(arch))


@pytest.mark.parametrize("arch", sorted(MODELS))
def test_one_activation_throughout_and_no_parameter_depends_on_it(arch: str) -> None:
    names = list(build(arch).state_dict())
    for choice, kind in KINDS.items():
        model = build(arch, activation=choice)
        found = {type(module) for module in model.modules() if isinstance(module, tuple(KINDS.values()))}
        assert found == {kind}
        assert list(model.state_dict()) == names


@pytest.mark.parametrize("choice", list(FUNCTIONS))
def test_the_activation_is_the_one_named(choice: str) -> None:
    model = build("mlp", activation=choice, depth=1).double()
    x = images().double()
    first, last = model.get_submodule("hidden.0"), model.get_submodule("classifier")
    torch.testing.assert_close(model(x), last(FUNCTIONS[choice](first(x.flatten(1)))), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arch", [arch for arch in sorted(MODELS) if "norm" in option_choices(arch)])
def test_normalisation_by_setting(arch: str) -> None:
    """Group-norm and layer-norm see one image: the others of its batch do not matter, in training too."""
    assert any(isinstance(module, nn.BatchNorm2d) for module in build(arch).modules())
    for norm in ("group", "layer"):
        model = build(arch, norm=norm, **({"dropout": 0.0} if "dropout" in model_options(arch) else {})).double()
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
        assert norms
        assert all(n.num_groups == (1 if norm == "layer" else group_count(n.num_channels)) for n in norms)
        x = images().double()
        with torch.no_grad():
            together, alone = model.train()(x)[:1], model(x[:1])
            # Of few values, some nearly alike, a norm makes roundings larger: eps of 1e-5 allows 300 times a layer.
            torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(512, 32), (64, 32), (48, 24), (40, 20), (36, 18), (32, 16), (16, 8), (7, 1), (2, 1), (1, 1)],
)
def test_groups_of_a_group_norm(channels: int, groups: int) -> None:
    assert group_count(channels) == groups
    nn.GroupNorm(groups, channels)


@pytest.mark.parametrize("arch", [arch for arch in sorted(MODELS) if "dropout" in model_options(arch)])
def test_dropout_by_setting(arch: str) -> None:
    model, x = build(arch, dropout=0.4), images()
    names = list(build(arch, dropout=0.0).state_dict())
    assert list(model.state_dict()) == names
    shares = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    assert shares == {0.4}
    torch.manual_seed(1)
    with torch.no_grad():
        first = model(x)
        second = model(x)
        assert not torch.equal(first, second)
        model.eval()
        assert torch.equal(model(x), model(x))
        still = build(arch, dropout=0.0)
        still.load_state_dict(copy.deepcopy(model.state_dict()))
        assert torch.equal(model(x), still.eval()(x))


def test_attention_is_softmax_of_products_within_heads() -> None:
    model = build("vit").double()
    attention = model.get_submodule("encoders.0.attention")
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query, key, value = attention.qkv(x).split(8, dim=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        seen = torch.softmax(
            query[..., head] @ key[..., head].transpose(1, 2) / 2, dim=-1
        )  # 2: root of a head's 4 units
        heads.append(seen @ value[..., head])
    wanted = attention.out(torch.cat(heads, dim=-1))
    torch.testing.assert_close(attention(x), wanted, rtol=1e-12, atol=1e-12)


def test_a_transformer_knows_where_patches_are() -> None:
    """Moving the patches changes what it says, unless positions are zero and so it cannot know."""
    model, x = build("vit").eval(), images()
    moved = torch.roll(x, 2, dims=-1)  # by one patch, around
    with torch.no_grad():
        assert (model(x) - model(moved)).abs().max() > 1e-4
        model.get_parameter("positions").zero_()
        torch.testing.assert_close(model(x), model(moved), rtol=1e-4, atol=1e-5)


def test_a_dense_layer_keeps_its_input_and_adds_growth_channels() -> None:
    model = build("densenet40")
    layer = model.get_submodule("stages.0.3")
    x = torch.randn(2, 4 + 3 * 2, 6, 6)
    out = layer(x)
    assert out.shape == (2, 12, 6, 6)
    assert torch.equal(out[:, :10], x)
    assert layer.conv1.in_channels == 10


def test_a_wide_block_projects_what_is_activated() -> None:
    """Where the shape changes; the block's input itself passes where it does not."""
    model = build("wrn16", width=2).eval()
    for name in ("stages.1.0", "stages.1.1"):
        block = model.get_submodule(name)
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        with torch.no_grad():
            before = F.relu(block.bn1(x))
            branch = block.conv2(F.relu(block.bn2(block.conv1(before))))
            direct = x if block.shortcut is None else F.conv2d(before, block.shortcut[0].weight, stride=2)
            torch.testing.assert_close(block(x), direct + branch, rtol=1e-5, atol=1e-5)
    assert model.get_submodule("stages.1.1").shortcut is None


@pytest.mark.parametrize("arch", ["vgg11", "densenet40", "wrn16"])
def test_convolutions_begin_with_variance_2_over_fan_out(arch: str) -> None:
    model = build_model(arch, input_shape=(3, 32, 32), classes=10, seed=0)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            # The sample deviation of n normals is within 4.5 / sqrt(2 n) of its value, in all of some 40 layers.
            room = 4.5 / (2 * module.weight.numel()) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_out) ** 0.5, rel=room), name
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize("arch", sorted(MODELS))
def test_which_architectures_take_images_of_growing_size(arch: str) -> None:
    """`train.resolutions` is refused where the parameters depend on the side, and only there."""
    with torch.device("meta"):
        counts = {
            sum(parameter.numel() for parameter in MODELS[arch](input_shape=(3, side, side), classes=2).parameters())
            for side in (32, 64)
        }
    assert (len(counts) > 1) == (arch in OF_ONE_SIDE)
    overrides = ["dataset.resolution=64", "train.resolutions=[[0, 32], [1, 64]]"]
    if arch in OF_ONE_SIDE:
        with pytest.raises(FastarError, match=f"train.resolutions changes the side of the images, and {arch}"):
            load_settings(dataset="imagenet", arch=arch, overrides=overrides)
    else:
        assert load_settings(dataset="imagenet", arch=arch, overrides=overrides).train.resolutions == ((0, 32), (1, 64))
