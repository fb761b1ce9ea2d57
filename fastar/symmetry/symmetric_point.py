"""Weights at which exchanges of units do nothing, so that one axis can be tried whatever else would move with it.

Let some exchange of two positions of an axis leave the network's function unchanged, for all weights, when other axes
move along in whatever way. At weights that are the same at both positions of all these other axes, their move does
nothing; so the exchange on the one axis alone would leave the outputs unchanged there. If it changes them, there is no
such set of axes. And the gradient of the outputs at weights that the whole exchange keeps is the same at both
positions; if it differs on an axis, that axis is not part of any such exchange. One backward pass tries all axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastar.flat.forward import gaps
from fastar.flat.state_check import is_vector, tensors_of
from fastar.runtime.seeds import derive_seed
from fastar.symmetry.held import Exchange, Run, in_front, patterns
from fastar.symmetry.positions import Array
from fastar.symmetry.random_network import RandomNetwork, State
from fastar.symmetry.symmetry import Symmetry
from fastar.symmetry.verify import DRAWS, RELATIVE_TOLERANCE, largest

LARGE = 1 << 24  # numbers in a state
Axes = frozenset[tuple[str, int]]
"""Axes by tensor and number."""


class OutOfTime(Exception):
    """There is no time for another forward pass."""


class Points:
    """States of a random network, and what exchanges change there. Forward passes are counted in `passes`.

    Args:
        going: asked before each pass; `OutOfTime` is raised where it says no.
    """

    def __init__(self, network: RandomNetwork, symmetry: Symmetry, going: Callable[[], bool]):
        self.network, self.passes, self.going = network, 0, going
        self.names = symmetry.names
        self.buffers = 2 if network.has_buffers else 0
        while self.buffers and not network.runs(self.generic(0)):
            self.buffers -= 1
        network.vary_integers(self.generic(0))
        if sum(tensor.numel() for tensor in tensors_of(network.model).values()) > LARGE:
            self._one_sample()
        self.movable = _movable(network.model)

    def _one_sample(self) -> None:
        """Give the network one sample where it treats those of a batch by themselves: that takes less time. (In small
        networks whose weights are all alike, all units may be dead for one sample.)"""
        network, given = self.network, list(self.network.inputs)
        lengths = {x.shape[0] if x.ndim else 0 for x in given if isinstance(x, Tensor)}
        if len(lengths) != 1 or (many := lengths.pop()) < 2:
            return
        state = self.generic(0)
        whole = network.outputs(state)
        network.inputs = [x[:1] if isinstance(x, Tensor) else x for x in given]
        if network.runs(state):
            one = network.outputs(state)
            first = [out[:1] if out.ndim and out.shape[0] == many else out for out in whole]
            scales = [largest(out) for out in first]
            if all(gap <= RELATIVE_TOLERANCE * scale for gap, scale in zip(gaps(first, one), scales, strict=True)):
                return
        network.inputs = given

    def generic(self, number: int) -> State:
        """All at random."""
        gain, positive = DRAWS[number % len(DRAWS)]
        return self.network.state(gain, positive=positive, buffers=self.buffers, number=number)

    def constant(self, number: int, free: Axes, count: int | None = None) -> State:
        """The same along all axes of tensors that can move but `free`, so that no permutation of these does anything;
        with `count` along axes of so many positions or a multiple of it alone.

        Without `count` numbers are positive, and divided so that sums of many equal terms do not grow.
        """
        state = self.generic(number)
        for name in self.movable:
            shape = state[name].shape
            axes = [d for d, n in enumerate(shape) if (name, d) not in free and (count is None or n % count == 0)]
            repeated = math.prod(shape[d] for d in axes if d)
            for axis in axes:
                state[name] = state[name].narrow(axis, 0, min(1, shape[axis]))
            if count is None and state[name].is_floating_point():
                state[name] = state[name].abs() / max(repeated, 1) ** 0.5
            state[name] = state[name].expand(shape).clone(memory_format=torch.contiguous_format)
        return state

    def paired(self, number: int, pair: tuple[int, int], runs: Sequence[Run], free: Axes) -> State:
        """All at random, but the same at positions `pair` of `runs`, which have equally many, and of all axes of as
        many positions or a multiple of it; `free` axes vary."""
        state, count = self.generic(number), len(runs[0].at)
        merged: dict[str, dict[tuple[int, ...], list[tuple[Array, Array]]]] = {}
        for name in self.movable:
            axes = merged.setdefault(name, {})
            for axis, length in enumerate(state[name].shape):
                axes[axis,] = list(patterns(length, count, *pair))
        for run in runs:
            for name in self.names[run.tensor]:
                merged[name].setdefault(run.axes, []).append((run.at[[pair[0]]], run.at[[pair[1]]]))
        for name, axes in merged.items():
            for those, pairs in axes.items():
                if pairs and not any((name, axis) in free for axis in those):
                    _make_alike(state[name], those, pairs)
        return state

    def axes_of(self, runs: Iterable[Run]) -> Axes:
        """The axes of runs, under all names of their tensors."""
        return frozenset((name, axis) for run in runs for name in self.names[run.tensor] for axis in run.axes)

    def outputs(self, state: State) -> list[Tensor]:
        """The outputs there."""
        self._count()
        return self.network.outputs(state)

    def _count(self) -> None:
        if not self.going():
            raise OutOfTime
        self.passes += 1

    def change(self, state: State, exchanges: Sequence[Exchange], expected: list[Tensor] | None = None) -> float:
        """The largest change of an output by exchanges, relative to its largest value; `state` is as before then. NaN
        where the outputs are not finite."""
        before = self.outputs(state) if expected is None else expected
        self._swap(state, exchanges)
        after = self.outputs(state)
        self._swap(state, exchanges)
        scales = [largest(out) for out in before]
        if not all(np.isfinite(scale) for scale in scales):
            return float("nan")
        found = gaps(before, after)
        return max((gap / scale if scale else float(gap > 0)) for gap, scale in zip(found, scales, strict=True))

    def _swap(self, state: State, exchanges: Sequence[Exchange]) -> None:
        for one in exchanges:
            for name in self.names[one.tensor]:
                one.swap(state[name])

    def matters(self, state: State, exchanges: Sequence[Exchange]) -> bool:
        """Tell whether other values at the positions of exchanges change the outputs."""
        expected = self.outputs(state)
        other = dict(state)
        for one in exchanges:
            for name in self.names[one.tensor]:
                tensor = other[name].clone()
                sizes = [tensor.shape[axis] for axis in one.axes]
                at = tuple(torch.from_numpy(k) for k in np.unravel_index(np.concatenate([one.a, one.b]), sizes))
                rows = in_front(tensor, one.axes)
                if tensor.is_floating_point():
                    rows[at] = rows[at] * 1.5 + 0.1
                other[name] = tensor
        found = gaps(expected, self.outputs(other))
        return any(gap > 1e-8 * largest(out) for gap, out in zip(found, expected, strict=True))

    def slopes(self, state: State, names: Iterable[str]) -> Callable[[str, Sequence[int]], Array]:
        """For a tensor of `names` and axes of it: how strongly the outputs depend on it at each position, relative to
        their size, for a change by the size of its values. Zeros where it has no gradient.

        One forward and one backward pass. A random sum of the outputs is derived.
        """
        leaves = {name: state[name].requires_grad_() for first in names for name in self.names[first]}
        self._count()
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        generator = torch.Generator().manual_seed(derive_seed(self.network.seed, "certificate", "outputs"))
        try:
            for out in self.network.outputs(state, grad=True):
                by = torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu")
                scale = largest(out.detach())
                if out.requires_grad and np.isfinite(scale) and scale:
                    total = total + (out * by).sum() / scale
            if total.requires_grad:
                found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        except RuntimeError:  # not to be derived: exchanges are tried instead
            pass
        for leaf in leaves.values():
            leaf.requires_grad_(False)
        gradients = dict(zip(leaves, found, strict=True))

        def of(tensor: str, axes: Sequence[int]) -> Array:
            rows = [gradients[name] for name in self.names[tensor]]
            whole = sum((one for one in rows if one is not None), torch.zeros_like(state[tensor]))
            size = float(state[tensor].square().mean().sqrt())
            values = in_front(whole, axes).reshape(int(np.prod([whole.shape[axis] for axis in axes])), -1)
            norms: Array = (values.norm(dim=1).nan_to_num() * size).numpy()
            return norms

        return of


def _movable(model: nn.Module) -> list[str]:
    """Tensors that a symmetry could move: parameters, and buffers of the state dict with a value for each unit."""
    return [
        name
        for name, tensor in tensors_of(model).items()
        if isinstance(tensor, nn.Parameter)
        or (is_vector(tensor) and (tensor.is_floating_point() or tensor.dtype == torch.bool))
    ]


def _make_alike(tensor: Tensor, axes: tuple[int, ...], pairs: Sequence[tuple[Array, Array]]) -> None:
    """Give positions b of axes the values of positions a, in place, for all pairs (a, b) at once."""
    sizes = [tensor.shape[axis] for axis in axes]
    first = np.arange(int(np.prod(sizes)))
    before = None
    while before is None or (first != before).any():
        before = first.copy()
        for a, b in pairs:
            first[b] = first[a] = np.minimum(first[a], first[b])
        first = first[first]
    moved = np.flatnonzero(first != np.arange(len(first)))
    rows = in_front(tensor, axes)
    source, target = (tuple(torch.from_numpy(k) for k in np.unravel_index(at, sizes)) for at in (first[moved], moved))
    rows[target] = rows[source]
