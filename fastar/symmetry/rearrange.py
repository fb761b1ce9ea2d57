"""Labels of tensors that are taken apart, put together and reshaped: positions go with the values."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from math import prod

import numpy as np

from fastar.symmetry.labels import Cell, Labels, cell, combine, stay
from fastar.symmetry.positions import Array, Constraints

MOST = 1 << 22  # positions that a flattened axis may have


class CannotFlatten(Exception):
    """A reshape makes an axis of more hidden units than are followed. Holds the size as text."""


def take(known: Constraints, x: Labels, d: int, index: Array) -> Labels:
    """Positions `index` along dimension `d`, in this order; some may be left out, some there several times."""
    shape = (*x.shape[:d], len(index), *x.shape[d + 1 :])
    cells = []
    again = len(np.unique(index)) < len(index)
    for one in x.cells:
        if d not in one.dims:
            cells.append(one)
            continue
        axis = one.dims.index(d)
        at = one.at.take(index, axis)
        if len(np.unique(index)) < one.at.shape[axis]:
            known.mark(at)
        if again:  # each time they are there a position of its own
            copies = known.fresh(at.shape)
            known.within(copies, at)
            order = np.argsort(index, kind="stable")
            times = np.arange(len(index)) - np.searchsorted(index[order], index[order])
            labels = np.empty(len(index), np.int64)
            labels[order] = times
            known.mark(copies, labels.reshape([-1 if k == axis else 1 for k in range(at.ndim)]))
            at = copies
        if len(index) > 1:
            cells.append(Cell(one.dims, at))
        elif len(index) == 1 and len(one.dims) > 1:
            cells.append(Cell(tuple(k for k in one.dims if k != d), at.take([0], axis).squeeze(axis)))
    return Labels(shape, tuple(cells) if len(index) else (), x.alike - ({d} if len(index) == 1 else set()))


def join(known: Constraints, x: Labels, dims: Collection[int]) -> Cell:
    """One cell of `dims`, which the cells that touch them have no other than.

    Raises:
        CannotFlatten: it would have too many positions.
    """
    those = x.touching(dims)
    ascending = tuple(sorted(d for d in dims if x.shape[d] > 1))
    for one in those:
        if one.dims == ascending:
            return one
    sizes = tuple(x.shape[d] for d in ascending)
    if prod(sizes) > MOST:
        raise CannotFlatten(f"flattens axes of {' x '.join(map(str, sizes))} positions into one")
    at = known.fresh(sizes)
    for one in those:
        known.know_outer(at, [ascending.index(d) for d in one.dims], one.at)
    if not x.alike & set(ascending):
        known.say_joined(at, [([ascending.index(d) for d in one.dims], one.at) for one in those])
    if x.fixed & set(ascending):
        stay(known, Cell(ascending, at), x.fixed, None)
    return Cell(ascending, at)


def closure(parts: Sequence[Labels], dims: set[int]) -> set[int]:
    """`dims` and all that are in cells with them, in any of the parts."""
    while True:
        found = dims.union(*(one.dims for part in parts for one in part.touching(dims)))
        if found == dims:
            return dims
        dims = found


def concatenate(known: Constraints, parts: Sequence[Labels], d: int, why: str) -> Labels:
    """Tensors after each other along dimension `d`."""
    shape = _with(parts[0].shape, d, sum(part.shape[d] for part in parts))
    parts = [part for part in parts if part.shape[d]]
    if not any(part.touching([d]) for part in parts):
        rest = [Labels(_with(part.shape, d, 1), part.cells, part.alike - {d}) for part in parts]
        alike = all(d in part.alike or (part.shape[d] == 1 and len(parts) == 1) for part in parts)
        whole = combine(known, _with(shape, d, 1), rest, why)
        return Labels(shape, whole.cells, whole.alike | ({d} if alike else set()))
    together = closure(parts, {d})
    ascending = tuple(sorted(k for k in together if shape[k] > 1))
    rest, pieces = [], []
    for part in parts:
        pieces.append(_piece(known, part, together, d, ascending.index(d)))
        apart = tuple(one for one in part.cells if not set(one.dims) & together)
        lengths = tuple(1 if k in together else n for k, n in enumerate(part.shape))
        rest.append(Labels(lengths, apart, part.alike - together))
    lengths = tuple(1 if k in together else n for k, n in enumerate(shape))
    others = combine(known, lengths, rest, why)
    return Labels(shape, (Cell(ascending, np.concatenate(pieces, ascending.index(d))), *others.cells), others.alike)


def _piece(known: Constraints, part: Labels, together: set[int], d: int, axis: int) -> Array:
    """Positions of a tensor along the dimensions `together`, of which `d`, the one at `axis`, may be of length 1."""
    if part.shape[d] > 1:
        return join(known, part, together).at
    others = {k for k in together if k != d}
    return np.expand_dims(join(known, part, others).at, axis) if others else known.fresh((1,))


def stack(known: Constraints, parts: Sequence[Labels], d: int, why: str) -> Labels:
    """Tensors beside each other along a new dimension `d`. What moves in them need not move alike."""
    first, count = parts[0], len(parts)
    shape = (*first.shape[:d], count, *first.shape[d:])
    names = {k: k + (k >= d) for k in range(len(first.shape))}
    spread = [part.moved(names, (*part.shape[:d], 1, *part.shape[d:])) for part in parts]
    if count == 1:
        return spread[0]

    def alike(a: Labels, b: Labels) -> bool:
        cells = [{one.dims: one.at.tobytes() for one in x.cells} for x in (a, b)]
        return cells[0] == cells[1] and a.alike == b.alike

    if all(alike(spread[0], other) for other in spread[1:]):
        return Labels(shape, spread[0].cells, spread[0].alike)
    dims = {k for part in spread for one in part.cells for k in one.dims}
    if prod(shape[k] for k in dims) * count > MOST or not dims:
        whole = combine(known, spread[0].shape, spread, why)
        return Labels(shape, whole.cells, whole.alike)
    cells = []
    while dims:
        together = closure(spread, {min(dims)})
        dims -= together
        ascending = sorted({*together, d})
        at = np.stack([join(known, part, together).at for part in spread], ascending.index(d))
        cells.append(Cell(tuple(ascending), at))
    touched = {k for one in cells for k in one.dims}
    lengths = tuple(1 if k in touched else n for k, n in enumerate(shape))
    rest = [Labels(lengths, (), part.alike - touched) for part in spread]
    return Labels(shape, tuple(cells), combine(known, lengths, rest, why).alike)


def _with(shape: Sequence[int], d: int, n: int) -> tuple[int, ...]:
    return (*shape[:d], n, *shape[d + 1 :])


def reshape(known: Constraints, x: Labels, shape: Sequence[int]) -> Labels:
    """Labels after a reshape: dimensions are split and merged at the places that old and new ones have in common."""
    shape = tuple(shape)
    if 0 in shape:
        return Labels(shape)
    old = [d for d, n in enumerate(x.shape) if n > 1]
    x = x.moved({d: i for i, d in enumerate(old)}, [x.shape[d] for d in old])
    new = [n for n in shape if n > 1]
    # From the last dimensions to the first, so that those before keep their numbers.
    done: list[int] = []
    left = list(new)
    while x.shape[: len(x.shape) - len(done)] or left:
        end = len(x.shape) - len(done)
        begin, olds, news = end - 1, x.shape[end - 1], [left.pop()]
        while olds != prod(news):
            if olds < prod(news):
                begin -= 1
                olds *= x.shape[begin]
            else:
                news.insert(0, left.pop())
        x = _regroup(known, x, begin, end, news)
        done = news + done
    places = [d for d, n in enumerate(shape) if n > 1]
    return x.moved(places, shape)


def _regroup(known: Constraints, x: Labels, begin: int, end: int, news: Sequence[int]) -> Labels:
    """Read dimensions begin .. end as those of sizes `news`."""
    olds = x.shape[begin:end]
    if list(olds) == list(news):
        return x
    cuts = sorted({prod(olds[:i]) for i in range(len(olds) + 1)} | {prod(news[:i]) for i in range(len(news) + 1)})
    if any(b % a for a, b in pairwise(cuts)):
        whole = _merged(known, x, begin, end)
        return _split(known, whole, begin, news)
    at, outside = begin, 1
    for n in olds:  # split each old dimension at the cuts that lie in it
        inner = [cut for cut in cuts if outside <= cut <= outside * n]
        parts = [b // a for a, b in pairwise(inner)]
        x = _split(known, x, at, parts)
        at, outside = at + len(parts), outside * n
    at, outside = begin, 1
    for n in news:
        count = sum(outside < cut <= outside * n for cut in cuts)
        x = _merged(known, x, at, at + count)
        at, outside = at + 1, outside * n
    return x


def _split(known: Constraints, x: Labels, d: int, sizes: Sequence[int]) -> Labels:
    """Read dimension `d` as several; a cell that was joined of others is these again."""
    more = len(sizes) - 1
    if not more:
        return x
    shape = (*x.shape[:d], *sizes, *x.shape[d + 1 :])
    cells = []
    for one in x.cells:
        dims: list[int] = []
        for k in one.dims:
            dims += range(d, d + more + 1) if k == d else [k + more * (k > d)]
        at = one.at.reshape([shape[k] for k in dims])
        parts = known.parts(at) if d in one.dims else None
        if parts is None:
            cells.append(Cell(tuple(dims), at))
        else:
            cells += [cell([dims[axis] for axis in axes], part) for axes, part in parts]
    alike: set[int] = set()
    for k in x.alike:
        alike |= set(range(d, d + more + 1)) if k == d else {k + more * (k > d)}
    return Labels(shape, tuple(cells), frozenset(alike))


def _merged(known: Constraints, x: Labels, begin: int, end: int) -> Labels:
    """Read dimensions begin .. end as one."""
    if end - begin == 1:
        return x
    dims, less = set(range(begin, end)), end - begin - 1
    shape = (*x.shape[:begin], prod(x.shape[begin:end]), *x.shape[end:])

    def name(d: int) -> int:
        return d if d < begin else max(begin, d - less)

    cells = [one for one in x.cells if not dims & set(one.dims)]
    alike = {d for d in x.alike if d not in dims}
    if x.touching(dims):
        whole = next((one for one in x.touching(dims) if dims <= set(one.dims)), None)
        if whole is None or any(not set(one.dims) <= set(whole.dims) for one in x.touching(dims)):
            whole = join(known, x, closure([x], dims))
            cells = [one for one in cells if not set(one.dims) <= set(whole.dims)]
        flat = tuple(dict.fromkeys(name(d) for d in whole.dims))
        cells = [Cell(tuple(map(name, one.dims)), one.at) for one in cells]
        cells.append(Cell(flat, whole.at.reshape([shape[d] for d in flat])))
    else:
        cells = [Cell(tuple(map(name, one.dims)), one.at) for one in cells]
        if dims <= x.alike:
            return Labels(shape, tuple(cells), frozenset({name(d) for d in alike} | {begin}))
    return Labels(shape, tuple(cells), frozenset(map(name, alike)))
