"""VGG (Simonyan and Zisserman 2015) for small images, with a dropout classifier of two hidden layers."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from fastar.models.layers import Activation, Norm, Parts, check_side, dropout_share, initialise_convolutions, scaled

CHANNELS = (64, 128, 256, 512, 512)
# Convolutions in each of the five stages.
DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
HIDDEN = 512
# Below, a stage would find a single pixel to halve.
SMALLEST = 17


class Vgg(nn.Module):
    """Five stages of 3x3 convolutions (with biases) and a max-pooling each, then the classifier: dropout, linear,
    activation, dropout, linear, activation, linear.

    Pooling rounds up, so that images of 28 pixels have a position left; at 32 there is one either way, and of larger
    images' positions the mean is taken.

    Args:
        depth: layers with weights, a key of `DEPTHS`.
        normalised: whether a normalisation follows each convolution.
        input_shape: (channels, height, width) of one image; only the channels determine parameters.
        classes: number of logits.
        width: factor of all channels and hidden units.
        dropout: share of units that the classifier drops in training.
    """

    def __init__(
        self,
        depth: int,
        normalised: bool,
        input_shape: tuple[int, int, int],
        classes: int,
        width: float = 1.0,
        dropout: float = 0.5,
        activation: Activation = "relu",
        norm: Norm = "batch",
    ):
        super().__init__()
        arch = f"vgg{depth}{'_bn' if normalised else ''}"
        check_side(input_shape, SMALLEST, arch, "halves images five times")
        *channels, hidden = scaled([*CHANNELS, HIDDEN], width, arch)
        share, parts = dropout_share(dropout, arch), Parts(activation, norm)
        layers: list[nn.Module] = []
        channels_in = input_shape[0]
        for count, wide in zip(DEPTHS[depth], channels, strict=True):
            for _ in range(count):
                layers.append(nn.Conv2d(channels_in, wide, 3, padding=1))
                layers += [parts.norm(wide)] if normalised else []
                layers.append(parts.activation())
                channels_in = wide
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Dropout(share),
            nn.Linear(channels_in, hidden),
            parts.activation(),
            nn.Dropout(share),
            nn.Linear(hidden, hidden),
            parts.activation(),
            nn.Linear(hidden, classes),
        )
        initialise_convolutions(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] of images [batch, channels, height, width]."""
        logits: torch.Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits


MODELS = {f"vgg{depth}": partial(Vgg, depth, False, norm="batch") for depth in DEPTHS} | {
    f"vgg{depth}_bn": partial(Vgg, depth, True) for depth in DEPTHS
}
"""Without normalisation `norm` is no setting: what is given here by its name is not asked for."""
