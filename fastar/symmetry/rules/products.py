"""Rules of products: linear maps, matrix products and attention. See `fastar.symmetry.rules.table`."""

from __future__ import annotations

from collections.abc import Sequence

from fastar.symmetry import axis_views as views
from fastar.symmetry.axes import fixed
from fastar.symmetry.axis_views import Dim, Dims
from fastar.symmetry.rules.broadcasting import combine
from fastar.symmetry.rules.call import Call, Refused
from fastar.symmetry.rules.shapes import repeated

Letter = str | int
Operand = tuple[Dims, Sequence[int]]


def pointwise(call: Call) -> Dims:
    """Any number of tensors, broadcast against each other."""
    return broadcast(call, [call.operand(node) for node in call.tensors()], call.shape())


def broadcast(call: Call, operands: Sequence[Operand], shape: Sequence[int]) -> Dims:
    """Labels of a pointwise function of tensors given by their labels and shapes."""
    out: list[Dim | None] = [None] * len(shape)
    for labels, lengths in operands:
        missing = len(shape) - len(lengths)
        dims = [
            None if d < missing or lengths[d - missing] != n else labels.dims[d - missing] for d, n in enumerate(shape)
        ]
        out = combine(call.solver, out, dims)
    return Dims(tuple((fixed(n),) if dim is None else dim for dim, n in zip(out, shape, strict=True)))


def contract(call: Call, operands: Sequence[tuple[Operand, Sequence[Letter]]], out: Sequence[Letter]) -> Dims:
    """Labels of a sum of products: dimensions of one letter are multiplied, letters not in `out` summed over.

    A dimension of length 1 is broadcast against longer ones of its letter.
    """
    letters, sizes = list(out), dict[Letter, int]()
    for (_, shape), names in operands:
        if len(set(names)) != len(names):
            raise Refused("a product that reads the diagonal of a tensor")
        letters += [name for name in names if name not in letters]
        sizes |= {name: max(n, sizes.get(name, 0)) for name, n in zip(names, shape, strict=True)}
    dims: list[Dim | None] = [None] * len(letters)
    for (labels, shape), names in operands:
        mine = {name: dim for name, dim, n in zip(names, labels.dims, shape, strict=True) if n == sizes[name]}
        dims = combine(call.solver, dims, [mine.get(name) for name in letters])
    product = Dims(tuple((fixed(1),) if dim is None else dim for dim in dims))
    return views.reduce(call.solver, product, range(len(out), len(letters)))


def linear(call: Call) -> Dims:
    x, weight = call.operand("input"), call.operand("weight")
    batch = list(range(len(x[1]) - 1))
    units: list[Letter] = ["o"] if len(weight[1]) == 2 else []
    out = contract(call, [(x, [*batch, "i"]), (weight, [*units, "i"])], [*batch, *units])
    if call["bias"] is None:
        return out
    return broadcast(call, [(out, call.shape()), call.operand("bias")], call.shape())


def matmul(call: Call) -> Dims:
    """mm, bmm, matmul, and what is added by addmm and baddbmm."""
    *added, left, right = call.tensors()
    out = _matmul(call, call.operand(left), call.operand(right))
    return broadcast(call, [(out, call.shape()), *map(call.operand, added)], call.shape())


def _matmul(call: Call, left: Operand, right: Operand) -> Dims:
    lengths = [len(shape) for _, shape in (left, right)]
    if min(lengths) < 2:
        raise Refused("matrix product with a vector")
    batch = max(lengths) - 2
    a, b = ([*range(batch + 2 - n, batch)] for n in lengths)
    return contract(call, [(left, [*a, "m", "k"]), (right, [*b, "k", "n"])], [*range(batch), "m", "n"])


def einsum(call: Call) -> Dims:
    left, arrow, out = call["equation"].replace(" ", "").partition("->")
    if "." in left + out:
        raise Refused("einsum with an ellipsis")
    names = left.split(",")
    if not arrow:
        flat = "".join(names)
        out = "".join(sorted(letter for letter in set(flat) if flat.count(letter) == 1))
    return contract(call, list(zip(map(call.operand, call.tensors()), names, strict=True)), out)


def _ordered(call: Call, x: Dims) -> Dims:
    """`x` with its last dimension but one held in place."""
    draft = views.Draft(call.solver, x.dims)
    call.solver.fix(draft.flatten(len(x.dims) - 2))
    return draft.settled()


def attention(call: Call) -> Dims:
    """scaled_dot_product_attention: softmax(q k^T + mask) v over [..., heads, length, units].

    Where heads are parts of an axis, queries and keys move in blocks, as do values; the inside of a head moves by
    itself, queries with keys. Where several heads share one of keys and values, they stay together.
    """
    if call.arguments.get("dropout_p"):
        raise Refused("dropout that stays active in evaluation mode")
    (q, q_shape), (k, k_shape), (v, v_shape) = (call.operand(name) for name in ("query", "key", "value"))
    times = q_shape[-3] // k_shape[-3] if call.arguments.get("enable_gqa") else 1
    if times > 1:
        k, v = (repeated(call, x, -3, times) for x in (k, v))
        k_shape, v_shape = ((*shape[:-3], q_shape[-3], *shape[-2:]) for shape in (k_shape, v_shape))
    if call.arguments.get("is_causal"):
        q, k, v = (_ordered(call, x) for x in (q, k, v))
    turned = Dims((*k.dims[:-2], k.dims[-1], k.dims[-2]))
    scores = _matmul(call, (q, q_shape), (turned, (*k_shape[:-2], k_shape[-1], k_shape[-2])))
    shape = (*call.shape()[:-1], k_shape[-2])
    mask = call.arguments.get("attn_mask")
    if mask is not None:
        scores = broadcast(call, [(scores, shape), call.operand(mask)], shape)
    weights = views.inside(call.solver, scores, {len(shape) - 1})
    return _matmul(call, (weights, shape), (v, v_shape))


def softmax(call: Call) -> Dims:
    """A function along one axis that treats its units alike."""
    x = call.dims()
    return views.inside(call.solver, x, {call["dim"] % len(x.dims)})
