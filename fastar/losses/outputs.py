"""The tensor that losses take of a network's outputs: themselves, or one of a tuple, a dict or an object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastar.errors import FastarError

# Keys and attributes that networks of others return their prediction under, in this order.
KEYS = ("logits", "out", "output", "prediction")


def prediction(outputs: Any) -> Tensor:
    """The predicted tensor of what a forward returned, in float32.

    Args:
        outputs: a tensor; a tuple or list, whose first entry it is; a mapping or an object with `.logits` (or `out`,
            `output`, `prediction`); or a mapping of one tensor.

    Raises:
        FastarError: there is no such entry; those that are there are listed.
    """
    found = outputs
    if not isinstance(outputs, Tensor):
        # An object of transformers is a mapping too.
        found = _named(outputs) if isinstance(outputs, Mapping) or hasattr(outputs, "logits") else _first(outputs)
    if not isinstance(found, Tensor):
        raise FastarError(
            f"the network returns {_kind(outputs)}, and a loss is taken of a tensor: return a tensor, a tuple that "
            "begins with it, a dict with 'logits', or give a loss of your own, f(outputs, batch)"
        )
    return found.float() if found.is_floating_point() else found


def _first(outputs: Any) -> Any:
    return outputs[0] if isinstance(outputs, tuple | list) and outputs else outputs


def _named(outputs: Any) -> Any:
    if not isinstance(outputs, Mapping):
        return outputs.logits
    for key in KEYS:
        if outputs.get(key) is not None:
            return outputs[key]
    tensors = [value for value in outputs.values() if isinstance(value, Tensor)]
    if len(tensors) == 1:
        return tensors[0]
    raise FastarError(
        f"the network's outputs have no {KEYS[0]!r}; their keys are {', '.join(map(repr, outputs)) or 'none'}: return "
        f"the prediction under {KEYS[0]!r}, or give a loss of your own, f(outputs, batch)"
    )


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {', '.join(type(one).__name__ for one in value) or 'nothing'}"
    return type(value).__name__
