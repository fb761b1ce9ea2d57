"""Batches of a user's own data and copies of a user's own networks, checked: what `fastar.api` is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import Dataset, IterableDataset

from fastar.errors import FastarError, first_line
from fastar.evaluation.ends import outputs_of
from fastar.flat.forward import Batch, in_float32, on_device
from fastar.flat.state_check import copied

Data = Iterable[tuple[Any, Tensor]] | Callable[[], Iterable[tuple[Any, Tensor]]] | tuple[Tensor, Tensor]
"""(inputs, labels) batches that can be gone through again and again (a DataLoader, a list, a function that begins a new
pass), or all inputs and all labels as two tensors. Inputs of a batch are what the model's forward takes, as
`example_inputs` are: a tensor, a tuple of arguments, or a mapping of keywords."""

Batches = Callable[[], Iterator[tuple[Batch, Tensor]]]
"""Begins a pass over (inputs, labels)."""

BATCH = 256  # of data given as two tensors

_WANTED = "give (inputs, labels) batches: a DataLoader, a list, a function that begins a new pass, or two tensors"


def check_network(model: object, name: str) -> None:
    """Raise FastarError unless `model` is a network, and not what holds one."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise FastarError(f"{name} is a {type(model).__name__}: give the network inside, its .module")
    if isinstance(model, torch.jit.ScriptModule):
        raise FastarError(f"{name} is TorchScript ({type(model).__name__}): give the network that it was made from")
    if isinstance(model, nn.Module):
        return
    remedy = "give the network itself, a torch.nn.Module"
    if isinstance(model, Mapping):
        remedy = "a state dict? give the network, with it loaded: model.load_state_dict(...)"
    elif isinstance(model, type):
        remedy = f"give a network, such as {model.__name__}(...)"
    elif callable(model):
        remedy = "give the network that it makes"
    kind = f"the class {model.__name__}" if isinstance(model, type) else f"of type {type(model).__name__}"
    raise FastarError(f"{name} is {kind}, not a network: {remedy}")


def float_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy in float32 and evaluation mode, on `device`."""
    return copied(model).float().to(device).eval()


def with_parameters(model: nn.Module, buffers: Iterable[str]) -> nn.Module:
    """`model` itself, these of its buffers made parameters of the same names."""
    for name in buffers:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._buffers:  # not yet made under another name of the module
            value = module._buffers.pop(leaf)
            assert value is not None
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    return model


def in_float(batches: Batches) -> Batches:
    """The same with floating-point inputs in float32."""

    def one_pass() -> Iterator[tuple[Batch, Tensor]]:
        for inputs, labels in batches():
            yield tree_map_only(Tensor, in_float32, inputs), labels

    return one_pass


def labelled(batches: Batches, classes: int, name: str) -> Batches:
    """The same, each label one of so many `classes`.

    Raises:
        FastarError: in a pass where labels do not fit.
    """

    def one_pass() -> Iterator[tuple[Batch, Tensor]]:
        for inputs, labels in batches():
            check_labels(inputs, labels, name)
            low, high = (int(one) for one in labels.aminmax()) if len(labels) else (0, 0)
            if low < 0 or high >= classes:
                raise FastarError(f"{name}: labels from {low} to {high}, where the model has {classes} classes, from 0")
            yield inputs, labels

    return one_pass


def check_labels(inputs: Batch, labels: Tensor, name: str) -> None:
    """Raise FastarError unless there is one whole number for each input."""
    count = len(inputs) if isinstance(inputs, Tensor) and inputs.ndim else None
    if not _whole(labels) or labels.ndim != 1 or count not in (None, len(labels)):
        of = f"{count} inputs" if count is not None else "the inputs"
        one = f" (one sample? wrap it in a DataLoader: {name} is to be batches)" if labels.ndim == 0 else ""
        raise FastarError(
            f"{name}: labels must be whole numbers, one for each of {of}; they are {labels.dtype} of shape "
            f"{list(labels.shape)}{one}"
        )


def _whole(labels: Tensor) -> bool:
    return not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool


def classes_of(model: nn.Module, inputs: Batch, labels: Tensor, name: str) -> int:
    """The number of classes in the logits that `model`, a copy in evaluation mode, gives for a batch.

    Raises:
        FastarError: it gives no logits.
    """
    logits = outputs_of(model, inputs, name)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        found = f"a tensor of shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise FastarError(
            f"the forward of {type(model).__name__} must return logits [{len(labels)}, classes] for a barrier; it "
            f"returns {found}: wrap it in a module that returns its logits alone"
        )
    return logits.shape[1]


def check_loss(outputs: Any, labels: Tensor, name: str) -> None:
    """Raise FastarError unless a cross-entropy can be taken of a batch's outputs with its labels."""
    try:
        F.cross_entropy(outputs, labels)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise FastarError(
            f"{name}: no loss can be taken of the model's outputs and labels {labels.dtype} {list(labels.shape)} "
            f"({first_line(error)}): give logits [batch, classes], and whole numbers [batch] from 0 to classes - 1"
        ) from error


def tried(model: nn.Module, batches: Batches, name: str) -> Batches:
    """The same, once `model`, a copy in evaluation mode, has run on the first batch; it is not asked for again.

    Raises:
        FastarError: there is no batch, or it does not run.
    """
    begun = batches()
    first = next(begun, None)
    if first is None:
        raise FastarError(f"there is no batch in what was given as {name}")
    outputs_of(model, first[0], f"the model, on {name},")
    passes = [chain([first], begun)]
    return lambda: passes.pop() if passes else batches()


def batches_of(data: Data, device: torch.device, name: str) -> Batches:
    """A function that begins a pass over `data`, on `device`."""
    again: Callable[[], Iterable[tuple[Any, Tensor]]]
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor) and isinstance(data[1], Tensor):
        inputs, labels = data
        if not inputs.ndim or not labels.ndim or len(inputs) != len(labels):
            count = [len(one) if one.ndim else "no" for one in data]
            raise FastarError(f"{name}: {count[0]} inputs and {count[1]} labels; give one label for each")
        # A batch of one sample has no statistics for batch-norm to take.
        size = BATCH - (len(inputs) % BATCH == 1)
        whole = list(zip(inputs.split(size), labels.split(size), strict=True))
        again = whole.copy
    else:
        _check_kind(data, name)
        again = data if callable(data) else partial(iter, cast(Iterable[tuple[Any, Tensor]], data))

    def one_pass() -> Iterator[tuple[Batch, Tensor]]:
        begun = again()
        if not isinstance(begun, Iterable):
            raise FastarError(f"the function given as {name} returns {_kind(begun)}: {_WANTED}")
        for batch in begun:
            if not isinstance(batch, tuple | list) or len(batch) != 2 or not _is_batch(*batch):
                numpy = any(isinstance(one, np.ndarray) for one in tree_leaves(batch))
                remedy = "; torch.from_numpy makes tensors of NumPy's arrays" if numpy else ""
                raise FastarError(
                    f"{name}: its batches must be (inputs, labels), two tensors; one is {_kind(batch)}{remedy}"
                )
            inputs, labels = batch
            # DataLoader makes lists of tuples.
            inputs = on_device(tuple(inputs) if isinstance(inputs, list) else inputs, device)
            yield inputs, (labels.long() if _whole(labels) else labels).to(device)

    return one_pass


def _check_kind(data: object, name: str) -> None:
    """Raise FastarError for what gives no batches."""
    if isinstance(data, Iterator):
        raise FastarError(
            f"{name} can be gone through once only; give a list, a DataLoader, or a function that begins a new pass"
        )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise FastarError(
            f"{name} is a dataset ({type(data).__name__}), which gives samples one by one: wrap it in a DataLoader, "
            f"torch.utils.data.DataLoader({name}, batch_size={BATCH})"
        )
    numpy = any(isinstance(one, np.ndarray) for one in (data if isinstance(data, tuple) else (data,)))
    if numpy:
        raise FastarError(f"{name} is {_kind(data)}: make tensors of NumPy's arrays, torch.from_numpy(...)")
    no_batches = isinstance(data, Tensor | Mapping | str | bytes | nn.Module | type)
    if no_batches or not (callable(data) or isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise FastarError(f"{name} is {_kind(data)}: {_WANTED}")


def _is_batch(inputs: object, labels: object) -> bool:
    if not isinstance(labels, Tensor):
        return False
    if isinstance(inputs, Tensor):
        return True
    leaves = tree_leaves(inputs) if isinstance(inputs, tuple | list | Mapping) else []
    return any(isinstance(one, Tensor) for one in leaves) and not any(isinstance(one, np.ndarray) for one in leaves)


def _kind(value: object) -> str:
    if isinstance(value, tuple | list):
        kinds = [type(part).__name__ for part in value[:4]]
        return f"{type(value).__name__} of {', '.join(kinds)}{', ...' if len(value) > 4 else ''}"
    return type(value).__name__
