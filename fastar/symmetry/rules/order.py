"""Rules of operations that choose, sort or write by number. See `fastar.symmetry.rules.table`.

A number says which position of a dimension is meant: that dimension may move only where numbers are used for nothing
else (`Labels.numbers`). Sorted values, and the largest ones, are the same in whatever order they were.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from operator import getitem

import numpy as np
from torch import fx

from fastar.symmetry import labels, rearrange
from fastar.symmetry.labels import Labels, labelled
from fastar.symmetry.positions import Array
from fastar.symmetry.rules.call import Call
from fastar.symmetry.rules.shapes import apart, apart_of, concatenate_labels, constant_of, hold_all, index, resized

_ORDER = "depends on the order"


def _uses(node: fx.Node, result: int) -> bool:
    """Tell whether a result of an operation of several is used."""
    return any(user.target is getitem and user.args[1] == result and user.users for user in node.users)


def _dim(call: Call, x: Labels) -> int:
    found = call.arguments.get("dim")
    return (-1 if found is None else found) % max(1, len(x.shape))


def extreme(call: Call) -> list[Labels]:
    """The largest or smallest values along a dimension, and their numbers (max, min, median, mode, kthvalue)."""
    x = call.labels()
    d = _dim(call, x)
    found = labels.reduce(call.known, x, {d}, keep=bool(call.arguments.get("keepdim")))
    return [found, replace(found, numbers=_numbered(call, x, d))]


def _numbered(call: Call, x: Labels, d: int) -> Array | None:
    """Positions along `d` that numbers stand for, if they are used; None where it does not move."""
    return labels.alone(call.known, x, d) if not x.shape or _uses(call.node, 1) else None


def hold_numbers(call: Call, numbers: Array) -> None:
    """Hold positions whose numbers an operation reads as it would read any."""
    call.hold(Labels(numbers.shape, (labels.Cell((0,), numbers),)), [0], f"reads numbers of positions: {_ORDER}")


def _meant(call: Call, index: Labels, x: Labels, d: int) -> Array | None:
    """Let the numbers in `index` mean positions along dimension `d` of `x`, which is held where others may be meant."""
    if index.numbers is None or len(index.numbers) != x.shape[d]:
        if index.numbers is not None:
            hold_numbers(call, index.numbers)
        call.hold(x, [d])
        return None
    labels.combine(
        call.known, (x.shape[d],), [_line(index.numbers), _line(labels.alone(call.known, x, d), x.shape[d])], call.why
    )
    return index.numbers


def _line(at: Array | None, length: int = 1) -> Labels:
    """Labels of one axis."""
    return labels.labelled((length if at is None else len(at),), {0: at})


def maximum(call: Call) -> Labels | list[Labels]:
    """max and min: of all values, or along a dimension."""
    if isinstance(call.node.meta["val"], tuple | list):
        return extreme(call)
    return labels.reduce(call.known, call.labels(), set(range(len(call.labels().shape))))


def ordered(call: Call) -> list[Labels]:
    """Sorted values, or the first of them, and their numbers (sort, topk)."""
    x = call.labels()
    d = _dim(call, x)
    found = _ranked(call, apart_of(call, call.inside(x, [d]), d), d)
    return [found, replace(found, numbers=_numbered(call, x, d))]


def numbers(call: Call) -> Labels:
    """Numbers of positions along a dimension (argsort, argmax, argmin)."""
    x = call.labels()
    given = call.arguments.get("dim")
    dims = set(range(len(x.shape))) if given is None else {given % max(1, len(x.shape))}
    at = labels.alone(call.known, x, min(dims)) if len(dims) == 1 else None
    if at is None:
        call.hold(x, dims, _ORDER)
    if len(call.shape) == len(x.shape):
        rest = labels.reduce(call.known, x, dims, keep=True)
        if x.shape != call.shape or len(dims) != 1:
            return Labels(call.shape, rest.cells, rest.alike, at)
        return replace(_ranked(call, rest, min(dims)), numbers=at)
    return replace(labels.reduce(call.known, x, dims), numbers=at)


def _ranked(call: Call, x: Labels, d: int) -> Labels:
    """`x` with ranks, which stay, along dimension `d`."""
    ranks = labels.fresh(call.known, [n if k == d else 1 for k, n in enumerate(call.shape)])
    call.hold(ranks, [d], "sorted values stay")
    return call.broadcast([resized(x, d, 1), ranks], call.shape)


def gather(call: Call) -> Labels:
    """Values along a dimension, chosen by numbers for each of the others."""
    x = call.labels("self")
    index = call.labels("indices" if "indices" in call.arguments else "index")
    if call.arguments.get("dim") is None:  # take_along_dim of all values in a row
        x = rearrange.reshape(call.known, x, (prod(x.shape),))
    elif not x.shape:
        return index
    d = (call.arguments.get("dim") or 0) % len(x.shape)
    other = {k for k in range(len(x.shape)) if k != d and x.shape[k] != index.shape[k]}
    _meant(call, index, x, d)
    call.hold(x, other)
    call.hold(index, other)
    rest = [k for k in range(len(x.shape)) if k != d and k not in other]
    return call.broadcast([index, apart(call, x, rest)], index.shape)


def scatter(call: Call) -> Labels:
    """Values put, or added, where numbers along a dimension say."""
    x = call.labels("self")
    d = call["dim"] % max(1, len(x.shape))
    parts = [apart_of(call, x, d)]
    meant = _meant(call, call.labels("index"), x, d)
    if meant is not None:
        parts.append(labelled((*[1] * d, x.shape[d], *[1] * (len(x.shape) - d - 1)), {d: meant}))
        parts[0] = x
    for name in ("index", "src"):
        if isinstance(call.arguments.get(name), fx.Node):
            one = call.labels(name)
            differ = {k for k in range(len(x.shape)) if one.shape[k] != x.shape[k]} | {d}
            call.hold(one, differ)
            call.hold(x, differ - {d})
            parts.append(apart(call, one, [k for k in range(len(x.shape)) if k not in differ]))
    return call.broadcast(parts, x.shape)


def index_add(call: Call) -> Labels:
    """Rows of a dimension to which others are added, or that they replace (index_add, index_copy, index_reduce)."""
    x, source = call.labels("self"), call.labels("source")
    d = call["dim"] % max(1, len(x.shape))
    call.hold(x, [d])
    call.hold(source, [d])
    hold_all(call, call.labels("index"))
    rest = [k for k in range(len(x.shape)) if k != d]
    return call.broadcast([apart_of(call, x, d), apart(call, source, rest)], x.shape)


def index_fill(call: Call) -> Labels:
    """Rows of a dimension that get one value."""
    x = call.labels("self")
    call.hold(x, [call["dim"]])
    hold_all(call, call.labels("index"))
    return x


def index_put(call: Call) -> Labels:
    """Values put where numbers along some dimensions say."""
    replaced = index(call)
    call.broadcast([replaced, call.labels("values")], replaced.shape)
    return call.labels("self")


def slice_scatter(call: Call) -> Labels:
    """A tensor in which another one replaces a slice."""
    x, source = call.labels("self"), call.labels("src")
    d = call.arguments.get("dim", 0) % len(x.shape)
    start, end = call.arguments.get("start"), call.arguments.get("end")
    steps = slice(start or 0, end, call.arguments.get("step", 1)).indices(x.shape[d])
    return _replaced(call, x, source, d, np.arange(*steps))


def select_scatter(call: Call) -> Labels:
    """A tensor in which another one replaces one position of a dimension."""
    x, source = call.labels("self"), call.labels("src")
    d = call["dim"] % len(x.shape)
    wide = source.moved([k + (k >= d) for k in range(len(source.shape))], (*x.shape[:d], 1, *x.shape[d + 1 :]))
    return _replaced(call, x, wide, d, np.array([call["index"] % x.shape[d]]))


def _replaced(call: Call, x: Labels, source: Labels, d: int, at: np.ndarray) -> Labels:
    index = np.arange(x.shape[d])
    index[at] = x.shape[d] + np.arange(len(at))
    if len(at) == x.shape[d]:
        return source
    both = concatenate_labels(call, [x, source], d)
    return rearrange.take(call.known, both, d, index)


def copy(call: Call) -> Labels:
    """The second tensor, in the shape of the first."""
    return call.broadcast([call.labels("src")], call.labels("self").shape)


def one_hot(call: Call) -> Labels:
    """A new last dimension: which number it was."""
    x, shape = call.labels(), call.shape
    wide = x.moved(range(len(x.shape)), (*x.shape, 1))
    if x.numbers is None or len(x.numbers) != shape[-1]:
        return Labels(shape, wide.cells, wide.alike)
    return call.broadcast([wide, _line(x.numbers)], shape)


def triangle(call: Call) -> Labels:
    """Part of a matrix by the order of rows and columns (tril, triu)."""
    x = call.labels()
    call.hold(x, [-1, -2])
    kept = apart(call, x, range(len(x.shape) - 2))
    return Labels(x.shape, kept.cells, kept.alike)


def diagonal(call: Call) -> Labels:
    """The diagonal of two dimensions, which stay."""
    x = call.labels()
    one, two = (call.arguments.get(name, default) % len(x.shape) for name, default in (("dim1", 0), ("dim2", 1)))
    call.hold(x, [one, two])
    rest = labels.reduce(call.known, x, {one, two})
    return Labels(call.shape, rest.cells, rest.alike)


def filled(call: Call) -> Labels:
    """A tensor of one value in the shape of another."""
    return constant_of(call.shape)


BY_NUMBER = {gather, scatter, one_hot}
"""Rules that know of numbers that stand for positions."""
