"""Rules of operations that rearrange axes: see `fastar.symmetry.rules.table`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastar.symmetry import labels, rearrange
from fastar.symmetry.labels import Labels
from fastar.symmetry.rules.call import Call, Refused


def dims_of(value: Any, ndim: int) -> set[int]:
    """Dimensions, counted from 0; all where none is given."""
    if value is None or value == []:
        return set(range(ndim))
    return {d % max(ndim, 1) for d in ([value] if isinstance(value, int) else value)} if ndim else set()


def reshape(call: Call) -> Labels:
    return rearrange.reshape(call.known, call.labels(), call.shape)


def permute(call: Call) -> Labels:
    x = call.labels()
    order = [d % len(x.shape) for d in call["dims"]]
    return x.moved({d: i for i, d in enumerate(order)}, call.shape)


def transpose(call: Call) -> Labels:
    x = call.labels()
    order = list(range(len(x.shape)))
    if len(order) > 1:
        a, b = call.arguments.get("dim0", 0), call.arguments.get("dim1", 1)
        order[a], order[b] = order[b], order[a]
    return x.moved(order, call.shape)


def squeeze(call: Call) -> Labels:
    x = call.labels()
    drop = {d for d in dims_of(call.arguments.get("dim"), len(x.shape)) if x.shape[d] == 1}
    left = [d for d in range(len(x.shape)) if d not in drop]
    return x.moved({d: i for i, d in enumerate(left)}, call.shape)


def unsqueeze(call: Call) -> Labels:
    x = call.labels()
    at = call["dim"] % (len(x.shape) + 1)
    return x.moved([d + (d >= at) for d in range(len(x.shape))], call.shape)


def expand(call: Call) -> Labels:
    """Copies along an axis that was not there are alike, in whatever order."""
    return call.broadcast([call.labels()])


def repeat(call: Call) -> Labels:
    """Whole copies of a tensor after each other."""
    x, times = call.labels(), call["repeats"]
    missing = len(times) - len(x.shape)
    x = x.moved({d: d + missing for d in range(len(x.shape))}, (*[1] * missing, *x.shape))
    for d, n in enumerate(times):
        if n != 1:
            x = _copied(call, x, d, n, before=True)
    return x


def repeat_interleave(call: Call) -> Labels:
    times, dim = call.arguments.get("repeats"), call.arguments.get("dim")
    if not isinstance(times, int) or dim is None:
        raise Refused("repeats positions by numbers that are not constant")
    return repeated(call, call.labels(), dim, times)


def repeated(call: Call, x: Labels, dim: int, times: int) -> Labels:
    """Labels of `times` copies of every position of `dim`, beside each other."""
    return _copied(call, x, dim % len(x.shape), times, before=False)


def _copied(call: Call, x: Labels, d: int, times: int, *, before: bool) -> Labels:
    """Copies of dimension `d`, whole ones after each other or of each position, which are alike."""
    at = d + (not before)
    new = x.moved([k + (k >= at) for k in range(len(x.shape))], (*x.shape[:at], 1, *x.shape[at:]))
    shape = (*new.shape[:at], times, *new.shape[at + 1 :])
    wide = Labels(shape, new.cells, new.alike | ({at} if times > 1 else frozenset()))
    return rearrange.reshape(call.known, wide, (*x.shape[:d], x.shape[d] * times, *x.shape[d + 1 :]))


def concatenate_labels(call: Call, parts: Sequence[Labels], d: int) -> Labels:
    """Tensors after each other along dimension `d`."""
    return rearrange.concatenate(call.known, parts, d, call.why)


def concatenate(call: Call) -> Labels:
    parts = [call.labels(node) for node in call.tensors()]
    parts = [x for x in parts if len(x.shape) == len(call.shape)]  # torch lets empty vectors be among them
    dim = call.arguments.get("dim", 0) % len(call.shape)
    return concatenate_labels(call, parts, dim)


def stack(call: Call) -> Labels:
    parts = [call.labels(node) for node in call.tensors()]
    return rearrange.stack(call.known, parts, call.arguments.get("dim", 0) % len(call.shape), call.why)


def take(call: Call, x: Labels, d: int, start: int, stop: int, step: int = 1) -> Labels:
    """Positions start, start + step ... of a dimension."""
    return rearrange.take(call.known, x, d, np.arange(start, stop, step))


def slice_axis(call: Call) -> Labels:
    x = call.labels()
    d = call["dim"] % len(x.shape)
    return take(call, x, d, *slice(call["start"] or 0, call["end"], call["step"]).indices(x.shape[d]))


def split_axis(call: Call) -> list[Labels]:
    """split and split_with_sizes: the pieces' lengths are read off the results."""
    x = call.labels()
    d = call.arguments.get("dim", 0) % len(x.shape)
    out, start = [], 0
    for piece in call.node.meta["val"]:
        length = int(piece.shape[d])
        out.append(take(call, x, d, start, start + length))
        start += length
    return out


def halves(call: Call) -> Labels:
    """A gated unit (glu): the first half of an axis times a function of the second, unit by unit."""
    x = call.labels()
    d = call["dim"] % len(x.shape)
    half = x.shape[d] // 2
    return call.broadcast([take(call, x, d, start, start + half) for start in (0, half)])


def select(call: Call) -> Labels:
    x = call.labels()
    d = call["dim"] % len(x.shape)
    return _picked(call, x, d, call["index"] % x.shape[d])


def unbind(call: Call) -> list[Labels]:
    x = call.labels()
    d = call.arguments.get("dim", 0) % len(x.shape)
    return [_picked(call, x, d, i) for i in range(x.shape[d])]


def _picked(call: Call, x: Labels, d: int, index: int) -> Labels:
    """One position of a dimension, which is then gone."""
    one = take(call, x, d, index, index + 1)
    left = [k for k in range(len(x.shape)) if k != d]
    return one.moved({k: i for i, k in enumerate(left)}, [x.shape[k] for k in left])


def pad(call: Call) -> Labels:
    """Padding with a constant adds positions that are all alike; other modes need an axis that does not move."""
    x = call.labels()
    amounts, constant = call["pad"], call.arguments.get("mode", "constant") == "constant"
    for pair in range(len(amounts) // 2):
        before, after = amounts[2 * pair : 2 * pair + 2]
        if not before and not after:
            continue
        d = len(x.shape) - 1 - pair
        if not constant:
            call.hold(x, [d])
            x = resized(apart_of(call, x, d), d, x.shape[d] + before + after)
            continue
        x = take(call, x, d, max(0, -before), x.shape[d] - max(0, -after)) if min(before, after) < 0 else x
        sizes = [(*x.shape[:d], n, *x.shape[d + 1 :]) for n in (max(0, before), max(0, after))]
        edges = [constant_of(size) for size in sizes]
        x = rearrange.concatenate(call.known, [edges[0], x, edges[1]], d, call.why)
    return x


def constant_of(shape: Any) -> Labels:
    """Labels of a tensor of one value."""
    return Labels(tuple(shape), (), frozenset(d for d, n in enumerate(shape) if n > 1))


def resized(x: Labels, d: int, length: int) -> Labels:
    """`x` whose dimension `d`, which is in no cell, is another one, of `length`, that stays."""
    return Labels((*x.shape[:d], length, *x.shape[d + 1 :]), x.cells, x.alike - {d})


def flip(call: Call) -> Labels:
    x = call.labels()
    for d in dims_of(call["dims"], len(x.shape)):
        x = take(call, x, d, x.shape[d] - 1, -1, -1)
    return x


def roll(call: Call) -> Labels:
    x, shifts, dims = call.labels(), call["shifts"], call.arguments.get("dims") or []
    shifts, dims = ([one] if isinstance(one, int) else list(one) for one in (shifts, dims))
    if not dims:
        flat = rearrange.reshape(call.known, x, (int(np.prod(x.shape)),))
        turned = rearrange.take(call.known, flat, 0, np.roll(np.arange(flat.shape[0]), shifts[0]))
        return rearrange.reshape(call.known, turned, x.shape)
    for shift, d in zip(shifts, dims, strict=True):
        x = rearrange.take(call.known, x, d % len(x.shape), np.roll(np.arange(x.shape[d]), shift))
    return x


def index(call: Call) -> Labels:
    """Indexed axes are held in place; the others pass, as do those of the indices."""
    x, indices = call.labels("self"), call["indices"]
    given = [d for d, one in enumerate(indices) if one is not None]
    call.hold(x, given)
    shapes = []
    for d in given:
        hold_all(call, call.labels(indices[d]))
        shapes.append(call.labels(indices[d]).shape)
    new = np.broadcast_shapes(*shapes)
    rest = [d for d in range(len(x.shape)) if d not in given]
    adjacent = given == list(range(given[0], given[-1] + 1))
    before = given[0] if adjacent else 0  # indices that are apart put their result in front
    names = {d: i if i < before else i + len(new) for i, d in enumerate(rest)}
    shape = (*(x.shape[d] for d in rest[:before]), *new, *(x.shape[d] for d in rest[before:]))
    return apart(call, x, rest).moved(names, shape)


def apart(call: Call, x: Labels, rest: Any) -> Labels:
    """`x` with only the dimensions `rest` labelled; the others are held, and of size 1 here."""
    shape = tuple(n if d in rest else 1 for d, n in enumerate(x.shape))
    kept = labels.reduce(call.known, x, {d for d in range(len(x.shape)) if d not in rest}, keep=True)
    return Labels(shape, kept.cells, kept.alike)


def hold_all(call: Call, x: Labels) -> None:
    """Hold everything in place."""
    call.hold(x, range(len(x.shape)))


def index_select(call: Call) -> Labels:
    x, d = call.labels("self"), call["dim"] % max(1, len(call.labels("self").shape))
    call.hold(x, [d])
    hold_all(call, call.labels("index"))
    return resized(apart_of(call, x, d), d, call.shape[d])


def apart_of(call: Call, x: Labels, d: int) -> Labels:
    """`x` without labels of dimension `d`, which is held; its size stays."""
    kept = labels.reduce(call.known, x, {d}, keep=True)
    return Labels(x.shape, kept.cells, kept.alike)


def along(call: Call) -> Labels:
    """Functions of the order along some axes (cumsum): those must not move."""
    x = call.labels()
    call.hold(x, dims_of(call.arguments.get("dims", call.arguments.get("dim")), len(x.shape)), "depends on the order")
    return x
