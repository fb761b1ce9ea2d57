"""Small networks and data, and Algorithm 1 written out plainly in float64, for the tests of training."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fastar.config import Augmentation, TrainSettings
from fastar.data.in_memory import DeviceDataset
from fastar.flat import FlatLayout
from fastar.training import SourcesStore

State = dict[str, Tensor]
CPU = torch.device("cpu")


class PlainMlp(nn.Module):
    """One hidden layer: its weight matching is a single assignment, which the reference can solve exactly."""

    # How each parameter meets the hidden units: (name, axis).
    hidden = (("first.weight", 0), ("first.bias", 0), ("second.weight", 1))

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x.flatten(1))))


class PlainConvNet(nn.Module):
    """One batch-normed convolution, pooled and read out: one group again."""

    hidden = (("conv.weight", 0), ("norm.weight", 0), ("norm.bias", 0), ("out.weight", 1))

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.norm(self.conv(x))).mean((2, 3)))


def network(kind: type[nn.Module], seed: int) -> nn.Module:
    """A network of this kind, all of whose parameters are random (batch-norm's too)."""
    generator = torch.Generator().manual_seed(seed)
    model = kind()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def batches(count: int, seed: int, shape: tuple[int, ...], size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Random batches; labels that depend on the images, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, size, *shape, generator=generator)
    labels = images.flatten(2)[..., :4].argmax(-1)
    return list(zip(images, labels, strict=True))


def dataset(
    count: int = 96, seed: int = 0, *, channels: int = 3, size: int = 8, pad: int = 1, device: torch.device = CPU
) -> DeviceDataset:
    """Random uint8 images of four classes that differ in one corner's brightness, augmented."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    images = torch.randint(0, 128, (count, size, size, channels), generator=generator)
    for sample, label in zip(images, labels.tolist(), strict=True):
        half = size // 2
        sample[half * (label // 2) : half * (label // 2 + 1), half * (label % 2) : half * (label % 2 + 1)] += 100
    return DeviceDataset(
        images.to(device, torch.uint8),
        labels.to(device),
        mean=(0.4,) * channels,
        std=(0.2,) * channels,
        augmentation=Augmentation(pad=pad, flip=pad > 0),
    )


def store(sources: Sequence[nn.Module], layout: FlatLayout) -> SourcesStore:
    """Z of these networks, named `source 0` and so on."""
    return SourcesStore(layout, [s.state_dict() for s in sources], [f"source {i}" for i in range(len(sources))], CPU)


def best_order(kind: Any, theta: State, source: State) -> Tensor:
    """The permutation of the hidden units that maximises <theta, pi(source)>, by SciPy's exact assignment."""
    profit = torch.zeros(theta[kind.hidden[0][0]].shape[0], source[kind.hidden[0][0]].shape[0], dtype=torch.float64)
    for name, axis in kind.hidden:
        mine, theirs = (s[name].double().movedim(axis, 0).unsqueeze(-1).flatten(1) for s in (theta, source))
        profit += mine @ theirs.T
    rows, columns = linear_sum_assignment(profit.numpy(), maximize=True)
    assert (rows == range(len(rows))).all()
    return torch.as_tensor(columns)


def permute_hidden(kind: Any, source: State, order: Tensor) -> State:
    """The network with its hidden units taken in `order`."""
    moved = dict(source)
    for name, axis in kind.hidden:
        moved[name] = source[name].index_select(axis, order)
    return moved


def match_exactly(kind: Any, theta: State, sources: list[State]) -> list[State]:
    """Algorithm 1, step 1, in the terms of `best_order`."""
    return [permute_hidden(kind, source, best_order(kind, theta, source)) for source in sources]


def algorithm_1(
    model: nn.Module,
    sources: Sequence[nn.Module],
    epochs: Sequence[Sequence[tuple[Tensor, Tensor]]],
    draws: Sequence[tuple[Sequence[int], Sequence[float]]],
    settings: TrainSettings,
    rates: Sequence[Sequence[float]],
    *,
    matching: bool = True,
    mu: float = 0.0,
    decay_is_scaled: bool = False,
    gradient_is_scaled: bool = True,
    clipped_at_the_point: bool = False,
) -> tuple[State, list[float], list[State]]:
    """Starlight in float64, one parameter at a time: the star, each step's loss, the sources as last matched.

    The three last flags make wrong variants, to show that the tests can tell them apart.
    """
    kind = type(model)
    module = copy.deepcopy(model).double().train()
    theta = {name: p.detach().clone() for name, p in module.named_parameters()}
    velocity = {name: torch.zeros_like(value) for name, value in theta.items()}
    squares = {name: torch.zeros_like(value) for name, value in theta.items()}
    steps_done = 0
    names = list(theta)
    z = [{name: p.detach().double() for name, p in source.named_parameters()} for source in sources]
    losses = []
    for epoch, (indices, ts), lrs in zip(epochs, draws, rates, strict=True):
        if matching:
            z = match_exactly(kind, theta, z)
        for (images, labels), n, t, lr in zip(epoch, indices, ts, lrs, strict=True):
            star = {name: value.clone().requires_grad_() for name, value in theta.items()}
            point = {name: (1 - t) * star[name] + t * z[n][name] for name in names}
            loss = F.cross_entropy(functional_call(module, point, (images.double(),)), labels)
            if mu:
                own = F.cross_entropy(functional_call(module, star, (images.double(),)), labels)
                loss = (loss + mu * own) / (1 + mu)
            losses.append(float(loss.detach()))
            # Differentiated with respect to theta itself, so that the factor 1 - t is autograd's, not ours.
            gradients = torch.autograd.grad(loss, [star[name] for name in names])
            steps_done += 1
            if settings.gradient_clip is not None:
                # At the point: as if the network's own gradient were clipped, and 1 - t came after.
                factor = 1 - t if clipped_at_the_point else 1.0
                gradients = [factor * g for g in clipped([g / factor for g in gradients], settings.gradient_clip)]
            for name, gradient in zip(names, gradients, strict=True):
                if not gradient_is_scaled and t < 1:
                    gradient = gradient / (1 - t)
                decay = settings.weight_decay * ((1 - t) if decay_is_scaled else 1.0)
                if settings.optimizer == "adamw":
                    theta[name] = theta[name] * (1 - lr * decay)
                    decay = 0.0
                step = gradient + decay * theta[name]
                if settings.optimizer != "sgd":
                    beta1, beta2 = settings.betas
                    velocity[name] = beta1 * velocity[name] + (1 - beta1) * step
                    squares[name] = beta2 * squares[name] + (1 - beta2) * step**2
                    mean, square = velocity[name] / (1 - beta1**steps_done), squares[name] / (1 - beta2**steps_done)
                    theta[name] = theta[name] - lr * mean / (square.sqrt() + settings.eps)
                    continue
                velocity[name] = settings.momentum * velocity[name] + step
                step = step + settings.momentum * velocity[name] if settings.nesterov else velocity[name]
                theta[name] = theta[name] - lr * step
    return theta, losses, z


def clipped(gradients: Sequence[Tensor], longest: float) -> list[Tensor]:
    """By torch.nn.utils.clip_grad_norm_."""
    holders = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for holder, gradient in zip(holders, gradients, strict=True):
        holder.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(holders, longest)
    return [holder.grad for holder in holders if holder.grad is not None]


def largest_difference(found: State, wanted: State) -> float:
    """Over all the parameters of `wanted`."""
    return max(
        float((found[name].detach().double() - value.detach().double()).abs().max()) for name, value in wanted.items()
    )
