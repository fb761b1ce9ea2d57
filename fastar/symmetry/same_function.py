"""Comparison of two networks as functions of their state.

Two of one class differ where one has another activation, say: permuting or interpolating it as if it were the other
would be wrong without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastar.errors import FastarError
from fastar.flat.forward import gaps
from fastar.flat.state_check import first_few, tensors_of
from fastar.symmetry.random_network import ExampleInputs, RandomNetwork
from fastar.symmetry.symmetry import Member, Symmetry
from fastar.symmetry.verify import DRAWS, RELATIVE_TOLERANCE, largest

# Attributes of a module that do not change its outputs in evaluation mode, or are compared elsewhere.
_APART = frozenset({"training", "_modules", "_parameters", "_buffers", "_backward_hooks", "_backward_pre_hooks"})


TIE_ALIKE = "tie them in both networks or in neither"


def check_same_function(
    first: nn.Module, other: nn.Module, example_inputs: ExampleInputs, names: tuple[str, str]
) -> None:
    """Raise FastarError, naming modules and what differs, unless both make the same of the same weights.

    Where modules and their attributes are the same nothing is run; else both are, in float64 on random weights.

    Args:
        names: what messages call the two.
    """
    found = list(differences(first, other, names))
    if not found or _agree(first, other, example_inputs):
        return
    raise FastarError(
        f"{names[0]} and {names[1]} compute something else with the same weights: {first_few(found)}: match networks "
        "of one architecture, or make them alike"
    )


def _agree(first: nn.Module, other: nn.Module, example_inputs: ExampleInputs) -> bool:
    """Tell whether outputs are the same on several draws of weights: small ones, and such that saturate."""
    one, two = (RandomNetwork(model, example_inputs, seed=0) for model in (first, other))
    for number, (gain, positive) in enumerate(DRAWS[:3]):
        state = one.state(gain, positive=positive, number=number)
        expected = one.outputs(state)
        found = gaps(expected, two.outputs(state))
        if any(gap > RELATIVE_TOLERANCE * largest(out) for gap, out in zip(found, expected, strict=True)):
            return False
    return True


def differences(first: nn.Module, other: nn.Module, names: tuple[str, str]) -> Iterator[str]:
    """The differences of two networks, their states aside; more than those that matter, but not fewer."""
    ours, theirs = (dict(model.named_modules(remove_duplicate=False)) for model in (first, other))
    known = tuple({id(tensor): name for name, tensor in tensors_of(model).items()} for model in (first, other))
    for name in ours.keys() ^ theirs.keys():
        yield f"{names[0] if name in ours else names[1]} alone has a module {name!r}"
    for name in (name for name in ours if name in theirs):
        one, two = ours[name], theirs[name]
        where = f"module {name!r}" if name else "the whole"
        if type(one) is not type(two):
            kinds = [type(module).__qualname__ for module in (one, two)]
            if kinds[0] == kinds[1]:
                kinds = [f"{type(module).__module__}.{kinds[0]}" for module in (one, two)]
            yield f"{where} is {kinds[0]} in {names[0]} and {kinds[1]} in {names[1]}"
            continue
        held = [{**vars(module), **module._buffers} for module in (one, two)]
        for key in dict.fromkeys((*held[0], *held[1])):
            values = [those.get(key) for those in held]
            if key not in _APART and not _same(values[0], values[1], known):
                said = [_said(value) for value in values]
                both = f"{said[0]} in {names[0]} and {said[1]} in {names[1]}" if said[0] != said[1] else "not the same"
                yield f"{key!r} of {where} is {both}"


def _same(one: Any, two: Any, known: tuple[dict[int, str], ...]) -> bool:
    """Tell whether two values are surely alike."""
    if one is two:
        return True
    if type(one) is not type(two):
        return False
    if isinstance(one, Tensor):
        if id(one) in known[0] or id(two) in known[1]:
            return known[0].get(id(one)) == known[1].get(id(two))
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one.cpu(), two.cpu())
    if isinstance(one, Mapping):
        if one and all(callable(value) for value in (*one.values(), *two.values())):  # hooks: their keys are counted up
            return _same(list(one.values()), list(two.values()), known)
        return list(one) == list(two) and all(_same(one[key], two[key], known) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(two) and all(_same(a, b, known) for a, b in zip(one, two, strict=True))
    if isinstance(one, nn.Module):
        return False  # one that is hidden in a list: not looked into
    return type(one).__eq__ is not object.__eq__ and (one == two) is True


def _said(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    text = getattr(value, "__qualname__", None) or repr(value)
    return text if len(text) <= 40 and "\n" not in text else type(value).__name__


def check_ties(symmetry: Symmetry, model: nn.Module, name: str) -> None:
    """Raise FastarError where `model` ties tensors that the symmetry moves apart: one tensor cannot move two ways."""
    moves: dict[str, set[tuple[str, Member]]] = {}
    for group in symmetry.groups:
        for member in group.members:
            moves.setdefault(member.tensor, set()).add((group.name, replace(member, tensor="")))
    first: dict[object, str] = {}
    in_memory: dict[object, str] = {}
    for own, tensor in tensors_of(model).items():
        owner = first.setdefault(id(tensor), own)
        if symmetry.tied.get(own, own) != symmetry.tied.get(owner, owner):
            raise FastarError(
                f"{name}: {own!r} and {owner!r} are one tensor, but two in the model that the groups were derived "
                f"from: {TIE_ALIKE}"
            )
        if not tensor.numel():
            continue
        other = in_memory.setdefault((tensor.device, tensor.data_ptr()), own)
        if moves.get(own) != moves.get(other) or symmetry.arranged.get(own) != symmetry.arranged.get(other):
            raise FastarError(
                f"{name}: {own!r} and {other!r} are two tensors that share memory, and would have to move in two "
                "ways: tie them by using one nn.Parameter, or one buffer, twice"
            )
