"""How permuted units travel through each operation: one rule per ATen operation.

A rule gets the labels of the tensor arguments and returns the labels of the output, having required whatever must hold
for `op(permuted inputs) == permuted op(inputs)`. An operation without a rule is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fastar.matching.axes import Axis, AxisSolver, CannotSplit, fixed
from fastar.matching.calls import Call, Labels, Refused
from fastar.matching.shapes import (
    concatenate,
    dims_of,
    expand,
    pad,
    permute,
    reshape,
    select,
    slice_axis,
    split_axis,
    squeeze,
    stack,
    transpose,
    unsqueeze,
)


def pointwise(call: Call) -> Labels:
    """Any number of tensors, broadcast against each other."""
    shape = call.shape()
    out: list[Axis | None] = [None] * len(shape)
    for node in call.tensors():
        labels, lengths = call.labels(node), call.shape(node)
        for back in range(1, len(lengths) + 1):
            if lengths[-back] != shape[-back]:
                continue  # broadcast: the same value for every unit
            if out[-back] is None:
                out[-back] = labels[-back]
            else:
                call.solver.unify(out[-back] or (), labels[-back])
    return tuple(fixed(n) if axis is None else axis for axis, n in zip(out, shape, strict=True))


def constant_fill(call: Call) -> Labels:
    """A tensor filled with one value: any permutation leaves it as it is."""
    return tuple(call.solver.fresh(n) for n in call.shape())


def fixed_result(call: Call) -> Labels:
    """A tensor that depends on nothing that can move."""
    return tuple(fixed(n) for n in call.shape())


def linear(call: Call) -> Labels:
    x, weight = call.labels("input"), call.labels("weight")
    call.solver.unify(x[-1], weight[-1])
    if call["bias"] is not None:
        call.solver.unify(weight[0], call.labels("bias")[0])
    return (*x[:-1], weight[0]) if len(weight) == 2 else x[:-1]


def convolution(call: Call) -> Labels:
    """Channels on axis 1. With groups, whole groups move; channels inside a group stay in place."""
    if call.arguments.get("transposed"):
        raise Refused("transposed convolution")
    x, weight, groups = call.labels("input"), call.labels("weight"), call["groups"]
    x_shape, weight_shape = call.shape(call["input"]), call.shape(call["weight"])
    spatial = len(weight_shape) - 2
    if len(x_shape) != spatial + 2:
        raise Refused("convolution of an input without a batch axis")
    for axis in (*weight[2:], *x[2:]):
        call.require_fixed(axis)
    if groups == 1:
        call.solver.unify(x[1], weight[1])
    else:
        blocks = call.solver.fresh(groups)
        call.require_fixed(weight[1])
        call.solver.unify(x[1], call.solver.merge([blocks, fixed(weight_shape[1])]))
        call.solver.unify(weight[0], call.solver.merge([blocks, fixed(weight_shape[0] // groups)]))
    if call["bias"] is not None:
        call.solver.unify(weight[0], call.labels("bias")[0])
    return (x[0], weight[0], *(fixed(n) for n in call.shape()[2:]))


def batch_norm(call: Call) -> Labels:
    """Statistics and affine parameters follow the channels on axis 1."""
    if call.arguments.get("training") and call.arguments.get("running_mean") is not None:
        raise Refused("batch-norm in training mode inside a model in evaluation mode")
    first, *rest = call.tensors()
    x = call.labels(first)
    for node in rest:
        call.solver.unify(x[1], call.labels(node)[0])
    return x


def layer_norm(call: Call) -> Labels:
    x = call.labels("input")
    for name in ("weight", "bias"):
        if call[name] is not None:
            labels = call.labels(name)
            for mine, theirs in zip(x[-len(labels) :], labels, strict=True):
                call.solver.unify(mine, theirs)
    return x


def prelu(call: Call) -> Labels:
    first, weight = call.tensors()
    x, slope = call.labels(first), call.labels(weight)
    if call.shape(weight) not in ((), (1,)):
        call.solver.unify(x[min(1, len(x) - 1)], slope[0])
    return x


def pool(spatial: int) -> Callable[[Call], Labels]:
    """The last `spatial` axes are pooled or resampled; the others pass."""

    def rule(call: Call) -> Labels:
        x = call.labels(call.tensors()[0])
        for axis in x[-spatial:]:
            call.require_fixed(axis)
        return (*x[:-spatial], *(fixed(n) for n in call.shape()[-spatial:]))

    return rule


def reduction(call: Call) -> Labels:
    """A symmetric function (mean, sum, maximum ...) over some axes does not depend on the order of what it reduces."""
    x = call.labels(call.tensors()[0])
    dims = dims_of(call.arguments.get("dim"), len(x))
    if call.arguments.get("keepdim"):
        return tuple(fixed(1) if i in dims else axis for i, axis in enumerate(x))
    return tuple(axis for i, axis in enumerate(x) if i not in dims)


def same(call: Call) -> Labels:
    """The first argument's labels: copies, and functions along an axis that treat its units alike (softmax)."""
    return call.labels(call.tensors()[0])


def dropout(call: Call) -> Labels:
    if call["train"]:
        raise Refused("dropout that stays active in evaluation mode")
    return same(call)


def matmul(call: Call) -> Labels:
    *added, left, right = call.tensors()
    a, b = call.labels(left), call.labels(right)
    if min(len(a), len(b)) < 2:
        raise Refused("matrix product with a vector")
    call.solver.unify(a[-1], b[-2])
    batch = max(len(a), len(b)) - 2
    shape, leading = call.shape(), []
    for d in range(batch):
        axes = [
            (labels[d - batch + len(labels) - 2], call.shape(node)[d - batch + len(labels) - 2])
            for labels, node in ((a, left), (b, right))
            if d - batch + len(labels) - 2 >= 0
        ]
        moving = [axis for axis, length in axes if length == shape[d]]
        for axis in moving[1:]:
            call.solver.unify(moving[0], axis)
        leading.append(moving[0])
    out = (*leading, a[-2], b[-1])
    for node in added:  # addmm's bias
        for back, (axis, n) in enumerate(zip(reversed(call.labels(node)), reversed(call.shape(node)), strict=True)):
            if n == shape[-1 - back]:
                call.solver.unify(out[-1 - back], axis)
    return out


def embedding(call: Call) -> Labels:
    weight = call.labels("weight")
    call.require_fixed(weight[0])
    for axis in call.labels("indices"):
        call.require_fixed(axis)
    return (*call.labels("indices"), weight[1])


Rule = Callable[[Call], Any]

# Names of ATen operations (overloads and in-place forms alike) and their rule.
_TABLE: list[tuple[str, Rule]] = [
    (
        "relu relu6 leaky_relu elu selu celu gelu silu mish tanh sigmoid log_sigmoid hardtanh hardsigmoid "
        "hardswish softplus softsign softshrink hardshrink threshold exp expm1 log log1p sqrt rsqrt square abs neg "
        "sign reciprocal sin cos erf erfc add sub rsub mul div pow maximum minimum clamp clamp_min clamp_max where "
        "masked_fill addcmul addcdiv lerp eq ne gt ge lt le logical_not logical_and logical_or",
        pointwise,
    ),
    (
        "clone contiguous alias detach detach_ to _to_copy type_as softmax log_softmax _softmax _log_softmax "
        "lift_fresh_copy",
        same,
    ),
    ("full full_like zeros zeros_like ones ones_like new_zeros new_ones new_full scalar_tensor", constant_fill),
    ("conv1d conv2d conv3d convolution", convolution),
    ("batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm", batch_norm),
    ("max_pool1d avg_pool1d adaptive_avg_pool1d", pool(1)),
    (
        "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d "
        "adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d",
        pool(2),
    ),
    ("max_pool3d avg_pool3d adaptive_avg_pool3d", pool(3)),
    ("mean sum amax amin var std logsumexp linalg_vector_norm", reduction),
    ("view _unsafe_view reshape flatten unflatten", reshape),
    ("transpose t", transpose),
    ("split split_with_sizes chunk", split_axis),
    ("mm bmm matmul addmm", matmul),
    ("pad constant_pad_nd", pad),
    ("prelu _prelu_kernel", prelu),
    ("arange", fixed_result),
    ("cat", concatenate),
    ("dropout", dropout),
    ("embedding", embedding),
    ("expand", expand),
    ("layer_norm", layer_norm),
    ("linear", linear),
    ("permute", permute),
    ("select", select),
    ("slice", slice_axis),
    ("squeeze", squeeze),
    ("stack", stack),
    ("unsqueeze", unsqueeze),
]
RULES: dict[str, Rule] = {name: rule for names, rule in _TABLE for name in names.split()}


def apply_rule(node: fx.Node, labels: dict[fx.Node, Any], solver: AxisSolver) -> Any:
    """Labels of `node`'s result. Raises Refused, with the reason, where the symmetry is not proven."""
    if node.target.__class__.__name__ == "builtin_function_or_method" and node.name.startswith("getitem"):
        source, index = node.args
        found = labels[source]  # type: ignore[index]
        if isinstance(source, fx.Node) and isinstance(source.meta["val"], tuple | list):
            # Operations of one useful result (batch-norm, pooling with indices) carry that result's labels alone.
            if found and isinstance(found[0], tuple) and found[0] and isinstance(found[0][0], tuple):
                return found[index]
            if index != 0:
                raise Refused("uses a second result")
        return found
    name = getattr(node.target, "_schema", None)
    short = name.name.split("::")[-1] if name is not None and name.name.startswith("aten::") else ""
    rule = RULES.get(short) or RULES.get(short.rstrip("_"))
    if rule is None:
        raise Refused("unknown operation")
    try:
        return rule(Call(node, labels, solver))
    except CannotSplit as why:
        raise Refused(str(why)) from why
