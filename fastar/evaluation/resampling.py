"""Intervals of means over networks, by a bootstrap over networks: values of one network are not independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastar.runtime.seeds import derive_seed

RESAMPLES = 2000
# The interval's ends, as percentiles of the bootstrap's means.
PERCENTILES = (2.5, 97.5)

Networks = Sequence[tuple[str, str]]
"""The networks that a value is of, each by its part (star, source, heldout) and its name in it."""


def resampled_means(values: Sequence[float], networks: Sequence[Networks], seed: int) -> np.ndarray:
    """Means [RESAMPLES] of values over networks drawn anew, with replacement, from those of each part that there are; a
    value counts as often as all its networks are drawn. NaN where none of them is.

    A network's own value, and pairs of networks, are both such values. A pair of a network with itself has none.

    Args:
        values: one for each of `networks`.
        seed: of the draws; of the same networks of a part they are the same, whatever the values.
    """
    weights = np.ones((RESAMPLES, len(values)))
    for part in sorted({part for of in networks for part, _ in of}):
        there = sorted({name for of in networks for other, name in of if other == part})
        generator = np.random.default_rng(derive_seed(seed, part, *there))
        drawn = generator.multinomial(len(there), np.full(len(there), 1 / len(there)), size=RESAMPLES)
        for column, of in enumerate(networks):
            for other, name in of:
                if other == part:
                    weights[:, column] *= drawn[:, there.index(name)]
    whole = weights.sum(1)
    return np.where(whole > 0, weights @ np.asarray(values, float) / np.where(whole > 0, whole, 1), np.nan)


def interval(resampled: np.ndarray) -> list[float] | None:
    """The 95 % interval of what was resampled; None: nothing can be drawn."""
    known = resampled[np.isfinite(resampled)]
    return None if not len(known) else [float(end) for end in np.percentile(known, PERCENTILES)]
