"""Residual networks for small images (He et al. 2016), with a width multiplier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from fastar.errors import FastarError

# oneDNN's weight gradient of a strided channels-last 1x1 convolution writes out of bounds on a CPU where the input has
# fewer channels than a vector (seen in torch 2.13, AVX2, below 8 channels: the process aborts). AVX-512 has 16.
NARROW = 16


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch-norm, and a residual; a 1x1 projection where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        self.subsample = 1
        if stride != 1 or channels_in != channels:
            if channels_in < NARROW:  # a strided 1x1 convolution reads every stride-th position: the same numbers
                self.subsample, stride = stride, 1
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        if self.subsample > 1:
            x = x[:, :, :: self.subsample, :: self.subsample]
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return F.relu(out)


class CifarResNet(nn.Module):
    """3x3 stem, stages of `BasicBlock`s at strides 1, 2, 2, ..., global average pooling, a linear classifier.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: number of logits.
        blocks: blocks in each stage.
        channels: channels of each stage.
    """

    def __init__(self, input_shape: tuple[int, int, int], classes: int, blocks: Sequence[int], channels: Sequence[int]):
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        stages, channels_in = [], channels[0]
        for stage, (count, wide) in enumerate(zip(blocks, channels, strict=True)):
            layers = []
            for block in range(count):
                layers.append(BasicBlock(channels_in, wide, stride=2 if stage > 0 and block == 0 else 1))
                channels_in = wide
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Linear(channels_in, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] of images [batch, channels, height, width]."""
        out = F.relu(self.bn1(self.conv1(images)))
        for stage in self.stages:
            out = stage(out)
        logits: torch.Tensor = self.classifier(out.mean(dim=(2, 3)))
        return logits


def scaled(base: Sequence[int], width: float, arch: str) -> list[int]:
    """Channels times `width`, rounded; a FastarError where none are left."""
    channels = [round(wide * width) for wide in base]
    if channels[0] < 1:
        raise FastarError(
            f"model.width={width} of {arch} leaves no channels: it multiplies {base[0]}, use a larger one"
        )
    return channels


def resnet18(input_shape: tuple[int, int, int], classes: int, width: float = 1.0) -> nn.Module:
    """CIFAR ResNet-18: 2-2-2-2 blocks of 64, 128, 256, 512 channels times `width` (11.2 M parameters at 1)."""
    return CifarResNet(input_shape, classes, [2, 2, 2, 2], scaled([64, 128, 256, 512], width, "resnet18"))


def resnet8(input_shape: tuple[int, int, int], classes: int, width: float = 1.0) -> nn.Module:
    """Three stages of one block: 16, 32, 64 channels times `width`."""
    return CifarResNet(input_shape, classes, [1, 1, 1], scaled([16, 32, 64], width, "resnet8"))


def resnet20(input_shape: tuple[int, int, int], classes: int, width: float = 1.0) -> nn.Module:
    """Three stages of three blocks: 16, 32, 64 channels times `width`."""
    return CifarResNet(input_shape, classes, [3, 3, 3], scaled([16, 32, 64], width, "resnet20"))
