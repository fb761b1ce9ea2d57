"""What a symmetry is held to: its groups as counted by hand, and that random permutations of them keep the network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from matching_calls import match_activations, match_one
from matching_models import random_state
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastar.flat.state_check import tensors_of
from fastar.symmetry import Symmetry

Sizes = list[tuple[int, int | None]]
"""(units, blocks that they lie in or None) of each group; a group of blocks has a line of its own."""
State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A small network and its groups as counted by hand.

    Args:
        make: builds it.
        inputs: what its forward takes.
        sizes: of its groups.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    sizes: Sizes


def sizes(symmetry: Symmetry) -> Sizes:
    """(units, blocks) of each group, as derived."""
    return [(g.size, None if g.parent is None else symmetry.group(g.parent).size) for g in symmetry.groups]


def counted(*by_hand: int | tuple[int, int]) -> Sizes:
    """Sizes in order: 8 for a group of 8 units, (12, 3) for 12 units in 3 blocks."""
    return in_order([(n, None) if isinstance(n, int) else n for n in by_hand])


def in_order(found: Sizes) -> Sizes:
    """Sizes in one order, whatever that of the groups."""
    return sorted(found, key=repr)


def draw(model: nn.Module, seed: int) -> State:
    """A state with every tensor at random in float64."""
    return {name: t.double() if t.is_floating_point() else t for name, t in random_state(model, seed).items()}


def outputs(model: nn.Module, state: State, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """All floating outputs in float64."""
    twin = copy.deepcopy(model).double().eval()
    twin.load_state_dict(state)
    with torch.no_grad():
        out = twin(*(x.double() if x.is_floating_point() else x for x in inputs))
    return [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point()]


def keeps_outputs(model: nn.Module, symmetry: Symmetry, inputs: tuple[Tensor, ...]) -> None:
    """Random permutations of all groups leave the outputs as they are, to 1e-10; other weights do not."""
    for seed in (1, 2):
        state = draw(model, seed)
        permutations = symmetry.random(seed)
        assert not permutations.is_identity()
        before = outputs(model, state, inputs)
        after = outputs(model, symmetry.apply(permutations, state), inputs)
        other = outputs(model, draw(model, seed + 10), inputs)
        for x, y, z in zip(before, after, other, strict=True):
            scale = float(x.abs().max())
            assert float((x - y).abs().max()) <= 1e-10 * scale
            assert float((x - z).abs().max()) > 1e-3 * scale


def comes_back(model: nn.Module, symmetry: Symmetry, inputs: tuple[Tensor, ...]) -> None:
    """A shuffled copy is found again exactly, by its weights and, all groups whose activations are seen, by these."""
    theta = random_state(model, 100)
    shuffle = symmetry.random(3)
    source = symmetry.apply(shuffle, theta)
    permuted, _, _ = match_one(symmetry, theta, source, restarts=5, perturbations=5)
    assert all(torch.equal(permuted[name], theta[name]) for name in theta)

    rows = {name: source[name][None] for name in tensors_of(model)}
    batches = [tuple(x + 0.5 * k if x.is_floating_point() else x for x in inputs) for k in range(3)]
    found, left = match_activations(model, symmetry, theta, rows, batches)
    assert len(left) < len(symmetry.groups)
    wanted = shuffle.inverse()
    for group in symmetry.groups:
        if group.name not in left:
            assert torch.equal(found.select(0)[group.name], wanted[group.name]), group.name
