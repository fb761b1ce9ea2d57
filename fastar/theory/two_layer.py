"""Two-layer networks v . a(W x) of two inputs, and which of them are stars of all others (paper, tables 3 and 4).

A network is an array [m, 3]: for each hidden unit its row of W, and its entry of v. Many are [N, m, 3]. All is float64:
barriers of 1e-6 are below what sums in float32 can tell.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fastar.matching.assignment import solve_assignment
from fastar.runtime.progress import SILENT, Progress

Floats = NDArray[np.float64]
Activation = Literal["linear", "elu"]

POINTS = 60
DISTANCE = 12.0
"""Between the means of the two classes, in standard deviations. The paper does not say it: where classes overlap, the
loss does not go to 0, and no network is a star at 1e-5."""
STEPS, RATE, MOMENTUM = 2000, 0.1, 0.9
STAR_MATCHING = 50
T = np.linspace(0.0, 1.0, 11)


def draw_points(generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Points [60, 2] of two Gaussians of one covariance, the identity, and their classes as signs [60]."""
    signs = np.repeat([1.0, -1.0], POINTS // 2)
    points = generator.standard_normal((POINTS, 2))
    points[:, 0] += signs * DISTANCE / 2
    return points, signs


def draw_networks(number: int, width: int, generator: np.random.Generator) -> Floats:
    """Untrained networks: uniform within 1 / sqrt(fan in), as PyTorch has it; no biases."""
    bounds = np.array([2, 2, width]) ** -0.5
    return generator.uniform(-bounds, bounds, (number, width, 3))


def outputs(units: Floats, points: Floats, activation: Activation) -> Floats:
    """The logits [..., P] of networks [..., m, 3] for points [P, 2]."""
    if activation == "linear":
        return effective(units) @ points.T
    hidden, _ = _elu(units[..., :2] @ points.T)
    logits: Floats = (units[..., None, :, 2] @ hidden)[..., 0, :]
    return logits


def effective(units: Floats) -> Floats:
    """W^T v [..., 2]: the one vector that a linear network is.

    >>> effective(np.array([[1.0, 2.0, 3.0], [0.0, 1.0, -1.0]])).tolist()
    [3.0, 5.0]
    """
    vector: Floats = (units[..., None, :, 2] @ units[..., :2])[..., 0, :]
    return vector


def _elu(inputs: Floats) -> tuple[Floats, Floats]:
    """ELU, and its slope."""
    below = np.expm1(np.minimum(inputs, 0.0))
    return np.maximum(inputs, 0.0) + below, below + 1.0


def loss(logits: Floats, signs: Floats) -> Floats:
    """Binary cross-entropy, the mean over points, of logits [..., P]."""
    assert logits.dtype == np.float64, "small barriers are lost in float32"
    mean: Floats = np.logaddexp(0.0, -signs * logits).mean(axis=-1)
    return mean


def gradient(units: Floats, points: Floats, signs: Floats, activation: Activation) -> Floats:
    """The gradient of each network's loss, shaped as `units` [N, m, 3]."""
    margins = signs * outputs(units, points, activation)
    slopes = -signs * np.exp(-np.logaddexp(0.0, margins)) / len(signs)  # of the loss by each logit
    if activation == "linear":
        by_vector = slopes @ points
        by_first = units[..., 2:] * by_vector[:, None]
        by_second = units[..., :2] @ by_vector[..., None]
    else:
        hidden, slope = _elu(units[..., :2] @ points.T)
        by_first = (units[..., 2:] * slope * slopes[:, None]) @ points
        by_second = hidden @ slopes[..., None]
    return np.concatenate([by_first, by_second], axis=-1)


def train(units: Floats, points: Floats, signs: Floats, activation: Activation, progress: Progress = SILENT) -> Floats:
    """The networks after 2,000 steps of gradient descent on all points, with momentum; all are trained at once."""
    units, velocity = units.copy(), np.zeros_like(units)
    with progress.task(f"training, width {units.shape[1]}", STEPS, "steps") as advance:
        for _ in range(STEPS):
            velocity = MOMENTUM * velocity + gradient(units, points, signs, activation)
            units -= RATE * velocity
            advance()
    return units


def match(first: Floats, second: Floats) -> NDArray[np.int64]:
    """The permutation of the second network's units [m, 3] with the largest inner product with the first's: of one
    group of hidden units, one assignment, which is exact."""
    return solve_assignment(first @ second.T, solver="scipy")


def matched_to(network: Floats, others: Floats) -> Floats:
    """The others [K, m, 3], each with its units permuted to match the network's."""
    return np.stack([other[match(network, other)] for other in others])


def train_star(
    star: Floats,
    sources: Floats,
    points: Floats,
    signs: Floats,
    activation: Activation,
    generator: np.random.Generator,
    progress: Progress = SILENT,
) -> Floats:
    """The network [m, 3] that 2,000 steps of Algorithm 1 make of `star`, with the networks' rate and momentum.

    Each step takes a t of each source, uniformly drawn, and the mean of the losses there; sources are matched anew
    every 50 steps.
    """
    star, velocity = star.copy(), np.zeros_like(star)
    with progress.task(f"star, width {len(star)}", STEPS, "steps") as advance:
        for step in range(STEPS):
            if step % STAR_MATCHING == 0:
                permuted = matched_to(star, sources)
            t = generator.random((len(sources), 1, 1))
            slope = (1 - t) * gradient((1 - t) * star + t * permuted, points, signs, activation)
            velocity = MOMENTUM * velocity + slope.mean(axis=0)
            star -= RATE * velocity
            advance()
    return star


def path_losses(first: Floats, second: Floats, points: Floats, signs: Floats, activation: Activation) -> Floats:
    """Losses [11, K] along the straight paths from one network [m, 3] to K others [K, m, 3]."""
    if activation == "linear":
        # W(t)^T v(t), multiplied out: no network between the ends is needed.
        crossed = effective(_crossed(first, second)) + effective(_crossed(second, first))
        t = T[:, None, None]
        vectors = (1 - t) ** 2 * effective(first) + t**2 * effective(second) + t * (1 - t) * crossed
        return loss(vectors @ points.T, signs)
    return np.stack([loss(outputs((1 - t) * first + t * second, points, activation), signs) for t in T])


def _crossed(first: Floats, second: Floats) -> Floats:
    """W of one, v of the other."""
    shape = np.broadcast_shapes(first.shape, second.shape)
    parts = np.broadcast_to(first, shape)[..., :2], np.broadcast_to(second, shape)[..., 2:]
    return np.concatenate(parts, axis=-1)


def barriers(losses: Floats) -> Floats:
    """The barriers [K] of losses [11, K] along paths: the most above the straight line between the ends, never below 0
    (paper, eq. 10)."""
    t = T[:, None]
    most: Floats = (losses - (1 - t) * losses[0] - t * losses[-1]).max(axis=0)
    return most


def barrier_matrix(
    units: Floats,
    points: Floats,
    signs: Floats,
    activation: Activation,
    *,
    matched: bool,
    progress: Progress = SILENT,
) -> Floats:
    """Barriers [N, N] between each two of the networks [N, m, 3].

    It is symmetric, since the inverse permutation is the best one for the way back: each pair is measured once.

    Args:
        matched: permute the second of each pair to match the first.
    """
    number = len(units)
    matrix = np.zeros((number, number))
    words = "barriers" if matched else "unmatched barriers"
    with progress.task(f"{words}, width {units.shape[1]}", number * (number - 1) // 2, "pairs") as advance:
        for i, first in enumerate(units[:-1]):
            others = units[i + 1 :]
            if matched:
                others = matched_to(first, others)
            matrix[i, i + 1 :] = barriers(path_losses(first, others, points, signs, activation))
            advance(len(others))
    return matrix + matrix.T


def star_share(matrix: Floats, eps: Floats) -> Floats:
    """For each tolerance of `eps`, the share of networks whose largest barrier to any other is below it."""
    stars: Floats = (matrix.max(axis=1)[:, None] < eps).mean(axis=0)
    return stars
