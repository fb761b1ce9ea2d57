"""A network run in float64 on random weights and inputs, for proofs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastar.errors import FastarError, first_line
from fastar.flat.forward import Batch, arguments_of
from fastar.flat.state_check import attribute_tensors, attributes_kept, copied, tensors_of
from fastar.runtime.seeds import derive_seed

# Arguments of a forward pass: positional or keyword inputs. Tensors may lie deeper in them; anything else is a
# constant.
ExampleInputs = tuple[Any, ...] | Mapping[str, Any]
State = dict[str, Tensor]
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class RandomNetwork:
    """`model` as a function of a state, on example inputs that are made to count. The model is copied, not touched."""

    def __init__(self, model: nn.Module, example_inputs: Batch, seed: int):
        self.model, self.seed, self.name = model, seed, type(model).__name__
        self.twin = without_cache(_without_weights(model).eval())
        self.inputs, self._structure = tree_flatten(tree_map(_as_double, arguments_of(example_inputs)))

    @property
    def has_buffers(self) -> bool:
        """Tell whether the state has buffers that are no batch-norm's statistics."""
        own = tensors_of(self.model).items()
        return any(not isinstance(tensor, nn.Parameter) and not name.endswith(_STATISTICS) for name, tensor in own)

    def state(self, gain: float, *, positive: bool = False, buffers: int = 0, number: int = 0) -> State:
        """Random weights of variance gain^2 / fan_in and vectors of variance 1; batch-norm variances are positive.

        `positive`: vectors too. `number`: each gives other values.
        `buffers`: of 1, move the other floating buffers too, so that none hides what it scales; of 2, also draw those
        of yes and no. Those of whole numbers, and with infinite values (masks), stay.
        """
        state: State = {}
        seen: dict[int, str] = {}
        for name, tensor in tensors_of(self.model).items():
            if id(tensor) in seen:
                state[name] = state[seen[id(tensor)]].clone()  # each name is permuted by itself
                continue
            seen[id(tensor)] = name
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "verify", name, number))
            state[name] = _drawn(name, tensor, generator, gain, positive, buffers)
        return state

    def vary_integers(self, state: State) -> None:
        """Replace inputs of whole numbers by random ones, where the model runs on them: tokens that are all alike hide
        what tells them apart. They are drawn up to the largest given, or the rows of the smallest embedding."""
        rows = [m.num_embeddings for m in self.model.modules() if isinstance(m, nn.Embedding)]
        for key, given in enumerate(self.inputs):
            if not isinstance(given, Tensor) or given.is_floating_point() or given.is_complex():
                continue
            if given.dtype == torch.bool or given.numel() < 2:
                continue
            high = max(int(given.max()), min(rows, default=1) - 1)
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "verify", "input", str(key)))
            low = min(int(given.min()), 0)
            self.inputs[key] = torch.randint(low, high + 1, given.shape, generator=generator, device="cpu").to(
                given.dtype
            )
            if not self.runs(state):
                self.inputs[key] = given

    def runs(self, state: State) -> bool:
        """Tell whether it runs and all its outputs are finite."""
        try:
            return all(bool(out.isfinite().all()) for out in self.outputs(state))
        except FastarError:
            return False

    def outputs(self, state: State, *, grad: bool = False) -> list[Tensor]:
        """All floating outputs that hold a value, complex ones as pairs of real ones; with `grad` a graph behind them.

        Raises:
            FastarError: the model does not run, draws random numbers, or has no such outputs.
        """
        values = dict(state)  # functional_call writes into it where a module has two names
        arguments, keywords = tree_unflatten(self.inputs, self._structure)
        try:
            with (
                torch.set_grad_enabled(grad),
                torch.random.fork_rng(devices=[]),
                _InFloat64(),
                attributes_kept(self.twin),
            ):
                before = torch.get_rng_state()
                result = torch.func.functional_call(self.twin, values, arguments, keywords, tie_weights=False)
                drew = not torch.equal(before, torch.get_rng_state())
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            raise FastarError(
                f"cannot verify the permutation groups of {self.name}: it does not run on the example inputs in "
                f"float64: {first_line(error)}; give inputs that it runs on"
            ) from error
        if drew:
            raise FastarError(
                f"cannot verify the permutation groups of {self.name}: its forward draws random numbers in evaluation "
                "mode (dropout that is left on?): make it a function of its inputs, F.dropout(x, p, self.training)"
            )
        flat, _ = tree_flatten(result)
        tensors = [torch.view_as_real(x) if x.is_complex() else x for x in flat if isinstance(x, Tensor)]
        found = [out for out in tensors if out.is_floating_point() and out.numel()]
        if not found:
            raise FastarError(
                f"cannot verify the permutation groups of {self.name}: none of its outputs is a tensor of "
                "floating-point numbers: let its forward return logits or features"
            )
        return found


def without_cache(twin: nn.Module) -> nn.Module:
    """`twin`, a copy, told to return no keys and values for later tokens (`past_key_values` of Hugging Face), which
    would be held in place as its outputs are."""
    for module in twin.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False  # type: ignore[union-attr]
    return twin


def _drawn(name: str, tensor: Tensor, generator: torch.Generator, gain: float, positive: bool, buffers: int) -> Tensor:
    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(tensor.shape, dtype=torch.float64, device="cpu").uniform_(low, high, generator=generator)

    if buffers > 1 and tensor.dtype == torch.bool:
        return torch.rand(tensor.shape, dtype=torch.float64, device="cpu", generator=generator) < 0.5
    if not tensor.is_floating_point():
        return _constant(tensor)
    if name.endswith("running_var"):
        return uniform(0.5, 1.5)
    if not isinstance(tensor, nn.Parameter) and not name.endswith("running_mean"):
        given = _constant(tensor)
        return given + uniform(0.1, 1) if buffers and bool(given.isfinite().all()) else given
    if tensor.ndim < 2:
        return uniform(0.0 if positive else -math.sqrt(3), math.sqrt(3))
    # The uniform distribution between these has variance gain^2 / fan_in.
    most = gain * math.sqrt(3 / max(math.prod(tensor.shape[1:]), 1))
    return uniform(-most, most)


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers of the state dict are left out, all other tensors in float64 on the CPU."""
    memo: dict[int, Any] = {id(t): torch.empty_like(t, device="meta") for t in tensors_of(model).values()}
    for tensor in (*model.buffers(), *attribute_tensors(model)):
        if not isinstance(tensor, nn.Parameter):
            memo.setdefault(id(tensor), _constant(tensor))
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copied(model, memo)


def _constant(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


def _as_double(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return _constant(value) if isinstance(value, Tensor) else value
    # Example inputs are often zeros; noise makes every input count.
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    return _constant(value) + noise


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
