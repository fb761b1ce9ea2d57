"""The groups of every architecture of fastar, counted by hand, and what matching makes of a shuffled copy."""

from __future__ import annotations

import pytest
import torch
from matching_calls import match_one

from fastar.models import MODELS, build_model
from fastar.symmetry import derive_symmetry

Count = tuple[int, int]  # groups, units of all of them together


def basic(widths: tuple[int, ...], blocks: tuple[int, ...]) -> Count:
    """ResNets of basic blocks: a residual stream per stage, the stem's being the first; inside each block one layer."""
    inside = sum(n * wide for n, wide in zip(blocks, widths, strict=True))
    return len(widths) + sum(blocks), sum(widths) + inside


def bottleneck(widths: tuple[int, ...], blocks: tuple[int, ...]) -> Count:
    """The stem feeds a projection, so it is apart; a stream four times as wide per stage; two layers in each block."""
    inside = 2 * sum(n * wide for n, wide in zip(blocks, widths, strict=True))
    return 1 + len(widths) + 2 * sum(blocks), widths[0] + 4 * sum(widths) + inside


def vgg(*layers: int) -> Count:
    """Every convolution's channels, and two hidden layers of 512; batch-norm and flattening add none."""
    widths = (64, 128, 256, 512, 512)
    return sum(layers) + 2, sum(n * wide for n, wide in zip(layers, widths, strict=True)) + 2 * 512


def dense(layers: int, *, growth: int = 12, bottleneck: bool = False) -> Count:
    """What each layer adds is a group of its own, read through concatenations; so are the stem's and the transitions'
    channels, and the bottleneck's of 4 * growth. Transitions keep all channels, or half of them (BC)."""
    channels = units = 2 * growth
    for block in range(3):
        channels += layers * growth
        units += layers * growth * (5 if bottleneck else 1)
        if block < 2:
            channels = channels // 2 if bottleneck else channels
            units += channels
    return 1 + 3 * layers * (2 if bottleneck else 1) + 2, units


def vit(dim: int, depth: int, heads: int, hidden: int) -> Count:
    """The stream; in each layer the heads, in them queries with keys and values (dim units each), and the hidden layer.
    Position embeddings and class token carry the stream."""
    return 1 + 4 * depth, dim + depth * (heads + 2 * dim + hidden)


NARROW, WIDE = (16, 32, 64), (64, 128, 256, 512)
TABLE: dict[str, Count] = {
    "mlp": (2, 2 * 32),  # two hidden layers
    "resnet8": basic(NARROW, (1, 1, 1)),
    "resnet20": basic(NARROW, (3, 3, 3)),
    "resnet18": basic(WIDE, (2, 2, 2, 2)),  # 12 groups, 2,880 units
    "resnet34": basic(WIDE, (3, 4, 6, 3)),
    "resnet50": bottleneck(WIDE, (3, 4, 6, 3)),  # 37 groups, 11,456 units
    "imagenet-resnet18": basic(WIDE, (2, 2, 2, 2)),
    "imagenet-resnet34": basic(WIDE, (3, 4, 6, 3)),
    "imagenet-resnet50": bottleneck(WIDE, (3, 4, 6, 3)),
    # Of width 1 the first stage is as wide as the stem, whose stream it continues.
    "wrn16": basic(NARROW, (2, 2, 2)),
    "wrn22": basic(NARROW, (3, 3, 3)),
    "wrn28": basic(NARROW, (4, 4, 4)),
    "wrn34": basic(NARROW, (5, 5, 5)),
    "wrn40": basic(NARROW, (6, 6, 6)),
    "vgg11": vgg(1, 1, 2, 2, 2),
    "vgg13": vgg(2, 2, 2, 2, 2),
    "vgg16": vgg(2, 2, 3, 3, 3),
    "vgg19": vgg(2, 2, 4, 4, 4),
    "vgg11_bn": vgg(1, 1, 2, 2, 2),
    "vgg13_bn": vgg(2, 2, 2, 2, 2),
    "vgg16_bn": vgg(2, 2, 3, 3, 3),
    "vgg19_bn": vgg(2, 2, 4, 4, 4),
    "densenet40": dense(12),
    "densenet40_bc": dense(6, bottleneck=True),
    "densenet100_bc": dense(16, bottleneck=True),
    "vit": vit(64, 6, 4, 128),
}
QUICK = ("mlp", "resnet8", "vgg11_bn", "wrn16")
SMALL: dict[str, dict[str, float | str]] = {
    "mlp": {"width": 9},
    "resnet8": {"width": 0.25},
    "vgg11_bn": {"width": 0.0625},
    "wrn16": {"width": 0.25},
    "vit": {"dim": 12, "depth": 2, "heads": 3},
}


def test_every_architecture_is_counted() -> None:
    assert set(TABLE) == set(MODELS)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TABLE]
)
def test_groups_of_an_architecture(name: str) -> None:
    shape = (3, 64, 64) if name.startswith("imagenet") else (3, 32, 32)
    model = build_model(name, input_shape=shape, classes=10, seed=0)
    symmetry = derive_symmetry(model, (torch.zeros(2, *shape),), verify=name in QUICK)
    assert (len(symmetry.groups), sum(g.size for g in symmetry.groups)) == TABLE[name]
    assert sum(g.parent is not None for g in symmetry.groups) == (12 if name == "vit" else 0)
    assert symmetry.frozen == ()


@pytest.mark.parametrize(
    ("name", "norm", "groups"),
    [
        ("resnet8", "layer", 6),
        # One more for each: the blocks that group-norm makes of its channels.
        ("resnet8", "group", 12),
    ],
)
def test_other_norms(name: str, norm: str, groups: int) -> None:
    model = build_model(name, input_shape=(3, 32, 32), classes=10, seed=0, norm=norm)
    symmetry = derive_symmetry(model, (torch.zeros(2, 3, 32, 32),))
    assert len(symmetry.groups) == groups
    assert sum(g.size for g in symmetry.groups if g.parent or norm == "layer") == TABLE[name][1]


def narrow(name: str) -> dict[str, float | str]:
    """Settings that leave few units."""
    if name in SMALL:
        return SMALL[name]
    if name.startswith("densenet"):
        return {"growth": 3}
    return {"width": 0.0625 if name.startswith("vgg") else 0.25 if name.startswith("wrn") else 0.125}


@pytest.mark.parametrize(
    "name", [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in TABLE]
)
def test_a_shuffled_copy_is_recovered(name: str) -> None:
    """Narrow, with random weights: then the permutation is the only one that makes the copy equal again."""
    side = 64 if name.startswith("imagenet") else 32
    model = build_model(name, input_shape=(3, side, side), classes=10, seed=0, **narrow(name))
    symmetry = derive_symmetry(model, (torch.zeros(2, 3, side, side),))
    generator = torch.Generator().manual_seed(1)
    theta = {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    shuffled = symmetry.apply(symmetry.random(3), theta)
    assert any(not torch.equal(shuffled[key], theta[key]) for key in theta)
    again, _, _ = match_one(symmetry, theta, shuffled, restarts=3, perturbations=3)
    assert all(torch.equal(again[key], theta[key]) for key in theta)
