"""Residual networks for large images (He et al. 2016) in torchvision's form, so that its state dicts load."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from fastar.models.layers import Activation, Norm, Parts, initialise_convolutions, scaled, stages_of
from fastar.models.resnet import SHAPES

# Parameters at width 1 and 1000 classes: 11,689,512; 21,797,672; 25,557,032.
DEPTHS = (18, 34, 50)


class ImageNetResNet(nn.Module):
    """ResNet-`depth`: 7x7 stem of stride 2, max-pooling, four stages at strides 1, 2, 2, 2, global average pooling, a
    linear `fc`. The 3x3 convolution of a bottleneck has the stride (version 1.5).

    Takes images of any side from 32 on. Parameter names and shapes are torchvision's at `width` 1.

    Args:
        depth: one of `DEPTHS`.
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
        channels, parts = scaled(base, width, f"imagenet-resnet{depth}"), Parts(activation, norm)
        self.conv1 = nn.Conv2d(input_shape[0], channels[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = parts.norm(channels[0])
        self.layer1, self.layer2, self.layer3, self.layer4 = stages_of(
            partial(block, parts=parts, residual="downsample"), blocks, channels, channels[0], block.expansion
        )
        self.fc = nn.Linear(channels[-1] * block.expansion, classes)
        self.activate = parts.activation()
        initialise_convolutions(self)  # as torchvision begins

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] of images [batch, channels, height, width]."""
        out = F.max_pool2d(self.activate(self.bn1(self.conv1(images))), 3, stride=2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            out = stage(out)
        logits: torch.Tensor = self.fc(out.mean(dim=(2, 3)))
        return logits


MODELS = {f"imagenet-resnet{depth}": partial(ImageNetResNet, depth) for depth in DEPTHS}
