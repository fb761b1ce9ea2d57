"""Wide residual networks (Zagoruyko and Komodakis 2016): activation before convolution.

The star-domain paper's own code differs from the original in small things: its convolutions have biases, the second one
of a block has the stride, and projections read the input before norm and activation.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from fastar.models.layers import Activation, Norm, Parts, dropout_share, initialise_convolutions, scaled, stages_of
from fastar.models.resnet import Projection

STEM = 16
CHANNELS = (16, 32, 64)


class WideBlock(nn.Module):
    """norm, activation, 3x3 convolution, norm, activation, dropout, 3x3 convolution, and a residual.

    Where the shape changes the residual is a 1x1 convolution of the activated input, else the input itself.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, dropout: float, parts: Parts):
        super().__init__()
        self.bn1 = parts.norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = parts.norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            self.shortcut = Projection(channels_in, channels, stride)
        self.activate = parts.activation()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = self.activate(self.bn1(x))
        out = self.dropout(self.activate(self.bn2(self.conv1(activated))))
        residual: torch.Tensor = x if self.shortcut is None else self.shortcut(activated)
        return residual + self.conv2(out)


class WideResNet(nn.Module):
    """WRN-`depth`: 3x3 stem of 16 channels, three stages at strides 1, 2, 2, norm, global average pooling, a linear
    classifier.

    Args:
        depth: of (depth - 4) / 6 blocks in each stage.
        input_shape: (channels, height, width) of one image; only the channels determine parameters.
        classes: number of logits.
        width: factor of the stages' channels, 16, 32 and 64.
        dropout: share that is dropped between a block's convolutions.
    """

    def __init__(
        self,
        depth: int,
        input_shape: tuple[int, int, int],
        classes: int,
        width: float = 1.0,
        dropout: float = 0.0,
        activation: Activation = "relu",
        norm: Norm = "batch",
    ):
        super().__init__()
        arch = f"wrn{depth}"
        channels, parts = scaled(CHANNELS, width, arch), Parts(activation, norm)
        block = partial(WideBlock, dropout=dropout_share(dropout, arch), parts=parts)
        self.conv1 = nn.Conv2d(input_shape[0], STEM, 3, padding=1, bias=False)
        self.stages = stages_of(block, [(depth - 4) // 6] * len(channels), channels, STEM)
        self.bn1 = parts.norm(channels[-1])
        self.activate = parts.activation()
        self.classifier = nn.Linear(channels[-1], classes)
        initialise_convolutions(self)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] of images [batch, channels, height, width]."""
        out = self.activate(self.bn1(self.stages(self.conv1(images))))
        logits: torch.Tensor = self.classifier(out.mean(dim=(2, 3)))
        return logits


MODELS = {f"wrn{depth}": partial(WideResNet, depth) for depth in (16, 22, 28, 34, 40)}
