"""A way out of local optima: kick a descent that has ended out of its optimum, descend again, keep what is better."""

from __future__ import annotations

import numpy as np

from fastar.matching.weight.descent import Descent, stacked
from fastar.runtime.seeds import derive_seed
from fastar.symmetry.batched_index import upload

# Noise on S_g, in standard deviations of its entries, one after the other: units whose partners are nearly as good as
# another's change them, sure ones stay. On ResNet-18, 5 kicks at 0.25 throughout gained as much, at 0.15 a quarter less
# and at 0.1 half as much; noise on single groups, or on all of them at 0.5 and more, gained less for the time.
LEVELS = (0.3, 0.25, 0.2, 0.15, 0.1)


def polish(descent: Descent, kicks: int, seed: int, max_sweeps: int) -> list[int]:
    """Kick every source of a descent that has ended `kicks` times; how many kicks of each source were kept.

    A kick solves all families once, in a random order, with noise on S_g, takes these assignments whatever they do to
    the objective, and descends to the next local optimum. A source keeps the better of it and where it stood, so that
    no objective is lowered. What is drawn depends on the seed and the number of the kick alone, so that a source's
    result does not depend on the others'.
    """
    groups, families = descent.problem.groups, descent.problem.families
    kept = np.zeros(descent.count, dtype=np.int64)
    for kick in range(kicks):
        random = np.random.default_rng(derive_seed(seed, "matching kick", kick))
        mark, (before, _) = descent.mark(), descent.sources.objectives()
        for f in random.permutation(len(families)):
            noisy = []
            for g in families[f]:
                size, score = groups[g].size, descent.score(g)
                (noise,) = upload([random.standard_normal((size, size), dtype=np.float32)], score.device)
                spread = score.flatten(1).std(dim=1, correction=0) * LEVELS[kick % len(LEVELS)]
                noisy.append(score + noise * spread[:, None, None])
            descent.force(int(f), stacked(descent.solve(int(f), noisy, descent.everyone)))
        order = [int(f) for f in random.permutation(len(families))]

        def there_and_back(sweep: int, order: list[int] = order) -> list[int]:
            return order[::-1] if sweep % 2 else order

        descent.run(there_and_back, max_sweeps)
        # Back at the same end the objective is the same, whatever the rounding of sums says.
        elsewhere = [(now != index).any(1) for now, index in zip(descent.permutations, mark.permutations, strict=True)]
        better = np.any(elsewhere, axis=0) & (descent.sources.objectives()[0] > before)
        kept += better
        descent.go_back(mark, np.flatnonzero(~better))
    return [int(one) for one in kept]
