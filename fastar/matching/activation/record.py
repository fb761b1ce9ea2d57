"""A recorder of activations: values that pass a network's parameters in a forward pass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastar.symmetry import Arrangement

Kind = Literal["made", "read", "other"]
"""Values that a linear map or convolution gives out; that one takes in; that a norm, a scale or a table gives out."""

Sight = tuple[Tensor, int | tuple[int, ...], Kind, Tensor]
"""A parameter, one of its axes, and values [..., length of that axis]: the last axis has a number for each position. Or
several of its axes, and values [..., their lengths]: such are of use where the parameter is read with these merged. Of
an axis that is read as several, values may run along the outermost of these alone."""

Place = int | tuple[int, int]
"""An axis of what is read of a parameter; or two, the second within the first."""

Observe = Callable[..., Iterator[Sight]]
"""Takes what a function gave out, and its arguments."""


class Observer(TorchFunctionMode):
    """While it is active, tells `keep` of all values that run along an axis of a parameter it knows.

    It sees calls of functions, not modules, so that any forward will do: convolutions, linear maps and products with a
    matrix, embeddings, norms, scales and shifts, attention. A parameter that is reshaped before it is used is not
    recognised.

    Args:
        names: id of a parameter's tensor -> its name.
        keep: takes name, axis, kind and values.
        arranged: name -> how a parameter is read: axes and positions that `keep` is told of are those of what is read.
        within: name -> pairs of these axes of which `keep` is told too, as of one axis that is made of both.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        keep: Callable[[str, Place, Kind, Tensor], None],
        arranged: Mapping[str, Arrangement] | None = None,
        within: Mapping[str, set[tuple[int, int]]] | None = None,
    ):
        super().__init__()
        self._names, self._keep, self._arranged, self._within = names, keep, arranged or {}, within or {}
        self._computed: dict[str, Tensor] = {}  # parameter -> the weight that a parametrisation makes of it

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        output = func(*args, **given)
        called = getattr(func, "__name__", "")
        if called in _PARAMETRISED and args and isinstance(args[0], Tensor) and args[0].ndim > 1:
            name = self._names.get(id(args[0]))
            if name is not None and output.shape == args[0].shape:
                self._computed[name] = output
        observe = _OBSERVED.get(called)
        if observe is not None:
            for parameter, axis, kind, values in observe(output, *args, **given):
                name = self._names.get(id(parameter)) or next(
                    (known for known, weight in self._computed.items() if weight is parameter), None
                )
                if name is None:
                    continue
                if name in self._arranged or name in self._within:
                    how = self._arranged.get(name) or Arrangement.plain(parameter.ndim)
                    for one, read in _as_read(how, parameter.shape, axis, values, self._within.get(name, set())):
                        self._keep(name, one, kind, read)
                elif isinstance(axis, int) and values.shape[-1] == parameter.shape[axis]:
                    self._keep(name, axis, kind, values)
        return output


def _as_read(
    arrangement: Arrangement,
    shape: torch.Size,
    axis: int | tuple[int, ...],
    values: Tensor,
    within: set[tuple[int, int]],
) -> Iterator[tuple[Place, Tensor]]:
    """The axes, and pairs of axes, of what is read of a parameter of `shape` that are made of all these axes, and
    values [..., their length]; none where there are none. Axes of length 1 may be left out. Where axes are split, what
    is read may be made of some of these, and the others are samples.
    """
    axes = (axis,) if isinstance(axis, int) else axis
    begin = values.ndim - len(axes)
    finer, seen, lengths = arrangement.finer(shape), list[int](), list[int]()
    for place, one in enumerate(axes):
        parts = [*arrangement.split.get(one, (shape[one],))]
        length = values.shape[begin + place]
        if length == shape[one]:
            values = arrangement.ordered(values, one, begin + place)
        elif one in arrangement.orders:
            return
        else:  # the outermost of its finer axes
            parts = [n for k, n in enumerate(parts) if length % math.prod(parts[: k + 1]) == 0]
            if math.prod(parts) != length or len(parts) == 0:
                return
        seen, lengths = [*seen, *finer[one][: len(parts)]], [*lengths, *parts]
    values = values.reshape(*values.shape[:begin], *lengths)
    long = {one for one, length in zip(seen, lengths, strict=True) if length > 1}
    wanted: list[tuple[Place, tuple[int, ...]]] = list(enumerate(arrangement.axes))
    wanted += [((a, b), (*arrangement.axes[a], *arrangement.axes[b])) for a, b in sorted(within)]
    fine = arrangement.fine(shape)
    for place_read, group in wanted:
        own = {one for one in group if fine[one] > 1}
        if own and own <= long and (own == long or arrangement.split):
            at = [seen.index(one) for one in group if one in seen]
            rest = [k for k in range(len(seen)) if k not in at]
            order = [*range(begin), *(begin + k for k in rest), *(begin + k for k in at)]
            yield place_read, values.permute(order).flatten(begin + len(rest))


def _linear(output: Any, input: Any, weight: Any, *_: Any, **__: Any) -> Iterator[Sight]:
    yield weight, 0, "made", output
    yield weight, 1, "read", input


def _product(output: Any, input: Any, other: Any = None, **_: Any) -> Iterator[Sight]:
    if not (isinstance(other, Tensor) and isinstance(input, Tensor) and input.ndim >= 2):
        return
    if other.ndim == 2:
        yield other, 1, "made", output
        yield other, 0, "read", input
    elif other.ndim == 3 and output.ndim >= 3:  # a product for each of a stack
        yield other, (0, 2), "made", output.movedim(-3, -2)
        stacks = input.ndim > 2 and len(other) > 1 and input.shape[-3] == len(other)
        yield (other, (0, 1), "read", input.movedim(-3, -2)) if stacks else (other, (1,), "read", input)


def _einsum(output: Any, equation: Any, *operands: Any, **_: Any) -> Iterator[Sight]:
    """Axes that each of two operands shares with the output, and those that it shares with the other one."""
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return
    given, to = equation.replace(" ", "").split("->")
    terms = [_letters(term, one.ndim) for term, one in zip(given.split(","), operands, strict=True)]
    for own, other, parameter, values in zip(terms, terms[::-1], operands, operands[::-1], strict=True):
        kinds: tuple[tuple[Kind, list[str | int], Tensor], ...]
        kinds = ("made", _letters(to, output.ndim), output), ("read", other, values)
        for kind, letters, seen in kinds:
            shared = [axis for axis, letter in enumerate(own) if letter in letters]
            if shared and len(set(own)) == len(own) and len(set(letters)) == len(letters):
                yield parameter, tuple(shared), kind, _last(seen, [letters.index(own[axis]) for axis in shared])


def _last(values: Tensor, axes: list[int]) -> Tensor:
    """Values with these axes behind all others, in this order."""
    return values.movedim(axes, [*range(-len(axes), 0)])


def _letters(term: str, axes: int) -> list[str | int]:
    """Names of an operand's axes in a term of an einsum; those of its ellipsis are counted from their last."""
    before, _, after = term.partition("...")
    return [*before, *range(len(before) + len(after) - axes, 0), *after]


def _convolution(output: Any, input: Any, weight: Any, *_: Any, **__: Any) -> Iterator[Sight]:
    yield weight, 0, "made", output.movedim(1 - weight.ndim, -1)
    yield weight, 1, "read", (read := input.movedim(1 - weight.ndim, -1))
    if read.shape[-1] != weight.shape[1]:  # groups, which lie on axis 0 too
        yield weight, (0, 1), "read", read.unflatten(-1, (-1, weight.shape[1]))


def _transposed(output: Any, input: Any, weight: Any, *_: Any, **__: Any) -> Iterator[Sight]:
    yield weight, 0, "read", input.movedim(1 - weight.ndim, -1)
    yield weight, 1, "made", (made := output.movedim(1 - weight.ndim, -1))
    if made.shape[-1] != weight.shape[1]:
        yield weight, (0, 1), "made", made.unflatten(-1, (-1, weight.shape[1]))


def _embedding(output: Any, *args: Any, **kwargs: Any) -> Iterator[Sight]:
    weight = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point())
    yield weight, 1, "made", output


def _along_channels(output: Any, *args: Any, **kwargs: Any) -> Iterator[Sight]:
    for value in (*args[1:], *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim == 1:
            yield value, 0, "other", output.movedim(1, -1)


def _along_last(output: Any, *args: Any, **kwargs: Any) -> Iterator[Sight]:
    yield from _broadcast(output, *args[1:], **kwargs)


def _broadcast(output: Any, *args: Any, **kwargs: Any) -> Iterator[Sight]:
    """Axes of operands of pointwise functions, aligned at the last one."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            long = [axis for axis, size in enumerate(value.shape) if size > 1]
            for axis in long:
                yield value, axis, "other", output.movedim(axis - value.ndim, -1)
            if len(long) > 1:
                yield value, tuple(long), "other", _last(output, [axis - value.ndim for axis in long])


def _attention(output: Any, *args: Any, **kwargs: Any) -> Iterator[Sight]:
    """torch's own function for whole attention layers; what its projections give out is computed here once more."""
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
    inputs = [given[name] for name in ("query", "key", "value")]
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    if given.get("use_separate_proj_weight"):
        for name, x, b in zip("qkv", inputs, biases, strict=True):
            one = given[f"{name}_proj_weight"]
            yield one, 0, "made", F.linear(x, one, b)
            yield one, 1, "read", x
    elif weight is not None and inputs[0].shape == inputs[1].shape == inputs[2].shape:
        made = [F.linear(x, one, b) for x, one, b in zip(inputs, weight.chunk(3), biases, strict=True)]
        yield weight, 0, "made", torch.cat(made, -1)
        yield weight, 1, "read", inputs[0]
    yield given["out_proj_weight"], 0, "made", output[0]


# Functions by which weight_norm and spectral_norm make a weight of a parameter of its shape.
_PARAMETRISED = {"_weight_norm", "__truediv__", "div", "true_divide"}
_OBSERVED: dict[str, Observe] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__"), _product),
    **dict.fromkeys(("addmm", "baddbmm"), lambda output, input, mat1, mat2, **_: _product(output, mat1, mat2)),
    "einsum": _einsum,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "embedding": _embedding,
    **dict.fromkeys(("batch_norm", "group_norm", "instance_norm", "prelu"), _along_channels),
    **dict.fromkeys(("layer_norm", "rms_norm"), _along_last),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply", "add", "__add__", "__radd__"), _broadcast),
    "multi_head_attention_forward": _attention,
}
