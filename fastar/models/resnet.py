"""Residual networks for small images (He et al. 2016), with a width multiplier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastar.models.layers import Activation, Norm, Parts, scaled

# oneDNN's weight gradient of a strided channels-last 1x1 convolution writes out of bounds on a CPU where the input has
# fewer channels than a vector (seen in torch 2.13, AVX2, below 8 channels: the process aborts). AVX-512 has 16.
NARROW = 16


class Projection(nn.Sequential):
    """1x1 convolution, and `norm` where one is given, for a shortcut whose shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int, *norm: nn.Module):
        self.subsample = 1
        if channels_in < NARROW:  # a strided 1x1 convolution reads every stride-th position: the same numbers
            self.subsample, stride = stride, 1
        super().__init__(nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), *norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.subsample > 1:
            x = x[:, :, :: self.subsample, :: self.subsample]
        out: torch.Tensor = super().forward(x)
        return out


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch-norm, and a residual; a 1x1 projection where the shape changes."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int, parts: Parts):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = parts.norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = parts.norm(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = Projection(channels_in, channels, stride, parts.norm(channels))
        self.activate = parts.activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.activate(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        activated: torch.Tensor = self.activate(out)
        return activated


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride) and 1x1 convolutions with batch-norm, and a residual as in `BasicBlock`."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int, parts: Parts):
        super().__init__()
        wide = channels * self.expansion
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = parts.norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = parts.norm(channels)
        self.conv3 = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn3 = parts.norm(wide)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != wide:
            self.shortcut = Projection(channels_in, wide, stride, parts.norm(wide))
        self.activate = parts.activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.activate(self.bn1(self.conv1(x)))
        out = self.activate(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out)) + self.shortcut(x)
        activated: torch.Tensor = self.activate(out)
        return activated


class CifarResNet(nn.Module):
    """3x3 stem, stages of blocks at strides 1, 2, 2, ..., global average pooling, a linear classifier.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: number of logits.
        block: kind of block.
        blocks: blocks in each stage.
        channels: channels inside the blocks of each stage.
        parts: activation and normalisation.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        channels: Sequence[int],
        parts: Parts,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], channels[0], 3, padding=1, bias=False)
        self.bn1 = parts.norm(channels[0])
        stages, channels_in = [], channels[0]
        for stage, (count, wide) in enumerate(zip(blocks, channels, strict=True)):
            layers: list[nn.Module] = []
            for index in range(count):
                layers.append(block(channels_in, wide, 2 if stage > 0 and index == 0 else 1, parts))
                channels_in = wide * block.expansion
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Linear(channels_in, classes)
        self.activate = parts.activation()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] of images [batch, channels, height, width]."""
        out = self.activate(self.bn1(self.conv1(images)))
        for stage in self.stages:
            out = stage(out)
        logits: torch.Tensor = self.classifier(out.mean(dim=(2, 3)))
        return logits


def resnet18(
    input_shape: tuple[int, int, int],
    classes: int,
    width: float = 1.0,
    activation: Activation = "relu",
    norm: Norm = "batch",
) -> nn.Module:
    """CIFAR ResNet-18: 2-2-2-2 blocks of 64, 128, 256, 512 channels times `width` (11,173,962 parameters at 1)."""
    channels = scaled([64, 128, 256, 512], width, "resnet18")
    return CifarResNet(input_shape, classes, BasicBlock, [2, 2, 2, 2], channels, Parts(activation, norm))


def resnet34(
    input_shape: tuple[int, int, int],
    classes: int,
    width: float = 1.0,
    activation: Activation = "relu",
    norm: Norm = "batch",
) -> nn.Module:
    """CIFAR ResNet-34: 3-4-6-3 blocks of 64, 128, 256, 512 channels times `width` (21,282,122 parameters at 1)."""
    channels = scaled([64, 128, 256, 512], width, "resnet34")
    return CifarResNet(input_shape, classes, BasicBlock, [3, 4, 6, 3], channels, Parts(activation, norm))


def resnet50(
    input_shape: tuple[int, int, int],
    classes: int,
    width: float = 1.0,
    activation: Activation = "relu",
    norm: Norm = "batch",
) -> nn.Module:
    """CIFAR ResNet-50: 3-4-6-3 bottlenecks of 64, 128, 256, 512 channels inside, four times as many between them,
    times `width` (23,520,842 parameters at 1)."""
    channels = scaled([64, 128, 256, 512], width, "resnet50")
    return CifarResNet(input_shape, classes, Bottleneck, [3, 4, 6, 3], channels, Parts(activation, norm))


def resnet8(
    input_shape: tuple[int, int, int],
    classes: int,
    width: float = 1.0,
    activation: Activation = "relu",
    norm: Norm = "batch",
) -> nn.Module:
    """Three stages of one block: 16, 32, 64 channels times `width`."""
    channels = scaled([16, 32, 64], width, "resnet8")
    return CifarResNet(input_shape, classes, BasicBlock, [1, 1, 1], channels, Parts(activation, norm))


def resnet20(
    input_shape: tuple[int, int, int],
    classes: int,
    width: float = 1.0,
    activation: Activation = "relu",
    norm: Norm = "batch",
) -> nn.Module:
    """Three stages of three blocks: 16, 32, 64 channels times `width`. With projections (272,474 parameters), where He
    et al. pad with zeros (269,722)."""
    channels = scaled([16, 32, 64], width, "resnet20")
    return CifarResNet(input_shape, classes, BasicBlock, [3, 3, 3], channels, Parts(activation, norm))
