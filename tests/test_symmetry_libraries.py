"""Networks of torchvision, timm and transformers: groups counted by hand, proven, and a wrong one caught."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import pytest
import symmetry_table
import torch

from fastar.errors import FastarError
from fastar.symmetry import derive_symmetry, verify_symmetry

# name -> (groups, units, of these in blocks), counted by hand.
TABLE: dict[str, tuple[int, int, int]] = {
    # A stream per stage (64 to 512) and one layer inside each of 8 blocks.
    "resnet18": (12, 2880, 0),
    # The stem, 4 streams (256 to 2048), and 2 layers inside each of 16 blocks.
    "resnet50": (37, 11456, 0),
    # As resnet50, of twice the inner width; in each block the first layer's channels move with the 32 groups of the
    # second, whole, and the second's also inside them: per block 32 units and twice 64, 128, 256 or 512 in blocks.
    "resnext50_32x4d": (37, 64 + 3840 + 16 * 32 + 2 * 3776, 2 * 3776),
    # 13 convolutions and 2 hidden layers of 4096.
    "vgg16_bn": (15, 4224 + 8192, 0),
    # The stem, 58 layers of a bottleneck of 128 and 32 new channels, 3 transitions to 128, 256 and 512 channels.
    "densenet121": (1 + 2 * 58 + 3, 64 + 58 * 160 + 128 + 256 + 512, 0),
    # The stem, 4 streams, 18 hidden layers 4 times as wide (depthwise convolutions are part of the stream).
    "convnext_tiny": (22, 1440 + 4 * (3 * 96 + 3 * 192 + 9 * 384 + 3 * 768), 0),
    # The stream of 768, and in each of 12 layers 12 heads, queries with keys, values, and 3072 hidden units.
    "vit_b_16": (49, 768 + 12 * (12 + 2 * 768 + 3072), 12 * 2 * 768),
    "timm.resnet50": (37, 11456, 0),
    "timm.vit_tiny_patch16_224": (49, 192 + 12 * (3 + 2 * 192 + 768), 12 * 2 * 192),
    # The stream of 512, and in each of 8 layers 256 hidden units across patches and 2048 across channels.
    "timm.mixer_s16_224": (17, 512 + 8 * (256 + 2048), 0),
    # The stream of 32 through tied embeddings; in each of 2 layers 4 heads, queries with keys, values, 128 hidden.
    "gpt2": (9, 32 + 2 * (4 + 2 * 32 + 128), 2 * 2 * 32),
    # Rotary embeddings hold the inside of queries and keys; values move; 48 gated hidden units in each of 2 layers.
    "llama": (1 + 2 * 3, 32 + 2 * (4 + 32 + 48), 2 * 32),
    # Two heads share one of keys and values: these 2 move, with all that is inside them.
    "llama-grouped": (1 + 2 * 2, 32 + 2 * (2 + 48), 0),
}
# Not counted by hand: kept if proven.
PROVEN = ("mobilenet_v3_small", "regnet_y_400mf", "efficientnet_b0", "swin_t", "timm.convnext_nano")
QUICK = ("resnet18",)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _cases(names: list[str]) -> list[object]:
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


def _make(name: str) -> tuple[torch.nn.Module, object]:
    try:
        made: tuple[torch.nn.Module, object] = symmetry_table.NETWORKS[name]()
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed (torchvision is among the test requirements, the others are not)")
    return made


@pytest.mark.parametrize("name", _cases([*TABLE, *PROVEN]))
def test_groups_of_a_library_s_network(name: str) -> None:
    model, inputs = _make(name)
    symmetry = derive_symmetry(model, inputs)  # type: ignore[arg-type]
    if name in TABLE:
        inside = sum(g.size for g in symmetry.groups if g.parent)
        assert (len(symmetry.groups), sum(g.size for g in symmetry.groups), inside) == TABLE[name]
    assert symmetry.frozen == ()
    largest = max(symmetry.groups, key=lambda g: len(g.members))
    kept = tuple(m for m in largest.members if m.tensor != largest.members[-1].tensor)
    wrong = dataclasses.replace(largest, members=kept)
    broken = dataclasses.replace(symmetry, groups=tuple(wrong if g is largest else g for g in symmetry.groups))
    with pytest.raises(FastarError, match="changes its outputs"):
        verify_symmetry(model, broken, inputs)  # type: ignore[arg-type]


def test_every_network_of_the_table_is_tested() -> None:
    assert {*TABLE, *PROVEN} == set(symmetry_table.NETWORKS)
