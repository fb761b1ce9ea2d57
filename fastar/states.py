"""Whether a state dict is of an architecture, and what the first differences are."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from fastar.errors import FastarError

# Differences that a message names; the others are counted.
NAMED = 3
# What parameters are computed with.
REAL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

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
    known = {**buffers, **parameters}
    strange = [name for name in tensors if name not in known]
    missing = [name for name in (*parameters, *needed) if name not in tensors and tied.get(name) not in tensors]
    pairs = _same_under_other_names(known, missing, strange, tensors, leading)
    if pairs:
        shown = "; ".join(f"{theirs!r} where the model has {own!r}" for theirs, own in pairs[:NAMED])
        more = f"; and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
        raise FastarError(
            f"{where} has the model's shapes under other names: {shown}{more}; rename its tensors, or save it from the "
            "same class of network"
        )
    found = list(_differences(parameters, known, missing, strange, tensors, leading))
    if found:
        more = f"; and {len(found) - NAMED} more differences" if len(found) > NAMED else ""
        raise FastarError(
            f"{where} {'; '.join(found[:NAMED])}{more}: it is of another architecture or width than the model"
        )


def check_state_of(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Raise FastarError, with the first differences, unless `state` is a whole state of `model`, of types that can be
    computed with, and with one value for each tensor that has two names.

    Only the counts of batches that batch-norms keep may be missing: they say nothing of the function.
    """
    own = _tensors_of(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    parameters = {name: shapes[name] for name, tensor in own.items() if isinstance(tensor, nn.Parameter)}
    buffers = {name: shapes[name] for name in own if name not in parameters}
    needed = [name for name in buffers if not name.endswith("num_batches_tracked")]
    tied = ties_of(model, state)
    tensors = {name: state[name] for name in state}  # once: they may lie in a file
    _check_types(own, tensors, where)
    check_state(parameters, buffers, tied, tensors, where, needed=needed)
    for name, other in tied.items():
        if name in tensors and other in tensors and not torch.equal(tensors[name], tensors[other]):
            raise FastarError(
                f"{where} has two values for {other!r} and {name!r}, which are one tensor in the model: what it "
                "computes is not known; save it with the two tied, or name a network that does not tie them"
            )


def ties_of(model: nn.Module, state: Collection[str]) -> dict[str, str]:
    """Name -> another name of the same tensor of `model`, one that is in `state` if any is."""
    names_of: dict[int, list[str]] = {}
    for name, tensor in _tensors_of(model).items():
        names_of.setdefault(id(tensor), []).append(name)
    tied: dict[str, str] = {}
    for names in names_of.values():
        given = next((name for name in names if name in state), names[0])
        tied |= {name: given for name in names if name != given}
    return tied


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _check_types(own: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    """Raise FastarError unless parameters are real floating-point numbers that matching and paths compute with, and
    no buffer would lose a part of its values in the model."""
    for name, tensor in own.items():
        value = state.get(name)
        if not isinstance(value, Tensor):
            continue
        for whose, one in ((f"{where} has {name!r} as", value), (f"{where}: in the model {name!r} is", tensor)):
            if isinstance(tensor, nn.Parameter) and one.dtype not in REAL:
                raise FastarError(
                    f"{whose} {_kind(one.dtype)}: parameters are matched and interpolated as float16, bfloat16, "
                    "float32 or float64 numbers; convert it first"
                )
        if value.is_complex() and not tensor.is_complex():
            raise FastarError(
                f"{where} has {name!r} as {_kind(value.dtype)} where the model's is {_kind(tensor.dtype)}: its "
                "imaginary part would be lost; name the network that it was saved from"
            )


def _kind(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if dtype.is_floating_point or dtype.is_complex else f"{name} (codes, not numbers)"


def _same_under_other_names(
    known: Shapes, missing: list[str], strange: list[str], tensors: Mapping[str, Tensor], leading: int
) -> list[tuple[str, str]]:
    """Pairs (name there, name in the model), in the model's order, where nothing but names differs; else none."""

    def shape(name: str) -> tuple[int, ...]:
        return tuple(tensors[name].shape[leading:])

    strange = [name for name in strange if not name.endswith("num_batches_tracked")]
    if not missing or sorted(map(shape, strange)) != sorted(known[name] for name in missing):
        return []
    if any(shape(name) != known[name] for name in tensors if name in known):
        return []
    of_shape: dict[tuple[int, ...], list[str]] = {}
    for name in strange:
        of_shape.setdefault(shape(name), []).append(name)
    return [(of_shape[known[name]].pop(0), name) for name in missing]


def _differences(
    parameters: Shapes,
    known: Shapes,
    missing: list[str],
    strange: list[str],
    state: Mapping[str, Tensor],
    leading: int,
) -> Iterator[str]:
    """What differs; the nearest names are looked up for the first differences, which are shown, alone."""
    told = 0

    def nearest(name: str, names: list[str]) -> str:
        nonlocal told
        told += 1
        near = difflib.get_close_matches(name, names, n=1) if told <= NAMED else []
        return f" (nearest: {near[0]!r})" if near else ""

    for name in missing:
        yield f"lacks {'parameter' if name in parameters else 'buffer'} {name!r}{nearest(name, strange)}"
    for name, tensor in state.items():
        if name in known and tuple(tensor.shape[leading:]) != known[name]:
            yield f"has {name!r} of shape {list(tensor.shape[leading:])} where the model's is {list(known[name])}"
    for name in strange:
        yield f"has a tensor {name!r} that the model lacks{nearest(name, missing)}"
