"""A recorder of activations: values that pass a network's parameters in a forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Kind = Literal["made", "read", "other"]
"""Values that a linear map or convolution gives out; that one takes in; that a norm, a scale or a table gives out."""

Sight = tuple[Tensor, int, Kind, Tensor]
"""A parameter, one of its axes, and values [..., length of that axis]: the last axis has a number for each position."""

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
    """

    def __init__(self, names: Mapping[int, str], keep: Callable[[str, int, Kind, Tensor], None]):
        super().__init__()
        self._names, self._keep = names, keep

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        output = func(*args, **given)
        observe = _OBSERVED.get(getattr(func, "__name__", ""))
        if observe is not None:
            for parameter, axis, kind, values in observe(output, *args, **given):
                name = self._names.get(id(parameter))
                if name is not None and values.shape[-1] == parameter.shape[axis]:
                    self._keep(name, axis, kind, values)
        return output


def _linear(output: Any, input: Any, weight: Any, *_: Any, **__: Any) -> Iterator[Sight]:
    yield weight, 0, "made", output
    yield weight, 1, "read", input


def _product(output: Any, input: Any, other: Any = None, **_: Any) -> Iterator[Sight]:
    if isinstance(other, Tensor) and isinstance(input, Tensor) and other.ndim == 2 and input.ndim >= 2:
        yield other, 1, "made", output
        yield other, 0, "read", input


def _convolution(output: Any, input: Any, weight: Any, *_: Any, **__: Any) -> Iterator[Sight]:
    yield weight, 0, "made", output.movedim(1 - weight.ndim, -1)
    yield weight, 1, "read", input.movedim(1 - weight.ndim, -1)


def _transposed(output: Any, input: Any, weight: Any, *_: Any, **__: Any) -> Iterator[Sight]:
    yield weight, 0, "read", input.movedim(1 - weight.ndim, -1)
    yield weight, 1, "made", output.movedim(1 - weight.ndim, -1)


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
            for axis, size in enumerate(value.shape):
                if size > 1:
                    yield value, axis, "other", output.movedim(axis - value.ndim, -1)


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


_OBSERVED: dict[str, Observe] = {
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "__matmul__"), _product),
    "addmm": lambda output, input, mat1, mat2, **_: _product(output, mat1, mat2),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "embedding": _embedding,
    **dict.fromkeys(("batch_norm", "group_norm", "instance_norm", "prelu"), _along_channels),
    **dict.fromkeys(("layer_norm", "rms_norm"), _along_last),
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply", "add", "__add__", "__radd__"), _broadcast),
    "multi_head_attention_forward": _attention,
}
