"""Numerical proof that the groups of a symmetry leave the network's function unchanged."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastar.errors import FastarError
from fastar.matching.permutations import Permutations
from fastar.matching.symmetry import Symmetry
from fastar.seeds import derive_seed

# float64 rounding through a few hundred layers stays below 1e-12 of the outputs' size; a wrong group changes them by
# their own size. In between there is room for either to be unlucky.
RELATIVE_TOLERANCE = 1e-8

# What a model is called with: positional inputs, or keyword inputs. What is no tensor is a constant.
ExampleInputs = tuple[Any, ...] | Mapping[str, Any]


def verify_symmetry(model: nn.Module, symmetry: Symmetry, example_inputs: ExampleInputs, seed: int = 0) -> None:
    """Permute every group at random in float64 and compare the outputs with the unpermuted network's.

    All parameters and batch-norm statistics are drawn at random first, so that nothing is hidden by weights that are
    zero or equal (fresh batch-norms, zero-initialised scales). `model` is copied, not touched. Outputs may differ by
    1e-8 of the largest one (`RELATIVE_TOLERANCE`).

    Raises:
        FastarError: the outputs differ (names the groups), are not finite, or the model does not run on the inputs.
    """
    if not symmetry.groups:
        return
    name = type(model).__name__
    twin = _without_weights(model).eval()
    inputs: ExampleInputs
    if isinstance(example_inputs, Mapping):
        inputs = {key: _as_double(x) for key, x in example_inputs.items()}
    else:
        inputs = tuple(_as_double(x) for x in example_inputs)
    state = _random_state(model, seed)
    permutations = symmetry.random(derive_seed(seed, "verify"))
    expected = _outputs(twin, state, inputs)
    scale = max(float(out.abs().max()) for out in expected)
    if not math.isfinite(scale):
        raise FastarError(
            f"cannot verify the permutation groups of {name}: random weights give outputs that are not finite"
        )

    def differs(state_after: dict[str, Tensor]) -> bool:
        after = _outputs(twin, state_after, inputs)
        return any(not _close(a, b, scale) for a, b in zip(expected, after, strict=True))

    # In place, because a second copy of a large network takes longer than its forward pass.
    symmetry.apply_rows(permutations, {key: tensor[None] for key, tensor in state.items()})
    if differs(state):
        state = _random_state(model, seed)
        identity = symmetry.identity()

        def wrong(families: tuple[tuple[int, ...], ...]) -> list[str]:
            """Names of the families that change the outputs, found by halving: a forward pass may take long."""
            names = [symmetry.groups[position].name for family in families for position in family]
            moved = Permutations({**identity, **{one: permutations[one] for one in names}})
            if not families or not differs(symmetry.apply(moved, state)):
                return []
            if len(families) == 1:
                return [" with ".join(names)]
            half = len(families) // 2
            return wrong(families[:half]) + wrong(families[half:])

        named = wrong(symmetry.families)
        raise FastarError(
            f"permuting the groups found in {name} changes its outputs (groups {', '.join(named) or 'together'}): it "
            "is not matched; its forward depends on the order of units in a way its graph does not show"
        )


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers of the state dict are left out, the other buffers in float64 on the CPU."""
    memo: dict[int, Any] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor):
            memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    for tensor in model.buffers():
        memo.setdefault(id(tensor), _constant(tensor))
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copy.deepcopy(model, memo)


def _constant(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


def _close(a: Tensor, b: Tensor, scale: float) -> bool:
    return bool(((a - b).abs() <= RELATIVE_TOLERANCE * scale).all())


def _as_double(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    if not value.is_floating_point():
        return value
    # Example inputs are often zeros; noise makes every input count.
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return value.double() + noise


class _InFloat64(TorchDispatchMode):
    """Inside, what a forward pass casts to a shorter float (norms in float32), or makes as one, is in float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        to = kwargs.get("dtype")
        if func is torch.ops.aten._to_copy.default and isinstance(to, torch.dtype) and to.is_floating_point:
            kwargs["dtype"] = torch.float64
        out = func(*args, **kwargs)
        short = isinstance(out, Tensor) and out.is_floating_point() and out.dtype != torch.float64
        return out.double() if short else out


def _random_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Weights of a size that keeps activations near 1; variances positive; whole-number buffers as they are."""
    state: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue  # a module's get_extra_state
        if id(tensor) in seen:
            state[name] = state[seen[id(tensor)]].clone()  # each name is permuted by itself
            continue
        seen[id(tensor)] = name
        statistics = name.endswith(("running_mean", "running_var"))
        if not (isinstance(tensor, nn.Parameter) or statistics) or not tensor.is_floating_point():
            state[name] = _constant(tensor)
            continue
        generator = torch.Generator().manual_seed(derive_seed(seed, "verify", name))
        fan_in = math.prod(tensor.shape[1:]) if tensor.ndim > 1 else 1
        most = math.sqrt(3 / max(fan_in, 1))  # the uniform distribution of variance 1 / fan_in
        low, high = (0.5, 1.5) if name.endswith("running_var") else (-most, most)
        state[name] = torch.empty(tensor.shape, dtype=torch.float64).uniform_(low, high, generator=generator)
    return state


def _outputs(model: nn.Module, state: dict[str, Tensor], inputs: ExampleInputs) -> list[Tensor]:
    keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
    values = dict(state)  # functional_call writes into it where a module has two names
    try:
        with torch.no_grad(), _InFloat64():
            result = torch.func.functional_call(model, values, () if keywords else inputs, keywords, tie_weights=False)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise FastarError(
            f"cannot verify the permutation groups of {type(model).__name__}: it does not run on the example inputs in "
            f"float64: {first_line}; give inputs that it runs on"
        ) from error
    flat, _ = torch.utils._pytree.tree_flatten(result)
    return [out for out in flat if isinstance(out, Tensor) and out.is_floating_point()]
