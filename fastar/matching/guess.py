"""A first guess where nothing is known about how the units of two networks correspond."""

from __future__ import annotations

import torch

from fastar.matching.descent import Descent


def align_backward(descent: Descent) -> None:
    """Match family after family from the output to the input, as a place to start from.

    Each S_g counts only parameters whose other groups are matched already, since the others would add noise. Every
    product of a parameter is computed once; afterwards all S_g are complete. A source for which this ends below the
    objective it began with goes back to where it was.
    """
    problem, count = descent.problem, descent.count
    before = [descent.objective(n)[0] for n in range(count)]
    given = dict(descent.data), [index.copy() for index in descent.permutations]
    owned = dict(descent.owned)
    done: set[int] = set()
    for f, family in reversed(list(enumerate(problem.families))):
        scores = []
        for g in family:
            score = torch.zeros(count, problem.groups[g].size, problem.groups[g].size, device=descent.device())
            for name in problem.tensors[g]:
                if {p.group for p in problem.places[name]} - done <= set(family) and not problem.twice(f, name):
                    descent.add(score, name, g)
            scores.append(score)
        done |= set(family)
        for n, answers in enumerate(descent.solve(scores, list(range(count)))):
            for name, row in descent.permuted(f, n, answers).items():
                descent.replace(name, n, row)
            for g, score, answer in zip(family, scores, answers, strict=True):
                descent.permutations[g][n] = descent.permutations[g][n][answer]
                score[n] = score[n].index_select(1, torch.from_numpy(answer).to(score.device))
        for g, score in zip(family, scores, strict=True):
            descent.scores[g] = score
        for name in problem.touched[f]:
            others = {p.group for p in problem.places[name]}
            if others <= done:
                late = others if problem.twice(f, name) else others - set(family)
                for h in sorted(late):
                    known = descent.scores[h]
                    assert known is not None
                    descent.add(known, name, h)
    worse = [n for n in range(count) if descent.objective(n)[0] < before[n]]
    if not worse:
        return
    descent.scores = [None] * len(descent.scores)
    data, permutations = given
    if count == 1:
        descent.data, descent.owned, descent.permutations = data, owned, permutations
        descent.products.clear()
        return
    for n in worse:
        for name, tensor in data.items():
            descent.replace(name, n, tensor[n])
        for g, index in enumerate(permutations):
            descent.permutations[g][n] = index[n]
