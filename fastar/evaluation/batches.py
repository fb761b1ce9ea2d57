"""Batches of a user's own data and copies of a user's own networks, checked: what `fastar.api` is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import Dataset, IterableDataset

from fastar.data.splits import leaving_no_single
from fastar.data.user_data import SampleData, TensorData, is_tensors
from fastar.errors import FastarError
from fastar.evaluation.ends import outputs_of
from fastar.flat.forward import Batch, in_float32, on_device
from fastar.flat.state_check import copied
from fastar.losses import Loss, Parts
from fastar.losses.terms import IGNORED, class_logits
from fastar.runtime.user_code import users_code

Data = Iterable[Any] | Callable[[], Iterable[Any]] | tuple[Tensor, Tensor] | Dataset[Any]
"""A map-style torch Dataset of samples; (inputs, targets) batches that can be gone through again and again (a
DataLoader, a list, a function that begins a new pass); or all inputs and all targets as two tensors. Inputs of a batch
are what the model's forward takes, as `example_inputs` are: a tensor, a tuple of arguments, or a mapping of
keywords."""

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
    """The same, each label one of so many `classes`, or ignored (-100).

    Raises:
        FastarError: in a pass where labels do not fit.
    """

    def one_pass() -> Iterator[tuple[Batch, Any]]:
        for inputs, targets in batches():
            check_labels(inputs, targets, name)
            labels = targets[targets != IGNORED]
            low, high = (int(one) for one in labels.aminmax()) if len(labels) else (0, 0)
            if low < 0 or high >= classes:
                raise FastarError(f"{name}: labels from {low} to {high}, where the model has {classes} classes, from 0")
            yield inputs, targets

    return one_pass


def check_labels(inputs: Batch, labels: Any, name: str) -> None:
    """Raise FastarError unless there is a whole number for each input, or for each place of it."""
    count = len(inputs) if isinstance(inputs, Tensor) and inputs.ndim else None
    if not isinstance(labels, Tensor) or not _whole(labels) or not labels.ndim or count not in (None, len(labels)):
        of = f"{count} inputs" if count is not None else "the inputs"
        shape = f"{labels.dtype} of shape {list(labels.shape)}" if isinstance(labels, Tensor) else _kind(labels)
        single = isinstance(labels, Tensor) and not labels.ndim
        one = f" (one sample? wrap it in a DataLoader: {name} is to be batches)" if single else ""
        raise FastarError(f"{name}: labels must be whole numbers, one for each of {of}; they are {shape}{one}")


def _whole(labels: Tensor) -> bool:
    return not labels.is_floating_point() and not labels.is_complex() and labels.dtype != torch.bool


def check_targets(model: nn.Module, inputs: Batch, targets: Any, loss: Loss, name: str) -> int | None:
    """Take the loss and metrics of a first batch; the number of classes, where targets are labels of classes.

    Args:
        model: a copy in evaluation mode.
        name: of the data.

    Raises:
        FastarError: the loss cannot be taken of what the model returns, or the targets do not fit.
    """
    by_class = loss.name == "cross_entropy" and not loss.whole
    if by_class and not (isinstance(targets, Tensor) and targets.is_floating_point() and targets.ndim > 1):
        check_labels(inputs, targets, name)
    outputs = outputs_of(model, inputs, "model_a" if name == "data" else f"the model, on {name},")
    device = next(model.parameters()).device
    classes = None
    if by_class and not targets.is_floating_point():
        classes = class_logits(outputs, targets).shape[1]
        next(labelled(lambda: iter([(inputs, targets)]), classes, name)())
    with users_code(f"the loss {loss.name}, on the first batch of {name},"):
        for metric in loss.measures().values():
            metric.begin(device, 1).add(0, outputs, targets)
    return classes


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


def batches_of(data: Data, device: torch.device, name: str, split: Callable[[Any], Parts] | None = None) -> Batches:
    """A function that begins a pass over `data`, on `device`.

    Args:
        split: takes a batch apart (`fastar.losses.split_of`); None: batches are (inputs, targets).
    """
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        samples = SampleData(name, data, device)
        return lambda: map(split or _pair, samples.sequential(BATCH))
    pair = isinstance(data, tuple) and len(data) == 2
    if split is not None and is_tensors(data) and not pair:  # several inputs, or inputs by name
        held = TensorData(name, data, device)
        return lambda: map(split, held.sequential(leaving_no_single(len(held), BATCH)))
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
            if split is not None and _holds_tensors(batch):
                inputs, targets = split(on_device(tuple(batch) if isinstance(batch, list) else batch, device))
                yield inputs, (targets.long() if isinstance(targets, Tensor) and _small(targets) else targets)
                continue
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
    numpy = any(isinstance(one, np.ndarray) for one in (data if isinstance(data, tuple) else (data,)))
    if numpy:
        raise FastarError(f"{name} is {_kind(data)}: make tensors of NumPy's arrays, torch.from_numpy(...)")
    no_batches = isinstance(data, Tensor | Mapping | str | bytes | nn.Module | type)
    if no_batches or not (callable(data) or isinstance(data, Iterable) or hasattr(data, "__getitem__")):
        raise FastarError(f"{name} is {_kind(data)}: {_WANTED}")


def _pair(batch: Any) -> Parts:
    return batch[0], batch[1]


def _small(targets: Tensor) -> bool:
    """Tell whether targets are whole numbers of a type that losses do not take."""
    return _whole(targets) and targets.dtype != torch.int64


def _holds_tensors(batch: Any) -> bool:
    """Tell whether a batch is of tensors alone: one, several, or by name."""
    leaves = tree_leaves(batch) if isinstance(batch, tuple | list | Mapping | Tensor) else []
    many = isinstance(batch, Mapping | Tensor) or len(batch) > 1
    return many and bool(leaves) and not any(isinstance(one, np.ndarray) for one in leaves)


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
