"""A star model from scratch: the whole method of the paper in plain torch, for small networks on scikit-learn's digits.

    python examples/star_from_scratch.py        # ten seconds on one CPU core

fastar does the same for any network, at the speed of ordinary training. tests/test_docs_examples.py holds that its star
step, its matching and its barrier compute what stands here.
"""

from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

State = dict[str, Tensor]  # a network as its named parameters
HIDDEN = ((0, 2), (2, 4))  # each hidden layer: the layer that makes its units, the layer that reads them


def network(seed: int, inputs: int = 64, width: int = 16, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    middle = nn.Linear(width, width)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), middle, nn.ReLU(), nn.Linear(width, classes))


def state_of(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def interpolate(a: State, b: State, t: float) -> State:
    """The point (1-t) a + t b of the path from `a` (t = 0) to `b` (t = 1)."""
    return {name: (1 - t) * a[name] + t * b[name] for name in a}


def update(theta: State, gradient: State, velocity: State, lr: float, momentum: float, decay: float) -> None:
    """SGD with Nesterov momentum, in place; the weight decay acts on theta."""
    for name, value in theta.items():
        moved = gradient[name] + decay * value
        velocity[name].mul_(momentum).add_(moved)
        value.sub_(lr * (moved + momentum * velocity[name]))


def star_step(
    model: nn.Module, theta: State, source: State, t: float, batch: tuple[Tensor, Tensor], velocity: State,
    lr: float = 0.05, momentum: float = 0.9, decay: float = 5e-4,
) -> float:  # fmt: skip
    """Steps 3 to 5 of Algorithm 1: the loss at a point of the path from the star to a source moves the star."""
    point = {name: value.requires_grad_() for name, value in interpolate(theta, source, t).items()}
    loss = cross_entropy(functional_call(model, point, batch[0]), batch[1])
    gradients = torch.autograd.grad(loss, list(point.values()))
    # d point / d theta = 1 - t.
    scaled = {name: (1 - t) * gradient for name, gradient in zip(point, gradients, strict=True)}
    update(theta, scaled, velocity, lr, momentum, decay)
    return float(loss.detach())


def match(theta: State, source: State) -> State:
    """Step 1 of Algorithm 1: `source` with its hidden units permuted, so that <theta, source> is at a local maximum.

    Coordinate descent (Git Re-Basin, algorithm 1): the best permutation of one layer's units while the others are
    fixed is an assignment problem. It is solved for each layer in turn until none changes.
    """
    matched, changed = dict(source), True
    while changed:
        changed = False
        for makes, reads in HIDDEN:
            rows = [f"{makes}.weight", f"{makes}.bias"]
            similarity = theta[f"{reads}.weight"].T @ matched[f"{reads}.weight"]
            similarity = similarity + theta[rows[0]] @ matched[rows[0]].T
            similarity = similarity + torch.outer(theta[rows[1]], matched[rows[1]])
            order = linear_sum_assignment(similarity.numpy(), maximize=True)[1]
            if np.array_equal(order, np.arange(len(order))):
                continue
            changed = True
            matched |= {name: matched[name][order] for name in rows}
            matched[f"{reads}.weight"] = matched[f"{reads}.weight"][:, order]
    return matched


def barrier(model: nn.Module, a: State, b: State, data: tuple[Tensor, Tensor], points: int = 11) -> float:
    """Equation 10: the largest loss on the path above the straight line between the losses of its ends."""
    ts = torch.linspace(0, 1, points).tolist()
    with torch.no_grad():
        losses = [float(cross_entropy(functional_call(model, interpolate(a, b, t), data[0]), data[1])) for t in ts]
    return max(loss - (1 - t) * losses[0] - t * losses[-1] for t, loss in zip(ts, losses, strict=True))


def train(seed: int, data: tuple[Tensor, Tensor], epochs: int, sources: list[State] | None = None) -> State:
    """A regular model; or, given sources, a star model of them."""
    model, generator = network(seed), torch.Generator().manual_seed(seed)
    theta = state_of(model)
    velocity = {name: torch.zeros_like(value) for name, value in theta.items()}
    for epoch in range(epochs):
        lr = 0.05 * (1 + np.cos(np.pi * epoch / epochs)) / 2
        matched = [match(theta, source) for source in sources] if sources else []
        for indices in torch.randperm(len(data[0]), generator=generator).split(64):
            batch = data[0][indices], data[1][indices]
            # Step 2: a source and a point of the path to it. A regular model is at t = 0 of any path.
            n = int(torch.randint(len(matched), (1,), generator=generator)) if matched else 0
            t = float(torch.rand(1, generator=generator)) if matched else 0.0
            star_step(model, theta, matched[n] if matched else theta, t, batch, velocity, lr)
    return theta


def main() -> None:
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    data = images, torch.tensor(digits.target)
    regular = [train(seed, data, epochs=40) for seed in range(10)]
    sources, heldouts = regular[:8], regular[8:]
    star, model = train(100, data, epochs=40, sources=sources), network(0)
    pairs = list(pairwise(sources))
    found = {
        "regular to regular, unmatched": [barrier(model, a, b, data) for a, b in pairs],
        "regular to regular": [barrier(model, a, match(a, b), data) for a, b in pairs],
        "star to sources": [barrier(model, star, match(star, b), data) for b in sources],
        "star to heldouts": [barrier(model, star, match(star, b), data) for b in heldouts],
    }
    for name, barriers in found.items():
        print(f"barrier, {name + ':':32}{np.mean(barriers):.3f}")


if __name__ == "__main__":
    main()
