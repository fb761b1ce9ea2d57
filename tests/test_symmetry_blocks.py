"""Attention, group-norm and their kin: groups in blocks, counted by hand, from the graph alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from matching_block_models import BLOCK_MODELS
from symmetry_checks import in_order, sizes
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.errors import FastarError
from fastar.symmetry import Group, Symmetry, derive_symmetry, verify_symmetry

TOKENS = (torch.zeros(2, 5, 6),)  # batch, length, features
STREAM, HEADS, INSIDE = 8, 3, 4
WIDE = HEADS * INSIDE


class Attending(nn.Module):
    """A residual stream and one attention layer, `attend` of its queries, keys and values [B, N, heads * inside]."""

    def __init__(self, attend: Callable[..., Tensor], *, fused: bool = False, pairs: int = HEADS, outside: int = WIDE):
        super().__init__()
        self.stem, self.readout = nn.Linear(6, STREAM), nn.Linear(STREAM, 4)
        self.qkv = nn.Linear(STREAM, 3 * WIDE) if fused else None
        self.query = nn.Linear(STREAM, WIDE)
        self.key, self.value = (nn.Linear(STREAM, pairs * INSIDE) for _ in range(2))
        self.scale, self.bias = nn.Parameter(torch.ones(INSIDE)), nn.Parameter(torch.ones(HEADS, 5, 5))
        self.project = nn.Linear(outside, STREAM)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.qkv is not None:
            found = self.attend(self, self.qkv(x))
        else:
            found = self.attend(self, self.query(x), self.key(x), self.value(x))
        return self.readout((x + self.project(found)).mean(1))


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.unflatten(-1, (count, INSIDE)).transpose(1, 2)


def back(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def plain(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return back(F.scaled_dot_product_attention(heads(q), heads(k), heads(v)))


def written_out(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (heads(q) * INSIDE**-0.5) @ heads(k).transpose(-2, -1)
    return back(torch.softmax(scores, -1) @ heads(v))


def einsum(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (one.unflatten(-1, (HEADS, INSIDE)) for one in (q, k, v))
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def fused(model: nn.Module, qkv: Tensor) -> Tensor:
    batch, length, _ = qkv.shape
    q, k, v = qkv.reshape(batch, length, 3, HEADS, INSIDE).permute(2, 0, 3, 1, 4).unbind(0)
    return (F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).reshape(batch, length, WIDE)


def chunked(model: nn.Module, qkv: Tensor) -> Tensor:
    return plain(model, *qkv.chunk(3, -1))


def merged_batch(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As nn.MultiheadAttention does it: batch and heads are one dimension, then products over it."""
    (batch, length, _) = q.shape
    q, k, v = (x.transpose(0, 1).reshape(length, batch * HEADS, INSIDE).transpose(0, 1) for x in (q, k, v))
    weights = torch.baddbmm(torch.zeros(batch * HEADS, length, length), q, k.transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v).transpose(0, 1).reshape(length, batch, WIDE).transpose(0, 1)


def masked(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    return back(F.scaled_dot_product_attention(heads(q), heads(k), heads(v), mask))


def causal(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return back(F.scaled_dot_product_attention(heads(q), heads(k), heads(v), is_causal=True))


def biased(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return back(F.scaled_dot_product_attention(heads(q), heads(k), heads(v), model.bias))


def normed(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = (F.normalize(heads(x), dim=-1) for x in (q, k))
    return back(F.scaled_dot_product_attention(q, k, heads(v)))


def scaled(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One vector for the units of all heads: inside, all heads would have to move alike."""
    q, k = (F.rms_norm(heads(x), (INSIDE,), model.scale) for x in (q, k))
    return back(F.scaled_dot_product_attention(q, k, heads(v)))


def rotary(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    angle = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])

    def turn(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., 2:], x[..., :2]], -1)
        return x * angle.cos() + half * angle.sin()

    return back(F.scaled_dot_product_attention(turn(heads(q)), turn(heads(k)), heads(v)))


def shared(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of keys and values for all."""
    k, v = heads(k, 1).expand(-1, HEADS, -1, -1), heads(v, 1).expand(-1, HEADS, -1, -1)
    return back(F.scaled_dot_product_attention(heads(q), k, v))


def mean_of_heads(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Summing over heads needs all of them to move alike inside: values' insides stay, and so do the sums."""
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v)).mean(1)


def linear_attention(model: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    context = torch.einsum("bhnd,bhne->bhde", heads(k).softmax(-2), heads(v))
    return back(heads(q).softmax(-1) @ context)


# Sizes of the groups found, of blocks those of the parent first: (units, blocks they are in or None).
# The stream of 8 always moves. Queries with keys, and values with what reads them, move in 3 heads of 4 units.
WHOLE = [(8, None), (3, None), (12, 3), (12, 3)]
ATTENTION: dict[str, tuple[nn.Module, list[tuple[int, int | None]]]] = {
    "plain": (Attending(plain), WHOLE),
    "written_out": (Attending(written_out), WHOLE),
    "einsum": (Attending(einsum), WHOLE),
    "fused": (Attending(fused, fused=True), WHOLE),
    "chunked": (Attending(chunked, fused=True), WHOLE),
    "merged_batch": (Attending(merged_batch), WHOLE),
    "masked": (Attending(masked), WHOLE),
    "causal": (Attending(causal), WHOLE),
    "biased": (Attending(biased), WHOLE),
    "normed": (Attending(normed), WHOLE),
    # The insides of queries and keys meet a vector common to all heads, or a pair that is turned together.
    "scaled": (Attending(scaled), [(8, None), (3, None), (12, 3)]),
    "rotary": (Attending(rotary), [(8, None), (3, None), (12, 3)]),
    # What heads give of the one value is a table of heads and its units: both could move, and the more do.
    "shared": (Attending(shared, pairs=1), [(8, None), (4, None)]),
    "mean_of_heads": (Attending(mean_of_heads, outside=INSIDE), [(8, None), (3, None), (12, 3)]),
    "linear_attention": (Attending(linear_attention), WHOLE),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", list(ATTENTION))
def test_attention(name: str) -> None:
    """Each is proven by running it, too; what is counted here is that nothing was held that could move."""
    model, expected = ATTENTION[name]
    assert in_order(sizes(derive_symmetry(model, TOKENS))) == in_order(expected)


def places(symmetry: Symmetry) -> set[tuple[object, ...]]:
    """Groups by what they hold, whatever their names."""
    parents = {g.name: g for g in symmetry.groups}

    def of(group: Group) -> tuple[object, ...]:
        return (group.size, frozenset(group.members))

    return {(of(g), of(parents[g.parent]) if g.parent else None) for g in symmetry.groups}


@pytest.mark.parametrize("name", list(BLOCK_MODELS))
def test_what_is_found_is_what_was_written_by_hand(name: str) -> None:
    model, by_hand, example = BLOCK_MODELS[name]
    assert places(derive_symmetry(model, (example,))) == places(by_hand)


class Images(nn.Module):
    """Convolutions with `middle` between them."""

    def __init__(self, middle: nn.Module, channels: int = 12, out: int = 12):
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, channels, 3), middle
        self.mix, self.readout = nn.Conv2d(out, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(F.relu(self.mix(self.middle(self.stem(x)))).mean((2, 3)))


class Shuffle(nn.Module):
    """The channel shuffle of ShuffleNet: channels in 3 groups of 4 are read in columns."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)


class Halves(nn.Module):
    """A gated unit: half of the channels times a function of the other half."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return a * torch.sigmoid(b)


class Squeeze(nn.Module):
    """Squeeze and excitation: channels scaled by a function of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(12, 5), nn.Linear(5, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))[:, :, None, None]


CHANNELS: dict[str, tuple[nn.Module, list[tuple[int, int | None]]]] = {
    "one_group": (Images(nn.GroupNorm(1, 12)), [(12, None), (5, None)]),
    "groups": (Images(nn.GroupNorm(4, 12)), [(4, None), (12, 4), (5, None)]),
    "each_its_own": (Images(nn.GroupNorm(12, 12)), [(12, None), (5, None)]),
    "instance_norm": (Images(nn.InstanceNorm2d(12, affine=True)), [(12, None), (5, None)]),
    # Two ways of grouping one axis: 2 blocks of 3 blocks of 2, of which the innermost is held.
    "two_norms": (
        Images(nn.Sequential(nn.GroupNorm(6, 12), nn.ReLU(), nn.GroupNorm(2, 12))),
        [(2, None), (6, 2), (5, None)],
    ),
    "depthwise": (Images(nn.Conv2d(12, 12, 3, groups=12)), [(12, None), (5, None)]),
    # What a group writes moves inside it; what it reads does not.
    "grouped": (Images(nn.Conv2d(12, 12, 3, groups=3)), [(3, None), (12, 3), (5, None)]),
    "multiplier": (Images(nn.Conv2d(6, 12, 3, groups=6), channels=6), [(6, None), (12, 6), (5, None)]),
    "shuffle": (Images(Shuffle()), [(12, None), (5, None)]),
    "halves": (Images(Halves(), channels=24), [(12, None), (5, None)]),
    "squeeze": (Images(Squeeze()), [(12, None), (5, None), (5, None)]),
    "glu": (Images(nn.GLU(1), channels=24), [(12, None), (5, None)]),
}


@pytest.mark.parametrize("name", list(CHANNELS))
def test_channels(name: str) -> None:
    model, expected = CHANNELS[name]
    symmetry = derive_symmetry(model, (torch.zeros(2, 3, 6, 6),))
    assert in_order(sizes(symmetry)) == in_order(expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_layer_of_torch(batch_first: bool, norm_first: bool) -> None:
    """nn.TransformerEncoderLayer: stream of 12, 3 heads of queries with keys and of values, a hidden layer of 7."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.readout = nn.Linear(6, 12), nn.Linear(12, 4)
            self.layer = nn.TransformerEncoderLayer(12, 3, 7, batch_first=batch_first, norm_first=norm_first)

        def forward(self, x: Tensor) -> Tensor:
            return self.readout(self.layer(self.stem(x)))

    symmetry = derive_symmetry(Encoder(), TOKENS)
    assert sizes(symmetry) == [(12, None), (3, None), (12, 3), (12, 3), (7, None)]


def test_attention_with_its_weights_returned() -> None:
    class Weighed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.readout = nn.Linear(6, 12), nn.Linear(12, 4)
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(x)
            out, weights = self.attention(x, x, x, need_weights=True, average_attn_weights=True)
            return self.readout(out), weights  # the mean over heads, which does not depend on their order

    expected = [(12, None), (3, None), (12, 3), (12, 3), (12, None)]
    assert sizes(derive_symmetry(Weighed(), TOKENS)) == expected


@pytest.mark.parametrize("name", ["plain", "fused", "biased"])
def test_a_wrong_structure_of_blocks_is_caught(name: str) -> None:
    """Negative controls: units that leave their head, other heads for values, a member left out, too small blocks."""
    model, _ = ATTENTION[name]
    symmetry = derive_symmetry(model, TOKENS)
    (parent,) = {g.parent for g in symmetry.groups} - {None}
    queries, values = (g for g in symmetry.groups if g.parent)

    def broken(*groups: Group) -> Symmetry:
        changed = {g.name: g for g in groups}
        kept = tuple(changed.get(g.name, g) for g in symmetry.groups)
        return dataclasses.replace(symmetry, groups=kept)

    def refused(wrong: Symmetry) -> None:
        with pytest.raises(FastarError, match="changes its outputs") as why:
            verify_symmetry(model, wrong, TOKENS)
        assert "\n" not in str(why.value)

    for group in (queries, values):
        refused(broken(dataclasses.replace(group, parent=None)))
        for left_out in group.members:
            if left_out.tensor.endswith("weight"):
                kept = tuple(m for m in group.members if m is not left_out)
                refused(broken(dataclasses.replace(group, members=kept)))
    heads_of_values = Group("other", HEADS, ())
    apart = [g for g in symmetry.groups if g.name != values.name]
    refused(
        dataclasses.replace(symmetry, groups=(*apart, heads_of_values, dataclasses.replace(values, parent="other")))
    )
    finer = [dataclasses.replace(g, size=2 * HEADS, members=()) if g.name == parent else g for g in symmetry.groups]
    refused(dataclasses.replace(symmetry, groups=tuple(finer)))


def test_partial_holds_what_is_not_proven_and_says_what() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(6, 7), nn.Linear(7, 8), nn.Linear(8, 4)
            self.named = nn.Identity()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = F.relu(self.second(F.relu(self.first(x))))
            return {"logits": self.third(torch.fft.fft(x).abs())}

    model, inputs = Spectrum(), (torch.zeros(2, 6),)
    with pytest.raises(FastarError, match=r"aten\.fft.*allow_partial") as why:
        derive_symmetry(model, inputs)
    assert "\n" not in str(why.value)
    symmetry = derive_symmetry(model, inputs, allow_partial=True)
    assert [(g.name, g.size) for g in symmetry.groups] == [("first", 7)]
    (line,) = symmetry.frozen
    assert "second (8 units): held by aten.fft_fft" in line
    assert "\n" not in line
    assert derive_symmetry(nn.Linear(3, 2), (torch.zeros(2, 3),), allow_partial=True).frozen == ()


class Language(nn.Module):
    """Token ids by keyword, tied embeddings, constants made from shapes, a dataclass-like mapping of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8), nn.Embedding(5, 8)
        self.norm, self.hidden, self.out = nn.LayerNorm(8), nn.Linear(8, 9), nn.Linear(9, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, keep: Tensor | None = None, scale: float = 1.0) -> dict[str, Tensor]:
        where = (torch.ones_like(ids).cumsum(-1) - 1).clamp(max=4)
        x = self.tokens(ids) + self.positions(where)
        if keep is not None:
            x = x * keep[..., None]
        return {"logits": scale * self.head(x + self.out(F.gelu(self.hidden(self.norm(x)))))}


def test_token_ids_keyword_inputs_and_tied_embeddings() -> None:
    model = Language()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for inputs in ({"ids": ids}, {"ids": ids, "keep": torch.ones(2, 3), "scale": 2.0}, (ids,)):
        symmetry = derive_symmetry(model, inputs)
        assert sorted(g.size for g in symmetry.groups) == [8, 9]
        stream = next(g for g in symmetry.groups if g.size == 8)
        places = {(m.tensor, m.axis) for m in stream.members}
        assert {("tokens.weight", 1), ("head.weight", 1), ("positions.weight", 1)} <= places
    assert symmetry.tied == {"head.weight": "tokens.weight"}


def test_a_forward_that_branches_on_values_says_where() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(FastarError, match=r"test_symmetry_blocks\.py:\d+, in forward.*PermutationSpec") as why:
        derive_symmetry(Branch(), (torch.zeros(2, 3),))
    assert "\n" not in str(why.value)


@pytest.mark.parametrize("inputs", [torch.zeros(2, 6), (), {}])
def test_example_inputs_are_a_tuple_or_a_mapping(inputs: object) -> None:
    with pytest.raises(FastarError, match=r"example_inputs of Linear are a .*give a tuple"):
        derive_symmetry(nn.Linear(6, 3), inputs)  # type: ignore[arg-type]
