"""Labels of tensor axes, solved by unification: positions of several axes that must be permuted together.

An axis is a list of segments. A segment holds `outer * size * inner` positions, ordered (outer, unit, inner): its
`size` units belong to one unknown, and every unit owns `outer * inner` positions. Flattening channels [C, H, W] gives
a segment with inner = H * W; concatenation gives several segments. The unknown `FIXED` stands for positions that may
not move.

An unknown may move in blocks: its unit g * b + d belongs to unit g of another unknown, its parent, and the permutation
sends it to sigma(g) * b + tau_g(d), sigma being the parent's (heads of an attention and the units inside each head,
groups of a group-norm and their channels). Fixing the parent leaves one independent unknown per block. There is one
level of blocks: where a description would need two, the inner one is fixed.

Fixing an unknown, splitting it into parts, or holding the inside of its blocks only ever makes the set of permutations
smaller, so it is always sound; that is what happens where two descriptions of an axis cannot be brought together
exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

FIXED = 0
_LONGEST = 4096  # more segments than this on one axis: repeated patterns are fixed instead of written out


@dataclass(frozen=True, slots=True)
class Segment:
    """`outer * size * inner` positions whose `size` units belong to the unknown `var`."""

    var: int
    size: int
    outer: int = 1
    inner: int = 1

    @property
    def length(self) -> int:
        return self.outer * self.size * self.inner


Axis = tuple[Segment, ...]


class CannotSplit(Exception):
    """A reshape would cut through units that are not known to be fixed. Holds the two shapes as text."""


def length_of(axis: Axis) -> int:
    """Number of positions of `axis`."""
    return sum(segment.length for segment in axis)


def fixed(length: int) -> Axis:
    """An axis whose positions may not move."""
    return (Segment(FIXED, length),)


class AxisSolver:
    """Unknowns and what has been learned about them."""

    def __init__(self) -> None:
        self._known: dict[int, Axis] = {}
        self._inside: dict[int, tuple[Axis, int]] = {}  # unknown in blocks -> its parent's axis, units in a block
        self._count = 0

    def fresh(self, length: int) -> Axis:
        """An axis about which nothing is known yet: all its positions are units of a new unknown."""
        if length <= 1:
            return fixed(length)
        self._count += 1
        return (Segment(self._count, length),)

    def blocks(self, axis: Axis, inner: int) -> Axis:
        """Require that `axis` moves in blocks of `inner` positions; the axis of its blocks."""
        count = length_of(axis) // inner
        if inner == 1:
            return self.resolve(axis)
        if count <= 1:
            return fixed(count)
        parent = self.fresh(count)
        self.unify(axis, self.child(parent, inner))
        return self.resolve(parent)

    def child(self, parent: Axis, inner: int) -> Axis:
        """An axis of blocks of `inner` units each, which move with `parent` and, inside each block, by themselves."""
        if inner == 1:
            return parent
        (segment,) = self.fresh(length_of(parent) * inner)
        self._inside[segment.var] = (parent, inner)
        return self.resolve((segment,))

    def parent_of(self, var: int) -> tuple[Segment, int] | None:
        """The parent, one segment, of an unknown that moves in blocks, and the units in a block. After `resolve`."""
        if var not in self._inside:
            return None
        parent, inner = self._inside[var]
        (segment,) = self.resolve(parent)
        return segment, inner

    def _settle(self, var: int) -> None:
        """Bring what is known of the parent of `var` into `var`, unless it still is one free unknown."""
        parent, inner = self._inside[var]
        parent = self.resolve(parent)
        if len(parent) == 1 and parent[0].var != FIXED and parent[0].var not in self._inside:
            (only,) = parent
            if only.outer == only.inner == 1:
                self._inside[var] = (parent, inner)
                return
        pieces: list[Segment] = []
        for segment in parent:
            if segment.var == FIXED:
                for _ in range(segment.length):
                    pieces += self.fresh(inner)
            elif segment.inner > 1 or segment.var in self._inside:
                pieces.append(replace(segment, inner=segment.inner * inner))  # two levels of blocks: one is held
            else:
                for _ in range(segment.outer):
                    pieces += self.child((replace(segment, outer=1),), inner)
        del self._inside[var]
        self._known[var] = tuple(pieces)

    def resolve(self, axis: Axis) -> Axis:
        """`axis` in terms of unknowns that are still free; neighbouring fixed segments become one."""
        out: list[Segment] = []
        for segment in axis:
            if segment.var in self._inside:
                self._settle(segment.var)
            if segment.var == FIXED:
                parts: Axis = fixed(segment.length)
            elif segment.var not in self._known:
                parts = (segment,)
            else:
                known = self.resolve(self._known[segment.var])
                self._known[segment.var] = known
                parts = self._repeat(known, segment.outer, segment.inner)
            for part in parts:
                if part.var == FIXED and out and out[-1].var == FIXED:
                    out[-1] = Segment(FIXED, out[-1].length + part.length)
                elif part.length:
                    out.append(Segment(FIXED, part.length) if part.var == FIXED else part)
        return tuple(out)

    def is_fixed(self, axis: Axis) -> bool:
        return all(segment.var == FIXED for segment in self.resolve(axis))

    def fix(self, *axes: Axis) -> None:
        """Hold every position of `axes` in place from now on."""
        for segment in (segment for axis in axes for segment in self.resolve(axis)):
            if segment.var != FIXED and segment.var not in self._known:  # it may have gone with its parent just now
                self._learn(segment.var, fixed(segment.size))
                if segment.var in self._inside:
                    self.fix(self._inside.pop(segment.var)[0])

    def _learn(self, var: int, axis: Axis) -> None:
        assert var not in self._known
        self._known[var] = axis

    def unify(self, first: Axis, second: Axis) -> None:
        """Require that position i of `first` moves exactly as position i of `second`, for every i."""
        while self._unify_once(self.resolve(first), self.resolve(second)):
            pass

    def merge(self, axes: Sequence[Axis]) -> Axis:
        """The axis that flattening `axes` (outermost first) gives. CannotSplit if two of them can move."""
        moving = [i for i, axis in enumerate(axes) if not self.is_fixed(axis)]
        lengths = [length_of(axis) for axis in axes]
        if not moving:
            return fixed(prod(lengths))
        if len(moving) > 1:
            raise CannotSplit(f"flattens axes of {' x '.join(str(lengths[i]) for i in moving)} units into one")
        (at,) = moving
        return self.resolve(self._repeat(self.resolve(axes[at]), prod(lengths[:at]), prod(lengths[at + 1 :])))

    def split(self, axis: Axis, lengths: Sequence[int]) -> list[Axis]:
        """The axes that viewing `axis` as `lengths` (outermost first) gives. CannotSplit if units would be cut."""
        axis = self.resolve(axis)
        if len(lengths) == 1 or self.is_fixed(axis):
            return [axis] if len(lengths) == 1 else [fixed(n) for n in lengths]
        for at in range(len(lengths)):
            before, after = prod(lengths[:at]), prod(lengths[at + 1 :])
            inner_ok = all(segment.length % after == 0 for segment in axis) and all(
                segment.var == FIXED or segment.inner % after == 0 for segment in axis
            )
            outer_ok = before == 1 or (len(axis) == 1 and axis[0].outer % before == 0)
            if inner_ok and outer_ok:
                parts = tuple(
                    Segment(FIXED, s.length // after)
                    if s.var == FIXED
                    else replace(s, outer=s.outer // before, inner=s.inner // after)
                    for s in axis
                )
                return [parts if i == at else fixed(n) for i, n in enumerate(lengths)]
        raise CannotSplit(f"splits an axis of {length_of(axis)} units into {' x '.join(map(str, lengths))}")

    def cut(self, axis: Axis, start: int, stop: int) -> Axis:
        """Positions start..stop-1 of `axis`; units that the cut would go through are fixed."""
        length = length_of(axis)
        parts = tuple(part for part in (start, stop - start, length - stop) if part)
        # Unifying with unknowns of the wanted lengths splits whatever has to be split.
        pieces = [self.fresh(part) for part in parts]
        self.unify(axis, tuple(segment for piece in pieces for segment in piece))
        return self.resolve(pieces[1 if start else 0]) if stop > start else ()

    @staticmethod
    def _repeat(axis: Axis, outer: int, inner: int) -> Axis:
        """Every position of `axis` becomes `inner` neighbouring ones, then the whole is repeated `outer` times."""
        widened = tuple(replace(segment, inner=segment.inner * inner) for segment in axis)
        if outer == 1:
            return widened
        if len(widened) == 1:
            return (replace(widened[0], outer=widened[0].outer * outer),)
        return widened * outer

    def _unify_once(self, first: Axis, second: Axis) -> bool:
        """Learn one thing from first = second; False when there is nothing left to learn."""
        if length_of(first) != length_of(second):
            raise AssertionError(f"axes of {length_of(first)} and {length_of(second)} positions compared")
        if len(first) + len(second) > _LONGEST:
            self.fix(first, second)
            return not (self.is_fixed(first) and self.is_fixed(second))
        left, right = list(reversed(first)), list(reversed(second))
        while left and right:
            a, b = left.pop(), right.pop()
            if a.length == b.length:
                if a != b:
                    self._join(a, b)
                    return True
                continue
            long, short, rest = (a, b, left) if a.length > b.length else (b, a, right)
            if long.var == FIXED:
                # The fixed side fixes the short segment; go on with what is left of the long one.
                if short.var != FIXED:
                    self.fix((short,))
                    return True
                rest.append(Segment(FIXED, long.length - short.length))
            elif long.outer > 1 and short.length % (long.size * long.inner) == 0:
                copies = short.length // (long.size * long.inner)
                head, tail = replace(long, outer=copies), replace(long, outer=long.outer - copies)
                if head != short:
                    self._join(head, short)
                    return True
                rest.append(tail)
            elif short.length % long.inner == 0:
                self._divide(long, short.length // long.inner % long.size)
                return True
            else:
                self.fix((long,))
                return True
        return False

    def _divide(self, segment: Segment, units: int) -> None:
        """The first `units` units of a segment move among themselves, and so do the others."""
        if segment.var not in self._inside:
            self._learn(segment.var, self.fresh(units) + self.fresh(segment.size - units))
            return
        parent, inner = self._inside[segment.var]
        whole, through = divmod(units, inner)
        cut = fixed(1) if through else ()  # a block that is cut through stays where it is
        rest = length_of(parent) - whole - len(cut)
        self._learn(self.resolve(parent)[0].var, self.fresh(whole) + cut + self.fresh(rest))

    def _join(self, a: Segment, b: Segment) -> None:
        """Two different segments of equal length are the same positions."""
        if FIXED in (a.var, b.var) or a.var == b.var:
            self.fix((a, b))
            return
        outer_a, outer_b, inner_a, inner_b = a.outer, b.outer, a.inner, b.inner
        if (outer_a, inner_a) == (outer_b, inner_b):
            self._same(max(a.var, b.var), min(a.var, b.var), a.size)
        elif outer_b % outer_a == 0 and inner_b % inner_a == 0:
            self._express(a.var, Segment(b.var, b.size, outer_b // outer_a, inner_b // inner_a))
        elif outer_a % outer_b == 0 and inner_a % inner_b == 0:
            self._express(b.var, Segment(a.var, a.size, outer_a // outer_b, inner_a // inner_b))
        else:
            self.fix((a, b))

    def _same(self, one: int, other: int, size: int) -> None:
        """Two unknowns of `size` units are one."""
        if one in self._inside and other not in self._inside:
            one, other = other, one
        if one in self._inside:
            (parent, inner), (others, other_inner) = self._inside[one], self._inside[other]
            if inner != other_inner:
                finer = one if inner < other_inner else other
                parent, inner = self._inside.pop(finer)
                self._learn(finer, self._repeat(parent, 1, inner))
                return  # the caller compares again
            del self._inside[one]
            self._learn(one, (Segment(other, size),))
            self.unify(parent, others)
            return
        self._learn(one, (Segment(other, size),))

    def _express(self, var: int, base: Segment) -> None:
        """The units of `var` are the positions of `base`, whose units own several of them."""
        if var not in self._inside:
            self._learn(var, (base,))
            return
        parent, inner = self._inside.pop(var)
        count = length_of(parent)
        self._learn(var, (base,))
        if base.inner % inner == 0:  # a block holds no more than one unit of base
            self.unify(parent, (replace(base, inner=base.inner // inner),))
        elif count % base.outer == 0 and inner % base.inner == 0:
            outside = self.blocks((Segment(base.var, base.size),), inner // base.inner)
            self.unify(parent, self._repeat(outside, base.outer, 1))
        elif base.outer % count == 0:  # a block holds all units of base: blocks stay, what is inside them moves
            self.fix(parent)
        else:
            self.fix(parent, (base,))
