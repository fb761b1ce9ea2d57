"""The end of a path is its model: both are run once, on one batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from fastar.errors import FastarError, first_line
from fastar.evaluation.batch_norm import evaluating, own_statistics, set_statistics
from fastar.evaluation.losses import bound
from fastar.flat import FlatLayout
from fastar.flat.forward import Batch, call, gaps
from fastar.flat.state_check import NAMED, first_few, is_vector
from fastar.runtime.full_precision import full_precision
from fastar.symmetry.same_function import differences

# Sums in another order change outputs by less than this part of the largest one in networks of ordinary depth. Where
# more is found, it is held against what a change of all weights in their last digits does, this many times.
RELATIVE_TOLERANCE, ROUNDING = 1e-5, 1e3
# The same network on the same batch: only what a GPU adds up in no fixed order may differ.
SAME = 1e-4
LAST_DIGIT = 1.2e-7


def outputs_of(model: nn.Module, batch: Batch, name: str) -> Any:
    """The outputs of `model`, in evaluation mode, for a batch as it is. No caller's generator of numbers moves.

    Raises:
        FastarError: it does not run on it; says what it was given.
    """
    device = next((one.device for one in tree_leaves(batch) if isinstance(one, Tensor)), torch.device("cpu"))
    with _numbers_kept(device):
        return _run(model, batch, name)


def _numbers_kept(device: torch.device) -> AbstractContextManager[None]:
    """Torch's own generators of numbers are afterwards where they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _run(model: nn.Module, batch: Batch, name: str) -> Any:
    try:
        with torch.no_grad(), full_precision():
            return call(model, batch)
    except Exception as error:  # the user's own code may raise anything
        raise FastarError(
            f"{name} does not run on a batch of inputs ({_described(batch)}): {first_line(error)}; give what its "
            f"forward takes{_layout_hint(model, batch)}"
        ) from error


@torch.no_grad()
def check_end(
    own: nn.Module, standing: nn.Module, layout: FlatLayout, state: Mapping[str, Tensor], batch: Batch, name: str
) -> None:
    """Run a model, and the network that stands for it at the end of a path: they have to compute the same.

    Args:
        own: the model in float32, on the batch's device; its weights are changed.
        standing: the network that is measured, on the batch's device: with the parameters and batch-norm statistics of
            `state`; the latter are not re-estimated here. It is left as it was.
        state: of the model, its units where they are measured.
        name: of the model.

    Raises:
        FastarError: two runs of the model differ, or the end's outputs from the model's, by more than rounding.
    """
    own.eval()
    statistics = {one: state[one].to(value) for one, value in own_statistics(standing).items()}
    device = next(standing.parameters()).device
    with _numbers_kept(device):
        before = _random_states(device)
        expected = _run(own, batch, name)
        again = _run(own, batch, name)
        drew = any(not torch.equal(a, b) for a, b in zip(before, _random_states(device), strict=True))
        gap, largest = _gap(expected, again), _largest(expected)
        if gap > (0 if drew else SAME * largest):
            raise FastarError(
                f"{name} gives two outputs for one batch in evaluation mode (they differ by up to {gap:.2g}): it draws "
                "random numbers, or keeps something of each batch; dropout belongs off there, as in "
                "F.dropout(x, p, self.training)"
            )
        with bound(standing, [entry.name for entry in layout.entries]) as bind, evaluating(standing):
            bind(layout.unflatten(layout.flatten(state).to(device)))
            set_statistics(standing, statistics)
            gap = _gap(expected, _run(standing, batch, f"the end of the path that stands for {name}"))
    if gap <= RELATIVE_TOLERANCE * largest or gap <= ROUNDING * _rounding(own, batch, expected, name):
        return
    unlike = list(differences(standing, own, ("the network of the path", name)))
    raise FastarError(
        f"the end of the path is not {name}: on one batch their outputs differ by up to {gap:.2g}, where the largest "
        f"is {largest:.2g}; a path has parameters and batch-norm statistics, and {name} computes with something else: "
        + (f"{first_few(unlike)}; make them equal" if unlike else "nothing that its attributes show")
    )


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _gap(first: Any, second: Any) -> float:
    """The largest difference between two outputs; infinite where they cannot be compared, or one is not finite."""
    return max(gaps(_numbers(first), _numbers(second)), default=0.0)


def _largest(outputs: Any) -> float:
    sizes = [float(a.abs().nan_to_num(nan=0, posinf=0).max()) for a in _numbers(outputs) if a.numel()]
    return max(sizes, default=0.0)


def _numbers(outputs: Any) -> list[Tensor]:
    return [one.double() for one in tree_leaves(outputs) if isinstance(one, Tensor) and not one.is_complex()]


def _rounding(own: nn.Module, batch: Batch, expected: Any, name: str) -> float:
    """The change of the outputs when all weights change in their last digits, which they do here."""
    generator = torch.Generator().manual_seed(0)
    for parameter in own.parameters():
        noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
        parameter.mul_(1 + LAST_DIGIT * noise.to(parameter.device))
    moved = _gap(expected, outputs_of(own, batch, name))
    return moved if math.isfinite(moved) else 0.0


def _described(batch: Batch) -> str:
    """Dtypes, shapes and device of the tensors of a batch."""
    tensors = [one for one in tree_leaves(batch) if isinstance(one, Tensor)]
    kinds = ", ".join(f"{str(one.dtype).removeprefix('torch.')} {list(one.shape)}" for one in tensors[:NAMED])
    return f"{kinds}{', ...' if len(tensors) > NAMED else ''} on {tensors[0].device}" if tensors else "no tensor"


def _layout_hint(model: nn.Module, batch: Batch) -> str:
    """Advice for images whose channels are the last axis, where convolutions take them as the first."""
    first = next((one for one in model.modules() if isinstance(one, nn.Conv2d)), None)
    if first is None or not isinstance(batch, Tensor) or batch.ndim != 4 or batch.shape[1] == first.in_channels:
        return ""
    if batch.shape[3] != first.in_channels:
        return ""
    return " (these look like [batch, height, width, channels]: inputs.permute(0, 3, 1, 2))"


def _equal(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors have one shape and, in the coarser of their dtypes, one value; NaN equals itself."""
    if first.shape != second.shape:
        return False
    pairs = ((first, second.to(first)), (first.to(second), second))
    return any(bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)


def interpolated_buffers(model_a: nn.Module, model_b: nn.Module) -> list[str]:
    """The buffers that differ between two networks of one architecture, and can be interpolated.

    Raises:
        FastarError: another one differs that is no statistic of a batch-norm.
    """
    norms = [name for name, module in model_a.named_modules(remove_duplicate=False) if isinstance(module, _BatchNorm)]
    buffers = [dict(model.named_buffers(remove_duplicate=False)) for model in (model_a, model_b)]
    persistent, found = model_a.state_dict().keys() & model_b.state_dict().keys(), []
    for name in dict.fromkeys((*buffers[0], *buffers[1])):
        module, _, leaf = name.rpartition(".")
        if leaf == "num_batches_tracked" or (leaf in ("running_mean", "running_var") and module in norms):
            continue
        first, second = (own.get(name) for own in buffers)
        if first is not None and second is not None and _equal(first, second):
            continue
        if name in persistent and first is not None and first.is_floating_point() and is_vector(first):
            found.append(name)
            continue
        raise FastarError(
            f"model_a and model_b differ in buffer {name!r}, which is neither a parameter to interpolate nor a "
            "batch-norm's statistic to re-estimate: make it equal in both, or a parameter"
        )
    return found
