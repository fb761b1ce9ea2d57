"""Shares of the sources that ranks hold and match."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastar.config import StarSettings
from fastar.runtime import ranks
from fastar.symmetry import Permutations


@dataclass(frozen=True)
class SourceShares:
    """The places, among all sources, of those that this rank holds, and of those of them that it matches.

    With `star.draws=shared` a rank holds all sources and matches its share, with `each` it holds its share alone.
    """

    number: int
    held: range
    matched: range

    @classmethod
    def here(cls, number: int, star: StarSettings) -> SourceShares:
        """The shares of this rank, of `number` sources."""
        own = ranks.share(number, ranks.rank(), ranks.world()) if ranks.world() > 1 else range(number)
        return cls(number, own if star.draws == "each" else range(number), own)

    @property
    def weight(self) -> float:
        """The share of all sources that is held: of a rank's gradient in the mean over all sources."""
        return len(self.held) / self.number

    @property
    def matched_rows(self) -> range:
        """The rows, among those held, of the sources that are matched here."""
        begin = self.held.start
        return range(self.matched.start - begin, self.matched.stop - begin)

    def other_rows(self) -> list[range]:
        """The rows of the sources that are held here and matched by other ranks."""
        mine = self.matched_rows
        return [range(mine.start), range(mine.stop, len(self.held))]


def rows_of(permutations: Permutations, places: range) -> Permutations:
    """The permutations of the sources at these places."""
    return Permutations({name: index[places.start : places.stop] for name, index in permutations.items()})


def of_all(permutations: Permutations, objective: Tensor, weights: Tensor) -> tuple[Permutations, Tensor, Tensor]:
    """Permutations and objectives of all sources, of those that each rank has found of its own."""
    if ranks.world() == 1:
        return permutations, objective, weights
    found = ranks.gathered(({name: index.int() for name, index in permutations.items()}, objective, weights))
    joined = {name: torch.cat([one[name] for one, _, _ in found]).long() for name in permutations}
    return Permutations(joined), torch.cat([one for _, one, _ in found]), torch.cat([one for _, _, one in found])
