"""Rules of operations that rearrange axes: see `fastar.symmetry.rules.table`."""

from __future__ import annotations

from typing import Any

from fastar.symmetry import axis_views as views
from fastar.symmetry.axes import fixed
from fastar.symmetry.axis_views import Dim, Dims
from fastar.symmetry.rules.broadcasting import combine
from fastar.symmetry.rules.call import Call, Labels, Refused


def dims_of(value: Any, ndim: int) -> list[int]:
    if value is None or value == []:
        return list(range(ndim))
    return sorted(d % ndim for d in ([value] if isinstance(value, int) else value))


def reshape(call: Call) -> Dims:
    return views.reshape(call.solver, call.dims(), call.shape())


def permute(call: Call) -> Dims:
    x = call.dims().dims
    return Dims(tuple(x[d] for d in call["dims"]))


def transpose(call: Call) -> Dims:
    x = list(call.dims().dims)
    if len(x) > 1:
        a, b = call.arguments.get("dim0", 0), call.arguments.get("dim1", 1)
        x[a], x[b] = x[b], x[a]
    return Dims(tuple(x))


def squeeze(call: Call) -> Dims:
    x, shape = call.dims().dims, call.shape(call.first)
    drop = [d for d in dims_of(call.arguments.get("dim"), len(x)) if shape[d] == 1]
    return Dims(tuple(dim for d, dim in enumerate(x) if d not in drop))


def unsqueeze(call: Call) -> Dims:
    x = list(call.dims().dims)
    x.insert(call["dim"] % (len(x) + 1), (fixed(1),))
    return Dims(tuple(x))


def expand(call: Call) -> Dims:
    """Copies along an axis that was not there are alike, in whatever order."""
    x, old, new = call.dims().dims, call.shape(call.first), call.shape()
    added = len(new) - len(old)
    return Dims(
        tuple(x[d - added] if d >= added and old[d - added] == n else (views.Copies(n),) for d, n in enumerate(new))
    )


def repeat(call: Call) -> Dims:
    """Whole copies of an axis after each other."""
    x, times = list(call.dims().dims), call["repeats"]
    x = [(fixed(1),)] * (len(times) - len(x)) + x
    copies = [(fixed(n), *dim) if n > 1 else dim for n, dim in zip(times, x, strict=True)]
    return views.Draft(call.solver, copies).settled()


def repeat_interleave(call: Call) -> Dims:
    times, dim = call.arguments.get("repeats"), call.arguments.get("dim")
    if not isinstance(times, int) or dim is None:
        raise Refused("repeats positions by numbers that are not constant")
    return repeated(call, call.dims(), dim, times)


def repeated(call: Call, x: Dims, dim: int, times: int) -> Dims:
    """Labels of `times` copies of every position of `dim`, beside each other."""
    dims = list(x.dims)
    dims[dim] = (*dims[dim], fixed(times))
    return views.Draft(call.solver, dims).settled()


def concatenate(call: Call) -> Dims:
    nodes = [node for node in call.tensors() if len(call.shape(node)) == len(call.shape())]
    at = call.arguments.get("dim", 0) % len(call.shape())
    drafts = [views.Draft(call.solver, call.dims(node).dims) for node in nodes]
    joined = tuple(segment for draft in drafts for segment in draft.flatten(at))
    merged: list[Dim | None] = []
    for one in drafts:
        dims: list[Dim | None] = [None if dim is None or d == at else tuple(dim) for d, dim in enumerate(one.dims)]
        merged = combine(call.solver, merged, dims) if merged else dims
    return Dims(tuple((joined,) if d == at else dim or () for d, dim in enumerate(merged)))


def stack(call: Call) -> Dims:
    first, *others = (call.dims(node).dims for node in call.tensors())
    merged: list[Dim | None] = list(first)
    for other in others:
        merged = combine(call.solver, merged, other)
    out, dim = [dim or () for dim in merged], call.arguments.get("dim", 0) % (len(merged) + 1)
    out.insert(dim, (fixed(call.shape()[dim]),))
    return Dims(tuple(out))


def slice_axis(call: Call) -> Dims | Labels:
    shape = call.shape(call.first)
    dim = call["dim"] % len(shape)
    start, stop, step = slice(call["start"] or 0, call["end"], call["step"]).indices(shape[dim])
    if step == 1:
        return views.cut(call.solver, call.dims(), dim, start, max(start, stop))
    x = list(call.labels())
    call.unmoved(x[dim], "takes every other unit of")
    x[dim] = fixed(call.shape()[dim])
    return tuple(x)


def split_axis(call: Call) -> list[Dims]:
    """split and split_with_sizes: the pieces' lengths are read off the results."""
    x = call.dims()
    dim = call.arguments.get("dim", 0) % len(x.dims)
    out, start = [], 0
    for piece in call.node.meta["val"]:
        length = int(piece.shape[dim])
        out.append(views.cut(call.solver, x, dim, start, start + length))
        start += length
    return out


def halves(call: Call) -> Dims:
    """A gated unit (glu): the first half of an axis times a function of the second, unit by unit."""
    x = call.dims()
    dim = call["dim"] % len(x.dims)
    half = call.shape(call.first)[dim] // 2
    first, second = (views.cut(call.solver, x, dim, start, start + half) for start in (0, half))
    return Dims(tuple(dim or () for dim in combine(call.solver, first.dims, second.dims)))


def select(call: Call) -> Dims:
    shape = call.shape(call.first)
    dim = call["dim"] % len(shape)
    return _pick(call, call.dims(), dim, call["index"] % shape[dim])


def unbind(call: Call) -> list[Dims]:
    shape = call.shape(call.first)
    dim = call.arguments.get("dim", 0) % len(shape)
    return [_pick(call, call.dims(), dim, i) for i in range(shape[dim])]


def _pick(call: Call, x: Dims, dim: int, index: int) -> Dims:
    """One position of an axis, which stays where it is from then on; of the outermost part of a view, its inside."""
    dims = views.cut(call.solver, x, dim, index, index + 1).dims
    return Dims((*dims[:dim], *dims[dim + 1 :]))


def pad(call: Call) -> Labels:
    """Padding with a constant adds positions that are all alike; other modes need an axis that does not move."""
    x = list(call.labels())
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


def index(call: Call) -> Labels:
    """Indexed axes are held in place; the others pass, as do those of the indices."""
    x, indices = call.labels("self"), call["indices"]
    given = [d for d, one in enumerate(indices) if one is not None]
    call.solver.fix(*(x[d] for d in given), *(axis for d in given for axis in call.labels(indices[d])))
    rest = [axis for d, axis in enumerate(x) if d not in given]
    adjacent = given == list(range(given[0], given[-1] + 1))
    before = given[0] if adjacent else 0  # indices that are apart put their result in front
    shape = call.shape()
    new = [fixed(n) for n in shape[before : before + len(shape) - len(rest)]]
    return (*rest[:before], *new, *rest[before:])


def index_select(call: Call) -> Labels:
    x, dim = list(call.labels("self")), call["dim"]
    call.solver.fix(x[dim], *call.labels("index"))
    x[dim] = fixed(call.shape()[dim])
    return tuple(x)


def along(call: Call) -> Labels:
    """Functions of the order along some axes (flip, roll, cumsum): those must not move."""
    x = call.labels()
    for d in dims_of(call.arguments.get("dims", call.arguments.get("dim")), len(x)):
        call.unmoved(x[d], "depends on the order along")
    return x
