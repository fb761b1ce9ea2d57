"""A training step captured once as a CUDA graph and replayed: the host launches one thing a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastar.errors import FastarError
from fastar.training.parts import no_parts, part

# Kernels are compiled, and libraries choose theirs and take their workspaces, in the first calls.
WARM_UP = 3

Body = Callable[[Tensor, Tensor, Tensor], Tensor]
Record = Callable[[Callable[[], None], Callable[[], None]], Callable[[], None]]


def record_cuda_graph(warm_up: Callable[[], None], run: Callable[[], None]) -> Callable[[], None]:
    """Capture what `run` launches, after `warm_up` on a side stream; what replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm_up()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # The thread that reads sources ahead may call CUDA meanwhile; only this thread's calls must be capturable.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


class StepGraph:
    """Runs `body(images, labels, lr) -> loss` as a graph, for batches of the first one's shape.

    Capturing does not train: everything in `moved` is put back after the warm-up, batch-norm's running statistics too.

    Args:
        body: the step, without host synchronisation; whatever else it reads must stay at its address.
        moved: every tensor that `body` changes.
        device: a GPU.
        record: captures; replaced in tests.

    Raises:
        FastarError: no GPU, or the capture failed.
    """

    def __init__(
        self, body: Body, moved: Sequence[Tensor], device: torch.device, *, record: Record = record_cuda_graph
    ) -> None:
        if device.type != "cuda" and record is record_cuda_graph:
            raise FastarError(f"train.graph=true: CUDA graphs need a GPU, this run is on {device}; set it to false")
        self._body = body
        self._moved = list(moved)
        self._record = record
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._loss: Tensor | None = None
        self._replay: Callable[[], None] | None = None

    def fits(self, images: Tensor, labels: Tensor) -> bool:
        """Whether this batch can be replayed: the first one always, others if they are like it."""
        if self._inputs is None:
            return True
        return all(
            given.shape == static.shape and given.dtype == static.dtype
            for given, static in zip((images, labels), self._inputs, strict=False)
        )

    def __call__(self, images: Tensor, labels: Tensor, lr: Tensor) -> Tensor:
        """One step on a batch that `fits`; the loss, 0-d."""
        if self._inputs is None:
            self._inputs = (images.clone(), labels.clone(), lr.clone())
            self._replay = self._capture(self._inputs)
        for static, given in zip(self._inputs, (images, labels, lr), strict=True):
            static.copy_(given)
        assert self._replay is not None
        with part("graph"):
            self._replay()
        assert self._loss is not None
        return self._loss.clone()  # the graph writes the next step's over it

    def _capture(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], None]:
        before = [tensor.detach().clone() for tensor in self._moved]

        def warm_up() -> None:
            for _ in range(WARM_UP):
                self._body(*inputs)
            with torch.no_grad():
                for tensor, saved in zip(self._moved, before, strict=True):
                    tensor.copy_(saved)

        def run() -> None:
            self._loss = self._body(*inputs)

        try:
            with no_parts():
                return self._record(warm_up, run)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise FastarError(
                f"train.graph=true: the step could not be captured ({reason}); set train.graph=false"
            ) from error
