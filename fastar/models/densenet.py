"""DenseNet (Huang et al. 2017) for small images: every layer reads what all before it in its block made."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from fastar.models.layers import (
    Activation,
    Norm,
    Parts,
    at_least,
    check_side,
    dropout_share,
    initialise_convolutions,
)

BLOCKS = 3


class DenseLayer(nn.Module):
    """norm, activation, 3x3 convolution to `growth` channels, dropout; its input and its output side by side.

    With `bottleneck`, a 1x1 convolution to 4 times `growth` channels comes first, likewise.
    """

    def __init__(self, channels_in: int, growth: int, dropout: float, parts: Parts, *, bottleneck: bool):
        super().__init__()
        inner = 4 * growth if bottleneck else channels_in
        self.bn1 = parts.norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, inner, 1, bias=False) if bottleneck else _wide(inner, growth)
        self.bn2 = parts.norm(inner) if bottleneck else None
        self.conv2 = _wide(inner, growth) if bottleneck else None
        self.activate = parts.activation()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.dropout(self.conv1(self.activate(self.bn1(x))))
        if self.bn2 is not None and self.conv2 is not None:
            out = self.dropout(self.conv2(self.activate(self.bn2(out))))
        return torch.cat((x, out), dim=1)


class Transition(nn.Module):
    """norm, activation, 1x1 convolution, dropout, 2x2 average pooling."""

    def __init__(self, channels_in: int, channels: int, dropout: float, parts: Parts):
        super().__init__()
        self.bn1 = parts.norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.activate = parts.activation()
        self.dropout = nn.Dropout(dropout)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.pool(self.dropout(self.conv1(self.activate(self.bn1(x)))))
        return out


class DenseNet(nn.Module):
    """DenseNet-`depth`: 3x3 stem, three dense blocks with transitions between them, norm, global average pooling, a
    linear classifier.

    Parameters at ten classes: 1,059,298 of DenseNet-40, with the stem of the implementation that the star-domain paper
    names (`stem=16` is Huang et al.'s: 1,019,722, their 1.0 M); 176,122 of BC-40, 769,162 of BC-100.

    Args:
        depth: layers with weights: the stem, two transitions, the classifier, and those of the blocks.
        bottleneck: the BC form: bottlenecks, which are two layers each, and transitions that halve the channels.
        input_shape: (channels, height, width) of one image; only the channels determine parameters.
        classes: number of logits.
        growth: channels that each dense layer adds.
        dropout: share that is dropped after each convolution but the first.
        stem: channels of the first convolution; 0: twice `growth`.
    """

    def __init__(
        self,
        depth: int,
        bottleneck: bool,
        input_shape: tuple[int, int, int],
        classes: int,
        growth: int = 12,
        dropout: float = 0.0,
        stem: int = 0,
        activation: Activation = "relu",
        norm: Norm = "batch",
    ):
        super().__init__()
        arch = f"densenet{depth}{'_bc' if bottleneck else ''}"
        at_least(growth, 1, "growth", arch)
        at_least(stem, 0, "stem", arch)
        check_side(input_shape, 4, arch, "halves images twice")
        share, parts = dropout_share(dropout, arch), Parts(activation, norm)
        channels = stem or 2 * growth
        self.conv1 = _wide(input_shape[0], channels)
        stages: list[nn.Module] = []
        for block in range(BLOCKS):
            dense = []
            for _ in range((depth - 4) // (BLOCKS * (2 if bottleneck else 1))):
                dense.append(DenseLayer(channels, growth, share, parts, bottleneck=bottleneck))
                channels += growth
            stages.append(nn.Sequential(*dense))
            if block < BLOCKS - 1:
                less = channels // 2 if bottleneck else channels
                stages.append(Transition(channels, less, share, parts))
                channels = less
        self.stages = nn.Sequential(*stages)
        self.bn1 = parts.norm(channels)
        self.activate = parts.activation()
        self.classifier = nn.Linear(channels, classes)
        initialise_convolutions(self)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] of images [batch, channels, height, width]."""
        out = self.activate(self.bn1(self.stages(self.conv1(images))))
        logits: torch.Tensor = self.classifier(out.mean(dim=(2, 3)))
        return logits


def _wide(channels_in: int, channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)


MODELS = {
    "densenet40": partial(DenseNet, 40, False),
    "densenet40_bc": partial(DenseNet, 40, True),
    "densenet100_bc": partial(DenseNet, 100, True),
}
