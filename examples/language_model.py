"""A star model of small language models: characters of Python's own documentation.

    python examples/language_model.py

Six causal transformers of two layers read the topics of Python's `help()`. Their heads are matched as wholes, and the
queries, keys and values inside each head.
It prints losses and barriers in nats a character, and the groups that were matched, seven minutes on one core. On the
training data: star to sources 0.377, star to heldouts 1.059, regular to regular 0.989, and 1.219 without matching. The
star is near its six sources, and not nearer to heldouts than regular models are to each other.
"""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastar

CONTEXT, WIDTH, HEADS, CHARACTERS = 64, 64, 4, 128


class Block(nn.Module):
    """Attention and a hidden layer, each added to the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_hidden = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.heads_out = nn.Linear(WIDTH, WIDTH)
        self.hidden, self.hidden_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.before_attention(x)
        split = [
            layer(normed).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        ]
        attended = F.scaled_dot_product_attention(*split, is_causal=True)
        x = x + self.heads_out(attended.transpose(1, 2).flatten(2))
        return x + self.hidden_out(F.gelu(self.hidden(self.before_hidden(x))))


class LanguageModel(nn.Module):
    """Characters [batch, place] -> logits of the next one [batch, place, character]."""

    def __init__(self) -> None:
        super().__init__()
        self.character, self.place = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.character(characters) + self.place.weight[: characters.shape[1]]
        return self.out(self.norm(self.blocks(x)))


def text(length: int | None) -> tuple[Tensor, Tensor]:
    """Training and test data: lines of CONTEXT characters, [n, CONTEXT]; every tenth is for testing."""
    data = "\n".join(topics.values()).encode("ascii", "replace")[:length]
    lines = torch.tensor(list(data[: len(data) // CONTEXT * CONTEXT])).view(-1, CONTEXT)
    tests = torch.arange(len(lines)) % 10 == 0
    return lines[~tests], lines[tests]


def main(epochs: int = 3, number: int = 6, length: int | None = None) -> fastar.Star:
    train, test = text(length)
    recipe = fastar.Recipe(
        epochs=epochs, batch_size=16, optimizer="adamw", lr=2e-3, warmup_epochs=0.2, star={"epochs": 3 * epochs},
        evaluation={"points": 7, "limit": 500, "test_limit": 500, "regular_pairs": 6},
    )  # fmt: skip
    sources = fastar.train_sources(LanguageModel, train, recipe, number=number, loss="lm")
    heldouts = fastar.train_sources(LanguageModel, train, recipe, number=2, kind="heldout", loss="lm")
    star = fastar.train_star(LanguageModel, sources, train, recipe, heldouts=heldouts, test=test, loss="lm")
    print(star.table())
    print({name: list(index.shape) for name, index in star.permutations.items()})
    return star


if __name__ == "__main__":
    main()
