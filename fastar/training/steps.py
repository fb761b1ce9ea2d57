"""Training steps over flat parameters: the regular one, and the star step of Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.config import StarSettings, TrainSettings
from fastar.errors import FastarError
from fastar.flat import FlatLayout, FlatParameters, WorkingWeights
from fastar.kernels import sgd_update
from fastar.seeds import derive_seed
from fastar.training.precision import LossScale, resolve_precision
from fastar.training.store import SourcesStore


class _FlatStep:
    """What both steps share: theta [P] and its momentum, forward and backward in the AMP dtype, the flat SGD update."""

    def __init__(self, model: nn.Module, settings: TrainSettings, *, working_copy: bool):
        self.model = model
        self.settings = settings
        self.device = next(model.parameters()).device
        self.dtype = resolve_precision(settings.precision, self.device)
        self.loss_scale = LossScale(self.device, enabled=self.dtype == torch.float16)
        self._one = torch.ones((), device=self.device)
        # Where weights are neither interpolated nor cast, the network lives in theta itself.
        self._working: WorkingWeights | None = None
        if working_copy or self.dtype != torch.float32:
            self.layout = FlatLayout.from_module(model)
            parameters = {name: p.detach() for name, p in model.named_parameters()}
            self.theta = self.layout.flatten(parameters)
            self._working = WorkingWeights(self.layout, model, self.dtype)
        else:
            self._flat = FlatParameters(model)
            self.layout, self.theta = self._flat.layout, self._flat.buffer
        self.momentum = torch.zeros_like(self.theta)

    def state(self) -> dict[str, Tensor]:
        """The model's state dict with theta as its parameters, fp32; buffers are the module's. Copies."""
        state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        state.update(self.layout.unflatten(self.theta))
        return state

    def describe(self, step: int) -> str:
        return ""

    def _autocast(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        # Weights change between steps under the same storage: a cached cast would be stale.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            loss = F.cross_entropy(self.model(images).float(), labels)
        (loss * self.loss_scale.scale if self.loss_scale.enabled else loss).backward()
        return loss.detach()

    def _update(self, lr: Tensor, scale: Tensor) -> None:
        """theta <- SGD step along `scale` times the gradient; weight decay is not scaled."""
        if self._working is None:
            parts = [(self.theta, self._flat.collect_gradient(), self.momentum)]
        else:
            gradients = self._working.collect_gradient()
            thetas, momenta = self._working.sections(self.theta), self._working.sections(self.momentum)
            parts = list(zip(thetas, gradients, momenta, strict=True))
        self.loss_scale.check([gradient for _, gradient, _ in parts])
        for theta, gradient, momentum in parts:
            sgd_update(
                theta,
                gradient,
                momentum,
                lr=lr,
                scale=scale,
                inverse_loss_scale=self.loss_scale.inverse,
                weight_decay=self.settings.weight_decay,
                momentum=self.settings.momentum,
                nesterov=self.settings.nesterov,
                found_nonfinite=self.loss_scale.found_nonfinite,
            )
        self.loss_scale.update()


class RegularStep(_FlatStep):
    """Ordinary training of one network."""

    def __init__(self, model: nn.Module, settings: TrainSettings):
        super().__init__(model, settings, working_copy=False)
        model.train()

    def begin_epoch(self, epoch: int, steps: int) -> None:
        return

    def __call__(self, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        if self._working is not None:
            self._working.write(self.theta)
        loss = self._backward(images, labels)
        self._update(lr, self._one)
        return loss


class StarStep(_FlatStep):
    """Algorithm 1, steps 2 to 5: the loss at a random point of the path to a random source moves the star.

    The network holds (1 - t) theta + t theta_n and runs in training mode, so batch-norm normalises with the batch; its
    running statistics belong to interpolated networks and mean nothing.

    Args:
        model: gives the architecture and the initial theta.
        settings: the recipe, as of a regular model.
        star: how t is drawn and when sources are matched.
        sources: Z, permuted in place by `match`.
        seed: of the draws of (source, t).
        match: makes the store's rows match theta; called at the start of epochs (Algorithm 1, step 1).
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        star: StarSettings,
        sources: SourcesStore,
        *,
        seed: int,
        match: Callable[[Tensor, SourcesStore, int], None],
    ):
        super().__init__(model, settings, working_copy=True)
        if sources.layout != self.layout:
            raise FastarError("the sources are of another architecture than the star model")
        model.train()
        self.star = star
        self.sources = sources
        self._seed = seed
        self._match = match
        self._indices: Sequence[int] = ()
        self._ts: Sequence[float] = ()
        self._draws = self._scales = torch.empty(0)
        self._step = 0

    def begin_epoch(self, epoch: int, steps: int) -> None:
        every = self.star.match_every_epochs
        if every and epoch % every == 0:  # (k - 1) mod m == 0: the start of every epoch, the first included
            self._match(self.theta, self.sources, epoch)
        self._indices, self._ts = draw(self.star, len(self.sources), steps, derive_seed(self._seed, "draws", epoch))
        self._draws = torch.tensor(self._ts, dtype=torch.float32).to(self.device)
        self._scales = 1 - self._draws
        self._step = 0

    def __call__(self, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        assert self._working is not None
        step = self._step
        self._step += 1
        self._working.interpolate(self.theta, self.sources.rows[self._indices[step]], self._draws[step])
        loss = self._backward(images, labels)
        self._update(lr, self._scales[step])
        return loss

    def describe(self, step: int) -> str:
        return f" (source {self.sources.names[self._indices[step]]}, t={self._ts[step]:.4f})"


def draw(star: StarSettings, sources: int, steps: int, seed: int) -> tuple[list[int], list[float]]:
    """For each step, a source index ~ Unif(Z) and t ~ Unif[0, 1], Beta(alpha, beta) or constant.

    Drawn on the CPU in float64, so that every device sees the same draws.
    """
    generator = np.random.default_rng(seed)
    indices = generator.integers(sources, size=steps).tolist()
    if star.t == "constant":
        return indices, [star.value] * steps
    ts = generator.random(steps) if star.t == "uniform" else generator.beta(star.alpha, star.beta, steps)
    return indices, ts.tolist()
