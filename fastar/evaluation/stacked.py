"""Many small networks without convolutions as one: their logits by batched products, instead of one network at a time.

Small products are bound by their launches: 363 networks of two layers of 32 units on 250 images of 28x28 take half the
time (2 cores; at 1,000 images a batch about the same time as one at a time).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fastar.flat.state_check import drops_caches

# What the batched form is known to be equal and faster for; every leaf of a network must be one of these.
_LEAVES = (nn.Linear, nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.Tanh, nn.Sigmoid, nn.Flatten, nn.Identity)
# Activations of this many samples x networks are in the caches; beyond it batched products gain nothing on a CPU.
_SAMPLES_ON_CPU = 16_000
# What the activations of networks that are evaluated together may take: a GPU is busy with fewer.
STACKED_BYTES = 256 << 20


def stackable(model: nn.Module) -> bool:
    """The networks of this kind can be evaluated together: dense layers and activations only."""
    leaves = [module for module in model.modules() if not list(module.children())]
    plain = all(isinstance(leaf, _LEAVES) and not list(leaf.buffers()) for leaf in leaves)
    return plain and not drops_caches(model)


def stacks(model: nn.Module, parameters: Mapping[str, Tensor], images: Tensor) -> bool:
    """Whether the forward of a network of such layers can be batched: it may branch on values, or draw numbers."""
    try:
        stacked_logits(model, {name: value[:1] for name, value in parameters.items()}, images[:1])
    except RuntimeError:
        return False
    return True


def networks_at_once(model: nn.Module, batch: int, device: torch.device) -> int:
    """How many networks to stack for batches of so many samples; 1 where that would gain nothing."""
    count = STACKED_BYTES // max(stacked_bytes(model, batch), 1)
    if device.type == "cpu":
        count = min(count, _SAMPLES_ON_CPU // max(batch, 1))
    return count if count > 16 else 1


def stacked_bytes(model: nn.Module, batch: int) -> int:
    """What each of several networks that are stacked takes on so many samples: of a layer what it is given, the
    products and their sums with the bias; or the logits twice, and of each sample label, loss and answer."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        return 0
    given = [0, *(layer.out_features for layer in layers[:-1])]  # what the first one is given all networks share
    widest = max(before + 2 * layer.out_features for before, layer in zip(given, layers, strict=True))
    return batch * max(4 * widest, 2 * 4 * layers[-1].out_features + 24)


@torch.no_grad()
def stacked_logits(model: nn.Module, parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """Logits [K, b, classes] of K networks (parameters [K, ...] by name) on the same images [b, C, H, W]."""

    def one(own: dict[str, Tensor]) -> Tensor:
        return functional_call(model, own, (images,))

    return vmap(one)(dict(parameters))
