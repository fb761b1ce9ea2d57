"""Residual networks for small images (He et al. 2016), with a width multiplier."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from fastar.models.layers import Activation, Norm, Parts, scaled, stages_of

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


class Block(nn.Module):
    """A residual block: its input, projected where the shape changes, is added before the last activation.

    `residual` is the name of the projection in state dicts.
    """

    expansion: int

    def add_residual(self, channels_in: int, channels: int, stride: int, parts: Parts, residual: str) -> None:
        """Make the projection of the input, or nothing, and the activation."""
        self.residual, same = residual, stride == 1 and channels_in == channels
        projection = nn.Sequential() if same else Projection(channels_in, channels, stride, parts.norm(channels))
        self.add_module(residual, projection)
        self.activate = parts.activation()

    def ended(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The block's output, of its last layer's and of its input."""
        activated: torch.Tensor = self.activate(out + getattr(self, self.residual)(x))
        return activated


class BasicBlock(Block):
    """Two 3x3 convolutions with batch-norm, and a residual; a 1x1 projection where the shape changes."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int, parts: Parts, residual: str = "shortcut"):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = parts.norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = parts.norm(channels)
        self.add_residual(channels_in, channels, stride, parts, residual)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.activate(self.bn1(self.conv1(x)))
        return self.ended(self.bn2(self.conv2(out)), x)


class Bottleneck(Block):
    """1x1, 3x3 (which has the stride) and 1x1 convolutions with batch-norm, and a residual as in `BasicBlock`."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int, parts: Parts, residual: str = "shortcut"):
        super().__init__()
        wide = channels * self.expansion
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = parts.norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = parts.norm(channels)
        self.conv3 = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn3 = parts.norm(wide)
        self.add_residual(channels_in, wide, stride, parts, residual)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.activate(self.bn1(self.conv1(x)))
        out = self.activate(self.bn2(self.conv2(out)))
        return self.ended(self.bn3(self.conv3(out)), x)


# Depth to block, blocks of each stage and its channels (a bottleneck's are those inside). Parameters at width 1 and ten
# classes: 11,173,962 of 18, 21,282,122 of 34, 23,520,842 of 50; 272,474 of 20, which has projections where He et al.
# pad with zeros (269,722).
SMALL, LARGE = (16, 32, 64), (64, 128, 256, 512)
SHAPES: dict[int, tuple[type[Block], tuple[int, ...], tuple[int, ...]]] = {
    8: (BasicBlock, (1, 1, 1), SMALL),
    18: (BasicBlock, (2, 2, 2, 2), LARGE),
    20: (BasicBlock, (3, 3, 3), SMALL),
    34: (BasicBlock, (3, 4, 6, 3), LARGE),
    50: (Bottleneck, (3, 4, 6, 3), LARGE),
}


class CifarResNet(nn.Module):
    """ResNet-`depth`: 3x3 stem, stages of blocks at strides 1, 2, 2, ..., global average pooling, a linear classifier.

    Args:
        depth: a key of `SHAPES`.
        input_shape: (channels, height, width) of one image; only the channels determine parameters.
        classes: number of logits.
        width: factor of all channels.
    """

    def __init__(
        self,
        depth: int,
        input_shape: tuple[int, int, int],
        classes: int,
        width: float = 1.0,
        activation: Activation = "relu",
        norm: Norm = "batch",
    ):
        super().__init__()
        block, blocks, base = SHAPES[depth]
        channels, parts = scaled(base, width, f"resnet{depth}"), Parts(activation, norm)
        self.conv1 = nn.Conv2d(input_shape[0], channels[0], 3, padding=1, bias=False)
        self.bn1 = parts.norm(channels[0])
        self.stages = stages_of(partial(block, parts=parts), blocks, channels, channels[0], block.expansion)
        self.classifier = nn.Linear(channels[-1] * block.expansion, classes)
        self.activate = parts.activation()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] of images [batch, channels, height, width]."""
        out = self.stages(self.activate(self.bn1(self.conv1(images))))
        logits: torch.Tensor = self.classifier(out.mean(dim=(2, 3)))
        return logits


MODELS = {f"resnet{depth}": partial(CifarResNet, depth) for depth in SHAPES}
