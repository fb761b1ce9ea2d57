"""Small networks that exercise the derivation of permutation groups, each with its example inputs."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.symmetry import Symmetry, derive_symmetry


class Block(nn.Module):
    """Two batch-normed convolutions and a residual, projected where the width changes."""

    def __init__(self, wide_in: int, wide: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(wide_in, wide, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.project = nn.Identity()
        if stride > 1 or wide_in != wide:
            self.project = nn.Sequential(nn.Conv2d(wide_in, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True))) + self.project(x))


class ResNet(nn.Module):
    """The CIFAR ResNet-18 layout (stem, stages of two blocks, average pool, linear) at any widths."""

    def __init__(self, widths: tuple[int, ...] = (6, 8, 10, 12), blocks: int = 2):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        layers, wide_in = [], widths[0]
        for stage, wide in enumerate(widths):
            for block in range(blocks):
                layers.append(Block(wide_in, wide, 2 if stage and not block else 1))
                wide_in = wide
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(wide_in, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.avg_pool2d(x, x.shape[-1]).view(x.size(0), -1))


class ConvFlatten(nn.Module):
    """Pooling, dropout and a flatten that leaves 4 positions per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, padding=1)
        self.norm = nn.BatchNorm2d(7)
        self.hidden = nn.Linear(7 * 4, 9)
        self.out = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.max_pool2d(F.silu(self.norm(self.conv(x))), 4), 0.3, self.training)
        return self.out(F.gelu(self.hidden(x.flatten(1))))


class Grouped(nn.Module):
    """A depthwise convolution with multiplier 2 and a convolution of 4 groups."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3)
        self.depthwise = nn.Conv2d(channels, 2 * channels, 3, groups=channels)
        self.grouped = nn.Conv2d(2 * channels, 12, 1, groups=4)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.elu(self.grouped(F.relu(self.depthwise(F.relu(self.stem(x)))))).mean((2, 3)))


class Transposed(nn.Module):
    """Transposed convolutions: of 4 groups, depthwise, and whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.grouped = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4)
        self.depthwise = nn.ConvTranspose2d(12, 12, 3, groups=12)
        self.whole = nn.ConvTranspose2d(12, 7, 3, padding=1)
        self.out = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(F.relu(self.grouped(F.relu(self.stem(x)))))
        return self.out(F.relu(self.whole(F.relu(x))).mean((2, 3)))


class ZeroPadded(nn.Module):
    """A residual whose shortcut takes every other position and pads channels with zeros (option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 8, 3, 2, 1)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.out(x.mean((2, 3)))


class Concatenated(nn.Module):
    """Dense connections: a layer reads the concatenation of two earlier ones, and a slice of it is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(9)
        self.out = nn.Linear(9, 5)
        self.side = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x))
        both = self.norm(torch.cat([a, self.b(a)], 1)).amax((2, 3))
        return self.out(both) + self.side(both[:, 5:])


class TwoAxes(nn.Module):
    """A residual linear layer: its weight carries one group on both of its axes. Two names for one readout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Linear(6, 8), nn.Linear(8, 8)
        self.readout = nn.Linear(8, 3)
        self.again = self.readout

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = x + self.mix(x)
        return self.readout(x) + self.again(x.square())


class Mlp(nn.Module):
    """Two hidden layers of given sizes."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


IMAGES = (torch.zeros(2, 3, 8, 8),)
CASES: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "resnet": (ResNet(), IMAGES),
    "flatten": (ConvFlatten(), IMAGES),
    "grouped": (Grouped(), IMAGES),
    "transposed": (Transposed(), IMAGES),
    "zero_padded": (ZeroPadded(), IMAGES),
    "concatenated": (Concatenated(), IMAGES),
    "two_axes": (TwoAxes(), (torch.zeros(2, 6),)),
    "mlp": (Mlp(5, 4, 4, 3), (torch.zeros(2, 5),)),
}


@functools.cache
def derived() -> dict[str, Symmetry]:
    """The symmetry of every case; tracing takes seconds, so once for all tests."""
    return {name: derive_symmetry(model, inputs, verify=False) for name, (model, inputs) in CASES.items()}


def random_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """A state dict whose every tensor is random (batch-norm variances positive), in channels-last convolutions."""
    generator = torch.Generator().manual_seed(seed)
    first: dict[int, str] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            state[name] = state[owner]
        elif not tensor.is_floating_point():
            state[name] = tensor.detach().clone()
        else:
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
            state[name] = torch.randn(tensor.shape, generator=generator) / fan_in**0.5
            if name.endswith("running_var"):
                state[name] = state[name].abs() + 0.5
            if tensor.ndim == 4:
                state[name] = state[name].contiguous(memory_format=torch.channels_last)
    return state
