"""Vision transformer (Dosovitskiy et al. 2021), pre-norm, with a class token and learned positions."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fastar.errors import FastarError
from fastar.models.layers import Activation, Parts, at_least, dropout_share

# As the original's, and in its wake everybody's.
EPSILON = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention with one linear map to queries, keys and values."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, dim] of the same."""
        batch, tokens, dim = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)  # each [batch, heads, tokens, dim / heads]
        seen = F.scaled_dot_product_attention(query, key, value)
        out: torch.Tensor = self.out(seen.transpose(1, 2).reshape(batch, tokens, dim))
        return out


class Encoder(nn.Module):
    """norm, attention, residual; norm, two linear maps with an activation between, residual."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float, parts: Parts):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPSILON)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPSILON)
        self.hidden = nn.Linear(dim, hidden)
        self.activate = parts.activation()
        self.project = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        out = self.dropout(self.activate(self.hidden(self.norm2(x))))
        return x + self.dropout(self.project(out))


class VisionTransformer(nn.Module):
    """Patches as tokens, a class token before them, positions added, encoders, norm, a linear classifier of the class
    token. 5,717,416 parameters as ViT-Ti/16 at 224 pixels and 1000 classes (patch 16, dim 192, depth 12, heads 3).

    Args:
        input_shape: (channels, height, width) of one image.
        classes: number of logits.
        patch: side of a patch in pixels; divides the image's sides.
        dim: width of the tokens.
        depth: encoders.
        heads: of each attention; divides `dim`.
        mlp_ratio: hidden units of an encoder, times `dim`.
        dropout: share that is dropped of the first tokens, of each branch and of its hidden units.
        activation: of the hidden units.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        patch: int = 4,
        dim: int = 64,
        depth: int = 6,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
        activation: Activation = "gelu",
    ):
        super().__init__()
        channels, height, width = input_shape
        for option, value in (("patch", patch), ("dim", dim), ("depth", depth), ("heads", heads)):
            at_least(value, 1, option, "vit")
        if height % patch or width % patch:
            raise FastarError(f"model.patch={patch} of vit must divide the sides of its images, {height}x{width}")
        if dim % heads:
            raise FastarError(f"model.heads={heads} of vit must divide model.dim={dim}")
        hidden = round(mlp_ratio * dim)
        if hidden < 1:
            raise FastarError(f"model.mlp_ratio={mlp_ratio} of vit leaves no hidden units: use a larger one")
        share, parts = dropout_share(dropout, "vit"), Parts(activation)
        self.patches = nn.Conv2d(channels, dim, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, 1 + (height // patch) * (width // patch), dim))
        self.dropout = nn.Dropout(share)
        self.encoders = nn.Sequential(*(Encoder(dim, heads, hidden, share, parts) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=EPSILON)
        self.classifier = nn.Linear(dim, classes)
        nn.init.normal_(self.positions, std=0.02)
        for module in self.encoders.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] of images [batch, channels, height, width]."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        first = self.class_token.expand(tokens.shape[0], -1, -1)
        out = self.dropout(torch.cat((first, tokens), dim=1) + self.positions)
        logits: torch.Tensor = self.classifier(self.norm(self.encoders(out))[:, 0])
        return logits


MODELS = {"vit": VisionTransformer}
