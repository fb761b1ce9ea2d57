"""Whether a state dict is of an architecture, and what the first differences are."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping

from torch import Tensor

from fastar.errors import FastarError

# Differences that a message names; the others are counted.
NAMED = 3

Shapes = Mapping[str, tuple[int, ...]]


def check_state(
    parameters: Shapes, buffers: Shapes, tied: Mapping[str, str], state: Mapping[str, Tensor], where: str, leading: int
) -> None:
    """Raise FastarError, with the first differences, unless `state` has every parameter, and nothing else but buffers.

    Args:
        parameters: name -> shape.
        buffers: name -> shape; they may be missing.
        tied: name -> the other name of the same tensor; one of the two is enough.
        where: what the message calls `state`.
        leading: batch axes in front of each shape.
    """
    found = list(_differences(parameters, buffers, tied, state, leading))
    if found:
        more = f"; and {len(found) - NAMED} more differences" if len(found) > NAMED else ""
        raise FastarError(f"{where} {'; '.join(found[:NAMED])}{more}: it is of another architecture than the model")


def _differences(
    parameters: Shapes, buffers: Shapes, tied: Mapping[str, str], state: Mapping[str, Tensor], leading: int
) -> Iterator[str]:
    known = {**buffers, **parameters}
    strange = [name for name in state if name not in known]
    missing = [name for name in parameters if name not in state and tied.get(name) not in state]
    for name in missing:
        yield f"lacks parameter {name!r}{_nearest(name, strange)}"
    for name, tensor in state.items():
        if name in known and tuple(tensor.shape[leading:]) != known[name]:
            yield f"has {name!r} of shape {list(tensor.shape[leading:])} where the model's is {list(known[name])}"
    for name in strange:
        yield f"has a tensor {name!r} that the model lacks{_nearest(name, missing)}"


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (nearest: {near[0]!r})" if near else ""
