"""The table of rules: how permuted units travel through each operation of a graph.

An operation without a rule is refused, so nothing is ever matched by a guess. torch.export writes some operations as
others, which then need no rule (`movedim`, `reshape` and `chunk` as `permute`, `view` and `split`). To add a rule:

1. Read the operation's name in the refusal: `aten.cosh.default` is `cosh`. Overloads and in-place forms (`cosh_`) have
   the same rule.
2. If an operation of the table treats units alike (any function of each number by itself is `pointwise`), add the name
   to its line of `_TABLE`.
3. Else write a function of one `Call` in the file that it belongs to (`layers`, `products`, `shapes`), and add a line.
   It returns `fastar.symmetry.labels.Labels` of the result.
4. The rule has to require whatever `op(permuted inputs) == permuted op(inputs)` needs, by the functions of
   `fastar.symmetry.labels`: `hold` (an axis stays), `combine` (tensors move alike), `inside` and `reduce` (positions
   are treated alike along some dimensions), and of `fastar.symmetry.rearrange`: `take`, `concatenate`, `reshape`.
   `raise Refused(why)` gives up.
5. Add a small network that uses the operation to `tests/test_symmetry_groups.py`: its groups are proven there.

A function of the order along its last axis, for instance:

    def ordered(call: Call) -> Labels:
        x = call.labels()
        call.hold(x, [-1], "depends on the order")
        return x
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from fastar.symmetry.labels import Labels
from fastar.symmetry.rearrange import CannotFlatten
from fastar.symmetry.rules import images, layers, order, products, recurrent, shapes
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
    ("max_pool1d avg_pool1d adaptive_avg_pool1d upsample_nearest1d upsample_linear1d", images.pool(1)),
    (
        "max_pool2d avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d "
        "upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa",
        images.pool(2),
    ),
    ("max_pool3d avg_pool3d adaptive_avg_pool3d upsample_nearest3d upsample_trilinear3d", images.pool(3)),
    ("max_pool1d_with_indices adaptive_max_pool1d", images.pool_with_indices(1)),
    ("max_pool2d_with_indices adaptive_max_pool2d", images.pool_with_indices(2)),
    ("max_pool3d_with_indices adaptive_max_pool3d", images.pool_with_indices(3)),
    ("pixel_shuffle", images.pixel_shuffle),
    ("pixel_unshuffle", images.pixel_unshuffle),
    ("channel_shuffle native_channel_shuffle", images.channel_shuffle),
    ("im2col", images.patches),
    ("col2im", images.from_patches),
    ("unfold", images.windows),
    ("grid_sampler grid_sampler_2d grid_sampler_3d", images.grid_sample),
    ("affine_grid_generator", images.stays),
    ("embedding_bag _embedding_bag _embedding_bag_forward_only", images.embedding_bag),
    ("max min", order.maximum),
    ("median nanmedian mode kthvalue", order.extreme),
    ("sort topk", order.ordered),
    ("argsort argmax argmin", order.numbers),
    ("gather take_along_dim", order.gather),
    ("scatter scatter_add scatter_reduce", order.scatter),
    ("index_add index_copy index_reduce", order.index_add),
    ("index_fill", order.index_fill),
    ("index_put", order.index_put),
    ("slice_scatter", order.slice_scatter),
    ("select_scatter", order.select_scatter),
    ("copy", order.copy),
    ("fill zero", order.filled),
    ("one_hot", order.one_hot),
    ("tril triu", order.triangle),
    ("diagonal", order.diagonal),
    ("var_mean std_mean", layers.both_reductions),
    ("_weight_norm", layers.weight_norm),
    ("_weight_norm_interface", layers.weight_norm_interface),
    ("norm_except_dim", layers.norm_except),
    ("lstm gru rnn_tanh rnn_relu", recurrent.layer()),
    ("lstm_cell", recurrent.cell(2)),
    ("gru_cell rnn_tanh_cell rnn_relu_cell", recurrent.cell(1)),
    ("mean sum amax amin var std logsumexp linalg_vector_norm norm prod all any", layers.reduction),
    ("view _unsafe_view", shapes.reshape),
    ("transpose t", shapes.transpose),
    ("split split_with_sizes", shapes.split_axis),
    ("mm bmm matmul addmm baddbmm mv dot vdot addmv", products.matmul),
    ("outer ger", products.outer),
    ("bilinear", products.bilinear),
    ("cosine_similarity", products.cosine_similarity),
    ("softmax log_softmax _softmax _log_softmax", products.softmax),
    ("cumsum cumprod logcumsumexp cummax cummin", shapes.along),
    ("flip", shapes.flip),
    ("roll", shapes.roll),
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


def apply_rule(call: Call, of: dict[fx.Node, Any]) -> Labels | list[Any] | None:
    """Labels of the result of an operation, whose inputs have the labels `of`. Raises Refused, with the reason, where
    the symmetry is not proven."""
    if call.node.target is operator.getitem:
        source, at = call.node.args
        found: Labels | list[Any] | None = of[source]  # type: ignore[index]
        if isinstance(found, list):
            chosen: Labels = found[at]  # type: ignore[index]
            return chosen
        # Operations of one useful result (batch-norm, pooling with indices) carry that result's labels alone.
        if isinstance(source, fx.Node) and isinstance(source.meta["val"], tuple | list) and at != 0:
            raise Refused("uses a second result")
        return found
    rule = _rule_of(call.node)
    if rule is None:
        raise Refused("unknown operation")
    try:
        result = rule(call)
    except CannotFlatten as why:
        raise Refused(str(why)) from why
    read = [of[node] for node in call.tensors()]
    numbers = [x.numbers for x in read if isinstance(x, Labels) and x.numbers is not None]
    if rule in _MOVES and numbers:  # whole numbers in other places
        carried = result if isinstance(result, list) else [result]
        carried = [replace(x, numbers=numbers[0]) if isinstance(x, Labels) else x for x in carried]
        return carried if isinstance(result, list) else carried[0]
    if rule not in order.BY_NUMBER and not is_fill(call.node):
        for one in numbers:
            order.hold_numbers(call, one)
    return result


_MOVES = {
    *(shapes.reshape, shapes.permute, shapes.transpose, shapes.squeeze, shapes.unsqueeze, shapes.expand),
    *(shapes.repeat, shapes.slice_axis, shapes.split_axis, shapes.select, shapes.unbind, shapes.flip, layers.same),
}
"""Rules of operations that give the values that they read, in other places."""
