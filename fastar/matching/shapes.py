"""Rules of operations that rearrange axes: see `fastar.matching.rules`."""

from __future__ import annotations

from typing import Any

from fastar.matching.axes import Axis, fixed
from fastar.matching.calls import Call, Labels


def dims_of(value: Any, ndim: int) -> list[int]:
    if value is None or value == []:
        return list(range(ndim))
    return sorted(d % ndim for d in ([value] if isinstance(value, int) else value))


def reshape(call: Call) -> Labels:
    """Blocks of input axes with the same product as a block of output axes are flattened and split again."""
    node = call.tensors()[0]
    labels, old, new = call.labels(node), call.shape(node), call.shape()
    out: list[Axis] = []
    i = j = 0
    while i < len(old) or j < len(new):
        begin_i, begin_j = i, j
        size_i, size_j = 1, 1
        while True:
            if size_i == size_j and (i > begin_i or j > begin_j):
                break
            if size_i <= size_j and i < len(old):
                size_i, i = size_i * old[i], i + 1
            elif j < len(new):
                size_j, j = size_j * new[j], j + 1
            else:
                size_i, i = size_i * old[i], i + 1
        merged = call.solver.merge(labels[begin_i:i]) if i > begin_i else fixed(1)
        out += call.solver.split(merged, new[begin_j:j]) if j > begin_j else []
    return tuple(out)


def permute(call: Call) -> Labels:
    x = call.labels(call.tensors()[0])
    return tuple(x[d] for d in call["dims"])


def transpose(call: Call) -> Labels:
    x = list(call.labels(call.tensors()[0]))
    if len(x) > 1:
        a, b = call.arguments.get("dim0", 0), call.arguments.get("dim1", 1)
        x[a], x[b] = x[b], x[a]
    return tuple(x)


def squeeze(call: Call) -> Labels:
    node = call.tensors()[0]
    x, shape = call.labels(node), call.shape(node)
    drop = [d for d in dims_of(call.arguments.get("dim"), len(x)) if shape[d] == 1]
    return tuple(axis for d, axis in enumerate(x) if d not in drop)


def unsqueeze(call: Call) -> Labels:
    x = list(call.labels(call.tensors()[0]))
    x.insert(call["dim"] % (len(x) + 1), fixed(1))
    return tuple(x)


def expand(call: Call) -> Labels:
    node = call.tensors()[0]
    x, old, new = call.labels(node), call.shape(node), call.shape()
    added = len(new) - len(old)
    return tuple(
        x[d - added] if d >= added and old[d - added] == n else call.solver.fresh(n) for d, n in enumerate(new)
    )


def concatenate(call: Call) -> Labels:
    parts = [node for node in call.tensors() if len(call.shape(node)) == len(call.shape())]
    dim = call.arguments.get("dim", 0) % len(call.shape())
    labels = [call.labels(node) for node in parts]
    for other in labels[1:]:
        for d, axis in enumerate(other):
            if d != dim:
                call.solver.unify(labels[0][d], axis)
    joined = tuple(segment for one in labels for segment in one[dim])
    return tuple(joined if d == dim else axis for d, axis in enumerate(labels[0]))


def stack(call: Call) -> Labels:
    first, *others = (call.labels(node) for node in call.tensors())
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            call.solver.unify(mine, theirs)
    out, dim = list(first), call.arguments.get("dim", 0) % (len(first) + 1)
    out.insert(dim, fixed(call.shape()[dim]))
    return tuple(out)


def slice_axis(call: Call) -> Labels:
    node = call.tensors()[0]
    x, length = list(call.labels(node)), call.shape(node)
    dim = call["dim"] % len(x)
    start, stop, step = call["start"] or 0, call["end"], call["step"]
    start, stop, step = slice(start, stop, step).indices(length[dim])
    if call.solver.is_fixed(x[dim]):
        x[dim] = fixed(call.shape()[dim])
    elif step != 1:
        call.unmoved(x[dim], "takes every other unit of")
    else:
        x[dim] = call.solver.cut(x[dim], start, stop)
    return tuple(x)


def split_axis(call: Call) -> tuple[Labels, ...]:
    """chunk, split and split_with_sizes: the pieces' lengths are read off the results."""
    x = call.labels(call.tensors()[0])
    dim = call.arguments.get("dim", 0) % len(x)
    out, start = [], 0
    for piece in call.node.meta["val"]:
        length = int(piece.shape[dim])
        axis = call.solver.cut(x[dim], start, start + length)
        out.append(tuple(axis if d == dim else other for d, other in enumerate(x)))
        start += length
    return tuple(out)


def select(call: Call) -> Labels:
    x = call.labels(call.tensors()[0])
    dim = call["dim"] % len(x)
    call.unmoved(x[dim], "picks one unit out of")
    return tuple(axis for d, axis in enumerate(x) if d != dim)


def pad(call: Call) -> Labels:
    """Padding with a constant adds positions that are all alike; other modes need an axis that does not move."""
    x = list(call.labels(call.tensors()[0]))
    amounts, constant = call["pad"], call.arguments.get("mode", "constant") == "constant"
    for pair in range(len(amounts) // 2):
        before, after = amounts[2 * pair : 2 * pair + 2]
        d = len(x) - 1 - pair
        if call.solver.is_fixed(x[d]):
            x[d] = fixed(call.shape()[d])
        elif constant and min(before, after) >= 0:
            x[d] = (*call.solver.fresh(before), *x[d], *call.solver.fresh(after))
        elif before or after:
            call.unmoved(x[d], "crops or reflects")
    return tuple(x)
