"""Rules of layers and of functions of one tensor: see `fastar.symmetry.rules.table`."""

from __future__ import annotations

from collections.abc import Callable

from fastar.symmetry import axis_views as views
from fastar.symmetry.axes import fixed
from fastar.symmetry.axis_views import Dims
from fastar.symmetry.rules.call import Call, Labels, Refused
from fastar.symmetry.rules.products import broadcast
from fastar.symmetry.rules.shapes import dims_of


def constant_fill(call: Call) -> Dims:
    """A tensor filled with one value: any permutation leaves it as it is."""
    return Dims(tuple((views.Copies(n),) for n in call.shape()))


def convolution(call: Call) -> Labels:
    """Channels on axis 1. With groups, whole groups move; channels that a group writes move inside it, channels that
    it reads stay in place, because their permutation in the weights would differ from group to group."""
    if call.arguments.get("transposed"):
        raise Refused("transposed convolution")
    x, weight, groups = call.labels("input"), call.labels("weight"), call["groups"]
    x_shape, weight_shape = call.shape(call["input"]), call.shape(call["weight"])
    spatial = len(weight_shape) - 2
    if len(x_shape) != spatial + 2:
        raise Refused("convolution of an input without a batch axis")
    call.solver.fix(*weight[2:], *x[2:])
    if groups == 1:
        call.solver.unify(x[1], weight[1])
    else:
        blocks = call.solver.fresh(groups)
        call.solver.fix(weight[1])
        call.solver.unify(x[1], call.solver.merge([blocks, fixed(weight_shape[1])]))
        call.solver.unify(weight[0], call.solver.child(blocks, weight_shape[0] // groups))
    if call["bias"] is not None:
        call.solver.unify(weight[0], call.labels("bias")[0])
    return (x[0], weight[0], *(fixed(n) for n in call.shape()[2:]))


def transposed_convolution(call: Call) -> Labels:
    """The same with the weight's first axes swapped: [inputs, outputs of a group, ...]. With groups, whole groups move,
    and channels that a group reads move inside it."""
    x, weight, groups = call.labels("input"), call.labels("weight"), call["groups"]
    x_shape, weight_shape = call.shape(call["input"]), call.shape(call["weight"])
    if len(x_shape) != len(weight_shape):
        raise Refused("convolution of an input without a batch axis")
    call.solver.fix(*weight[2:], *x[2:])
    call.solver.unify(x[1], weight[0])
    written = weight[1]
    if groups > 1:
        blocks = call.solver.fresh(groups)
        call.solver.fix(weight[1])
        call.solver.unify(weight[0], call.solver.child(blocks, weight_shape[0] // groups))
        written = call.solver.merge([blocks, fixed(weight_shape[1])])
    if call["bias"] is not None:
        call.solver.unify(written, call.labels("bias")[0])
    return (x[0], written, *(fixed(n) for n in call.shape()[2:]))


def per_channel(call: Call, x: Dims, *names: str) -> Dims:
    """`x` with vectors along axis 1 applied to it."""
    shape = call.shape()
    rest = len(shape) - 2
    for name in names:
        if call.arguments.get(name) is not None:
            (vector,), (length,) = call.dims(name).dims, call.shape(call[name])
            labels = Dims(((fixed(1),), vector, *[(fixed(1),)] * rest))
            x = broadcast(call, [(x, shape), (labels, (1, length, *[1] * rest))], shape)
    return x


def batch_norm(call: Call) -> Dims:
    """Statistics and affine parameters follow the channels on axis 1."""
    if call.arguments.get("training") and call.arguments.get("running_mean") is not None:
        raise Refused("batch-norm in training mode inside a model in evaluation mode")
    return per_channel(call, call.dims(), "weight", "bias", "running_mean", "running_var")


def layer_norm(call: Call) -> Dims:
    """Layer-norm and RMS-norm over the last axes."""
    x, shape = call.dims(), call.shape(call.first)
    x = views.inside(call.solver, x, range(len(shape) - len(call["normalized_shape"]), len(shape)))
    for name in ("weight", "bias"):
        if call.arguments.get(name) is not None:
            x = broadcast(call, [(x, shape), call.operand(name)], shape)
    return x


def group_norm(call: Call) -> Dims:
    """Channels of axis 1 are normalised in groups: groups move, and the channels inside each."""
    x, groups = call.labels("input"), call["num_groups"]
    call.solver.blocks(x[1], call.shape()[1] // groups)
    return per_channel(call, Dims.plain(x), "weight", "bias")


def instance_norm(call: Call) -> Dims:
    """Every channel of axis 1 by itself; the order of the other positions does not matter."""
    names = ("weight", "bias", "running_mean", "running_var")
    return per_channel(call, Dims.plain(call.labels("input")), *names)


def prelu(call: Call) -> Dims:
    x, (_, weight) = call.dims(), call.tensors()
    if call.shape(weight) in ((), (1,)):
        return x
    if len(x.dims) < 2:
        return broadcast(call, [(x, call.shape()), call.operand(weight)], call.shape())
    return per_channel(call, x, "weight")


def pool(spatial: int) -> Callable[[Call], Labels]:
    """The last `spatial` axes are pooled or resampled; the others pass."""

    def rule(call: Call) -> Labels:
        x = call.labels()
        call.solver.fix(*x[-spatial:])
        return (*x[:-spatial], *(fixed(n) for n in call.shape()[-spatial:]))

    return rule


def reduction(call: Call) -> Dims:
    """A symmetric function (mean, sum, maximum ...) over some axes does not depend on the order of what it reduces."""
    x = call.dims()
    dims = dims_of(call.arguments.get("dim"), len(x.dims))
    return views.reduce(call.solver, x, dims, keep=bool(call.arguments.get("keepdim")))


def same(call: Call) -> Dims:
    """The first argument's labels: copies, and functions of each number by itself."""
    return call.dims()


def dropout(call: Call) -> Dims:
    if call["train"]:
        raise Refused("dropout that stays active in evaluation mode")
    return same(call)


def embedding(call: Call) -> Labels:
    weight, indices = call.labels("weight"), call.labels("indices")
    call.solver.fix(weight[0], *indices)
    return (*indices, weight[1])
