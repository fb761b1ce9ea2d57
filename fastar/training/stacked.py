"""Steps of several small networks of one architecture at once: their products are batched over the networks.

A small network spends its time between operations, not in them: K of them in one pass of operations take little longer
than one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastar.config import TrainSettings
from fastar.flat import FlatLayout
from fastar.flat.forward import Batch, call
from fastar.losses import Loss, find_loss
from fastar.losses.side_by_side import stacked_losses
from fastar.runtime.timing import span
from fastar.training.amp import LossScale
from fastar.training.optimizers import flat_optimizer
from fastar.training.resume import Resumable, copy_into
from fastar.training.stacked_layers import round_as_alone


class StackedStep:
    """The steps of K networks (`RegularStep` in fp32), done at once.

    Their parameters lie in one buffer, the matrices of all before the vectors of all: one call of the optimizer moves
    them. The forward pass is `torch.func.vmap` of the first network's, with the others' parameters and buffers.

    Args:
        models: networks of one architecture, freshly built; the modules of the first are used.
        settings: the recipe.
        loss: of a batch; None: cross-entropy.
        way: to take it, among the `ways` of `stacked_losses`, whose number is known after a step.
    """

    def __init__(self, models: Sequence[nn.Module], settings: TrainSettings, *, loss: Loss | None = None, way: int = 0):
        first = models[0].train()
        self.settings, self.loss, self.way = settings, find_loss() if loss is None else loss, way
        self.ways = 1
        self.layout, self.count = FlatLayout.from_module(first), len(models)
        self.device = next(first.parameters()).device
        self.theta = torch.zeros(self.count * self.layout.numel, device=self.device, dtype=torch.float32)
        self._gradient = torch.zeros_like(self.theta)
        self._gradients = list(self._views(self._gradient).values())
        views = self._views(self.theta)
        with torch.no_grad():
            for k, model in enumerate(models):
                named = dict(model.named_parameters())
                for name, view in views.items():
                    view[k].copy_(named[name])
        self._weights = [view.detach().requires_grad_() for view in views.values()]
        tables = [dict(model.named_buffers()) for model in models]
        self._buffers = {name: torch.stack([table[name] for table in tables]) for name in tables[0]}
        self._names = list(first.state_dict())
        self._network = _Interchangeable(first, self.layout, list(self._buffers))
        self._forward = torch.func.vmap(self._network, randomness="error")
        # As in fp32 training alone: it scales nothing.
        self.loss_scale = LossScale(self.device, enabled=False)
        self._one = torch.ones((), device=self.device, dtype=torch.float32)
        self.optimizer = flat_optimizer(settings, self.theta, lambda buffer: (buffer,), self._vectors_begin)

    def __call__(self, inputs: Batch, targets: Any, lr: Tensor) -> Tensor:
        """Do a step of each network on its own batch, all tensors [K, batch, ...]; the losses [K]."""
        with span("forward"):
            outputs, buffers = self._forward(inputs, self._weights, list(self._buffers.values()))
            ways = stacked_losses(self.loss, outputs, targets)
            self.ways = len(ways)
            losses, told = ways[self.way](outputs, targets, self.settings.label_smoothing)
        with span("backward"):
            found = torch.autograd.grad(losses.sum(), self._weights, allow_unused=True, materialize_grads=True)
        with span("update"):
            torch._foreach_copy_(self._gradients, found)
            self.optimizer.update((self._gradient,), lr=lr, scale=self._one, loss_scale=self.loss_scale)
            for own, moved in zip(self._buffers.values(), buffers, strict=True):
                own.copy_(moved.detach())
        return told

    def finite(self) -> Tensor:
        """True for each network whose moving parts are all finite: bool [K]; not waited for."""
        moved = [*self._views(self.theta).values(), *self._buffers.values()]
        for one in self.optimizer.state():
            moved += self._views(one).values() if one.numel() == self.theta.numel() else ()
        floats = [one.reshape(len(one), -1) for one in moved if one.is_floating_point()]
        return torch.isfinite(torch.cat(floats, 1)).all(1)

    def of(self, k: int) -> OneOfStack:
        """Network number `k`."""
        return OneOfStack(self, k)

    def tensors(self, k: int) -> dict[str, Tensor]:
        """All that steps move of network number `k`, by the names of `Step.save`. Writing into them changes nothing."""
        remembered = {"optimizer": self.optimizer.state(), "loss_scale": self.loss_scale.state()}
        return {
            "theta": self._row(self.theta, k),
            **{f"{part}.{i}": self._row(one, k) for part, some in remembered.items() for i, one in enumerate(some)},
            **{f"buffer.{name}": buffer[k] for name, buffer in self._buffers.items()},
        }

    def put(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Make network number `k` what `tensors` gave."""
        copy_into(self.tensors(k), state)  # names and shapes are checked
        own = {"theta": self.theta, **{f"optimizer.{i}": one for i, one in enumerate(self.optimizer.state())}}
        with torch.no_grad():
            for name, whole in own.items():
                for part, value in zip(self._parts(whole, k), self._cut(state[name]), strict=True):
                    part.copy_(value)
            for name, buffer in self._buffers.items():
                buffer[k].copy_(state[f"buffer.{name}"])

    def state(self, k: int) -> dict[str, Tensor]:
        """The state dict of network number `k`: copies."""
        parameters = self.layout.unflatten(self._row(self.theta, k))
        return {
            name: parameters[name] if name in parameters else self._buffers[name][k].clone() for name in self._names
        }

    @property
    def _vectors_begin(self) -> int:
        return self.count * self.layout.matrices

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Name -> view [K, ...] of a buffer such as theta."""
        matrices, vectors = buffer[: self._vectors_begin], buffer[self._vectors_begin :]
        return self.layout.section_views(matrices.view(self.count, -1), vectors.view(self.count, -1))

    def _parts(self, buffer: Tensor, k: int) -> tuple[Tensor, ...]:
        """The matrices and the vectors of network `k` in a buffer such as theta; one that all share is whole."""
        if buffer.numel() != self.theta.numel():
            return (buffer,)
        matrices, vectors = buffer[: self._vectors_begin], buffer[self._vectors_begin :]
        return matrices.view(self.count, -1)[k], vectors.view(self.count, -1)[k]

    def _cut(self, row: Tensor) -> tuple[Tensor, ...]:
        """A network's row [P] in the parts of `_parts`."""
        if row.numel() != self.layout.numel:
            return (row,)
        return row[: self.layout.matrices], row[self.layout.matrices :]

    def _row(self, buffer: Tensor, k: int) -> Tensor:
        """Network `k` of a buffer such as theta as a row [P], a copy."""
        parts = self._parts(buffer, k)
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()


class OneOfStack:
    """One network of a `StackedStep`, saved and loaded as its `RegularStep` alone."""

    def __init__(self, stack: StackedStep, k: int):
        self._stack, self._k = stack, k

    def save(self) -> dict[str, Tensor]:
        return self._stack.tensors(self._k)

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._stack.put(self._k, state)

    def state(self) -> dict[str, Tensor]:
        """As of `Step`."""
        return self._stack.state(self._k)

    def parts(self) -> dict[str, Resumable]:
        return {"step": self}

    def describe(self, step: int) -> str:
        return ""


class _Interchangeable:
    """A network as a function of (inputs, its parameters, its buffers), and what it makes of the buffers.

    As `torch.func.functional_call`, at a third of its time: the places are found once.
    """

    def __init__(self, model: nn.Module, layout: FlatLayout, buffers: Sequence[str]):
        self._model = model
        round_as_alone(model)
        modules = dict(model.named_modules(remove_duplicate=False))

        def place(name: str, table: str) -> tuple[dict[str, Any], str]:
            owner, _, leaf = name.rpartition(".")
            return getattr(modules[owner], table), leaf

        names = [[entry.name] for entry in layout.entries]
        for alias, name in layout.aliases:
            next(some for some in names if some[0] == name).append(alias)
        self._parameters = [[place(name, "_parameters") for name in some] for some in names]
        self._buffers = [place(name, "_buffers") for name in buffers]

    def __call__(self, inputs: Batch, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> Any:
        own = [(table, leaf, table[leaf]) for some in (*self._parameters, self._buffers) for table, leaf in some]
        try:
            for some, value in zip(self._parameters, parameters, strict=True):
                for table, leaf in some:
                    table[leaf] = value
            for (table, leaf), value in zip(self._buffers, buffers, strict=True):
                table[leaf] = value
            outputs = call(self._model, inputs)
            return outputs, [table[leaf] for table, leaf in self._buffers]
        finally:
            for table, leaf, value in own:
                table[leaf] = value
