"""Rules of layers and of functions of one tensor: see `fastar.symmetry.rules.table`."""

from __future__ import annotations

from math import prod

from fastar.symmetry import labels, rearrange
from fastar.symmetry.labels import Labels, labelled
from fastar.symmetry.rules.call import Call, Refused
from fastar.symmetry.rules.shapes import constant_of, dims_of, hold_all


def constant_fill(call: Call) -> Labels:
    """A tensor filled with one value: any permutation leaves it as it is."""
    return constant_of(call.shape)


def convolution(call: Call) -> Labels:
    """Channels on axis 1. With groups, whole groups move; channels that a group writes move inside it, channels that
    it reads stay in place, because their permutation in the weights would differ from group to group."""
    return _convolved(call, transposed=bool(call.arguments.get("transposed")))


def transposed_convolution(call: Call) -> Labels:
    """The same with the weight's first axes swapped: [inputs, outputs of a group, ...]. With groups, whole groups move,
    and channels that a group reads move inside it."""
    return _convolved(call, transposed=True)


def _convolved(call: Call, *, transposed: bool) -> Labels:
    known, x, weight, groups = call.known, call.labels("input"), call.labels("weight"), call["groups"]
    spatial = len(weight.shape) - 2
    if len(x.shape) != spatial + 2:
        raise Refused("convolution of an input without a batch axis")
    call.hold(x, range(2, len(x.shape)))
    labels.hold(known, weight, set(range(2, len(weight.shape))), f"positions of the kernel, {call.why}")
    batch = labels.alone(known, x, 0)
    first, second = (labelled((weight.shape[d],), {0: labels.alone(known, weight, d)}) for d in (0, 1))
    channels, shape = x.shape[1:2], call.shape
    reads = constant_of(channels) if 1 in x.alike else labelled(channels, {0: labels.alone(known, x, 1)})
    if groups == 1:
        read, out = (first, second) if transposed else (second, first)
        labels.combine(known, reads.shape, [reads, read], call.why)
    else:
        call.hold(second, [0])
        # The weight's axis 0 in groups; of the other side [groups, channels of each] the groups alone move.
        blocks = labels.reduce(known, rearrange.reshape(known, first, (groups, weight.shape[0] // groups)), {1})
        if transposed:
            labels.combine(known, reads.shape, [reads, first], call.why)
            wide = Labels((groups, weight.shape[1]), blocks.cells, blocks.alike)
            out = rearrange.reshape(known, wide, (groups * weight.shape[1],))
        else:
            out = first
            read_in = rearrange.reshape(known, reads, (groups, weight.shape[1]))
            call.hold(read_in, [1], "what a group of a convolution reads stays in order")
            labels.combine(known, (groups,), [labels.reduce(known, read_in, {1}), blocks], call.why)
    parts = [labelled((shape[0], 1), {0: batch}), out.moved([1], (1, shape[1]))]
    if call["bias"] is not None:
        parts.append(call.labels("bias").moved([1], (1, shape[1])))
    result = labels.combine(known, shape[:2], parts, call.why)
    return Labels(shape, result.cells, result.alike)


def per_channel(call: Call, x: Labels, *names: str) -> Labels:
    """`x` with vectors along axis 1 applied to it."""
    rest = len(x.shape) - 2
    for name in names:
        if call.arguments.get(name) is not None:
            vector = call.labels(name)
            wide = vector.moved([1], (1, vector.shape[0], *[1] * rest))
            x = call.broadcast([x, wide], x.shape)
    return x


def batch_norm(call: Call) -> Labels:
    """Statistics and affine parameters follow the channels on axis 1."""
    if call.arguments.get("training") and call.arguments.get("running_mean") is not None:
        raise Refused("batch-norm in training mode inside a model in evaluation mode")
    return per_channel(call, call.labels(), "weight", "bias", "running_mean", "running_var")


def layer_norm(call: Call) -> Labels:
    """Layer-norm and RMS-norm over the last axes."""
    x = call.labels()
    x = call.inside(x, range(len(x.shape) - len(call["normalized_shape"]), len(x.shape)))
    for name in ("weight", "bias"):
        if call.arguments.get(name) is not None:
            x = call.broadcast([x, call.labels(name)], x.shape)
    return x


def group_norm(call: Call) -> Labels:
    """Channels of axis 1 are normalised in groups: groups move, and the channels inside each."""
    x, groups = call.labels("input"), call["num_groups"]
    parts = rearrange.reshape(call.known, x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    parts = call.inside(parts, range(2, len(parts.shape)))
    return per_channel(call, rearrange.reshape(call.known, parts, x.shape), "weight", "bias")


def instance_norm(call: Call) -> Labels:
    """Every channel of axis 1 by itself; the order of the other positions does not matter."""
    x = call.labels("input")
    x = call.inside(x, range(2, len(x.shape)))
    return per_channel(call, x, "weight", "bias", "running_mean", "running_var")


def prelu(call: Call) -> Labels:
    x, (_, weight) = call.labels(), call.tensors()
    if prod(call.labels(weight).shape) == 1:
        return x
    if len(x.shape) < 2 or len(call.labels(weight).shape) > 1:
        return call.broadcast([x, call.labels(weight)], x.shape)
    return per_channel(call, x, "weight")


def reduction(call: Call) -> Labels:
    """A symmetric function (mean, sum, maximum ...) over some axes does not depend on the order of what it reduces."""
    x = call.labels()
    dims = dims_of(call.arguments.get("dim"), len(x.shape))
    return labels.reduce(call.known, x, dims, keep=bool(call.arguments.get("keepdim")))


def both_reductions(call: Call) -> list[Labels]:
    """var_mean and std_mean."""
    return [reduction(call)] * 2


def weight_norm(call: Call) -> Labels:
    """v g / |v|: the norm over all axes but one, along which g lies."""
    v, g = call.labels("v"), call.labels("g")
    dim = call.arguments.get("dim", 0)
    call.inside(v, [d for d in range(len(v.shape)) if d != dim % len(v.shape) or dim == -1])
    return call.broadcast([v, g], v.shape)


def weight_norm_interface(call: Call) -> list[Labels]:
    """The same, and the norm."""
    whole = weight_norm(call)
    return [whole, call.labels("g")]


def norm_except(call: Call) -> Labels:
    """The norm over all axes but one."""
    v, dim = call.labels("v"), call.arguments.get("dim", 0)
    rest = {d for d in range(len(v.shape)) if d != dim % len(v.shape) or dim == -1}
    return labels.reduce(call.known, v, rest, keep=len(call.shape) == len(v.shape))


def same(call: Call) -> Labels:
    """The first argument's labels: copies, and functions of each number by itself."""
    return call.labels()


def dropout(call: Call) -> Labels:
    if call["train"]:
        raise Refused("dropout that stays active in evaluation mode")
    return same(call)


def embedding(call: Call) -> Labels:
    """Rows of a table by number: the numbers stay, what is in the rows moves."""
    weight, indices = call.labels("weight"), call.labels("indices")
    hold_all(call, indices)
    call.hold(weight, [0])
    shape = call.shape
    return labelled(shape, {len(shape) - 1: labels.alone(call.known, weight, 1)})
