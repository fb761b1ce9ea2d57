"""Multilayer perceptron."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from fastar.errors import FastarError
from fastar.models.layers import Activation, Parts


class Mlp(nn.Module):
    """`depth` hidden layers of `width` units each, on the flattened image.

    Args:
        input_shape: (channels, height, width) of one image.
        classes: number of logits.
        width: units in each hidden layer.
        depth: number of hidden layers, at least 1.
        activation: of the hidden units.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        width: int = 32,
        depth: int = 2,
        activation: Activation = "relu",
    ):
        super().__init__()
        if width < 1 or width != int(width):
            raise FastarError(f"model.width={width} of mlp must be a whole number of units, at least 1")
        if depth < 1:
            raise FastarError(f"model.depth={depth} of mlp must be at least 1 hidden layer")
        sizes = [math.prod(input_shape), *[int(width)] * depth]
        parts = Parts(activation)
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), parts.activation()]
        self.hidden = nn.Sequential(*layers)
        self.classifier = nn.Linear(sizes[-1], classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] of images [batch, channels, height, width]."""
        logits: torch.Tensor = self.classifier(self.hidden(images.flatten(1)))
        return logits


MODELS = {"mlp": Mlp}
