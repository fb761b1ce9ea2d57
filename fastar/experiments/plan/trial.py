"""One run of network, data and loss together, before any work."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastar.data.generators import generators_kept
from fastar.errors import FastarError, UserCodeError
from fastar.experiments.task import Network, TaskData
from fastar.flat.forward import Batch, call
from fastar.losses import Loss
from fastar.runtime.memory import within_memory
from fastar.runtime.user_code import users_code


def check_task(network: Network, data: TaskData, loss: Loss, device: torch.device) -> None:
    """Run the network and the loss once on two samples of each split, and backward on those that are trained on, so
    that what does not fit is said before any work.

    Raises:
        FastarError: the network does not run on the data, or no loss can be taken of what it returns.
    """
    remedy = "use a smaller network, or more memory"
    with generators_kept(), within_memory("running the network on two samples", remedy):
        model = network.build(seed=0)
        if next(model.parameters(), None) is None:
            raise FastarError(f"the network, a {type(model).__name__}, has no parameters: there is nothing to train")
        frozen = next((name for name, one in model.named_parameters() if not one.requires_grad), None)
        if frozen is not None:
            raise FastarError(
                f"the network's parameter {frozen} is frozen (requires_grad=False), and all parameters are trained: "
                "unfreeze it, or make it a buffer"
            )
        for split, (inputs, targets), doubt in data.trials():
            if isinstance(targets, Tensor) and not targets.ndim:
                raise FastarError(
                    f"the {split} data give samples, not batches (a target has no axis of samples): wrap them in a "
                    "DataLoader with a batch_size"
                )
            with (
                torch.no_grad(),
                _placed(model, inputs),
                users_code(f"the network's forward, on the first {split} batch,"),
            ):
                outputs = call(model.eval(), inputs)
            with torch.no_grad(), users_code(f"the loss {loss.name}, on the first {split} batch,"):
                classes = loss.classes(outputs, targets)
                if classes is not None and not doubt:
                    data.check_classes(split, classes)
                for name, metric in loss.measures().items():
                    totals = metric.begin(device, 1)
                    totals.add(0, outputs, targets)
                    if doubt and name == "loss" and not math.isfinite(value := totals.values()[0]):
                        raise FastarError(
                            f"{doubt}, and the loss {loss.name} of that sample is {value}: replace the number, or "
                            "leave the sample out"
                        )
            if split == "train" and not doubt:
                with users_code(f"a training step with the loss {loss.name}"):
                    mean = loss.mean(call(model.train(), inputs), targets)
                    if not mean.requires_grad:
                        raise FastarError(
                            f"the loss {loss.name} has no gradient: return a tensor that is computed from the "
                            "network's outputs, not one that is detached"
                        )
                    mean.backward()


@contextmanager
def _placed(model: nn.Module, inputs: Batch) -> Iterator[None]:
    """Inside, an error of the network's forward says the shape of its inputs, and the module that it comes from."""
    try:
        yield
    except UserCodeError as error:
        cause, names = error.__cause__, {id(module): name for name, module in model.named_modules()}
        frames = [] if cause is None else [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        inside = [names[id(one)] for one in (frame.f_locals.get("self") for frame in frames) if id(one) in names]
        shapes = ", ".join(str(list(one.shape)) for one in tree_leaves(inputs) if isinstance(one, Tensor))
        where = f", in its module {inside[-1]!r}" if inside and inside[-1] else ""
        raise UserCodeError(f"{error}{where}; its inputs have the shape {shapes}") from cause
