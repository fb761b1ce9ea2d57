"""Training steps over flat parameters: what all share, and the regular one (the star step is in `star`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastar.config import TrainSettings
from fastar.errors import FastarError
from fastar.flat import FlatLayout, FlatParameters, WorkingWeights
from fastar.flat.forward import Batch, call
from fastar.losses import Loss, find_loss
from fastar.runtime import ranks
from fastar.runtime.cuda_graph import CallGraph, Record
from fastar.runtime.seeds import derive_seed
from fastar.runtime.timing import span
from fastar.training.amp import LossScale, resolve_precision, shortening
from fastar.training.optimizers import flat_optimizer
from fastar.training.resume import Resumable, copy_into
from fastar.training.split_batch import SplitBatch
from fastar.training.split_layers import SplitDraws, synchronise_norms

# Below this a forward pass is over before a second thread has been woken; and threads that wait for each other on a
# busy machine cost a hundred times what they save.
SMALL_FLOPS = 100_000_000


class Step:
    """Base of all training steps: theta [P] and its optimizer, forward and backward in the AMP dtype, the flat update.

    On several ranks each has a copy of all, and its samples of the batch; gradients are summed before the update, so
    that copies stay the same to the bit.

    Args:
        model: gives the architecture and the initial theta; it is trained in place.
        settings: the recipe.
        working_copy: whether the network holds other weights than theta.
        loss: of a batch; None: cross-entropy.
        record: captures `train.graph`'s graph; None: as a CUDA graph.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        *,
        working_copy: bool,
        loss: Loss | None = None,
        record: Record | None = None,
    ):
        self.model = model
        self.settings = settings
        self.loss = find_loss() if loss is None else loss
        self._record = record
        self.device = next(model.parameters()).device
        self.dtype = resolve_precision(settings.precision, self.device)
        self.loss_scale = LossScale(self.device, enabled=self.dtype == torch.float16)
        self._one = torch.ones((), device=self.device, dtype=torch.float32)
        self._input_shapes: list[torch.Size] = []
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
        self._split = SplitBatch(settings.batch_size) if ranks.world() > 1 else None
        if self._split is not None and settings.sync_batch_norm:
            synchronise_norms(model)
        # A compiled network draws otherwise anyway.
        alike = self._split is not None and settings.compile is not True
        self._split_draws = SplitDraws(model, self.device) if alike else None
        self._network: Callable[..., Any] = CompiledNetwork(model) if settings.compile is True else model
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
        """All that steps change and later steps depend on: theta, the optimizer, the loss scale, the module's buffers.

        The tensors themselves.
        """
        remembered = {"optimizer": self.optimizer.state(), "loss_scale": self.loss_scale.state()}
        return {
            "theta": self.theta,
            **{f"{part}.{i}": tensor for part, tensors in remembered.items() for i, tensor in enumerate(tensors)},
            **{f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Become what was saved, in place: at the same addresses, for graphs."""
        copy_into(self.save(), state)

    def __call__(self, inputs: Batch, targets: Any, lr: Tensor) -> Tensor:
        """Do one step at learning rate `lr` (0-d, on the device); the loss, 0-d, without synchronising.

        Inputs are None on a rank that has no samples of the batch; the loss is that of the whole batch on all ranks.
        """
        raise NotImplementedError

    def begin_batch(self, samples: int, seed: int) -> None:
        """Note, on several ranks, how many samples they have of the next batch in all, and the seed of its draws."""
        if self._split_draws is not None:
            self._split_draws.begin(samples, seed)

    def parts(self) -> dict[str, Resumable]:
        """All whose state belongs to the training, by name: the step, and what it uses."""
        return {"step": self}

    def begin_epoch(self, epoch: int, steps: int) -> dict[str, float]:
        """Prepare epoch number `epoch` (from 0) of `steps` steps, such as matching the sources; metrics of that."""
        return {}

    def resume_epoch(self, epoch: int, steps: int, begin: int) -> None:
        """Prepare the steps from number `begin` on of an epoch that had begun, and been matched, before `load`."""

    def describe(self, step: int) -> str:
        """The draws of step number `step` of the current epoch, for error messages."""
        return ""

    def _graph_of(self, body: Callable[[Tensor, Tensor, Tensor], Tensor]) -> CallGraph | None:
        """`body` as a CUDA graph, where `train.graph` asks for it."""
        if self.settings.graph is not True:  # auto is decided before (`step_trial`)
            return None
        working = () if self._working is None else self._working.values
        moved = [self.theta, *working, *self.optimizer.state(), *self.loss_scale.state(), *self.model.buffers()]
        return CallGraph(body, moved, self.device, record=self._record)

    def _replayed(self, graph: CallGraph | None, inputs: Batch, targets: Any) -> CallGraph | None:
        """The graph, if this batch can be replayed. Images of another side, as progressive resizing has them, are
        captured anew; batches of another length (an epoch's last) run without."""
        if graph is None:
            return None
        shapes = [one.shape[1:] for one in tree_leaves(inputs) if isinstance(one, Tensor)]
        if shapes != self._input_shapes:
            graph.forget()
            self._input_shapes = shapes
        return graph if graph.fits(inputs, targets) else None

    def _autocast(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        # Weights change between steps under the same storage: a cached cast would be stale.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def _backward(self, inputs: Batch, targets: Any, weight: Tensor | float | None = None) -> Tensor:
        """The loss; its gradient, times `weight` where one is given, is added to the network's own.

        Of several ranks each has its part of both.
        """
        smoothing = self.settings.label_smoothing
        if inputs is None:
            assert self._split is not None
            return self._split.nothing(self.model)
        with span("forward"), self._autocast():
            outputs = call(self._network, inputs)
            if self._split is None:
                loss = self.loss.mean(outputs, targets, smoothing)
            else:
                loss = self._split.part(*self.loss.total(outputs, targets, smoothing))
        with span("backward"):
            weighted = loss if weight is None else loss * weight
            (weighted * self.loss_scale.scale if self.loss_scale.enabled else weighted).backward()
        return loss.detach()

    def _update(self, lr: Tensor, scale: Tensor, loss: Tensor) -> Tensor:
        """theta <- a step of the optimizer along `scale` times the gradient; weight decay is not scaled.

        Returns:
            The loss of the batch, of which `loss` is this rank's part.
        """
        with span("update"):
            gradients = (self._flat.collect_gradient(),) if self._working is None else self._working.collect_gradient()
            if self._split is not None:
                with span("ranks"):
                    share, loss = self._split.sum_(gradients, loss)
                scale = scale * share
            self.loss_scale.check(gradients)
            if self.settings.gradient_clip is not None:
                scale = scale * shortening(gradients, scale * self.loss_scale.inverse, self.settings.gradient_clip)
            self.optimizer.update(gradients, lr=lr, scale=scale, loss_scale=self.loss_scale)
            self.loss_scale.update()
        return loss


class RegularStep(Step):
    """Ordinary training of one network."""

    def __init__(
        self, model: nn.Module, settings: TrainSettings, *, loss: Loss | None = None, record: Record | None = None
    ):
        super().__init__(model, settings, working_copy=False, loss=loss, record=record)
        self._graph = self._graph_of(self._body)

    def __call__(self, inputs: Batch, targets: Any, lr: Tensor) -> Tensor:
        graph = self._replayed(self._graph, inputs, targets)
        if graph is not None:
            return graph(inputs, targets, lr)
        return self._body(inputs, targets, lr)

    def _body(self, inputs: Batch, targets: Any, lr: Tensor) -> Tensor:
        if self._working is not None:
            with span("interpolate"):
                self._working.write(self.theta)
        return self._update(lr, self._one, self._backward(inputs, targets))


class CompiledNetwork:
    """`model` compiled for the first batch's shapes; shorter batches (an epoch's last) go to it uncompiled.

    Images of another side, as progressive resizing has them, are compiled for anew.

    Raises:
        FastarError: the first call could not be compiled.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._compiled: Any = None
        self._shapes: list[torch.Size] | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        shapes = [one.shape for one in tree_leaves((inputs, named)) if isinstance(one, Tensor)]
        if self._shapes is None or [one[1:] for one in shapes] != [one[1:] for one in self._shapes]:
            self._shapes = shapes
            return self._compile(inputs, named)
        return (self._compiled if shapes == self._shapes else self._model)(*inputs, **named)

    def _compile(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        self._compiled = torch.compile(self._model, dynamic=False)
        try:
            return self._compiled(*inputs, **named)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            reason = " ".join(str(error).split())[:300]
            what = f"train.compile=true: torch.compile failed ({reason})"
            raise FastarError(f"{what}; install a C++ compiler or set train.compile=false") from error


class StepDraws:
    """While entered, torch's generators are begun anew before each step; afterwards they are where they were.

    So a step draws the same whatever was drawn before it, and a training that goes on within an epoch comes to the same
    bits; each rank draws otherwise. Whether steps draw at all is seen at the first one; generators are left alone from
    then on if it did not. They are set on the host: nothing waits, and a CUDA graph reads its generator's seed at each
    replay. A compiled network draws other numbers than one that is not, likewise determined.

    Args:
        seed: of the training.
        device: of the network.
    """

    def __init__(self, seed: int, device: torch.device):
        self._seed = seed
        self._generators = [torch.default_generator]  # the CPU's alone: torch.manual_seed would move those of all GPUs
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generators.append(torch.cuda.default_generators[index])
        self._before: list[Tensor] = []
        self._begun: list[Tensor] | None = None
        self._needed = True

    def __enter__(self) -> StepDraws:
        self._before = self._states()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for generator, state in zip(self._generators, self._before, strict=True):
            generator.set_state(state)

    def seed(self, epoch: int, step: int) -> int:
        """The seed of step number `step` of epoch number `epoch` (both from 0)."""
        return derive_seed(self._seed, "network", epoch, step)

    def begin(self, epoch: int, step: int) -> None:
        """Before step number `step` of epoch number `epoch`."""
        if not self._needed:
            return
        seed = self.seed(epoch, step)
        if ranks.world() > 1 and not ranks.is_first():
            seed = derive_seed(seed, "rank", ranks.rank())
        for generator in self._generators:
            generator.manual_seed(seed)
        if self._begun is None:
            self._begun = self._states()

    def end(self) -> None:
        """After the step."""
        if self._begun:
            pairs = zip(self._begun, self._states(), strict=True)
            self._needed = not all(torch.equal(begun, now) for begun, now in pairs)
            self._begun = []

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]


def forward_flops(model: nn.Module, inputs: Batch) -> int:
    """Floating-point operations of one forward pass of `model` over a batch of `inputs` (products only)."""
    from torch.utils.flop_counter import FlopCounterMode  # only here: it imports Triton

    training = model.training
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call(model.eval(), inputs)
    finally:
        model.train(training)
    return int(counter.get_total_flops())


@contextmanager
def suitable_threads(model: nn.Module, inputs: Batch) -> Iterator[int]:
    """Inside, torch uses one CPU thread if a forward pass of `model` over `inputs` is small; else as many as before.

    Has no effect on a GPU's work.
    """
    before, device = torch.get_num_threads(), next(model.parameters()).device
    # Counting costs a second, which torch takes to import its compiler: only where there is something to choose.
    small = before > 1 and device.type == "cpu" and forward_flops(model, inputs) < SMALL_FLOPS
    chosen = 1 if small else before
    torch.set_num_threads(chosen)
    try:
        yield chosen
    finally:
        torch.set_num_threads(before)
