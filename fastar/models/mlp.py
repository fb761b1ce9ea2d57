"""Multilayer perceptron."""

from __future__ import annotations

import itertools
import math

import torch
from torch import nn

from fastar.models.layers import Activation, Parts, at_least


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
        sizes = [math.prod(input_shape), *[at_least(width, 1, "width", "mlp")] * at_least(depth, 1, "depth", "mlp")]
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
