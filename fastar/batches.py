"""Batches of a user's own data and copies of a user's own networks, checked: what `fastar.api` is given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from fastar.errors import FastarError

Data = Iterable[tuple[Tensor, Tensor]] | Callable[[], Iterable[tuple[Tensor, Tensor]]] | tuple[Tensor, Tensor]
"""(inputs, labels) batches that can be gone through again and again (a DataLoader, a list, a function that begins a new
pass), or all inputs and all labels as two tensors."""

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Begins a pass over (inputs, labels)."""

BATCH = 256  # of data given as two tensors


def copy_of(model: nn.Module) -> nn.Module:
    """A copy without gradients, which belong to the original."""
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        # torch refuses tensors that were computed (torch.nn.utils.weight_norm), Python locks, files and generators.
        first_line = str(error).strip().splitlines()[0].split(".")[0]
        raise FastarError(
            f"{type(model).__name__} cannot be copied ({first_line}): hold no computed tensors in it, as "
            "torch.nn.utils.weight_norm does (torch.nn.utils.remove_weight_norm undoes it)"
        ) from error
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def in_float(batches: Batches) -> Batches:
    """The same with floating-point inputs in float32."""

    def one_pass() -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in batches():
            yield inputs.float() if inputs.is_floating_point() else inputs, labels

    return one_pass


def labelled(model: nn.Module, batches: Batches, name: str) -> Batches:
    """The same in float32 and int64, where each label is one of the classes that `model` tells apart.

    Raises:
        FastarError: at once where the first batch does not give logits; in a pass where labels do not fit them.
    """
    # Asked here, not in a pass: while batch-norm statistics are taken, each forward pass counts.
    classes = next((_classes(model, inputs) for inputs, _ in in_float(batches)()), 0)

    def one_pass() -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in in_float(batches)():
            whole = not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool
            if not whole or labels.shape != inputs.shape[:1]:
                raise FastarError(
                    f"{name}: labels must be whole numbers, one for each of {len(inputs)} inputs; they are "
                    f"{labels.dtype} of shape {list(labels.shape)}"
                )
            low, high = (int(one) for one in labels.aminmax()) if len(labels) else (0, 0)
            if low < 0 or high >= classes:
                raise FastarError(f"{name}: labels from {low} to {high}, where the model has {classes} classes, from 0")
            yield inputs, labels.long()

    return one_pass


def _classes(model: nn.Module, inputs: Tensor) -> int:
    """How many classes the logits of `model` have, on its first batch."""
    with torch.no_grad():
        logits = copy_of(model).eval()(inputs)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
        found = f"a tensor of shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise FastarError(
            f"the forward of {type(model).__name__} must return logits [{len(inputs)}, classes] for a barrier; it "
            f"returns {found}: wrap it in a module that returns its logits alone"
        )
    return logits.shape[1]


def batches_of(data: Data, device: torch.device, name: str) -> Batches:
    """A function that begins a pass over `data`, on `device`."""
    again: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor) and isinstance(data[1], Tensor):
        inputs, labels = data
        if len(inputs) != len(labels):
            raise FastarError(f"{name}: {len(inputs)} inputs and {len(labels)} labels; give one label for each")
        # A batch of one sample has no statistics for batch-norm to take.
        size = BATCH - (len(inputs) % BATCH == 1)
        whole = list(zip(inputs.split(size), labels.split(size), strict=True))
        again = whole.copy
    elif isinstance(data, Iterator):
        raise FastarError(
            f"{name} can be gone through once only; give a list, a DataLoader, or a function that begins a new pass"
        )
    else:
        again = data if callable(data) else partial(iter, cast(Iterable[tuple[Tensor, Tensor]], data))

    def one_pass() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in again():
            if not isinstance(batch, tuple | list) or len(batch) != 2 or not all(isinstance(x, Tensor) for x in batch):
                raise FastarError(f"{name}: its batches must be (inputs, labels), two tensors; one is {_kind(batch)}")
            inputs, labels = batch
            yield inputs.to(device), labels.to(device)

    return one_pass


def _kind(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {', '.join(type(part).__name__ for part in value)}"
    return type(value).__name__
