"""Small networks whose groups come in blocks, with their symmetries written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.symmetry import Group, Member, Symmetry


class Attention(nn.Module):
    """One attention layer on a residual stream, its heads scaled by a parameter of their own."""

    def __init__(self, stream: int = 6, heads: int = 3, inside: int = 4):
        super().__init__()
        wide = heads * inside
        self.heads = heads
        self.stem = nn.Linear(5, stream)
        self.query, self.key, self.value = (nn.Linear(stream, wide) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(heads))
        self.project = nn.Linear(wide, stream)
        self.readout = nn.Linear(stream, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self._layers())
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2) * self.scale[:, None]
        return self.readout((x + self.project(y.flatten(2))).mean(1))

    def _layers(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.query, self.key, self.value


class GroupNormed(nn.Module):
    """A convolution with group-norm, and a residual one: its weight carries the same tree on both axes."""

    def __init__(self, groups: int = 3, inside: int = 3, *, residual: bool = False):
        super().__init__()
        wide = groups * inside
        self.conv = nn.Conv2d(3, wide, 3, padding=1)
        self.norm = nn.GroupNorm(groups, wide)
        self.mix = nn.Conv2d(wide, wide, 1) if residual else None
        self.readout = nn.Linear(wide, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        if self.mix is not None:
            x = x + F.relu(self.norm(self.mix(x)))
        return self.readout(x.mean((2, 3)))


class Gated(nn.Module):
    """Blocks of hidden units, each with one gate that reads them all: a parent and its child on one weight."""

    def __init__(self, blocks: int = 4, inside: int = 2):
        super().__init__()
        self.blocks = blocks
        self.stem = nn.Linear(5, blocks * inside)
        self.gate = nn.Linear(blocks * inside, blocks)
        self.readout = nn.Linear(blocks * inside, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        gates = torch.sigmoid(self.gate(x))
        return self.readout((x.unflatten(-1, (self.blocks, -1)) * gates[..., None]).flatten(-2))


def _both(name: str, axis: int = 0) -> tuple[Member, ...]:
    return (Member(f"{name}.weight", axis), Member(f"{name}.bias", 0)) if axis == 0 else (Member(f"{name}.weight", 1),)


def _symmetry(model: nn.Module, *groups: Group) -> Symmetry:
    return Symmetry(groups, {name: tuple(p.shape) for name, p in model.named_parameters()})


def attention() -> tuple[nn.Module, Symmetry, Tensor]:
    """Heads with a scale; inside them units of queries and keys, and of values."""
    model = Attention()
    groups = (
        Group("stem", 6, (*_both("stem"), *(m for n in ("query", "key", "value", "readout") for m in _both(n, 1)))),
        Group("heads", 3, (Member("scale", 0),)),
        Group("query", 12, (*_both("query"), *_both("key")), parent="heads"),
        Group("value", 12, (*_both("value"), *_both("project", 1)), parent="heads"),
    )
    stem = Group("stem", 6, (*groups[0].members, *_both("project")))
    return model, _symmetry(model, stem, *groups[1:]), torch.zeros(2, 7, 5)


def group_norm(residual: bool = False) -> tuple[nn.Module, Symmetry, Tensor]:
    """Groups of a group-norm without parameters of their own, and the channels inside them."""
    model = GroupNormed(residual=residual)
    members = (*_both("conv"), *_both("norm"), *_both("readout", 1))
    if residual:
        members = (*members, *_both("mix"), *_both("mix", 1))
    return model, _symmetry(model, Group("norm", 3, ()), Group("conv", 9, members, "norm")), torch.zeros(2, 3, 5, 5)


def gated() -> tuple[nn.Module, Symmetry, Tensor]:
    """A quadratic tree: the gate's weight carries the parent on one axis and the child on the other."""
    model = Gated()
    child = (*_both("stem"), *_both("gate", 1), *_both("readout", 1))
    return model, _symmetry(model, Group("gate", 4, _both("gate")), Group("stem", 8, child, "gate")), torch.zeros(2, 5)


BLOCK_MODELS = {
    "attention": attention(),
    "group_norm": group_norm(),
    "group_norm_residual": group_norm(residual=True),
    "gated": gated(),
}
