"""A star trainer in plain PyTorch, as one writes it from the paper: the peer of tools/bench_reference.py.

torch.optim.SGD, `functional_call` at the interpolated weights (autograd gives the factor 1 - t), PyPI's rebasin for
matching, and batch-norm statistics taken anew at every point of a path. In its best setting on a CPU: weights and
images channels-last (1.24 times as fast; fused and foreach SGD gain nothing); images in memory as normalised tensors,
padded once; a batch cropped and mirrored by one gather; rebasin's trace of each source kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

EVALUATED = 250  # images of a batch that losses are measured on
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@dataclass(frozen=True)
class Training:
    """The recipe of a training; the learning rate falls to 0 by half a cosine."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.SGD:
        return torch.optim.SGD(
            parameters, self.lr, momentum=self.momentum, nesterov=True, weight_decay=self.weight_decay
        )

    def lr_at(self, step: int, steps: int) -> float:
        return self.lr * (1 + math.cos(math.pi * step / steps)) / 2


class Images:
    """Normalised images fp32 [n, C, H, W] and their labels, in memory.

    Args:
        pad: zero pixels (of the value `black` [C]) around each image that is cropped at random.
        flip: mirror half of them.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, *, pad: int = 0, flip: bool = False, black: Tensor | None = None
    ):
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels, self.pad, self.flip = labels, pad, flip
        count, channels, height, width = images.shape
        self._padded = torch.zeros(count, height + 2 * pad, width + 2 * pad, channels)
        if black is not None:
            self._padded += black
        self._padded[:, pad : pad + height, pad : pad + width] = images.permute(0, 2, 3, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def epoch(
        self, size: int, generator: torch.Generator, *, drop_last: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled and augmented batches."""
        order = torch.randperm(len(self), generator=generator)
        for chosen in order.split(size):
            if len(chosen) == size or not drop_last:
                yield self._augmented(chosen, generator), self.labels[chosen]

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.images.split(EVALUATED), self.labels.split(EVALUATED), strict=True)

    def _augmented(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        if not self.pad and not self.flip:
            return self.images[chosen]
        height, width = self.images.shape[2:]
        down, right = torch.randint(2 * self.pad + 1, (2, len(chosen), 1), generator=generator)
        columns = torch.arange(width).expand(len(chosen), -1)
        if self.flip:
            mirrored = torch.rand(len(chosen), 1, generator=generator) < 0.5
            columns = torch.where(mirrored, width - 1 - columns, columns)
        rows = torch.arange(height) + down
        gathered = self._padded[chosen[:, None, None], rows[:, :, None], (columns + right)[:, None, :]]
        return gathered.permute(0, 3, 1, 2)


def train(model: nn.Module, data: Images, recipe: Training, seed: int) -> nn.Module:
    """Train a regular model, in place."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = recipe.optimizer(list(model.parameters()))
    step, steps = 0, recipe.epochs * (len(data) // recipe.batch_size)
    model.train()
    for _ in range(recipe.epochs):
        for images, labels in data.epoch(recipe.batch_size, generator):
            optimizer.param_groups[0]["lr"] = recipe.lr_at(step, steps)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            step += 1
    return model


def star_step(
    model: nn.Module, theta: dict[str, Tensor], source: dict[str, Tensor], t: float, batch: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
) -> Tensor:  # fmt: skip
    """Steps 3 to 5 of Algorithm 1: the loss at a point of the path from theta, the model's parameters, to a source."""
    point = {name: torch.lerp(own, source[name], t) for name, own in theta.items()}
    loss = F.cross_entropy(functional_call(model, point, (batch[0],)), batch[1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters by name; those of convolutions channels-last, which rebasin does not leave them."""
    return {
        name: value.detach().contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value.detach()
        for name, value in model.named_parameters()
    }


class Matching:
    """Step 1 of Algorithm 1 by PyPI's rebasin: sources are permuted in place, from how they were permuted last.

    The graph of theta and each source is traced once.
    """

    def __init__(self, theta: nn.Module, sources: Sequence[nn.Module], example: Tensor):
        from rebasin import PermutationCoordinateDescent

        self._searches = [PermutationCoordinateDescent(theta, source, example) for source in sources]

    def __call__(self) -> None:
        for search in self._searches:
            for permutation, _ in search.pinit.model_graph.permutation_to_info:
                permutation.perm_indices = torch.arange(len(permutation))
            search.rebasin()


def matched(first: nn.Module, second: nn.Module, example: Tensor) -> nn.Module:
    """A copy of the second network, its hidden units permuted to match the first."""
    permuted = copy.deepcopy(second)
    Matching(first, [permuted], example)()
    return permuted


class StarTraining:
    """Algorithm 1, epoch by epoch; what is timed apart is called apart.

    Args:
        model: the star at its start; trained in place.
        sources: permuted in place.
        example: an input that networks are traced with.
    """

    def __init__(
        self, model: nn.Module, sources: Sequence[nn.Module], data: Images, recipe: Training, example: Tensor, seed: int
    ):
        self.model, self.sources, self.data, self.recipe, self.example = model, sources, data, recipe, example
        self._generator = torch.Generator().manual_seed(seed)
        self._theta: dict[str, Tensor] = dict(model.named_parameters())
        self._optimizer = recipe.optimizer(list(model.parameters()))
        self._match: Matching | None = None
        self._step, self._steps = 0, recipe.epochs * (len(data) // recipe.batch_size)

    def match(self) -> None:
        """Step 1; the first time with the tracing."""
        if self._match is None:
            self._match = Matching(self.model, self.sources, self.example)
        self._match()

    def epoch(self) -> None:
        """Steps 2 to 5, for a pass over the data."""
        sources = [parameters_of(source) for source in self.sources]
        self.model.train()
        for batch in self.data.epoch(self.recipe.batch_size, self._generator):
            n = int(torch.randint(len(sources), (), generator=self._generator))
            t = float(torch.rand((), generator=self._generator))
            self._optimizer.param_groups[0]["lr"] = self.recipe.lr_at(self._step, self._steps)
            star_step(self.model, self._theta, sources[n], t, batch, self._optimizer)
            self._step += 1


@torch.no_grad()
def losses_along(
    first: nn.Module,
    second: nn.Module,
    points: int,
    train: Images,
    splits: Sequence[Images],
    batch_size: int,
    seed: int,
) -> list[list[float]]:
    """The mean loss on each split at each point of the path; batch-norm statistics of the train set at every one."""
    model, ends = copy.deepcopy(first), [parameters_of(one) for one in (first, second)]
    found: list[list[float]] = [[] for _ in splits]
    for t in torch.linspace(0, 1, points).tolist():
        for name, value in model.named_parameters():
            value.copy_(torch.lerp(ends[0][name], ends[1][name], t))
        take_statistics(model, train, batch_size, seed)
        model.eval()
        for split, losses in zip(splits, found, strict=True):
            total = sum(float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in split.in_order())
            losses.append(total / len(split))
    return found


def take_statistics(model: nn.Module, data: Images, batch_size: int, seed: int) -> None:
    """Batch-norm's running statistics, of one pass over the data, as torch.optim.swa_utils.update_bn does it."""
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    model.train()
    for images, _ in data.epoch(batch_size, torch.Generator().manual_seed(seed), drop_last=False):
        model(images)


def barrier(losses: Sequence[float]) -> float:
    """Equation 10: the largest loss above the straight line between the ends' losses."""
    last = len(losses) - 1
    return max(loss - losses[0] - (losses[-1] - losses[0]) * k / last for k, loss in enumerate(losses))
