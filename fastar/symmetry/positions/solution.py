"""The solution of `Constraints`: units that may change places, found by colour refinement.

Units are told apart by colours, refined until they are stable: the colour of a position depends on its array and marks,
on the colours of its unit, of the blocks that it is in, and of what is in its blocks. Units of one colour may change
places: inside their block, if they are in one. On forests, which units in blocks are, colour refinement is exact. What
is no forest is made one: of a table of which rows and columns both move one is held, and so is the order inside blocks
that are in blocks. `Solution.reduced` tells of it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fastar.symmetry.positions.constraints import Array, Constraints

Colours = NDArray[np.uint64]
_TABLE = "a table of which rows and columns could move: one of them stays"
_ORDER = "a network in which these positions cannot be told apart without their order"


def solve(known: Constraints, without: Collection[str] = ()) -> Solution:
    """The units and their blocks, as if the reasons in `without` held nothing."""
    return _Solver(known, without).solution()


@dataclass(frozen=True)
class Units:
    """Units that may change places: `count` of them, in `parent`'s blocks of equally many if there is one.

    Unit g * b + d of a class in blocks is the d-th of block g.
    """

    count: int
    parent: int | None


@dataclass(frozen=True)
class Solution:
    """Classes of units, and where each position is.

    Args:
        classes: parents before what is in their blocks.
        kind: the class of each position, [positions]; -1 of those that stay.
        unit: the number of its unit in the class.
        slot: the same for positions that have the same role in their units.
        crossed: which positions are entries of a table whose rows and columns both move, and move as these say.
        reduced: lines, for what is held because it cannot be expressed, and the positions.
    """

    classes: tuple[Units, ...]
    kind: Array
    unit: Array
    slot: Colours
    crossed: NDArray[np.bool_]
    reduced: tuple[tuple[str, Array], ...]


def _mix(x: Colours) -> Colours:
    """A bijection of 64 bits that looks random (splitmix64's finisher)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hashed(*columns: NDArray[np.generic] | int) -> Colours:
    """One number for each row."""
    out: Colours = np.zeros(1, np.uint64)
    for column in columns:
        out = _mix(out ^ np.asarray(column).astype(np.uint64))
    return out


def _sums(at: Array, values: Colours, size: int) -> Colours:
    """Sums of values by index, modulo 2^64."""
    out = np.zeros(size, np.uint64)
    np.add.at(out, at, values)
    return out


def _numbers(values: NDArray[np.generic]) -> tuple[Array, int]:
    """Each value's number among the different ones, in order of value, and how many there are."""
    different, numbers = np.unique(values, return_inverse=True)
    return numbers.astype(np.int64), len(different)


def different_pairs(pairs: Array) -> Array:
    """Each pair [2, pairs] of small whole numbers once, in order. (`np.unique` of columns is slow.)"""
    base = int(pairs[1].max(initial=0)) + 1
    found: Array = np.stack(np.divmod(np.unique(pairs[0] * base + pairs[1]), base))
    return found


class _Solver:
    """Colours of positions, refined; units are joined and held until all are in at most one block each."""

    def __init__(self, given: Constraints, without: Collection[str]):
        starts = np.array([*given.starts, given.count], np.int64)
        lengths = np.diff(starts)
        self.array = np.repeat(np.arange(len(lengths)), lengths)
        # Positions that move alike for sure are solved once: `place` is the number of the first of them. `role` tells
        # apart those of one place.
        moved, self.role = np.arange(given.count), _hashed(0, self.array)
        done: set[int] = set()

        def settle(array: int) -> None:
            if array in done:
                return
            done.add(array)
            mine = slice(starts[array], starts[array + 1])
            if array in given._copies:
                others = given._copies[array]
                for other in given._arrays_of(others):
                    settle(other)
                moved[mine], self.role[mine] = moved[others], _hashed(14, array, self.role[others])
            elif array in given._same:
                root = given._root(array)
                moved[mine] = np.arange(starts[root], starts[root + 1])

        for array in range(len(lengths)):
            settle(array)
        self.place, self.size = _numbers(moved)
        first = np.zeros(self.size, np.int64)
        first[self.place[::-1]] = np.arange(given.count)[::-1]
        self.colour = _hashed(1, self.array[first])
        for number, one in enumerate(given._marks):
            if one.why is None or one.why not in without:
                shade = _hashed(2, np.full(len(one.at), number), self.role[one.at], one.labels)
                np.add.at(self.colour, self.place[one.at], shade)
        self.ties, self.tie_kinds = self._edges(given._ties)
        self.blocks, self.block_kinds = self._edges(given._blocks)
        self.first, self.given = first, given
        self.lined = np.zeros(self.size, bool)
        for line in given.lines:
            self.lined[self.place[line]] = True
        self.reduced: list[tuple[str, Array]] = []
        self.links: Array = np.zeros((2, 0), np.int64)
        self.unit = np.arange(self.size)  # of each place
        self.crossed = np.zeros(self.size, bool)  # units on which rows and columns of a table decide
        self._join(self.ties)

    def _edges(self, pairs: list[tuple[Array, Array]]) -> tuple[Array, Colours]:
        """Pairs of places, [2, edges], and a number for the role of each."""
        if not pairs:
            return np.zeros((2, 0), np.int64), np.zeros(0, np.uint64)
        a, b = (np.concatenate(side) for side in zip(*pairs, strict=True))
        number = np.repeat(np.arange(len(pairs)), [len(one) for one, _ in pairs])
        kinds = _hashed(3, number, self.role[a], self.role[b])
        return np.stack([self.place[a], self.place[b]]), kinds

    def _join(self, pairs: Array) -> None:
        """Let places [2, pairs] be of one unit."""
        self.links = np.concatenate([pairs, self.links], 1)
        ones = np.ones(self.links.shape[1], bool)
        graph = coo_array((ones, (self.links[0], self.links[1])), shape=(self.size, self.size))
        self.units, unit = connected_components(graph, directed=False)
        crossed = np.zeros(self.units, bool)
        crossed[unit[self.crossed[self.unit]]] = True
        self.unit, self.crossed = unit.astype(np.int64), crossed

    def _refine(self) -> None:
        """Colours until they no longer tell more positions apart."""
        (a, b), (inside, block) = self.ties, self.blocks
        different = 0
        while True:
            of_units = _sums(self.unit, _mix(self.colour), self.units)
            new = _mix(self.colour) + _hashed(4, of_units[self.unit])
            for at, other, kinds, number in (
                (a, b, self.tie_kinds, 5),
                (b, a, self.tie_kinds, 6),
                (inside, block, self.block_kinds, 7),
                (block, inside, self.block_kinds, 8),
            ):
                np.add.at(new, at, _hashed(number, kinds, self.colour[other]))
            self.colour = _mix(new)
            numbers = len(np.unique(self.colour))
            if numbers == different:
                return
            different = numbers

    def _hold(self, units: NDArray[np.bool_], why: str, said: NDArray[np.bool_] | None = None) -> None:
        """Hold the units for which `units` is true; `said`: those that it is told of."""
        places = np.flatnonzero(units[self.unit])
        self.colour[places] += _hashed(9, places)
        self._say(why, units if said is None else said)

    def _say(self, why: str, units: NDArray[np.bool_]) -> None:
        self.reduced.append((why, np.flatnonzero(units[self.unit[self.place]])))

    def solution(self) -> Solution:
        """Refine, join and hold until nothing changes.

        A long function: the steps in their order, each of which begins anew where it has changed something.
        """
        while True:
            self._refine()
            if self._ambiguous() or self._alone_in_blocks():
                continue
            of_units = _sums(self.unit, _mix(self.colour), self.units)
            kind, kinds = _numbers(of_units)
            many = np.bincount(kind, minlength=kinds) > 1
            many[kind[self.crossed]] = False
            edges = different_pairs(self.unit[self.blocks])
            edges = edges[:, (edges[0] != edges[1]) & many[kind[edges[0]]] & many[kind[edges[1]]]]
            if self._several_blocks(edges, kind) or self._blocks_in_blocks(edges, kind):
                continue
            return self._numbered(edges, kind, many)

    def _ambiguous(self) -> bool:
        """Hold units of which two positions have one colour: which of them is which would be a guess."""
        order = np.lexsort((self.colour, self.unit))
        unit, colour = self.unit[order], self.colour[order]
        twice = (unit[1:] == unit[:-1]) & (colour[1:] == colour[:-1])
        if not twice.any():
            return False
        units = np.zeros(self.units, bool)
        units[unit[1:][twice]] = True
        self._hold(units, _ORDER)
        return True

    def _alone_in_blocks(self) -> bool:
        """Join what is the only one of its colour in its block with the block."""
        inside, block = self.blocks
        key = _hashed(10, self.block_kinds, self.colour[inside], self.unit[block])
        numbers, count = _numbers(key)
        alone = np.bincount(numbers, minlength=count)[numbers] == 1
        alone &= self.unit[inside] != self.unit[block]
        if not alone.any():
            return False
        self._join(self.blocks[:, alone])
        return True

    def _several_blocks(self, edges: Array, kind: Array) -> bool:
        """Leave each unit in one block: join blocks that are the same, order those of which one is in the other, and
        hold one of two that cross (rows and columns of a table that move both)."""
        inside, block = edges
        if not len(inside):
            return False
        order = np.lexsort((kind[block], inside))
        inside, block = inside[order], block[order]
        same: list[Array] = []  # blocks of two kinds that are one another's
        inner: list[tuple[int, Array, Array]] = []  # of a kind of units, finer blocks and those that they lie in
        crossing: list[tuple[NDArray[np.bool_], Array, tuple[int, int]]] = []
        for apart in range(1, int(np.bincount(inside).max())):  # every two blocks of one unit
            again = np.flatnonzero(inside[apart:] == inside[:-apart])
            x, y = block[again], block[again + apart]
            which, count = _numbers(_hashed(15, kind[inside[again]], kind[x], kind[y]))
            for number in range(count):
                pairs = different_pairs(np.stack([x, y])[:, which == number])
                of = int(kind[inside[again[np.argmax(which == number)]]])
                (first, second), (xs, ys) = kind[pairs[:, 0]], (len(np.unique(side)) for side in pairs)
                if first == second:
                    self._hold(kind == first, "blocks of one kind that overlap")
                    return True
                if pairs.shape[1] == xs == ys:
                    same.append(pairs)
                elif pairs.shape[1] in (xs, ys):
                    fine, coarse = pairs if pairs.shape[1] == xs else pairs[::-1]
                    inner.append((of, fine, coarse))
                else:
                    crossing.append((kind == of, pairs, (xs, ys)))
        if same:
            self._join(self._first_places(np.concatenate(same, 1)))
        elif inner:
            places = [self._first_places(np.stack([fine, coarse])) for _, fine, coarse in inner]
            for of, _, coarse in inner:
                self._leave(of, kind, coarse)
            for one in places:
                self._into(one)
        elif tables := [one for one in crossing if self._is_table(*one)]:
            for units, _, _ in tables:
                self.blocks, self.block_kinds = self._without(units)
                self.crossed |= units
        elif crossing:
            units, pairs, _ = crossing[0]
            first, second = kind[pairs[:, 0]]
            rest = ~units[inside]  # in their blocks there is more than this table
            moving = [
                np.count_nonzero(kind == k) + np.count_nonzero(rest & (kind[block] == k)) for k in (first, second)
            ]
            less = kind == (first if moving[0] < moving[1] else second)
            mine = less[inside]
            if mine.any() and np.bincount(inside[mine]).max() == 1:  # the block that each is in can still move
                self._order_inside(inside[mine], block[mine])
                self._say(_TABLE, units)
            else:
                self._hold(less, _TABLE, units)
        return bool(same or inner or crossing)

    def _is_table(self, units: NDArray[np.bool_], pairs: Array, sizes: tuple[int, int]) -> bool:
        """Tell whether units are one for each row and column, on different axes, and no blocks themselves."""
        if pairs.shape[1] != sizes[0] * sizes[1] or np.count_nonzero(units) != pairs.shape[1]:
            return False
        return not (units[self.unit] & self.lined).any() and not units[self.unit[self.blocks[1]]].any()

    def _without(self, units: NDArray[np.bool_]) -> tuple[Array, Colours]:
        kept = ~units[self.unit[self.blocks[0]]]
        return self.blocks[:, kept], self.block_kinds[kept]

    def _first_places(self, units: Array) -> Array:
        """A place of each unit."""
        found = np.zeros(self.units, np.int64)
        found[self.unit[::-1]] = np.arange(self.size)[::-1]
        return found[units]

    def _leave(self, of: int, kind: Array, blocks: Array) -> None:
        """Forget that units of a kind are in these blocks."""
        inside, block = self.unit[self.blocks]
        gone = (kind[inside] == of) & np.isin(block, blocks)
        self.blocks, self.block_kinds = self.blocks[:, ~gone], self.block_kinds[~gone]

    def _into(self, places: Array) -> None:
        """Put places into blocks."""
        self.blocks = np.concatenate([self.blocks, places], 1)
        new = np.full(places.shape[1], _hashed(11, len(self.block_kinds))[0])
        self.block_kinds = np.concatenate([self.block_kinds, new])

    def _blocks_in_blocks(self, edges: Array, kind: Array) -> bool:
        """Hold the order inside blocks that are in blocks themselves: one level can be expressed."""
        inside, block = edges
        deep = np.isin(block, inside)
        if not deep.any():
            return False
        innermost = ~np.isin(kind[inside], kind[block])
        mine = innermost & np.isin(kind[inside], kind[inside[deep]])
        units, blocks = inside[mine], block[mine]
        self._order_inside(units, blocks, kind[units])
        self._say("blocks in blocks: the order inside the inner ones stays", np.isin(np.arange(self.units), units))
        return True

    def _order_inside(self, units: Array, blocks: Array, kinds: Array | int = 0) -> None:
        """Hold the order of units of a kind inside each of their blocks."""
        kinds = np.broadcast_to(kinds, units.shape)
        first = self._first_places(np.arange(self.units))
        order = np.lexsort((first[units], blocks, kinds))
        units, blocks, kinds = units[order], blocks[order], kinds[order]
        begin = np.r_[0, np.flatnonzero(np.diff(blocks) | np.diff(kinds)) + 1]
        ranks = np.full(self.units, -1)
        ranks[units] = np.arange(len(units)) - np.repeat(begin, np.diff(np.r_[begin, len(units)]))
        places = np.flatnonzero(ranks[self.unit] >= 0)
        self.colour[places] += _hashed(12, ranks[self.unit[places]])

    def _numbered(self, edges: Array, kind: Array, many: NDArray[np.bool_]) -> Solution:
        """Classes and numbers of units: by their first positions, in blocks by their block's number before."""
        first = np.full(self.units, self.given.count, np.int64)
        np.minimum.at(first, self.unit, self.first)
        parent = np.full(self.units, -1, np.int64)
        parent[edges[0]] = edges[1]
        kinds = [int(one) for one in np.flatnonzero(many)]
        members = {one: np.flatnonzero(kind == one) for one in kinds}
        above = {one: int(parent[members[one][0]]) for one in kinds}
        number = np.zeros(self.units, np.int64)
        classes: list[Units] = []
        places: dict[int, int] = {}
        by_first = sorted(kinds, key=lambda one: int(first[members[one]].min()))
        for one in sorted(by_first, key=lambda one: above[one] >= 0):
            units = members[one]
            block = number[parent[units]] if above[one] >= 0 else np.zeros(len(units), np.int64)
            order = np.lexsort((first[units], block))
            number[units[order]] = np.arange(len(units))
            places[one] = len(classes)
            classes.append(Units(len(units), places[int(kind[above[one]])] if above[one] >= 0 else None))
        of_unit = np.full(self.units, -1, np.int64)
        for one, place in places.items():
            of_unit[members[one]] = place
        units = self.unit[self.place]
        slot = _hashed(13, self.colour[self.place], self.role)
        return Solution(tuple(classes), of_unit[units], number[units], slot, self.crossed[units], tuple(self.reduced))
