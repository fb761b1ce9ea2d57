"""Training steps over flat parameters: the regular one, and the star step of Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.config import StarSettings, TrainSettings
from fastar.errors import FastarError
from fastar.flat import FlatLayout, FlatParameters, WorkingWeights
from fastar.kernels import NextPoint
from fastar.runtime.cuda_graph import CallGraph
from fastar.runtime.seeds import derive_seed
from fastar.runtime.timing import part
from fastar.training.amp import LossScale, resolve_precision
from fastar.training.batch_counts import BatchCounts
from fastar.training.clipping import shortening
from fastar.training.compiled import CompiledNetwork
from fastar.training.optimizer import flat_optimizer
from fastar.training.prefetch import ResidentRows, RowFeed
from fastar.training.resume import copy_into
from fastar.training.sources import SourcesStore


class _FlatStep:
    """What both steps share: theta [P] and its optimizer, forward and backward in the AMP dtype, the flat update."""

    def __init__(self, model: nn.Module, settings: TrainSettings, *, working_copy: bool):
        self.model = model
        self.settings = settings
        self.device = next(model.parameters()).device
        self.dtype = resolve_precision(settings.precision, self.device)
        self.loss_scale = LossScale(self.device, enabled=self.dtype == torch.float16)
        self._one = torch.ones((), device=self.device, dtype=torch.float32)
        self._image_shape: torch.Size | None = None
        # Where weights are neither interpolated nor cast, the network lives in theta itself.
        self._working: WorkingWeights | None = None
        if working_copy or self.dtype != torch.float32:
            self.layout = FlatLayout.from_module(model)
            parameters = {name: p.detach() for name, p in model.named_parameters()}
            self.theta = self.layout.flatten(parameters)
            self._working = WorkingWeights(self.layout, model, self.dtype)
            self.optimizer = flat_optimizer(settings, self.theta, self._working.sections, self.layout.matrices)
        else:
            self._flat = FlatParameters(model)
            self.layout, self.theta = self._flat.layout, self._flat.buffer
            self.optimizer = flat_optimizer(settings, self.theta, lambda buffer: (buffer,), self.layout.matrices)
        # A network that is compiled counts in what it was compiled to.
        self._batch_counts = None if settings.compile else BatchCounts(model)
        self._network: Callable[[Tensor], Tensor] = CompiledNetwork(model) if settings.compile else model
        model.train()

    def state(self) -> dict[str, Tensor]:
        """The model's state dict with theta as its parameters, fp32; buffers are the module's. Copies."""
        parameters = self.layout.unflatten(self.theta)
        return {
            name: parameters[name] if name in parameters else value.detach().clone()
            for name, value in self.model.state_dict().items()
        }

    def release(self) -> None:
        """Give back all memory: the training is over, and nothing of it can be used any more."""
        self.__dict__.clear()

    def save(self) -> dict[str, Tensor]:
        """theta, what the optimizer and the loss scale remember, the module's buffers. The tensors themselves."""
        remembered = {"optimizer": self.optimizer.state(), "loss_scale": self.loss_scale.state()}
        return {
            "theta": self.theta,
            **{f"{part}.{i}": tensor for part, tensors in remembered.items() for i, tensor in enumerate(tensors)},
            **{f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Become what was saved, in place: at the same addresses, for graphs."""
        copy_into(self.save(), state)

    def describe(self, step: int) -> str:
        return ""

    def _graph_of(self, body: Callable[[Tensor, Tensor, Tensor], Tensor]) -> CallGraph | None:
        """`body` as a CUDA graph, where `train.graph` asks for it."""
        if not self.settings.graph:
            return None
        working = () if self._working is None else self._working.values()
        moved = [self.theta, *working, *self.optimizer.state(), *self.loss_scale.state(), *self.model.buffers()]
        return CallGraph(body, moved, self.device)

    def _replayed(self, graph: CallGraph | None, images: Tensor, labels: Tensor) -> CallGraph | None:
        """The graph, if this batch can be replayed. Images of another side, as progressive resizing has them, are
        captured anew; batches of another length (an epoch's last) run without."""
        if graph is None:
            return None
        if images.shape[1:] != self._image_shape:
            graph.forget()
            self._image_shape = images.shape[1:]
        return graph if graph.fits(images, labels) else None

    def _autocast(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        # Weights change between steps under the same storage: a cached cast would be stale.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def _backward(self, images: Tensor, labels: Tensor) -> Tensor:
        counting = nullcontext() if self._batch_counts is None else self._batch_counts.counting()
        with part("forward"), counting, self._autocast():
            logits = self._network(images).float()
            loss = F.cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)
        with part("backward"):
            (loss * self.loss_scale.scale if self.loss_scale.enabled else loss).backward()
        return loss.detach()

    def _update(self, lr: Tensor, scale: Tensor, next_points: Sequence[NextPoint] | None = None) -> None:
        """theta <- a step of the optimizer along `scale` times the gradient; weight decay is not scaled."""
        with part("update"):
            gradients = (self._flat.collect_gradient(),) if self._working is None else self._working.collect_gradient()
            self.loss_scale.check(gradients)
            if self.settings.gradient_clip is not None:
                scale = scale * shortening(gradients, scale * self.loss_scale.inverse, self.settings.gradient_clip)
            self.optimizer.update(gradients, lr=lr, scale=scale, loss_scale=self.loss_scale, next_points=next_points)
            self.loss_scale.update()


class RegularStep(_FlatStep):
    """Ordinary training of one network."""

    def __init__(self, model: nn.Module, settings: TrainSettings):
        super().__init__(model, settings, working_copy=False)
        self._graph = self._graph_of(self._body)

    def begin_epoch(self, epoch: int, steps: int) -> None:
        return

    def resume_epoch(self, epoch: int, steps: int, begin: int) -> None:
        return

    def __call__(self, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        graph = self._replayed(self._graph, images, labels)
        if graph is not None:
            return graph(images, labels, lr)
        return self._body(images, labels, lr)

    def _body(self, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        if self._working is not None:
            with part("interpolate"):
                self._working.write(self.theta)
        loss = self._backward(images, labels)
        self._update(lr, self._one)
        return loss


class StarStep(_FlatStep):
    """Algorithm 1, steps 2 to 5: the loss at a random point of the path to a random source moves the star.

    The network holds (1 - t) theta + t theta_n and runs in training mode, so batch-norm normalises with the batch; its
    running statistics belong to interpolated networks and mean nothing.

    A step's update also writes the next step's point (`fuse`), so theta must not be changed from outside between the
    steps of an epoch.

    Args:
        model: gives the architecture and the initial theta.
        settings: the recipe, as of a regular model.
        star: how t is drawn and when sources are matched.
        sources: Z, permuted in place by `match`.
        seed: of the draws of (source, t).
        match: makes the store's rows match theta; called at the start of epochs (Algorithm 1, step 1).
        fuse: whether updates write the next point. The numbers are the same; small networks on a CPU gain 5 %.

    Raises:
        FastarError: sources of another architecture, or settings that this device cannot follow.
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
        fuse: bool = True,
    ):
        super().__init__(model, settings, working_copy=True)
        if sources.layout != self.layout:
            raise FastarError("the sources are of another architecture than the star model")
        self.star = star
        self.sources = sources
        self._seed = seed
        self._match = match
        self._fuse = fuse
        self._indices: Sequence[int] = ()
        self._ts: Sequence[float] = ()
        self._draws = self._scales = torch.empty(0, dtype=torch.float32, device="cpu")
        self._feed: RowFeed = ResidentRows(sources.rows, ())
        self._begin = self._step = 0
        self._written = False
        # What is read of the step that runs, and of the next: always at the same address, for graphs and since a kernel
        # is compiled anew for pointers that are aligned otherwise.
        self._scale = torch.ones((), device=self.device, dtype=torch.float32)
        self._next_t = torch.zeros((), device=self.device, dtype=torch.float32)
        self._next_row = torch.zeros((), dtype=torch.int64, device=self.device)
        self._graph = self._graph_of(self._captured)

    def begin_epoch(self, epoch: int, steps: int) -> None:
        every = self.star.match_every_epochs
        if every and epoch % every == 0:  # (k - 1) mod m == 0: the start of every epoch, the first included
            with part("matching"):
                self._match(self.theta, self.sources, epoch)
        self.resume_epoch(epoch, steps, 0)

    def resume_epoch(self, epoch: int, steps: int, begin: int) -> None:
        indices, ts = draw(self.star, len(self.sources), steps, derive_seed(self._seed, "draws", epoch))
        self._indices, self._ts = indices[begin:], ts[begin:]
        self._begin = begin
        self._draws = torch.tensor(self._ts, dtype=torch.float32, device="cpu").to(self.device)
        self._scales = 1 - self._draws
        self._feed = self.sources.feed(self._indices)
        self._step = 0
        self._written = False

    def __call__(self, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        assert self._working is not None
        step = self._step
        self._step += 1
        if not self._written:
            with part("interpolate"):
                source = self._feed.table[self._feed.take(step)]
                self._next_t.copy_(self._draws[step])
                self._working.interpolate(self.theta, source, self._next_t)
                self._feed.done(step)
        self._written = self._fuse and step + 1 < len(self._indices)
        row = self._feed.take(step + 1) if self._written else 0
        self._scale.copy_(self._scales[step])
        if self._written:
            self._next_t.copy_(self._draws[step + 1])
        graph = self._replayed(self._graph, images, labels)
        if graph is not None:
            self._next_row.fill_(row)
            loss = graph(images, labels, lr)
        else:
            points = self._working.next_points(self._feed.table[row], self._next_t) if self._written else None
            loss = self._body(images, labels, lr, self._scale, points)
        if self._written:
            self._feed.done(step + 1)
        return loss

    def release(self) -> None:
        self.sources.release()
        super().release()

    def describe(self, step: int) -> str:
        here = step - self._begin
        return f" (source {self.sources.names[self._indices[here]]}, t={self._ts[here]:.4f})"

    def _body(
        self, images: Tensor, labels: Tensor, lr: Tensor, scale: Tensor, points: Sequence[NextPoint] | None
    ) -> Tensor:
        loss = self._backward(images, labels)
        self._update(lr, scale, points)
        return loss

    def _captured(self, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        """As a graph: scalars and the row are read where `__call__` puts them. The last step of an epoch has no next
        one; the point that is written then all the same is never used."""
        assert self._working is not None
        points = self._working.next_points(self._feed.table, self._next_t, index=self._next_row) if self._fuse else None
        return self._body(images, labels, lr, self._scale, points)


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
