"""Networks as users write them, of the sizes of registered ones: `tools/bench_step.py --model` compares the two."""

from __future__ import annotations

from torch import Tensor, nn

from fastar.models import build_model


class Net(nn.Module):
    """The registered `mlp` of width 8 for scikit-learn's digits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.classifier = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.hidden(images.flatten(1)))
        return logits


def mlp() -> nn.Module:
    """`--arch mlp --width 8 --channels 1 --size 8`."""
    return Net()


def resnet8() -> nn.Module:
    """`--arch resnet8`, for images of 3 channels and 10 classes."""
    return build_model("resnet8", input_shape=(3, 32, 32), classes=10)
