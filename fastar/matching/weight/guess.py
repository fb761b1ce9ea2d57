"""A first guess where nothing is known about how the units of two networks correspond."""

from __future__ import annotations

import numpy as np
import torch

from fastar.matching.weight.descent import Descent, stacked
from fastar.symmetry.batched_index import along, upload


def align_backward(descent: Descent) -> None:
    """Match family after family from the output to the input, as a place to start from.

    Each S_g counts only parameters whose other groups are matched already, since the others would add noise. Every
    product of a parameter is computed once; afterwards all S_g are complete. A source for which this ends below the
    objective it began with goes back to where it was.
    """
    problem, count, device = descent.problem, descent.count, descent.sources.device
    before, _ = descent.sources.objectives()
    kept, permutations = descent.sources.keep(), [index.copy() for index in descent.permutations]
    done: set[int] = set()
    for f, family in reversed(list(enumerate(problem.families))):
        scores = []
        for g in family:
            score = torch.zeros(
                count, problem.groups[g].size, problem.groups[g].size, device=device, dtype=torch.float32
            )
            for name in problem.tensors[g]:
                if {p.group for p in problem.places[name]} - done <= set(family) and not problem.twice(f, name):
                    descent.add(score, name, g)
            scores.append(score)
        done |= set(family)
        answers = stacked(descent.solve(f, scores, descent.everyone))
        descent.sources.permute(f, descent.everyone, answers)
        descent.taken(f, descent.everyone, answers)
        for g, score, index in zip(family, scores, upload(answers, device), strict=True):
            descent.scores[g] = along(score, 1, index)
        for name in problem.touched[f]:
            others = {p.group for p in problem.places[name]}
            if others <= done:
                late = others if problem.twice(f, name) else others - set(family)
                for h in sorted(late):
                    known = descent.scores[h]
                    assert known is not None
                    descent.add(known, name, h)
    after, _ = descent.sources.objectives()
    worse = np.flatnonzero(after < before)
    if not len(worse):
        return
    descent.scores = [None] * len(descent.scores)
    descent.sources.go_back(kept, worse)
    for now, index in zip(descent.permutations, permutations, strict=True):
        now[worse] = index[worse]
