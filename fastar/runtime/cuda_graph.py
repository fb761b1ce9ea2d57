"""Work on a batch captured once as a CUDA graph and replayed: the host launches one thing a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from fastar.errors import FastarError
from fastar.runtime.timing import no_spans, span

# Kernels are compiled, and libraries choose theirs and take their workspaces, in the first calls.
WARM_UP = 3

Body = Callable[..., Tensor]
Record = Callable[[Callable[[], None], Callable[[], None]], Callable[[], None]]


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """A high-priority stream of its own, on which everything is captured: torch shares a small pool of streams for each
    priority, so that other work could leak into the capture."""
    return torch.cuda.Stream(device, priority=-1)


def record_cuda_graph(warm_up: Callable[[], None], run: Callable[[], None]) -> Callable[[], None]:
    """Capture what `run` launches, after `warm_up` on the same stream; return what replays it."""
    stream = _capture_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm_up()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The thread that reads sources ahead may call CUDA meanwhile; only this thread's calls must be capturable.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        run()
    return graph.replay


class CallGraph:
    """Runs `body(*inputs) -> result` as a graph, for inputs (tensors, or trees of them) of the first ones' shapes.

    Capturing changes nothing: everything in `moved` is put back after the warm-up, batch-norm's running statistics too,
    and torch's generators (dropout) stand where they stood; a replay draws as a call without the graph does.

    Args:
        body: a step, or the evaluation of a batch; never waits for the device, and what else it reads stays in place.
            A method's object is not kept alive.
        moved: every tensor that `body` changes.
        device: a GPU.
        setting: what asked for a graph, for errors.
        record: captures; None: as a CUDA graph.

    Raises:
        FastarError: no GPU, inputs that hold other things than tensors, or the capture failed.
    """

    def __init__(
        self,
        body: Body,
        moved: Sequence[Tensor],
        device: torch.device,
        *,
        setting: str = "train.graph",
        record: Record | None = None,
    ) -> None:
        if device.type != "cuda" and record is None:
            raise FastarError(f"{setting}=true: CUDA graphs need a GPU, this run is on {device}; set it to false")
        # A step holds its graph: held in turn, its memory would wait for the garbage collector.
        self._body: Callable[[], Body | None] = WeakMethod(body) if isinstance(body, MethodType) else lambda: body
        self._moved = list(moved)
        self._device = device
        self._setting = setting
        self._record = record or record_cuda_graph
        self._inputs: tuple[Any, ...] | None = None
        self._result: Tensor | None = None
        self._replay: Callable[[], None] | None = None

    def fits(self, *given: Any) -> bool:
        """Tell whether these inputs can be replayed: the first ones always, others if shapes and types are alike."""
        if self._inputs is None:
            return True
        return all(_alike(one, static) for one, static in zip(given, self._inputs, strict=False))

    def forget(self) -> None:
        """Give up what was captured: the next inputs are the first again."""
        self._inputs = self._result = self._replay = None

    def __call__(self, *inputs: Any) -> Tensor:
        """Run on inputs that fit; a copy of what `body` returned."""
        if self._inputs is None:
            other = [type(one).__name__ for one in tree_leaves(inputs) if not isinstance(one, Tensor)]
            if other:
                raise FastarError(
                    f"{self._setting}=true: batches must hold tensors alone, not {other[0]}; set it to false"
                )
            self._inputs = tree_map_only(Tensor, Tensor.clone, inputs)
            self._replay = self._capture(self._inputs)
        for static, given in zip(tree_leaves(self._inputs), tree_leaves(inputs), strict=True):
            static.copy_(given)
        assert self._replay is not None
        with span("graph"):
            self._replay()
        assert self._result is not None
        return self._result.clone()  # the graph writes the next one over it

    def _capture(self, inputs: tuple[Any, ...]) -> Callable[[], None]:
        body = self._body()
        assert body is not None
        before = [tensor.detach().clone() for tensor in self._moved]

        def warm_up() -> None:
            for _ in range(WARM_UP):
                body(*inputs)
            with torch.no_grad():
                for tensor, saved in zip(self._moved, before, strict=True):
                    tensor.copy_(saved)

        def run() -> None:
            self._result = body(*inputs)

        try:
            with no_spans(), torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
                return self._record(warm_up, run)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise FastarError(
                f"{self._setting}=true: the work could not be captured ({reason}); set {self._setting}=false"
            ) from error


def _alike(one: Any, other: Any) -> bool:
    """Tell whether two trees of tensors are of one structure, and their tensors of the same shapes and types."""
    (tensors, structure), (others, wanted) = tree_flatten(one), tree_flatten(other)
    return structure == wanted and all(
        isinstance(a, Tensor) and a.shape == b.shape and a.dtype == b.dtype
        for a, b in zip(tensors, others, strict=True)
    )
