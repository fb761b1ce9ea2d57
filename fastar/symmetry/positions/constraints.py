"""What a permutation of the positions along tensors' axes has to satisfy.

A position is an index along an axis of a tensor, or a tuple of indices along several. What the operations of a graph
demand of a permutation of all positions is written down as it is met:

- `tie`: position i of one array moves exactly as position i of another;
- `within`: positions of one array lie in blocks; a block moves as its position of another array does (heads of an
  attention and the units inside each head, groups of a group-norm and their channels);
- `mark`: positions with different labels do not change places; all labels different holds each position in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]
MOST_IN_BLOCKS = 1 << 20  # positions that axes of a parameter may have, of which one moves by itself for each of others


@dataclass
class _Marks:
    at: Array
    labels: Array
    why: str | None  # None of marks that are part of the structure


@dataclass
class Constraints:
    """What has been learned about positions so far. Positions are numbered; arrays of them have any shape."""

    starts: list[int] = field(default_factory=list)  # of each array that `fresh` gave
    count: int = 0
    _ties: list[tuple[Array, Array]] = field(default_factory=list)
    _blocks: list[tuple[Array, Array]] = field(default_factory=list)
    _marks: list[_Marks] = field(default_factory=list)
    _used: set[int] = field(default_factory=set)  # arrays of which something is known
    _same: dict[int, int] = field(default_factory=dict)  # array -> one before it that moves alike, position by position
    _copies: dict[int, Array] = field(default_factory=dict)  # array -> the positions that its own move as
    loose: dict[int, str] = field(default_factory=dict)  # array -> the parameter of which it is an axis, used once
    in_blocks: dict[int, tuple[tuple[int, ...], Array]] = field(default_factory=dict)
    """What became of an array of `loose`: other arrays of the parameter, and positions along these and it."""
    missed: list[tuple[str, Array]] = field(default_factory=list)  # what is held because it cannot be expressed
    lines: list[Array] = field(default_factory=list)
    """Positions along one axis of a parameter: they cannot be rows and columns of a table that both move."""
    _outer: dict[tuple[object, ...], Array] = field(default_factory=dict)
    _joined: dict[tuple[object, ...], list[tuple[list[int], Array]]] = field(default_factory=dict)

    def fresh(self, shape: Sequence[int]) -> Array:
        """New positions, [*shape], about which nothing is known."""
        size = int(np.prod(shape))
        self.starts.append(self.count)
        self.count += size
        return np.arange(self.count - size, self.count).reshape(shape)

    def tie(self, a: Array, b: Array) -> None:
        """Let each position of `a` move as the one at its place in `b`, of the same shape."""
        a, b = a.ravel(), b.ravel()
        if np.array_equal(a, b):
            return
        one, other = self._whole(a), self._whole(b)
        if other is None or other in self._used:
            a, b, one, other = b, a, other, one
        self._used |= self._arrays_of(a)
        if other is not None and other not in self._used:
            self._copies[other] = a  # nothing else is known of it: position by position it is the other
        elif one is not None and other is not None and not {one, other} & self._copies.keys():
            first, second = sorted((self._root(one), self._root(other)))
            if first != second:
                self._same[second] = first
        else:
            self._ties.append((a, b))
        self._used |= self._arrays_of(b)

    def within(self, inside: Array, blocks: Array) -> None:
        """Let each position of `inside` be in the block at its place in `blocks`, broadcast."""
        self._used |= self._arrays_of(inside) | self._arrays_of(blocks)
        self._blocks.append((inside.ravel(), np.broadcast_to(blocks, inside.shape).ravel()))

    def mark(self, at: Array, labels: Array | int = 0, why: str | None = None) -> None:
        """Let positions stay among those of their label. `why`: for what; such marks can be left out of a solution."""
        if at.size:
            self._used |= self._arrays_of(at)
            self._marks.append(_Marks(at.ravel(), np.broadcast_to(labels, at.shape).ravel(), why))

    def hold(self, at: Array, why: str) -> None:
        """Hold every position in place."""
        self.mark(at, np.arange(at.size).reshape(at.shape), why)

    def outer(self, at: Array, axes: Sequence[int]) -> Array:
        """The positions of blocks, [sizes of `axes`], in which those of `at` lie that have the same indices there."""
        if len(axes) == at.ndim:
            return at.transpose(axes)
        key, order = self._key(at, axes)
        if key not in self._outer:
            self.know_outer(at, order, self.fresh([at.shape[axis] for axis in order]))
        return self._outer[key].transpose([order.index(axis) for axis in axes])

    def has_outer(self, at: Array, axes: Sequence[int]) -> bool:
        """Tell whether `outer` has been asked for these before."""
        return self._key(at, axes)[0] in self._outer

    def know_outer(self, at: Array, axes: Sequence[int], blocks: Array) -> None:
        """Say that `blocks` [sizes of `axes`] is what `outer` has to give, and that `at` is in them."""
        key, order = self._key(at, axes)
        blocks = blocks.transpose([list(axes).index(axis) for axis in order])
        front = at.transpose((*order, *(axis for axis in range(at.ndim) if axis not in order)))
        self.within(front, blocks.reshape(*blocks.shape, *[1] * (at.ndim - len(axes))))
        self._outer[key] = blocks

    @staticmethod
    def _key(at: Array, axes: Sequence[int]) -> tuple[tuple[object, ...], list[int]]:
        """A name for `at` and `axes` that does not depend on the order of its axes; `axes` in that order."""
        steps = [int(at[tuple(int(k == axis) for k in range(at.ndim))]) for axis in range(at.ndim)]
        order = sorted(axes, key=steps.__getitem__)
        rest = sorted((axis for axis in range(at.ndim) if axis not in order), key=steps.__getitem__)
        turned = np.ascontiguousarray(at.transpose((*order, *rest)))
        return (turned.shape, len(axes), blake2b(turned.tobytes(), digest_size=16).digest()), order

    def say_joined(self, at: Array, parts: Sequence[tuple[Sequence[int], Array]]) -> None:
        """Say that `at` is nothing but all pairs of the positions of `parts` (its axes, and the positions), where axes
        in none of them stay."""
        key, order = self._key(at, range(at.ndim))
        self._joined[key] = [([order.index(axis) for axis in axes], part) for axes, part in parts]

    def parts(self, at: Array) -> list[tuple[list[int], Array]] | None:
        """What `at`, whose axes may have changed places, was joined of."""
        key, order = self._key(at, range(at.ndim))
        found = self._joined.get(key)
        return None if found is None else [([order[axis] for axis in axes], part) for axes, part in found]

    def _array(self, position: int) -> int:
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def put_in_blocks(self, at: Array, blocks: Sequence[Array]) -> bool:
        """Let an axis of a parameter move by itself for each position of other axes of it, if nothing is known of it
        yet. False if it may not."""
        mine, others = self._whole(at), [self._whole(one) for one in blocks]
        parameter = self.loose.get(-1 if mine is None else mine)
        if parameter is None or mine in self._used or mine in self.in_blocks:
            return False
        if any(one is None or self.loose.get(one) != parameter or one in self.in_blocks for one in others):
            return False
        size = len(at) * int(np.prod([len(one) for one in blocks]))
        if size > MOST_IN_BLOCKS:
            return False
        positions = self.fresh([*(len(one) for one in blocks), len(at)])
        for axis, one in enumerate(blocks):
            self.know_outer(positions, [axis], one)
        self.in_blocks[mine] = tuple(others), positions  # type: ignore[index, arg-type]
        return True

    def now(self, at: Array) -> tuple[tuple[int, ...], Array] | None:
        """The arrays and positions that took the place of an axis of a parameter by `put_in_blocks`."""
        mine = self.array_of(at)
        return None if mine is None else self.in_blocks.get(mine)

    def array_of(self, at: Array) -> int | None:
        """The array that `at` is, in order; None where it is none."""
        return self._whole(at) if at.ndim == 1 and len(at) else None

    def _arrays_of(self, at: Array) -> set[int]:
        return set(np.unique(np.searchsorted(self.starts, at, side="right") - 1).tolist())

    def _whole(self, at: Array) -> int | None:
        """The array that `at` is, in order; None where it is none."""
        found = self._array(int(at[0]))
        end = self.starts[found + 1] if found + 1 < len(self.starts) else self.count
        start = self.starts[found]
        whole = len(at) == end - start and bool((at == np.arange(start, end)).all())
        return found if whole else None

    def _root(self, array: int) -> int:
        while array in self._same:
            array = self._same[array]
        return array

    def reasons(self) -> list[str]:
        """Why positions are held, each reason once."""
        return list(dict.fromkeys(one.why for one in self._marks if one.why is not None))

    def held_for(self, why: str) -> Array:
        """The positions that are held for this reason."""
        found = [one.at for one in self._marks if one.why == why]
        return np.concatenate(found) if found else np.zeros(0, np.int64)
