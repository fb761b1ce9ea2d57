"""Parameter counts equal those that the originals publish."""

from __future__ import annotations

import pytest
import torch

from fastar.models import MODELS, parameter_count


def count(arch: str, side: int = 32, classes: int = 10, **options: float) -> int:
    with torch.device("meta"):
        return parameter_count(MODELS[arch](input_shape=(3, side, side), classes=classes, **options))


@pytest.mark.parametrize(
    ("arch", "wanted"),
    [
        # kuangliu/pytorch-cifar's networks, counted.
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        # 0.27 M (He et al. 2016, table 6), which is 269,722 with shortcuts that pad with zeros. Ours project: two 1x1
        # convolutions (16x32, 32x64) and their norms (64, 128) more.
        ("resnet20", 269_722 + 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64),
        ("resnet8", 78_042),
    ],
)
def test_cifar_resnets(arch: str, wanted: int) -> None:
    assert count(arch) == wanted


@pytest.mark.parametrize(
    ("arch", "wanted"),
    [("imagenet-resnet18", 11_689_512), ("imagenet-resnet34", 21_797_672), ("imagenet-resnet50", 25_557_032)],
)
def test_torchvision_resnets(arch: str, wanted: int) -> None:
    """`num_params` in torchvision's documentation."""
    assert count(arch, side=224, classes=1000) == wanted


@pytest.mark.parametrize(
    ("arch", "torchvision"),
    [
        ("vgg11", 132_863_336),
        ("vgg13", 133_047_848),
        ("vgg16", 138_357_544),
        ("vgg19", 143_667_240),
        ("vgg11_bn", 132_868_840),
        ("vgg13_bn", 133_053_736),
        ("vgg16_bn", 138_365_992),
        ("vgg19_bn", 143_678_248),
    ],
)
def test_vggs(arch: str, torchvision: int) -> None:
    """`num_params` in torchvision's documentation, with the classifier for small images in the place of its own."""
    theirs = (512 * 49 * 4096 + 4096) + (4096 * 4096 + 4096) + (4096 * 1000 + 1000)
    ours = 2 * (512 * 512 + 512) + (512 * 10 + 10)
    assert count(arch) == torchvision - theirs + ours
    assert count(arch, side=28) == count(arch)


@pytest.mark.parametrize(
    ("arch", "width", "millions"),
    [
        # Zagoruyko and Komodakis 2016, tables 4 and 5.
        ("wrn40", 1, 0.6),
        ("wrn40", 2, 2.2),
        ("wrn40", 4, 8.9),
        ("wrn40", 8, 35.7),
        ("wrn28", 10, 36.5),
        ("wrn22", 8, 17.2),
        ("wrn22", 10, 26.8),
        ("wrn16", 8, 11.0),
        ("wrn16", 10, 17.1),
    ],
)
def test_wide_resnets(arch: str, width: int, millions: float) -> None:
    assert round(count(arch, width=width) / 1e6, 1) == millions


@pytest.mark.parametrize(("arch", "width", "wanted"), [("wrn16", 4, 2_748_890), ("wrn28", 10, 36_479_194)])
def test_wide_resnets_to_the_last(arch: str, width: int, wanted: int) -> None:
    """What xternalz/WideResNet-pytorch's network of this shape has."""
    assert count(arch, width=width) == wanted


@pytest.mark.parametrize(
    ("arch", "options", "wanted"),
    [
        # andreasveit/densenet-pytorch, `--layers 40 --growth 12 --no-bottleneck --reduce 1.0`: its stem is 2 * growth.
        ("densenet40", {}, 1_059_298),
        # Huang et al. 2017, table 2: 1.0 M; their stem has 16 channels where there are no bottlenecks.
        ("densenet40", {"stem": 16}, 1_019_722),
        # Table 2: 0.8 M; and the same repository's with its default bottlenecks and reduction.
        ("densenet100_bc", {}, 769_162),
        ("densenet40_bc", {}, 176_122),
    ],
)
def test_densenets(arch: str, options: dict[str, int], wanted: int) -> None:
    assert count(arch, **options) == wanted


@pytest.mark.parametrize(
    ("dim", "heads", "wanted"),
    [
        (192, 3, 5_717_416),  # timm's vit_tiny_patch16_224
        (384, 6, 22_050_664),  # timm's vit_small_patch16_224
        (768, 12, 86_567_656),  # `num_params` of vit_b_16 in torchvision's documentation
    ],
)
def test_vision_transformers(dim: int, heads: int, wanted: int) -> None:
    assert count("vit", 224, 1000, patch=16, dim=dim, depth=12, heads=heads, mlp_ratio=4) == wanted
