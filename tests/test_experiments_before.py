"""What a run is told before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastar


class Spectrum(nn.Module):
    """Reads its hidden units by their frequencies: an operation that no rule covers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.fft.fft(self.first(x)).abs())


def test_a_network_that_cannot_be_matched_is_refused_before_its_heldouts_are_trained(tmp_path: Path) -> None:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    train, recipe = (x, x[:, :3].argmax(1)), fastar.Recipe(epochs=1, batch_size=16)
    with pytest.raises(fastar.FastarError, match="fft_fft"):
        fastar.train_star(Spectrum, [Spectrum(), Spectrum()], train, recipe, out=tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "log.jsonl").exists()
