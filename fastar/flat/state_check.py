"""A module as a function of its state dict: whether a state is of it, what else it computes with, and copies of it."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves

from fastar.errors import FastarError, first_line

# Differences that a message names; the others are counted.
NAMED = 3
# The dtypes that parameters are computed with.
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
    for name in missing:
        for ends, undo in _COMPUTED_FROM.items():
            if all(name + end in strange for end in ends):
                raise FastarError(
                    f"{where} has {name + ends[0]!r} and {name + ends[1]!r} where the model has {name!r}, which is "
                    f"computed from them: call torch.nn.utils.{undo}(module, {name.rpartition('.')[2]!r}) on its "
                    "network, and save it again"
                )
    pairs = _same_under_other_names(known, missing, strange, tensors, leading)
    if pairs:
        found = [f"{theirs!r} where the model has {own!r}" for theirs, own in pairs]
        raise FastarError(
            f"{where} has the model's shapes under other names: {first_few(found, 'more')}; rename its tensors, or use "
            "one class of network for both"
        )
    found = list(_differences(parameters, known, missing, strange, tensors, leading))
    if found:
        raise FastarError(f"{where} {first_few(found)}: it is of another architecture or width than the model")


def first_few(found: Sequence[str], others: str = "more differences") -> str:
    """The first of what was found, and how many there are of `others`."""
    more = [f"and {len(found) - NAMED} {others}"] if len(found) > NAMED else []
    return "; ".join([*found[:NAMED], *more])


_COMPUTED_FROM = {
    ("_orig", "_mask"): "prune.remove",
    ("_g", "_v"): "remove_weight_norm",
    ("_orig", "_u"): "remove_spectral_norm",
}


def check_state_of(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Raise FastarError, with the first differences, unless `state` is a whole state of `model`, of types that can be
    computed with.

    Only the counts of batches that batch-norms keep may be missing: they say nothing of the function.
    """
    own = tensors_of(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    parameters = {name: shapes[name] for name, tensor in own.items() if isinstance(tensor, nn.Parameter)}
    buffers = {name: shapes[name] for name in own if name not in parameters}
    needed = [name for name in buffers if not name.endswith("num_batches_tracked")]
    tied = ties_of(model, state)
    _check_types(own, state, where)
    check_state(parameters, buffers, tied, state, where, needed=needed)


def check_one_value(model: nn.Module, state: Mapping[str, Tensor], where: str, remedy: str) -> None:
    """Raise FastarError, with what to do, where `state` has two values for what is one tensor in `model`."""
    for name, other in ties_of(model, state).items():
        if name in state and other in state and not torch.equal(state[name], state[other]):
            raise FastarError(
                f"{where} has two values for {other!r} and {name!r}, which are one tensor in the model: {remedy}"
            )


def ties_of(model: nn.Module, state: Collection[str]) -> dict[str, str]:
    """Name -> another name of the same tensor of `model`, one that is in `state` if any is."""
    names_of: dict[int, list[str]] = {}
    for name, tensor in tensors_of(model).items():
        names_of.setdefault(id(tensor), []).append(name)
    tied: dict[str, str] = {}
    for names in names_of.values():
        given = next((name for name in names if name in state), names[0])
        tied |= {name: given for name in names if name != given}
    return tied


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the state dict, the model's own objects, without what `get_extra_state` adds."""
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
    """The differences; nearest names are looked up for the first few alone, which are shown."""
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


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of `model`, without gradients and what modules drop when they are set to training (evaluation caches).

    Args:
        memo: as of `copy.deepcopy`: what stands for which object.

    Raises:
        FastarError: weights or buffers that are computed from others (`check_computed`), or what cannot be copied.
    """
    check_computed(model)
    memo = {} if memo is None else memo
    for tensor in attribute_tensors(model):
        if tensor.grad_fn is not None:  # a kept activation: torch refuses to copy its history
            memo.setdefault(id(tensor), tensor.detach().clone())
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:  # a module's own code may raise anything
        why = first_line(error).split(".")[0]
        raise FastarError(
            f"{type(model).__name__} cannot be copied ({why}): hold no computed tensors, locks or files in it"
        ) from error
    for parameter in twin.parameters():
        parameter.grad = None
    forget(twin)
    return twin


def forget(model: nn.Module) -> None:
    """Let modules that know when they are trained drop what they computed from weights in evaluation mode."""
    if not drops_caches(model):
        return
    modes = {module: module.training for module in model.modules()}
    model.train()
    if not any(modes.values()):
        model.eval()
    for module, training in modes.items():
        module.training = training


def drops_caches(model: nn.Module) -> bool:
    """Tell whether a module does something of its own when it is set to training."""
    return any(type(module).train is not nn.Module.train for module in model.modules())


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Inside, modules may keep what they compute as attributes (caches, activations); afterwards these are as before,
    so that the next pass, with other weights, does not see them."""
    before = [
        (vars(module), {key: (value, _content(value)) for key, value in _plain(module).items()})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for now, attributes in before:
            for key in now.keys() - attributes.keys() - _OWN:
                del now[key]
            for key, (value, content) in attributes.items():
                now[key] = value
                if content is not None:
                    value.clear()
                    (value.extend if isinstance(value, list) else value.update)(content)


_OWN = frozenset(vars(nn.Module()))


def _content(value: Any) -> Any:
    """A copy of a container; None of others."""
    return value.copy() if isinstance(value, dict | list | set) else None


def check_computed(model: nn.Module) -> None:
    """Raise FastarError, naming module and tensor, where weights are computed before each pass and kept beside what
    they are computed from (torch.nn.utils.prune, weight_norm), or a buffer is: a copy would be of the old ones."""
    for name, module in model.named_modules():
        where = f"{type(model).__name__} cannot be copied: " + (f"module {name!r}" if name else "it")
        for hook in module._forward_pre_hooks.values():
            undo = next((undo for kind, undo in _UNDO.items() if isinstance(hook, kind)), None)
            leaf = getattr(hook, "_tensor_name", getattr(hook, "name", ""))
            kept = vars(module).get(leaf)
            if undo == "prune.remove" or (undo and isinstance(kept, Tensor) and kept.grad_fn is not None):
                raise FastarError(
                    f"{where} computes its {leaf!r} from other tensors before each pass; make it a parameter, in all "
                    f"networks that are matched: torch.nn.utils.{undo}(module, {leaf!r})"
                )
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.grad_fn is not None:
                raise FastarError(f"{where} has a buffer {key!r} that is computed from others: detach it (.detach())")


_UNDO: dict[type, str] = {
    prune.BasePruningMethod: "prune.remove",
    WeightNorm: "remove_weight_norm",
    SpectralNorm: "remove_spectral_norm",
}


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are its own, by name: no parameters, buffers or modules."""
    return {key: value for key, value in vars(module).items() if key not in _OWN}


def attribute_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that modules keep as plain attributes, in containers of containers too."""
    return (one for module in model.modules() for one in tree_leaves(_plain(module)) if isinstance(one, Tensor))


def is_vector(tensor: Tensor) -> bool:
    """Tell whether a tensor has one axis that is longer than one, and so may hold a value for each of some units."""
    return sum(size > 1 for size in tensor.shape) == 1
