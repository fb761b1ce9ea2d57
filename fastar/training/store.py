"""The source models Z as rows of one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastar.errors import FastarError
from fastar.flat import FlatLayout


class SourcesStore:
    """The parameters of N sources, one row each, kept permuted to match the star model.

    Args:
        layout: where parameters lie in a row.
        states: one state dict per source.
        names: what to call them in errors.
        device: where the rows live.

    Raises:
        FastarError: a source of another architecture, or with values that are not finite.
    """

    def __init__(
        self, layout: FlatLayout, states: Sequence[Mapping[str, Tensor]], names: Sequence[str], device: torch.device
    ):
        if not states:
            raise FastarError("a star model needs at least one source")
        self.layout = layout
        self.names = list(names)
        self.rows = torch.zeros(len(states), layout.numel, device=device)
        for row, state, name in zip(self.rows, states, self.names, strict=True):
            try:
                layout.flatten(state, out=row)
            except FastarError as error:
                raise FastarError(f"source {name}: {error}") from error
            if not torch.isfinite(row).all():
                raise FastarError(f"source {name} has NaN or infinite values; train it again or leave it out")

    def __len__(self) -> int:
        return len(self.rows)

    def views(self) -> dict[str, Tensor]:
        """Parameter name to [N, *shape] view of the rows."""
        return self.layout.views(self.rows)
