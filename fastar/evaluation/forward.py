"""What the forward passes of evaluation take beside the models, and how many models are therefore held at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.evaluation.batch_norm import batch_norm_layers, evaluating
from fastar.evaluation.stacked import networks_at_once, stackable, stacked_bytes
from fastar.runtime.footprint import Footprint, Network, count_bytes

# Rows of the ends of paths that are kept on the device, since the next path may end in them too.
ENDS = 4


@dataclass(frozen=True)
class Pass:
    """A pass over images in batches of `batch`. Bytes of images that are `held` in fp32 at a time, and that the next
    ones take while they are made (`coming`)."""

    batch: int
    held: int
    coming: int


@dataclass(frozen=True)
class Shown:
    """What evaluation is shown: images of the shape `image` (C, H, W)."""

    image: tuple[int, int, int]
    passes: tuple[Pass, ...]

    @property
    def batch(self) -> int:
        """Images of the largest batch."""
        return max(one.batch for one in self.passes)


@dataclass(frozen=True)
class ForwardBytes:
    """Of passes of networks like `model` without gradients in fp32; `one`: of a network that is evaluated by itself."""

    model: nn.Module
    one: Footprint

    def of(self, images: int, networks: int, device: torch.device) -> int:
        """At the fullest moment of evaluating so many networks on a batch of so many images."""
        alone = self.one.of(images)
        if networks == 1 or not stackable(self.model):
            return alone
        at_once = min(networks, networks_at_once(self.model, images, device))
        return alone if at_once == 1 else at_once * stacked_bytes(self.model, images)


def forward_bytes(model: nn.Module, image: Sequence[int], batch: int) -> ForwardBytes:
    """Of `model` on up to `batch` images of the shape `image` (C, H, W); `model` is left as it was."""

    @torch.no_grad()
    def run(network: Network, images: Tensor, labels: Tensor) -> None:
        F.cross_entropy(network(images).float(), labels, reduction="sum")

    with evaluating(model):
        return ForwardBytes(model, count_bytes(model, run, image, batch))


def statistics_bytes(model: nn.Module) -> int:
    """Of one model's batch-norm statistics while they are re-estimated: sums in float64, and what they end as."""
    return (3 * 8 + 2 * 4) * sum(layer.num_features for layer in batch_norm_layers(model).values())


def passes_bytes(forward: ForwardBytes, networks: int, shown: Shown, device: torch.device) -> int:
    """Bytes of the fullest moment of all passes: a batch and the forward pass over it, or the next images beside."""
    return max(max(forward.of(one.batch, networks, device), one.coming) + one.held for one in shown.passes)


def beside_models(forward: ForwardBytes, row: int, networks: int, shown: Shown, device: torch.device) -> int:
    """Bytes that evaluating paths takes beside the models that are held at once: its passes, and the ends of paths.

    Args:
        row: bytes of one model's parameters.
        networks: models to evaluate in all.
    """
    return passes_bytes(forward, networks, shown, device) + ENDS * row
