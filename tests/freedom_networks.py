"""Small networks with views, blocks and shuffles of hidden units, and their groups counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from symmetry_checks import Case, counted
from torch import Tensor, nn
from torch.nn import functional as F


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


X = (inputs(16, 6),)
TOKENS = (inputs(4, 5, 6),)
IMAGES = (inputs(4, 3, 6, 6),)
NODES = (inputs(5, 6),)


# Views whose inner part moves


class Selective(nn.Module):
    """As SKNet: what 5 layers give is stacked, and each of 8 units weighs the 5 by a softmax over them."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(6, 8) for _ in range(5)])
        self.down, self.up, self.readout = nn.Linear(8, 7), nn.Linear(7, 40), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([torch.tanh(branch(x)) for branch in self.branches], 1)
        weights = self.up(torch.tanh(self.down(stacked.sum(1)))).view(-1, 5, 8).softmax(1)
        return self.readout((stacked * weights).sum(1))


class Scales(nn.Module):
    """One layer gives 5 vectors of 8 units, each with a constant of its own; units move alike in all 5."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.readout = nn.Linear(6, 40), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x)).view(-1, 5, 8) * torch.arange(1.0, 6.0)[:, None]
        return self.readout(x.sum(1))


class Apart(nn.Module):
    """One layer gives 3 vectors of 8 units, which are read by one layer each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 24)
        self.readouts = nn.ModuleList([nn.Linear(8, 3) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.tanh(self.stem(x)).view(-1, 3, 8).unbind(1)
        return torch.stack([readout(part) for readout, part in zip(self.readouts, parts, strict=True)], 1)


class BothParts(nn.Module):
    """One layer gives 5 vectors of 8 units whose sum is read: the 5 move, and the units alike in all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.readout = nn.Linear(6, 40), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).view(-1, 5, 8)
        return self.readout((x * x.softmax(1)).sum(1).tanh() + torch.tanh(x.mean(2)).sum(1, keepdim=True))


class Hyper(nn.Module):
    """A small network computes the weights [out, in] of a layer, from a condition or from x itself."""

    def __init__(self, *, readout: bool):
        super().__init__()
        self.stem, self.condition, self.weights = nn.Linear(6, 8), nn.Linear(6, 7), nn.Linear(7, 40)
        self.readout = nn.Linear(5, 3) if readout else None

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(torch.tanh(self.condition(x))).view(-1, 5, 8)
        x = torch.bmm(weights, torch.tanh(self.stem(x))[:, :, None])[:, :, 0]
        return x if self.readout is None else self.readout(torch.tanh(x))


class Maxout(nn.Module):
    """8 units, each the largest of 5 pieces; pieces lie first on the axis, or units."""

    def __init__(self, *, pieces_first: bool):
        super().__init__()
        self.stem, self.readout, self.pieces_first = nn.Linear(6, 40), nn.Linear(8, 3), pieces_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.readout(x.view(-1, 5, 8).amax(1) if self.pieces_first else x.view(-1, 8, 5).amax(2))


VIEWS: dict[str, Case] = {
    # The 5 layers are told apart by their names, the units move alike in all; 7 units that weigh.
    "selective": Case(Selective, X, counted(8, 7)),
    "scales": Case(Scales, X, counted(8)),
    "apart": Case(Apart, X, counted(8, 8, 8)),
    # Two groups on the same positions: any order of the 5, and any of the 8.
    "both_parts": Case(BothParts, X, counted(5, 8)),
    # What comes out is an output and stays: units of the stem move, and with them those columns of the weights.
    "hyper_output": Case(lambda: Hyper(readout=False), X, counted(7, 8)),
    "hyper": Case(lambda: Hyper(readout=True), X, counted(7, 8, 5)),
    # The 5 pieces of each unit move by themselves.
    "maxout": Case(lambda: Maxout(pieces_first=False), X, counted(8, (40, 8))),
    "maxout_pieces_first": Case(lambda: Maxout(pieces_first=True), X, counted(8, (40, 8))),
}


# Attention. A stream of 8; 3 heads of 4 units.


class Fused(nn.Module):
    """A residual stream and an attention layer of one projection; `attend` of its result [B, N, width]."""

    def __init__(self, attend: Callable[..., Tensor], *, width: int = 36, out: int = 12):
        super().__init__()
        self.stem, self.readout = nn.Linear(6, 8), nn.Linear(8, 4)
        self.qkv, self.project = nn.Linear(8, width), nn.Linear(out, 8)
        self.temperature, self.scale = nn.Parameter(torch.ones(3, 1, 1)), nn.Parameter(torch.ones(4))
        self.before, self.after = nn.Linear(3, 3), nn.Linear(3, 3)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.readout(torch.tanh(x + self.project(self.attend(self, self.qkv(x)))).mean(1))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of [B, N, heads, inside]."""
    q, k, v = (one.transpose(1, 2) for one in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def neox(model: Fused, x: Tensor) -> Tensor:
    return attention(*x.unflatten(-1, (3, 12)).chunk(3, -1))


def bloom(model: Fused, x: Tensor) -> Tensor:
    x = x.unflatten(-1, (3, 3, 4))
    return attention(x[..., 0, :], x[..., 1, :], x[..., 2, :])


def channels(model: Fused, x: Tensor) -> Tensor:
    """XCiT: a unit of a query attends to the units of keys of its head, over tokens."""
    q, k, v = x.unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 4, 1)  # each [B, heads, inside, N]
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    weights = (q @ k.transpose(-2, -1) * model.temperature).softmax(-1)
    return (weights @ v).permute(0, 3, 1, 2).flatten(2)


def partial_rotary(model: Fused, x: Tensor) -> Tensor:
    """Phi: the first 4 of 6 units of each query and key are turned in pairs."""
    q, k, v = (part.unflatten(-1, (3, 6)) for part in x.chunk(3, -1))
    angle = torch.arange(x.shape[1])[:, None, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])

    def turn(x: Tensor) -> Tensor:
        first, rest = x[..., :4], x[..., 4:]
        half = torch.cat([-first[..., 2:], first[..., :2]], -1)
        return torch.cat([first * angle.cos() + half * angle.sin(), rest], -1)

    return attention(turn(q), turn(k), v)


def grouped(model: Fused, x: Tensor) -> Tensor:
    """6 heads of queries, 2 each for 3 heads of keys and values."""
    q, k, v = x.split((24, 12, 12), -1)
    k, v = (one.unflatten(-1, (3, 4)).repeat_interleave(2, 2) for one in (k, v))
    return attention(q.unflatten(-1, (6, 4)), k, v)


def linear_attention(model: Fused, x: Tensor) -> Tensor:
    q, k, v = (one.unflatten(-1, (3, 4)) for one in x.chunk(3, -1))
    context = torch.einsum("bnhd,bnhe->bhde", k.softmax(1), v)
    return torch.einsum("bnhd,bhde->bnhe", q.softmax(-1), context).flatten(2)


def mean_of_heads(model: Fused, x: Tensor) -> Tensor:
    q, k, v = (one.unflatten(-1, (3, 4)) for one in x.chunk(3, -1))
    return attention(q, k, v).unflatten(-1, (3, 4)).mean(2)


def one_key_for_all(model: Fused, x: Tensor) -> Tensor:
    """3 heads of queries, and one of keys and values for all of them."""
    q, k, v = x.split((12, 4, 4), -1)
    k, v = (one.unflatten(-1, (1, 4)).expand(-1, -1, 3, -1) for one in (k, v))
    return attention(q.unflatten(-1, (3, 4)), k, v)


def one_scale_for_all(model: Fused, x: Tensor) -> Tensor:
    """Queries and keys normalised, and scaled by one vector for the units of all heads."""
    q, k, v = (one.unflatten(-1, (3, 4)) for one in x.chunk(3, -1))
    q, k = (F.rms_norm(one, (4,), model.scale) for one in (q, k))
    return attention(q, k, v)


def inside_first(model: Fused, x: Tensor) -> Tensor:
    """NesT: what the heads give is laid out by units, and by heads in each."""
    q, k, v = x.unflatten(-1, (3, 3, 4)).unbind(2)
    return attention(q, k, v).unflatten(-1, (3, 4)).transpose(2, 3).flatten(2)


def talking_heads(model: Fused, x: Tensor) -> Tensor:
    """CaiT: scores of the heads are mixed before the softmax, and its result after it."""
    q, k, v = (one.unflatten(-1, (3, 4)).transpose(1, 2) for one in x.chunk(3, -1))
    scores = model.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1))
    weights = model.after(scores.softmax(2)).permute(0, 3, 1, 2)
    return (weights @ v).transpose(1, 2).flatten(2)


class BiasApart(nn.Module):
    """BEiT: queries and values have biases, keys have zeros, which are a buffer; all are joined for one projection."""

    def __init__(self, *, persistent: bool):
        super().__init__()
        self.stem, self.readout = nn.Linear(6, 8), nn.Linear(8, 4)
        self.qkv, self.project = nn.Linear(8, 36, bias=False), nn.Linear(12, 8)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.zeros(12))
        self.register_buffer("k_bias", torch.zeros(12), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, 3, 4)).unbind(2)
        return self.readout(torch.tanh(x + self.project(attention(q, k, v))).mean(1))


WHOLE = counted(8, 3, (12, 3), (12, 3))
ATTENTION: dict[str, Case] = {
    "neox": Case(lambda: Fused(neox), TOKENS, WHOLE),
    "bloom": Case(lambda: Fused(bloom), TOKENS, WHOLE),
    "inside_first": Case(lambda: Fused(inside_first), TOKENS, WHOLE),
    # Heads of queries and keys, the mixed ones, and heads of values.
    "talking_heads": Case(lambda: Fused(talking_heads), TOKENS, counted(8, 3, (12, 3), 3, 3, (12, 3))),
    # Queries with what reads the result, and keys with values.
    "cross_covariance": Case(lambda: Fused(channels), TOKENS, WHOLE),
    # Of queries and keys the 2 units of each head that are not turned move.
    "partial_rotary": Case(lambda: Fused(partial_rotary, width=54, out=18), TOKENS, counted(8, 3, (6, 3), (18, 3))),
    # 3 heads of keys and values move; inside each the 2 of queries, the units of keys (in both queries alike), and
    # those of values (alike in both places where the projection reads them).
    "grouped_queries": Case(lambda: Fused(grouped, width=48, out=24), TOKENS, counted(8, 3, (6, 3), (12, 3), (12, 3))),
    # Queries with keys, and values: the product of keys and values is of a head alone.
    "linear_attention": Case(lambda: Fused(linear_attention), TOKENS, WHOLE),
    # Units of values move alike in all heads.
    "mean_of_heads": Case(lambda: Fused(mean_of_heads, out=4), TOKENS, counted(8, 3, (12, 3), 4)),
    # Units of queries with the key's, and of the value, are alike in all heads.
    "one_key_for_all": Case(lambda: Fused(one_key_for_all, width=20), TOKENS, counted(8, 3, 4, 4)),
    "one_scale_for_all": Case(lambda: Fused(one_scale_for_all), TOKENS, counted(8, 3, 4, (12, 3))),
    "bias_apart": Case(lambda: BiasApart(persistent=True), TOKENS, WHOLE),
    "bias_apart_constant": Case(lambda: BiasApart(persistent=False), TOKENS, WHOLE),
}


# Channels that are shuffled


def shuffled(x: Tensor, groups: int = 2) -> Tensor:
    batch, wide, height, width = x.shape
    return x.view(batch, groups, wide // groups, height, width).transpose(1, 2).reshape(batch, wide, height, width)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: half of 8 channels passes, the other half goes through 5 hidden ones, then both are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(4, 5, 1), nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.norm, self.last = nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        passes, x = x.chunk(2, 1)
        x = torch.tanh(self.last(self.norm(self.depthwise(torch.tanh(self.first(x))))))
        return shuffled(torch.cat([passes, x], 1))


class Shuffling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = nn.Conv2d(3, 8, 3), nn.Sequential(ShuffleUnit(), ShuffleUnit())
        self.mix, self.readout = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.units(torch.tanh(self.stem(x)))
        return self.readout(torch.tanh(self.mix(x)).mean((2, 3)))


class ShuffledOnce(nn.Module):
    """Channels in 3 groups of 4, read in columns by one convolution: nothing is held by it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.readout = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.mix(shuffled(torch.tanh(self.stem(x)), 3))).mean((2, 3)))


SHUFFLES: dict[str, Case] = {
    # Of the stem's 8 channels the last 4 are read by the first unit, 2 and 3 by the second, 0 and 1 at the end. Of the
    # first unit's 4, the last 2 are read by the second, the others at the end, as are all 4 of the second. In each unit
    # 5 hidden channels, and 6 at the end.
    "shuffling": Case(Shuffling, IMAGES, counted(4, 2, 2, 5, 2, 2, 5, 4, 6)),
    "shuffled_once": Case(ShuffledOnce, IMAGES, counted(12, 5)),
}


# One permutation for each block


class Experts(nn.Module):
    """A stream of 6, and 3 experts of 5 hidden units, all in one tensor; `route` of the gate's 3 and the experts."""

    def __init__(self, route: Callable[[Tensor, Tensor], Tensor], *, by: str = "bmm", bias: bool = False):
        super().__init__()
        self.stem, self.gate, self.readout = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.up, self.down = nn.Parameter(torch.zeros(3, 6, 5)), nn.Parameter(torch.zeros(3, 5, 6))
        self.up_bias = nn.Parameter(torch.zeros(3, 1, 5)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(3, 1, 6)) if bias else None
        self.route, self.by = route, by

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        if self.by == "bmm":
            hidden = torch.bmm(x.expand(3, -1, -1), self.up)
            if self.up_bias is not None:
                hidden = hidden + self.up_bias
            out = torch.bmm(F.gelu(hidden), self.down)
            if self.down_bias is not None:
                out = out + self.down_bias
        else:
            hidden = torch.einsum("bd,edf->ebf", x, self.up)
            out = torch.einsum("ebf,efd->ebd", F.gelu(hidden), self.down)
        return self.readout(torch.tanh(x + self.route(self.gate(x), out)))


def dense(gate: Tensor, experts: Tensor) -> Tensor:
    """All experts, weighed by a softmax."""
    return torch.einsum("be,ebd->bd", gate.softmax(-1), experts)


def summed(gate: Tensor, experts: Tensor) -> Tensor:
    return (gate.softmax(-1).t()[:, :, None] * experts).sum(0)


def scattered(gate: Tensor, experts: Tensor) -> Tensor:
    """The 2 largest weights of each row, put back where they were; all others are 0."""
    largest, index = gate.softmax(-1).topk(2, -1)
    weights = torch.zeros_like(gate).scatter(-1, index, largest / largest.sum(-1, keepdim=True))
    return torch.einsum("be,ebd->bd", weights, experts)


def gathered(gate: Tensor, experts: Tensor) -> Tensor:
    """The 2 best experts of each row, taken from all that were computed."""
    largest, index = gate.softmax(-1).topk(2, -1)
    chosen = experts.transpose(0, 1).gather(1, index[:, :, None].expand(-1, -1, experts.shape[-1]))
    return (chosen * largest[:, :, None]).sum(1)


def masked(gate: Tensor, experts: Tensor) -> Tensor:
    """As gates before a softmax: all but the 2 largest are minus infinity."""
    lowest = gate.topk(2, -1).values[:, -1:]
    return dense(gate.masked_fill(gate < lowest, float("-inf")), experts)


class Looked(nn.Module):
    """The best expert's weights are looked up in their stack, for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.readout = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.up, self.down = nn.Parameter(torch.zeros(3, 5, 6)), nn.Parameter(torch.zeros(3, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        weight, best = self.gate(x).softmax(-1).max(-1)
        hidden = F.gelu(torch.einsum("bfd,bd->bf", self.up[best], x))
        return self.readout(torch.tanh(x + weight[:, None] * torch.einsum("bdf,bf->bd", self.down[best], hidden)))


class GraphAttention(nn.Module):
    """GAT: 3 heads of 4 units; how a node attends to its neighbours is the sum of two numbers of each head."""

    def __init__(self, *, concatenated: bool):
        super().__init__()
        self.linear, self.readout = nn.Linear(6, 12, bias=False), nn.Linear(12 if concatenated else 4, 2)
        self.receives, self.sends = (nn.Parameter(torch.zeros(1, 3, 4)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(12 if concatenated else 4))
        self.concatenated = concatenated

    def forward(self, x: Tensor) -> Tensor:
        near = torch.ones(5, 5).tril(1).bool()
        x = self.linear(x).view(-1, 3, 4)
        receives, sends = (x * self.receives).sum(-1), (x * self.sends).sum(-1)
        scores = F.leaky_relu(receives[:, None] + sends[None], 0.2).masked_fill(~near[:, :, None], float("-inf"))
        x = torch.einsum("ijh,jhc->ihc", scores.softmax(1), x)
        return self.readout(F.elu((x.flatten(1) if self.concatenated else x.mean(1)) + self.bias))


class Convolutions(nn.Module):
    """12 channels, and `count` convolutions of 3 groups, each of 4 channels that it reads and 4 that it writes."""

    def __init__(self, count: int):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3)
        self.grouped = nn.ModuleList([nn.Conv2d(12, 12, 3, padding=1, groups=3) for _ in range(count)])
        self.mix, self.readout = nn.Conv2d(12, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for layer in self.grouped:
            x = torch.tanh(layer(x))
        return self.readout(torch.tanh(self.mix(x)).mean((2, 3)))


# The stream, the experts with their gate, and 5 hidden units in each.
EXPERTS = counted(6, 3, (15, 3))
BLOCKS: dict[str, Case] = {
    "experts_bmm": Case(lambda: Experts(dense), X, EXPERTS),
    "experts_biased": Case(lambda: Experts(summed, bias=True), X, EXPERTS),
    "experts_einsum": Case(lambda: Experts(dense, by="einsum"), X, EXPERTS),
    "experts_scattered": Case(lambda: Experts(scattered), X, EXPERTS),
    "experts_gathered": Case(lambda: Experts(gathered), X, EXPERTS),
    "experts_masked": Case(lambda: Experts(masked, by="einsum"), X, EXPERTS),
    "experts_looked_up": Case(Looked, X, EXPERTS),
    # Groups move; inside each the channels that are read, and those that are written, by themselves.
    "grouped_convolution": Case(lambda: Convolutions(1), IMAGES, counted(3, (12, 3), (12, 3), 5)),
    "grouped_convolutions": Case(lambda: Convolutions(2), IMAGES, counted(3, (12, 3), (12, 3), (12, 3), 5)),
    "heads_concatenated": Case(lambda: GraphAttention(concatenated=True), NODES, counted(3, (12, 3))),
    # Units of all heads are averaged: they move alike in each.
    "heads_averaged": Case(lambda: GraphAttention(concatenated=False), NODES, counted(3, 4)),
}

CASES = {**VIEWS, **ATTENTION, **SHUFFLES, **BLOCKS}
