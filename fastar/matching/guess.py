"""A first guess where nothing is known about how the units of two networks correspond."""

from __future__ import annotations

import torch

from fastar.matching.descent import Descent


def align_backward(descent: Descent) -> None:
    """Match group after group from the output to the input, as a place to start from.

    Each S_g counts only parameters whose other groups are matched already, since the others would add noise. Every
    product of a parameter is computed once; afterwards all S_g are complete. A source for which this ends below the
    objective it began with goes back to where it was.
    """
    problem, count = descent.problem, descent.count
    before = [descent.objective(n)[0] for n in range(count)]
    given = dict(descent.data), [index.copy() for index in descent.permutations]
    owned = dict(descent.owned)
    done: set[int] = set()
    for g, group in reversed(list(enumerate(problem.groups))):
        score = torch.zeros(count, group.size, group.size, device=descent.device())
        for name in problem.tensors[g]:
            if {p.group for p in problem.places[name]} - done <= {g} and not _twice(descent, g, name):
                descent.add(score, name, g)
        done.add(g)
        answers = descent.solve(score, list(range(count)))
        for n, answer in enumerate(answers):
            for name, row in descent.permuted(g, n, answer).items():
                descent.replace(name, n, row)
            descent.permutations[g][n] = descent.permutations[g][n][answer]
            score[n] = score[n].index_select(1, torch.from_numpy(answer).to(score.device))
        descent.scores[g] = score
        for name in problem.tensors[g]:
            others = {p.group for p in problem.places[name]}
            if others <= done:
                late = others if _twice(descent, g, name) else others - {g}
                for h in late:
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


def _twice(descent: Descent, g: int, name: str) -> bool:
    """Whether group g lies on two axes of this parameter."""
    return len({p.axis for p in descent.problem.places[name] if p.group == g}) > 1
