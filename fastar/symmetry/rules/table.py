"""The table of rules: how permuted units travel through each operation of a graph.

An operation without a rule is refused, so nothing is ever matched by a guess. torch.export writes some operations as
others, which then need no rule (`movedim`, `reshape` and `chunk` as `permute`, `view` and `split`). To add a rule:

1. Read the operation's name in the refusal: `aten.cosh.default` is `cosh`. Overloads and in-place forms (`cosh_`) have
   the same rule.
2. If an operation of the table treats units alike (any function of each number by itself is `pointwise`), add the name
   to its line of `_TABLE`.
3. Else write a function of one `Call` in the file that it belongs to (`layers`, `products`, `shapes`), and add a line.
   It returns labels of the result: one axis for each dimension (a tuple; read its inputs by `Call.labels`), or `Dims`
   where an axis may stay in parts after a reshape (`Call.dims`, `fastar.symmetry.axis_views`).
4. The rule has to require whatever `op(permuted inputs) == permuted op(inputs)` needs: `call.solver.fix(axis)` holds
   an axis in place, `call.solver.unify(a, b)` lets two move together, `raise Refused(why)` gives up.
5. Add a small network that uses the operation to `tests/test_symmetry_groups.py`: its groups are proven there.

A function of the order along its last axis, for instance:

    def ordered(call: Call) -> Labels:
        *others, last = call.labels()
        call.solver.fix(last)
        return (*others, fixed(call.shape()[-1]))
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from fastar.symmetry.axes import AxisSolver, CannotSplit
from fastar.symmetry.axis_views import Dims
from fastar.symmetry.rules import layers, products, shapes
from fastar.symmetry.rules.call import Call, Refused, Result

Rule = Callable[[Call], Result]

# Names of ATen operations (overloads and in-place forms alike) and their rule.
_TABLE: list[tuple[str, Rule]] = [
    (
        "relu relu6 leaky_relu elu selu celu gelu silu mish tanh sigmoid log_sigmoid hardtanh hardsigmoid "
        "hardswish softplus softshrink hardshrink threshold exp expm1 log log1p sqrt rsqrt square abs neg "
        "sign reciprocal sin cos erf erfc sgn add sub rsub mul div pow maximum minimum clamp clamp_min clamp_max where "
        "masked_fill addcmul addcdiv lerp eq ne gt ge lt le logical_not logical_and logical_or logical_xor bitwise_and "
        "bitwise_or bitwise_not __and__ __or__ floor ceil round trunc exp2 log2 log10 tan atan sinh cosh isnan "
        "isinf nan_to_num logit special_erf float_power fmod remainder clip true_divide "
        "multiply subtract divide negative",
        products.pointwise,
    ),
    (
        "clone alias detach _to_copy type_as lift_fresh_copy",
        layers.same,
    ),
    (
        "full full_like zeros zeros_like ones ones_like empty_like new_zeros new_ones new_full new_empty scalar_tensor",
        layers.constant_fill,
    ),
    ("conv1d conv2d conv3d convolution", layers.convolution),
    ("conv_transpose1d conv_transpose2d conv_transpose3d", layers.transposed_convolution),
    ("batch_norm _native_batch_norm_legit_no_training _native_batch_norm_legit cudnn_batch_norm", layers.batch_norm),
    ("max_pool1d avg_pool1d adaptive_avg_pool1d", layers.pool(1)),
    (
        "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d "
        "adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d",
        layers.pool(2),
    ),
    ("max_pool3d avg_pool3d adaptive_avg_pool3d", layers.pool(3)),
    ("mean sum amax amin var std logsumexp linalg_vector_norm norm prod all any", layers.reduction),
    ("view _unsafe_view", shapes.reshape),
    ("transpose t", shapes.transpose),
    ("split split_with_sizes", shapes.split_axis),
    ("mm bmm matmul addmm baddbmm", products.matmul),
    ("softmax log_softmax _softmax _log_softmax", products.softmax),
    ("flip roll cumsum cumprod logcumsumexp", shapes.along),
    ("layer_norm rms_norm", layers.layer_norm),
    ("dropout alpha_dropout feature_dropout feature_alpha_dropout", layers.dropout),
    ("_assert_tensor_metadata _assert_async", lambda call: None),  # checks that the tracer wrote into the graph
    ("pad constant_pad_nd", shapes.pad),
    ("prelu _prelu_kernel", layers.prelu),
    ("cat", shapes.concatenate),
    ("einsum", products.einsum),
    ("embedding", layers.embedding),
    ("expand", shapes.expand),
    ("glu", shapes.halves),
    ("group_norm", layers.group_norm),
    ("index", shapes.index),
    ("index_select", shapes.index_select),
    ("instance_norm", layers.instance_norm),
    ("linear", products.linear),
    ("permute", shapes.permute),
    ("repeat", shapes.repeat),
    ("repeat_interleave", shapes.repeat_interleave),
    ("scaled_dot_product_attention", products.attention),
    ("select", shapes.select),
    ("slice", shapes.slice_axis),
    ("squeeze", shapes.squeeze),
    ("stack", shapes.stack),
    ("unbind", shapes.unbind),
    ("unsqueeze", shapes.unsqueeze),
]
RULES: dict[str, Rule] = {name: rule for names, rule in _TABLE for name in names.split()}


def is_fill(node: fx.Node) -> bool:
    """Tell whether the result of `node` depends on no tensor's values, though it may take its shape from one."""
    return _rule_of(node) is layers.constant_fill


def _rule_of(node: fx.Node) -> Rule | None:
    schema = getattr(node.target, "_schema", None)
    short = schema.name.split("::")[-1] if schema is not None and schema.name.startswith("aten::") else ""
    return RULES.get(short) or RULES.get(short.removesuffix("_"))


def apply_rule(node: fx.Node, labels: dict[fx.Node, Any], solver: AxisSolver) -> Dims | list[Any] | None:
    """Labels of `node`'s result. Raises Refused, with the reason, where the symmetry is not proven."""
    if node.target is operator.getitem:
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
