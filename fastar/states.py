"""Whether a state dict is of an architecture, and what the first differences are."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn

from fastar.errors import FastarError

# Differences that a message names; the others are counted.
NAMED = 3

Shapes = Mapping[str, tuple[int, ...]]


def check_state(
    parameters: Shapes,
    buffers: Shapes,
    tied: Mapping[str, str],
    state: Mapping[str, Tensor],
    where: str,
    leading: int = 0,
    needed: Collection[str] = (),
) -> None:
    """Raise FastarError, with the first differences, unless `state` has every parameter, and nothing else but buffers.

    What is no tensor (a module's `get_extra_state`) is not looked at.

    Args:
        parameters: name -> shape.
        buffers: name -> shape; they may be missing.
        tied: name -> the other name of the same tensor; one of the two is enough.
        where: what the message calls `state`: a file, or which of the given ones it is.
        leading: batch axes in front of each shape.
        needed: buffers that may not be missing.
    """
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    found = list(_differences(parameters, buffers, tied, tensors, leading, needed))
    if found:
        more = f"; and {len(found) - NAMED} more differences" if len(found) > NAMED else ""
        raise FastarError(
            f"{where} {'; '.join(found[:NAMED])}{more}: it is of another architecture or width than the model"
        )


def check_state_of(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Raise FastarError, with the first differences, unless `state` is a whole state of `model`.

    Only the counts of batches that batch-norms keep may be missing: they say nothing of the function.
    """
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    names_of: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names_of.setdefault(id(tensor), []).append(name)
    tied: dict[str, str] = {}
    for names in names_of.values():  # each with another that is there, if any is
        given = next((name for name in names if name in state), names[0])
        tied |= {name: given for name in names if name != given}
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    parameters = {name: shapes[name] for name, tensor in own.items() if isinstance(tensor, nn.Parameter)}
    buffers = {name: shapes[name] for name in own if name not in parameters}
    needed = [name for name in buffers if not name.endswith("num_batches_tracked")]
    check_state(parameters, buffers, tied, state, where, needed=needed)


def _differences(
    parameters: Shapes,
    buffers: Shapes,
    tied: Mapping[str, str],
    state: Mapping[str, Tensor],
    leading: int,
    needed: Collection[str],
) -> Iterator[str]:
    known = {**buffers, **parameters}
    strange = [name for name in state if name not in known]
    missing = [name for name in (*parameters, *needed) if name not in state and tied.get(name) not in state]
    for name in missing:
        yield f"lacks {'parameter' if name in parameters else 'buffer'} {name!r}{_nearest(name, strange)}"
    for name, tensor in state.items():
        if name in known and tuple(tensor.shape[leading:]) != known[name]:
            yield f"has {name!r} of shape {list(tensor.shape[leading:])} where the model's is {list(known[name])}"
    for name in strange:
        yield f"has a tensor {name!r} that the model lacks{_nearest(name, missing)}"


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f" (nearest: {near[0]!r})" if near else ""
