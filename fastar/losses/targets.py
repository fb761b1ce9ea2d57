"""A batch taken apart: the inputs that a network's forward takes, and the targets that a loss is taken with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fastar.errors import FastarError

Parts = tuple[Any, Any]
"""(inputs, targets) of a batch."""

# Keys that hold the targets in batches by name, in this order.
TARGETS = ("labels", "label", "targets", "target", "y")


def split_of(model: nn.Module, *, whole: bool) -> Callable[[Any], Parts]:
    """A function that takes a batch apart for `model`.

    - A tuple or list: its last entry are the targets, the others the inputs.
    - A mapping: `labels` (or label, targets, target, y) are the targets; the inputs are the entries that `forward` has
      arguments for.
    - A tensor: it is both (an autoencoder, a language model).

    Args:
        whole: the targets are the whole batch: a user's function is given it.
    """
    accepted = _arguments(model)

    def split(batch: Any) -> Parts:
        inputs, targets = _by_name(batch, accepted) if isinstance(batch, Mapping) else _by_place(batch)
        return inputs, batch if whole else targets

    return split


def _by_place(batch: Any) -> Parts:
    if isinstance(batch, Tensor):
        return batch, batch
    if not isinstance(batch, tuple | list) or not batch:
        raise FastarError(
            f"a batch is {type(batch).__name__}: give tensors, tuples (inputs, targets), or dicts with 'labels'"
        )
    if len(batch) == 1:
        return batch[0], batch[0]
    inputs = batch[0] if len(batch) == 2 else tuple(batch[:-1])
    # DataLoader makes lists of tuples.
    return tuple(inputs) if isinstance(inputs, list) else inputs, batch[-1]


def _by_name(batch: Mapping[str, Any], accepted: set[str] | None) -> Parts:
    target = next((key for key in TARGETS if key in batch), None)
    rest = {key: value for key, value in batch.items() if key != target}
    inputs = rest if accepted is None else {key: value for key, value in rest.items() if key in accepted}
    if not inputs:
        raise FastarError(
            f"a batch has the keys {', '.join(map(repr, batch))}, and the network's forward takes none of them: it "
            f"takes {', '.join(sorted(accepted or ())) or 'nothing'}"
        )
    # A language model's targets are its tokens.
    return inputs, batch[target] if target is not None else next(iter(inputs.values()))


def target_of(batch: Any) -> Any:
    """The targets of a whole batch, as `split_of` finds them."""
    return (_by_name(batch, None) if isinstance(batch, Mapping) else _by_place(batch))[1]


def _arguments(model: nn.Module) -> set[str] | None:
    """The names that the forward of `model` takes; None: any."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        return None
    return {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}


def sample_count(batch: Any) -> int:
    """The number of samples of a batch, or of its inputs or targets: the length of its first tensor.

    Raises:
        FastarError: it holds no tensor that has a length.
    """
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(first, Tensor) and first.ndim:
        return len(first)
    for one in tree_leaves(batch):
        if isinstance(one, Tensor) and one.ndim:
            return len(one)
    raise FastarError("a batch holds no tensor with an axis of samples: give tensors [batch, ...]")


def repeated(batch: Any, count: int) -> Any:
    """A batch of `count` samples: those of `batch`, again and again. A tensor that is there twice is one again."""
    samples = sample_count(batch)

    @cache
    def longer(one: Tensor) -> Tensor:
        if not one.ndim or len(one) != samples:
            return one
        return one[torch.arange(count, device=one.device) % samples]

    return tree_map_only(Tensor, longer, batch)
