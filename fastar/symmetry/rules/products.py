"""Rules of products: linear maps, matrix products and attention. See `fastar.symmetry.rules.table`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from fastar.symmetry import labels
from fastar.symmetry.labels import Labels
from fastar.symmetry.rules.call import Call, Refused
from fastar.symmetry.rules.shapes import repeated

Letter = Hashable


def pointwise(call: Call) -> Labels:
    """A function of several tensors, value by value."""
    return call.broadcast([call.labels(node) for node in call.tensors()])


def contract(call: Call, operands: Sequence[tuple[Labels, Sequence[Letter]]], out: Sequence[Letter]) -> Labels:
    """Labels of a sum of products: dimensions of one letter are multiplied, letters not in `out` summed over.

    A dimension of length 1 is broadcast against longer ones of its letter.
    """
    letters, sizes = list(out), dict[Letter, int]()
    for x, names in operands:
        if len(set(names)) != len(names):
            raise Refused("a product that reads the diagonal of a tensor")
        letters += [name for name in names if name not in letters]
        sizes |= {name: max(n, sizes.get(name, 0)) for name, n in zip(names, x.shape, strict=True)}
    counts = {name: sum(name in names for _, names in operands) for name in letters}
    batch = {name for name in out if counts[name] > 1}
    parts = []
    for x, names in operands:
        along = [d for d, name in enumerate(names) if name in batch]
        if along and len(along) < len(names):
            x = labels.in_blocks(call.known, x, along, [d for d in range(len(names)) if d not in along])
        at = {d: letters.index(name) for d, (name, n) in enumerate(zip(names, x.shape, strict=True)) if n > 1}
        lengths = [1] * len(letters)
        for d, place in at.items():
            lengths[place] = x.shape[d]
        parts.append(x.moved(at, lengths))
    product = labels.combine(call.known, [sizes[name] for name in letters], parts, call.why)
    return labels.reduce(call.known, product, set(range(len(out), len(letters))))


def linear(call: Call) -> Labels:
    """x W^T + bias."""
    x, weight = call.labels("input"), call.labels("weight")
    batch = list(range(len(x.shape) - 1))
    units: list[Letter] = ["o"] if len(weight.shape) == 2 else []
    out = contract(call, [(x, [*batch, "i"]), (weight, [*units, "i"])], [*batch, *units])
    return out if call["bias"] is None else call.broadcast([out, call.labels("bias")])


def bilinear(call: Call) -> Labels:
    """y_o = x1 W_o x2 + bias."""
    one, two, weight = (call.labels(name) for name in ("input1", "input2", "weight"))
    batch = list(range(len(one.shape) - 1))
    operands: list[tuple[Labels, Sequence[Letter]]] = [(one, [*batch, "i"]), (two, [*batch, "j"])]
    out = contract(call, [*operands, (weight, ["o", "i", "j"])], [*batch, "o"])
    return out if call["bias"] is None else call.broadcast([out, call.labels("bias")])


def matmul(call: Call) -> Labels:
    """Products of matrices and vectors, and what is added by addmm, baddbmm and addmv."""
    *added, left, right = call.tensors()
    out = product(call, call.labels(left), call.labels(right))
    return call.broadcast([out, *map(call.labels, added)]) if added else out


def product(call: Call, left: Labels, right: Labels) -> Labels:
    """Labels of left @ right, as torch.matmul reads their dimensions."""
    lengths = [len(x.shape) for x in (left, right)]
    batch = max(0, max(lengths) - 2)
    rows: list[Letter] = ["m"] if lengths[0] > 1 else []
    columns: list[Letter] = ["n"] if lengths[1] > 1 else []
    a, b = ([*range(batch + 2 - max(n, 2), batch)] for n in lengths)
    return contract(call, [(left, [*a, *rows, "k"]), (right, [*b, "k", *columns])], [*range(batch), *rows, *columns])


def outer(call: Call) -> Labels:
    """Products of all pairs of two vectors."""
    one, two = (call.labels(node) for node in call.tensors())
    return contract(call, [(one, ["m"]), (two, ["n"])], ["m", "n"])


def einsum(call: Call) -> Labels:
    """A sum of products, by its equation; the dimensions of an ellipsis are numbered from the last."""
    left, arrow, out = call["equation"].replace(" ", "").partition("->")
    operands = [call.labels(node) for node in call.tensors()]
    longest = 0
    names: list[list[Letter]] = []
    for x, text in zip(operands, left.split(","), strict=True):
        before, dots, after = text.partition("...")
        many = len(x.shape) - len(before) - len(after)
        longest = max(longest, many)
        names.append([*before, *(range(-many, 0) if dots else ()), *after])
    rest: list[Letter] = list(range(-longest, 0))
    if arrow:
        before, dots, after = out.partition("...")
        wanted: list[Letter] = [*before, *(rest if dots else ()), *after]
    else:
        flat = [letter for one in names for letter in one if isinstance(letter, str)]
        wanted = [*rest, *sorted(letter for letter in set(flat) if flat.count(letter) == 1)]
    return contract(call, list(zip(operands, names, strict=True)), wanted)


def attention(call: Call) -> Labels:
    """scaled_dot_product_attention: softmax(q k^T + mask) v over [..., heads, length, units].

    Where heads are parts of an axis, queries and keys move in blocks, as do values; the inside of a head moves by
    itself, queries with keys. Several heads that share one of keys and values are a block of heads.
    """
    if call.arguments.get("dropout_p"):
        raise Refused("dropout that stays active in evaluation mode")
    q, k, v = (call.labels(name) for name in ("query", "key", "value"))
    times = q.shape[-3] // k.shape[-3] if call.arguments.get("enable_gqa") else 1
    if times > 1:
        k, v = (repeated(call, x, -3, times) for x in (k, v))
    if call.arguments.get("is_causal"):
        for x in (q, k, v):
            call.hold(x, [-2])
    ndim = len(k.shape)
    turned = k.moved([*range(ndim - 2), ndim - 1, ndim - 2], (*k.shape[:-2], k.shape[-1], k.shape[-2]))
    scores = product(call, q, turned)
    mask = call.arguments.get("attn_mask")
    if mask is not None:
        scores = call.broadcast([scores, call.labels(mask)], scores.shape)
    return product(call, call.inside(scores, [-1]), v)


def softmax(call: Call) -> Labels:
    """A function along one axis that treats its units alike."""
    return call.inside(call.labels(), [call["dim"]])


def cosine_similarity(call: Call) -> Labels:
    """x1 . x2 / |x1| |x2| along one dimension, which must not move in one and stay in the other."""
    x = pointwise_of(call, ("x1", "x2"))
    return labels.reduce(call.known, x, {call["dim"] % len(x.shape)})


def pointwise_of(call: Call, names: Sequence[str]) -> Labels:
    """Labels of a function, value by value, of arguments that are broadcast against each other."""
    parts = [call.labels(name) for name in names]
    ndim = max(len(x.shape) for x in parts)
    shapes = [[1] * (ndim - len(x.shape)) + list(x.shape) for x in parts]
    return call.broadcast(parts, [max(sizes) for sizes in zip(*shapes, strict=True)])
