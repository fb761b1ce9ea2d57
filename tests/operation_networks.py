"""Small networks around one operation each, and their groups counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from freedom_networks import IMAGES, NODES, TOKENS, X, inputs
from symmetry_checks import Case, counted
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

WORDS = (torch.tensor([[1, 2, 3, 4, 9], [5, 6, 7, 8, 0], [10, 3, 5, 1, 7]]),)


class Between(nn.Module):
    """8 hidden units of each token, `middle` of them [B, 5, 8], and a readout of `out`."""

    def __init__(self, middle: Callable[[Tensor], Tensor], out: int = 8):
        super().__init__()
        self.stem, self.readout, self.middle = nn.Linear(6, 8), nn.Linear(out, 3), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.middle(torch.tanh(self.stem(x))))


class Images(nn.Module):
    """4 channels, `middle` of them, which may have parameters, 5 channels that read `read`, and a readout."""

    def __init__(self, middle: Callable[[Tensor], Tensor], read: int = 4, channels: int = 4):
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, channels, 3, padding=1), middle
        self.mix, self.readout = nn.Conv2d(read, 5, 3, padding=1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.tanh(self.stem(x)))
        return self.readout(torch.tanh(self.mix(x)).mean((2, 3)))


# Recurrent layers


class Tagger(nn.Module):
    """A class for each word, from a recurrent layer over 6 numbers of each."""

    def __init__(self, kind: type[nn.RNNBase], out: int = 5, **options: Any):
        super().__init__()
        self.words, self.layer = nn.Embedding(11, 6), kind(6, 5, batch_first=True, **options)
        self.readout = nn.Linear(out, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.readout(self.layer(self.words(words))[0])


class LastState(nn.Module):
    """What is left at the end, hidden units and cells, of a layer whose beginning is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(11, 6), nn.LSTM(6, 5)
        self.h, self.c = nn.Parameter(torch.zeros(1, 1, 5)), nn.Parameter(torch.zeros(1, 1, 5))
        self.readout, self.of_cells = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, words: Tensor) -> Tensor:
        begin = tuple(one.expand(-1, len(words), -1).contiguous() for one in (self.h, self.c))
        _, (h, c) = self.layer(self.words(words).transpose(0, 1), begin)
        return self.readout(h[-1]) + self.of_cells(torch.tanh(c[-1]))


class Cells(nn.Module):
    """A cell that is called for each word."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.words, self.cell, self.readout = nn.Embedding(11, 6), cell, nn.Linear(5, 3)

    def forward(self, words: Tensor) -> Tensor:
        state = None
        for x in self.words(words).unbind(1):
            state = self.cell(x, state)
        return self.readout(state[0] if isinstance(state, tuple) else state)


# 6 numbers of each word; 5 units of each layer and direction, which are in all gates, and in the state they read.
RECURRENT: dict[str, Case] = {
    "lstm": Case(lambda: Tagger(nn.LSTM), WORDS, counted(6, 5)),
    "lstm_without_bias": Case(lambda: Tagger(nn.LSTM, bias=False), WORDS, counted(6, 5)),
    "lstm_both_ways": Case(lambda: Tagger(nn.LSTM, 10, bidirectional=True), WORDS, counted(6, 5, 5)),
    "lstm_two_layers": Case(lambda: Tagger(nn.LSTM, num_layers=2), WORDS, counted(6, 5, 5)),
    "lstm_two_layers_both_ways": Case(
        lambda: Tagger(nn.LSTM, 10, num_layers=2, bidirectional=True), WORDS, counted(6, 5, 5, 5, 5)
    ),
    # 4 units read the 5 cells' outputs, and are what is read on.
    "lstm_projected": Case(lambda: Tagger(nn.LSTM, 4, proj_size=4), WORDS, counted(6, 5, 4)),
    "lstm_last_state": Case(LastState, WORDS, counted(6, 5)),
    "gru": Case(lambda: Tagger(nn.GRU), WORDS, counted(6, 5)),
    "gru_two_layers_both_ways": Case(
        lambda: Tagger(nn.GRU, 10, num_layers=2, bidirectional=True), WORDS, counted(6, 5, 5, 5, 5)
    ),
    "rnn": Case(lambda: Tagger(nn.RNN), WORDS, counted(6, 5)),
    "rnn_relu": Case(lambda: Tagger(nn.RNN, nonlinearity="relu"), WORDS, counted(6, 5)),
    "lstm_cell": Case(lambda: Cells(nn.LSTMCell(6, 5)), WORDS, counted(6, 5)),
    "gru_cell": Case(lambda: Cells(nn.GRUCell(6, 5)), WORDS, counted(6, 5)),
    "rnn_cell": Case(lambda: Cells(nn.RNNCell(6, 5)), WORDS, counted(6, 5)),
}


# Functions of tokens that treat units alike


def written(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0.5
    x[:, 1:3] = x[:, 2:4] * 2
    x[:, 4].mul_(3)
    return x


def written_at(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, torch.tensor([0, 3])] = x[:, 1:2]
    return x.index_put((torch.tensor([0, 1]), torch.tensor([1, 1])), x[:2, 4], accumulate=True)


def copied(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], 6, 8)
    out[:, :5].copy_(x)
    out[:, 5].copy_(x.sum(1))
    return out


def scattered(x: Tensor) -> Tensor:
    """Each token is put where an index says, as functions that write nothing in place do it."""
    x = torch.slice_scatter(x, x[:, :2] * 2, 1, 3, 5)
    return torch.select_scatter(x, x[:, 1].cos(), 1, 0)


def summed_at(x: Tensor) -> Tensor:
    to = torch.tensor([1, 0, 1, 2, 2])
    out = x.new_zeros(x.shape[0], 3, 8).index_add(1, to, x)
    return out + x.new_zeros(x.shape[0], 3, 8).scatter_add(1, to[None, :, None].expand_as(x).flip(1), x * x)


def taken(x: Tensor) -> Tensor:
    index = torch.tensor([[3, 0], [1, 4], [2, 2], [4, 0]])[:, :, None].expand(-1, -1, 8)
    return x.gather(1, index) + torch.take_along_dim(x, index.flip(1), 1)


def written_units(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 0] = 1.0
    return x


def largest(x: Tensor) -> Tensor:
    values, where = x.max(1)
    return values * (1 + where) + x.argmin(1) * x.min(1).values


def first_few(x: Tensor) -> Tensor:
    values, where = x.topk(2, 1)
    return values[:, 0] - values[:, 1] * torch.tanh(where[:, 0] - 1.5 * where[:, 1])


def sorted_tokens(x: Tensor) -> Tensor:
    values, where = x.sort(1)
    return (values * torch.arange(5.0)[:, None]).sum(1) + values[:, 2] * where[:, 0] + x.argsort(1)[:, 1]


def middle_token(x: Tensor) -> Tensor:
    values, where = x.median(1)
    return values * (1 + where) + x.kthvalue(2, 1).values + x.cummax(1).values[:, 1]


def variance_and_mean(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    of_tokens, mean_of_tokens = torch.var_mean(x, 1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5) + of_tokens * mean_of_tokens


class Similar(nn.Module):
    """The cosine of the angle between what two layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.cosine_similarity(torch.tanh(self.first(x)), torch.tanh(self.second(x)), dim=-1)


class Ellipsis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.readout = nn.Linear(6, 8), nn.Linear(7, 3)
        self.weight = nn.Parameter(torch.zeros(7, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(torch.einsum("...d,hd->...h", torch.tanh(self.stem(x)), self.weight)))


class Bag(nn.Module):
    """One vector of 8 for each sentence: the mean of its words', and the sum of others."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.others = nn.EmbeddingBag(11, 8, mode="mean"), nn.EmbeddingBag(11, 8, mode="sum")
        self.readout = nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.words(words) + self.others(words)))


class Pairs(nn.Module):
    """7 units that are each a product of 5 and 6."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(6, 6)
        self.pairs, self.readout = nn.Bilinear(5, 6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.tanh(self.pairs(torch.tanh(self.first(x)), torch.tanh(self.second(x)))))


class Messages(nn.Module):
    """A graph of 5 nodes and 7 edges: two rounds of messages of 7 units, added to 8 of each node."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.message = nn.Linear(6, 8), nn.Linear(16, 7)
        self.update, self.readout = nn.Linear(7, 8), nn.Linear(8, 3)
        self.register_buffer("sender", torch.tensor([0, 1, 2, 3, 4, 0, 2]), persistent=False)
        self.register_buffer("receiver", torch.tensor([1, 2, 3, 4, 0, 3, 0]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for _ in range(2):
            pairs = torch.cat([x.index_select(0, self.sender), x[self.receiver]], -1)
            sums = x.new_zeros(len(x), 7).index_add(0, self.receiver, torch.tanh(self.message(pairs)))
            x = torch.tanh(x + self.update(sums))
        return self.readout(x.mean(0, keepdim=True))


TOKEN_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{"largest": largest, "first_few": first_few, "sorted_tokens": sorted_tokens, "middle_token": middle_token},
    **{"written": written, "written_at": written_at, "copied": copied, "scattered": scattered},
    **{"summed_at": summed_at, "taken": taken, "variance_and_mean": variance_and_mean},
}
FUNCTIONS: dict[str, Case] = {
    # All 8 units are treated alike.
    **{name: Case(lambda f=f: Between(f), TOKENS, counted(8)) for name, f in TOKEN_FUNCTIONS.items()},  # type: ignore[misc]
    # Unit 0 is written over, the other 7 move.
    "written_units": Case(lambda: Between(written_units), TOKENS, counted(7)),
    "cosine_similarity": Case(Similar, TOKENS, counted(8)),
    "einsum_with_an_ellipsis": Case(Ellipsis, TOKENS, counted(8, 7)),
    "embedding_bag": Case(Bag, WORDS, counted(8)),
    "bilinear": Case(Pairs, X, counted(5, 6, 7)),
    "messages": Case(Messages, NODES, counted(8, 7)),
}


# Images


class Upsampled(nn.Module):
    """A small U-Net: 4 channels, 6 of half the size, 4 of the whole size again, and 5 that read both 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 2, 2)
        self.up, self.both = nn.ConvTranspose2d(6, 4, 2, 2), nn.Conv2d(8, 5, 3, padding=1)
        self.out = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        up = torch.tanh(self.up(torch.tanh(self.down(x))))
        return self.out(torch.tanh(self.both(torch.cat([x, up], 1))))


class Patches(nn.Module):
    """Patches of 2 x 2 of 4 channels, a layer of 5 x 2 x 2 on each, and put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 20)

    def forward(self, x: Tensor) -> Tensor:
        patches = torch.tanh(self.mix(F.unfold(x, 2, stride=2).transpose(1, 2)))
        return F.fold(patches.transpose(1, 2), x.shape[-2:], 2, stride=2)


class Turned(nn.Module):
    """A spatial transformer: 7 hidden units decide how the image is turned."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.angles = nn.Linear(4, 7), nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        theta = torch.tanh(self.angles(torch.tanh(self.hidden(x.mean((2, 3)))))).view(-1, 2, 3)
        return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


class Volumes(nn.Module):
    """Upsampling of a volume, whose channels are 4, then 5."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.readout = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(4, 5, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(torch.tanh(self.stem(x)), scale_factor=2, mode="trilinear")
        x = F.interpolate(torch.tanh(self.mix(x)), scale_factor=2, mode="nearest")
        return self.readout(x.square().mean((2, 3, 4)))


class Waves(nn.Module):
    """The same of one dimension, with transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.readout = nn.Conv1d(6, 4, 3), nn.ConvTranspose1d(4, 5, 3, 2), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(torch.tanh(self.stem(x.transpose(1, 2))), scale_factor=2.0, mode="linear")
        return self.readout(torch.tanh(self.up(x)).mean(2))


def bicubic(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bicubic") + F.interpolate(x, scale_factor=2, mode="nearest-exact")


class Blurred(nn.Module):
    """One filter for every channel, as a buffer that is not in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filter", (row[:, None] * row)[None, None].repeat(4, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filter, stride=2, padding=1, groups=4)


class Denoiser(nn.Module):
    """A block of a diffusion network: a stream of 12 channels in 3 groups, 12 hidden ones in 4, a time, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 3, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(groups, 12) for groups in (3, 4, 3, 3)])
        self.first, self.second = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.time, self.shift = nn.Linear(4, 6), nn.Linear(6, 12)
        self.query, self.key, self.value, self.project = (nn.Conv2d(12, 12, 1) for _ in range(4))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        angle = time[:, None] * torch.tensor([1.0, 0.1])
        time = F.silu(self.time(torch.cat([angle.sin(), angle.cos()], -1)))
        x = self.stem(x)
        hidden = self.first(F.silu(self.norms[0](x))) + self.shift(time)[:, :, None, None]
        x = x + self.second(F.silu(self.norms[1](hidden)))
        normed = self.norms[2](x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        x = x + self.project(attended.transpose(1, 2).unflatten(2, x.shape[2:]))
        return self.out(F.silu(self.norms[3](x)))


IMAGE_CASES: dict[str, Case] = {
    "u_net": Case(Upsampled, IMAGES, counted(4, 6, 4, 5)),
    "bicubic": Case(lambda: Images(bicubic), IMAGES, counted(4, 5)),
    "volumes": Case(Volumes, (inputs(2, 3, 4, 4, 4),), counted(4, 5)),
    "waves": Case(Waves, TOKENS, counted(4, 5)),
    "blurred": Case(lambda: Images(Blurred()), IMAGES, counted(4, 5)),
    # Each of 4 channels is read as 4 neighbours, which become its pixels; the other way round each becomes 4.
    "pixel_shuffle": Case(lambda: Images(nn.PixelShuffle(2), channels=16), IMAGES, counted(4, 5)),
    "pixel_unshuffle": Case(lambda: Images(nn.PixelUnshuffle(2), 16), IMAGES, counted(4, 5)),
    # 4 channels, and 5 that the layer writes in 4 positions each.
    "patches": Case(lambda: Images(Patches(), 5), IMAGES, counted(4, 5, 5)),
    "spatial_transformer": Case(lambda: Images(Turned()), IMAGES, counted(4, 7, 5)),
    # The stream in its groups; 6 units of the time; hidden channels in theirs; queries with keys, and values.
    "denoiser": Case(Denoiser, (*IMAGES, inputs(4)), counted(3, (12, 3), 6, 4, (12, 4), 12, 12)),
}


# Weights that are computed


def normed(kind: Callable[..., nn.Module], *layers: nn.Module) -> nn.Module:
    """`layers` with a tanh between them, each parametrised by `kind`."""
    return nn.Sequential(*(one for layer in layers for one in (kind(layer), nn.Tanh())))


def linear_layers() -> list[nn.Module]:
    return [nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)]


def convolutions() -> list[nn.Module]:
    return [nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv2d(5, 2, 1)]


PARAMETRISED: dict[str, Case] = {
    "weight_norm": Case(lambda: normed(parametrizations.weight_norm, *linear_layers()), X, counted(8, 7)),
    "weight_norm_of_convolutions": Case(
        lambda: normed(parametrizations.weight_norm, *convolutions()), IMAGES, counted(4, 5)
    ),
    "spectral_norm": Case(lambda: normed(parametrizations.spectral_norm, *linear_layers()), X, counted(8, 7)),
    "spectral_norm_of_convolutions": Case(
        lambda: normed(parametrizations.spectral_norm, *convolutions()), IMAGES, counted(4, 5)
    ),
}

OPERATIONS = {**RECURRENT, **FUNCTIONS, **IMAGE_CASES, **PARAMETRISED}
