"""`fastar.train_sources` and `fastar.train_star` on one run folder, in any order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fastar


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def test_heldouts_may_be_trained_before_and_after_a_star_of_given_sources(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    train, recipe = (x, x.sum(1, keepdim=True)), fastar.Recipe(epochs=1, batch_size=16, lr=0.01)

    def heldouts(number: int) -> list[fastar.TrainedModel]:
        return fastar.train_sources(
            build, train, recipe, number=number, kind="heldout", loss="mse", out=tmp_path, progress=False
        )

    def star() -> fastar.Star:
        return fastar.train_star(build, sources, train, recipe, loss="mse", out=tmp_path, progress=False)

    assert len(heldouts(1)) == 1
    assert fastar.load_run(tmp_path).sources == []  # those alone that were asked for
    sources = fastar.train_sources(build, train, recipe, number=2, loss="mse", progress=False)
    first = star()
    assert (first.results["sources"], first.results["heldout"]) == (2, 1)
    assert len(heldouts(2)) == 2
    again = star()
    assert (again.results["sources"], again.results["heldout"]) == (2, 2)
    assert all(torch.equal(value, again.state[name]) for name, value in first.state.items())
    with pytest.raises(fastar.FastarError, match="gives the sources, so none are to be trained"):
        fastar.train_sources(build, train, recipe, number=2, loss="mse", out=tmp_path, progress=False)
