"""Layers of all architectures that are chosen by setting: activation, normalisation, dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn

from fastar.errors import FastarError

Activation = Literal["relu", "elu", "silu", "gelu"]
Norm = Literal["batch", "group", "layer"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU, "gelu": nn.GELU}

# Wu and He's default number of groups ("Group Normalization", 2018).
GROUPS = 32


class Parts:
    """The makers of a network's activations and normalisations, in the place of ReLU and batch-norm."""

    def __init__(self, activation: Activation = "relu", norm: Norm = "batch"):
        self._activation = ACTIVATIONS[activation]
        self._norm = norm

    def activation(self) -> nn.Module:
        return self._activation()

    def norm(self, channels: int) -> nn.Module:
        """For images [B, channels, H, W]: statistics of the batch; or of one image, by groups of its channels (`group`)
        or over all of them (`layer`)."""
        if self._norm == "batch":
            return nn.BatchNorm2d(channels)
        return nn.GroupNorm(1 if self._norm == "layer" else group_count(channels), channels)


def stages_of(
    block: Callable[[int, int, int], nn.Module],
    blocks: Sequence[int],
    channels: Sequence[int],
    channels_in: int,
    expansion: int = 1,
) -> nn.Sequential:
    """Stages of so many blocks each, at strides 1, 2, 2, ...; `block` takes its input's channels, its own and a stride,
    and writes `expansion` times its channels."""
    stages: list[nn.Module] = []
    for count, wide in zip(blocks, channels, strict=True):
        layers: list[nn.Module] = []
        for index in range(count):
            layers.append(block(channels_in, wide, 2 if stages and index == 0 else 1))
            channels_in = wide * expansion
        stages.append(nn.Sequential(*layers))
    return nn.Sequential(*stages)


def group_count(channels: int) -> int:
    """Groups of a group-norm: 32, or the most below that divide the channels and leave at least 2 to a group.

    A group of one channel would be an instance-norm, which makes a single position zero.

    >>> [group_count(channels) for channels in (512, 64, 48, 16, 7)]
    [32, 32, 24, 8, 1]
    """
    fitting = (groups for groups in range(GROUPS, 1, -1) if channels % groups == 0 and channels >= 2 * groups)
    return next(fitting, 1)


def scaled(base: Sequence[int], width: float, arch: str) -> list[int]:
    """Channels times `width`, rounded; a FastarError where none are left."""
    channels = [round(wide * width) for wide in base]
    if channels[0] < 1:
        raise FastarError(
            f"model.width={width} of {arch} leaves no channels: it multiplies {base[0]}, use a larger one"
        )
    return channels


def dropout_share(dropout: float, arch: str) -> float:
    """The share of units to drop; a FastarError unless it is at least 0 and below 1."""
    if not 0 <= dropout < 1:
        raise FastarError(f"model.dropout={dropout} of {arch} is the share of units to drop: at least 0 and below 1")
    return float(dropout)


def at_least(value: int, least: int, option: str, arch: str) -> int:
    """`value`; a FastarError where it is below `least`."""
    if value < least:
        raise FastarError(f"model.{option}={value} of {arch} must be at least {least}")
    return value


def check_side(input_shape: tuple[int, int, int], least: int, arch: str, why: str) -> None:
    """A FastarError where an image (channels, height, width) has fewer than `least` pixels a side."""
    side = min(input_shape[1:])
    if side < least:
        size = f"{input_shape[1]}x{input_shape[2]}"
        raise FastarError(f"model.arch={arch} {why}: its images need at least {least} pixels a side, these are {size}")


def initialise_convolutions(network: nn.Module) -> None:
    """Weights normal with variance 2 / (kernel area * output channels), biases 0: as VGG, DenseNet and WRN begin."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
