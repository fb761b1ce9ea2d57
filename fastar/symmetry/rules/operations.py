"""How permuted units travel through each operation: one rule per ATen operation.

A rule gets the labels of the tensor arguments and returns the labels of the output, having required whatever must hold
for `op(permuted inputs) == permuted op(inputs)`. An operation without a rule is refused. A rule that calls
`Call.labels` gets one axis per dimension; those that call `Call.dims` know that an axis may be seen in parts (see
`fastar.symmetry.axis_views`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fastar.symmetry import axis_views as views
from fastar.symmetry.axes import AxisSolver, CannotSplit, fixed
from fastar.symmetry.axis_views import Dims
from fastar.symmetry.rules.call import Call, Labels, Refused, Result
from fastar.symmetry.rules.products import attention, broadcast, einsum, linear, matmul, pointwise, softmax
from fastar.symmetry.rules.shapes import (
    along,
    concatenate,
    dims_of,
    expand,
    halves,
    index,
    index_select,
    movedim,
    pad,
    permute,
    repeat,
    repeat_interleave,
    reshape,
    select,
    slice_axis,
    split_axis,
    squeeze,
    stack,
    transpose,
    unbind,
    unsqueeze,
)


def constant_fill(call: Call) -> Dims:
    """A tensor filled with one value: any permutation leaves it as it is."""
    return Dims(tuple((views.Copies(n),) for n in call.shape()))


def fixed_result(call: Call) -> Labels:
    """A tensor that depends on nothing that can move."""
    return tuple(fixed(n) for n in call.shape())


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
    for axis in (*weight[2:], *x[2:]):
        call.require_fixed(axis)
    if groups == 1:
        call.solver.unify(x[1], weight[1])
    else:
        blocks = call.solver.fresh(groups)
        call.require_fixed(weight[1])
        call.solver.unify(x[1], call.solver.merge([blocks, fixed(weight_shape[1])]))
        call.solver.unify(weight[0], call.solver.child(blocks, weight_shape[0] // groups))
    if call["bias"] is not None:
        call.solver.unify(weight[0], call.labels("bias")[0])
    return (x[0], weight[0], *(fixed(n) for n in call.shape()[2:]))


def per_channel(call: Call, x: Dims, *names: str) -> Dims:
    """`x` with vectors along axis 1 applied to it."""
    nodes = [call[name] for name in names if call.arguments.get(name) is not None]
    shape = call.shape()
    for node in nodes:
        along_channels = [1] * len(shape)
        along_channels[1] = call.shape(node)[0]
        vector = call.dims(node).dims[0]
        dims = Dims(tuple(vector if d == 1 else (fixed(1),) for d in range(len(shape))))
        x = broadcast(call, [(x, shape), (dims, along_channels)], shape)
    return x


def batch_norm(call: Call) -> Dims:
    """Statistics and affine parameters follow the channels on axis 1."""
    if call.arguments.get("training") and call.arguments.get("running_mean") is not None:
        raise Refused("batch-norm in training mode inside a model in evaluation mode")
    return per_channel(call, call.dims(call.tensors()[0]), "weight", "bias", "running_mean", "running_var")


def layer_norm(call: Call) -> Dims:
    """Layer-norm and RMS-norm over the last axes."""
    node = call.tensors()[0]
    x, shape = call.dims(node), call.shape(node)
    x = views.inside(call.solver, x, range(len(shape) - len(call["normalized_shape"]), len(shape)))
    for name in ("weight", "bias"):
        if call.arguments.get(name) is not None:
            x = broadcast(call, [(x, shape), (call.dims(name), call.shape(call[name]))], shape)
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
    first, weight = call.tensors()
    x = call.dims(first)
    if call.shape(weight) in ((), (1,)):
        return x
    if len(x.dims) < 2:
        return broadcast(call, [(x, call.shape()), (call.dims(weight), call.shape(weight))], call.shape())
    return per_channel(call, x, "weight")


def pool(spatial: int) -> Callable[[Call], Labels]:
    """The last `spatial` axes are pooled or resampled; the others pass."""

    def rule(call: Call) -> Labels:
        x = call.labels(call.tensors()[0])
        for axis in x[-spatial:]:
            call.require_fixed(axis)
        return (*x[:-spatial], *(fixed(n) for n in call.shape()[-spatial:]))

    return rule


def reduction(call: Call) -> Dims:
    """A symmetric function (mean, sum, maximum ...) over some axes does not depend on the order of what it reduces."""
    x = call.dims(call.tensors()[0])
    dims = dims_of(call.arguments.get("dim"), len(x.dims))
    return views.reduce(call.solver, x, dims, keep=bool(call.arguments.get("keepdim")))


def same(call: Call) -> Dims:
    """The first argument's labels: copies, and functions of each number by itself."""
    return call.dims(call.tensors()[0])


def dropout(call: Call) -> Dims:
    if call["train"]:
        raise Refused("dropout that stays active in evaluation mode")
    return same(call)


def nothing(call: Call) -> None:
    """A check that the tracer wrote into the graph."""


def embedding(call: Call) -> Labels:
    weight = call.labels("weight")
    call.require_fixed(weight[0])
    for axis in call.labels("indices"):
        call.require_fixed(axis)
    return (*call.labels("indices"), weight[1])


Rule = Callable[[Call], Result]

# Names of ATen operations (overloads and in-place forms alike) and their rule.
_TABLE: list[tuple[str, Rule]] = [
    (
        "relu relu6 leaky_relu elu selu celu gelu silu mish tanh sigmoid log_sigmoid hardtanh hardsigmoid "
        "hardswish softplus softsign softshrink hardshrink threshold exp expm1 log log1p sqrt rsqrt square abs neg "
        "sign reciprocal sin cos erf erfc sgn add sub rsub mul div pow maximum minimum clamp clamp_min clamp_max where "
        "masked_fill addcmul addcdiv lerp eq ne gt ge lt le logical_not logical_and logical_or logical_xor bitwise_and "
        "bitwise_or bitwise_not __and__ __or__ floor ceil round trunc exp2 log2 log10 tan atan sinh cosh isnan "
        "isinf nan_to_num logit special_erf float_power fmod remainder clip true_divide "
        "multiply subtract divide negative",
        pointwise,
    ),
    (
        "clone contiguous alias detach detach_ to _to_copy type_as lift_fresh_copy view_as positive",
        same,
    ),
    (
        "full full_like zeros zeros_like ones ones_like empty_like new_zeros new_ones new_full new_empty scalar_tensor",
        constant_fill,
    ),
    ("conv1d conv2d conv3d convolution", convolution),
    ("batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm", batch_norm),
    ("max_pool1d avg_pool1d adaptive_avg_pool1d", pool(1)),
    (
        "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d "
        "adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d",
        pool(2),
    ),
    ("max_pool3d avg_pool3d adaptive_avg_pool3d", pool(3)),
    ("mean sum amax amin var std logsumexp linalg_vector_norm norm prod all any", reduction),
    ("view _unsafe_view reshape flatten unflatten", reshape),
    ("transpose t swapaxes swapdims", transpose),
    ("movedim moveaxis", movedim),
    ("split split_with_sizes chunk", split_axis),
    ("mm bmm matmul addmm baddbmm", matmul),
    ("softmax log_softmax _softmax _log_softmax softmin", softmax),
    ("flip roll cumsum cumprod logcumsumexp", along),
    ("layer_norm rms_norm", layer_norm),
    ("dropout alpha_dropout feature_dropout feature_alpha_dropout", dropout),
    ("_assert_tensor_metadata _assert_async", nothing),
    ("pad constant_pad_nd", pad),
    ("prelu _prelu_kernel", prelu),
    ("arange", fixed_result),
    ("cat", concatenate),
    ("einsum", einsum),
    ("embedding", embedding),
    ("expand", expand),
    ("glu", halves),
    ("group_norm", group_norm),
    ("index", index),
    ("index_select", index_select),
    ("instance_norm", instance_norm),
    ("linear", linear),
    ("permute", permute),
    ("repeat", repeat),
    ("repeat_interleave", repeat_interleave),
    ("scaled_dot_product_attention", attention),
    ("select", select),
    ("slice", slice_axis),
    ("squeeze", squeeze),
    ("stack", stack),
    ("unbind", unbind),
    ("unsqueeze", unsqueeze),
]
RULES: dict[str, Rule] = {name: rule for names, rule in _TABLE for name in names.split()}


def is_fill(node: fx.Node) -> bool:
    """Whether the result of `node` depends on no tensor's values, though it may take its shape from one."""
    return _rule_of(node) is constant_fill


def _rule_of(node: fx.Node) -> Rule | None:
    schema = getattr(node.target, "_schema", None)
    short = schema.name.split("::")[-1] if schema is not None and schema.name.startswith("aten::") else ""
    return RULES.get(short) or RULES.get(short.removesuffix("_"))


def apply_rule(node: fx.Node, labels: dict[fx.Node, Any], solver: AxisSolver) -> Dims | list[Any] | None:
    """Labels of `node`'s result. Raises Refused, with the reason, where the symmetry is not proven."""
    if node.target.__class__.__name__ == "builtin_function_or_method" and node.name.startswith("getitem"):
        source, at = node.args
        found: Dims | list[Any] | None = labels[source]  # type: ignore[index]
        if isinstance(found, list):
            chosen: Dims = found[at]  # type: ignore[index]
            return chosen
        # Operations of one useful result (batch-norm, pooling with indices) carry that result's labels alone.
        if isinstance(source, fx.Node) and isinstance(source.meta["val"], tuple | list) and at != 0:
            raise Refused("uses a second result")
        return found
    rule = _rule_of(node)
    if rule is None:
        raise Refused("unknown operation")
    try:
        result = rule(Call(node, labels, solver))
    except CannotSplit as why:
        raise Refused(str(why)) from why
    return Dims.plain(result) if isinstance(result, tuple) else result
