"""Residual networks for large images (He et al. 2016) in torchvision's form, so that its state dicts load."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from fastar.models.layers import Activation, Norm, Parts, scaled
from fastar.models.resnet import Projection


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch-norm, and a residual."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int, parts: Parts):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = parts.norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = parts.norm(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.downsample = Projection(channels_in, channels, stride, parts.norm(channels))
        self.activate = parts.activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.activate(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        activated: torch.Tensor = self.activate(out + (x if self.downsample is None else self.downsample(x)))
        return activated


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride: version 1.5) and 1x1 convolutions with batch-norm, and a residual."""

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
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != wide:
            self.downsample = Projection(channels_in, wide, stride, parts.norm(wide))
        self.activate = parts.activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.activate(self.bn1(self.conv1(x)))
        out = self.activate(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        activated: torch.Tensor = self.activate(out + (x if self.downsample is None else self.downsample(x)))
        return activated


class ImageNetResNet(nn.Module):
    """7x7 stem of stride 2, max-pooling, four stages at strides 1, 2, 2, 2, global average pooling, a linear `fc`.

    Takes images of any side from 32 on. Parameter names and shapes are torchvision's at `width` 1.

    Args:
        input_shape: (channels, height, width) of one image; only the channels determine parameters.
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
        self.conv1 = nn.Conv2d(input_shape[0], channels[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = parts.norm(channels[0])
        channels_in, stages = channels[0], []
        for stage, (count, wide) in enumerate(zip(blocks, channels, strict=True)):
            layers: list[nn.Module] = []
            for index in range(count):
                layers.append(block(channels_in, wide, 2 if stage > 0 and index == 0 else 1, parts))
                channels_in = wide * block.expansion
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(channels_in, classes)
        self.activate = parts.activation()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as torchvision begins
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] of images [batch, channels, height, width]."""
        out = F.max_pool2d(self.activate(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            out = stage(out)
        logits: torch.Tensor = self.fc(out.mean(dim=(2, 3)))
        return logits


# Depth to block and blocks of each stage. Parameters at width 1 and 1000 classes: 11,689,512; 21,797,672; 25,557,032.
CHANNELS = (64, 128, 256, 512)
SHAPES: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
}


def imagenet_resnet(depth: int) -> Callable[..., nn.Module]:
    """torchvision's ResNet-`depth`, its channels times `width`."""
    block, counts = SHAPES[depth]

    def build(
        input_shape: tuple[int, int, int],
        classes: int,
        width: float = 1.0,
        activation: Activation = "relu",
        norm: Norm = "batch",
    ) -> nn.Module:
        channels = scaled(CHANNELS, width, f"imagenet-resnet{depth}")
        return ImageNetResNet(input_shape, classes, block, counts, channels, Parts(activation, norm))

    return build
