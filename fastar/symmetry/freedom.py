"""A search for freedom to permute that no group of a symmetry has, and for proof where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastar.symmetry.frozen import Explained
from fastar.symmetry.held import Exchange, Run, alone, exchange_of
from fastar.symmetry.positions import Array, Solution
from fastar.symmetry.random_network import State
from fastar.symmetry.symmetric_point import Axes, OutOfTime, Points
from fastar.symmetry.verify import DRAWS, RELATIVE_TOLERANCE, SHOWN

Site = tuple[str, tuple[int, ...]]
"""Axes of a tensor that are read as one."""
# The least relative change of an output that shows something.
CHANGED = RELATIVE_TOLERANCE * SHOWN
POSITIVE, ANY = 3, 0  # draws of weights, of `DRAWS`: with positive vectors few units are dead
OTHER = len(DRAWS)  # a draw that is none of them
ROUNDS = 8  # times that axes are looked for which move along with those found
ANYTHING = "whatever else moves"
SUCH = "however axes of its length, or of a multiple of it, move"
ALIKE = "whatever axes of its length, or of a multiple of it, move along"


@dataclass
class Told:
    """Where a run's positions are told apart: at the weights of `state`, most of all two of them."""

    reach: str
    state: Callable[[], State]
    pair: tuple[int, int]
    apart: int
    strength: float
    change: float | None = None


class Search:
    """Which of the runs are shown to stay, and which can move."""

    def __init__(self, points: Points, runs: list[Run], explained: Explained | None):
        self.points, self.explained = points, explained
        self.runs = [part for run in runs for part in _of_one_role(run, explained)]
        self.whys = {run: tuple(why(run, explained)) for run in self.runs}
        self.retried: set[Run] = set()
        self.told: dict[Run, Told] = {}
        self.free: Axes = frozenset()  # axes that are shown to stay as a whole, whatever moves
        self.missed: list[tuple[Run, Sequence[Exchange], float]] = []
        self.along: list[Run] = []  # tied to the run that was searched last
        self.searched: set[Run] = set()  # for axes that move along
        self.parts: dict[tuple[int, int], dict[Site, Array]] = {}  # by number of positions and draw, see `_parts`
        self.verdicts: dict[Run, str] = {}
        tensors = {} if explained is None else explained.tensors
        self.cells = {
            name: [(one.dims, one.at) for one in labels.cells]
            for name, labels in tensors.items()
            if name in points.names
        }

    def run(self) -> None:
        """Fill `told`, `verdicts` and `missed`, until all is known or there is no more time."""
        try:
            self._run()
        except OutOfTime:
            return

    def _run(self) -> None:
        self._all_alike(None)
        for count in dict.fromkeys(len(run.at) for run in self._left()):
            self._all_alike(count)
        self._pairs()
        for run in self._weakest_of_each():
            self._exchange(run)
        for run in self._left():
            if self._settled(run) is None:
                self._look_for_others(run)
        for run in list(self.told):
            if run in self.told and self.told[run].change is None:
                self._exchange(run)
        for run in self.runs:  # those that were told apart only where other axes have their units in the same order
            if self._settled(run) in (None, ALIKE) and run not in self.searched:
                self._look_for_others(run)

    def _settled(self, run: Run) -> str | None:
        """The reach of what tells a run's positions apart, or its verdict; None: it is not known."""
        return self.told[run].reach if run in self.told else self.verdicts.get(run)

    def _left(self) -> list[Run]:
        """The runs of which nothing is known yet."""
        return [run for run in self.runs if self._settled(run) is None]

    def _all_alike(self, count: int | None) -> None:
        """Try the runs that are left where tensors are the same along all axes, or along those of a multiple of `count`
        positions; what is shown to stay varies from then on, since it does not move."""
        free, new = self.free, True
        while new and (left := [run for run in self._left() if count in (None, len(run.at))]):
            slopes = self.points.slopes(self.points.constant(POSITIVE, free, count), {run.tensor for run in left})
            for run in left:
                pair, apart, strength = _told_apart(slopes(run.tensor, run.axes)[run.at])
                if strength > CHANGED:
                    state = partial(self.points.constant, POSITIVE, free | self.points.axes_of([run]), count)
                    self.told[run] = Told(ANYTHING if count is None else SUCH, state, pair, apart, strength)
            whole = [run for run in left if run in self.told and self.told[run].apart == run.length]
            new = bool(whole)
            free |= self.points.axes_of(whole)
        if count is None:
            self.free = free

    def _pairs(self) -> None:
        """Try two positions of each run that is left: the first two, and those on which the outputs depend most."""
        tried: set[Run] = set()
        while new := [run for run in self._left() if run not in tried]:
            first, count = new[0], len(new[0].at)
            tried.add(first)
            for draw in (POSITIVE, ANY):
                self._pair_alike((0, 1), count, draw)
            if first not in self.told:
                slopes = self.points.slopes(self.points.generic(ANY), {first.tensor})
                values = slopes(first.tensor, first.axes)[first.at]
                one, other = sorted(int(k) for k in np.argsort(-values, kind="stable")[:2])
                self._pair_alike((one, other), count, ANY)

    def _pair_alike(self, pair: tuple[int, int], count: int, draw: int) -> None:
        """Try two positions of the runs that are left, of so many positions, where axes are the same at both."""
        free, new = self.free, True
        while new and (left := [run for run in self._left() if len(run.at) == count]):
            slopes = self.points.slopes(self.points.paired(draw, pair, left, free), {run.tensor for run in left})
            for run in left:
                one, other = slopes(run.tensor, run.axes)[run.at[list(pair)]]
                if abs(one - other) > CHANGED:
                    state = partial(self.points.paired, draw, pair, left, free | self.points.axes_of([run]))
                    self.told[run] = Told(ALIKE, state, pair, 2, abs(float(one - other)))
            whole = [run for run in left if run in self.told and len(run.at) == run.length]
            new = bool(whole)
            free |= self.points.axes_of(whole)

    def _weakest_of_each(self) -> list[Run]:
        """Of each class of runs that are alike, the one that is told apart least."""
        weakest: dict[Any, Run] = {}
        for run, told in self.told.items():
            key = (reason(self.whys[run]), run.inside is None)
            if key not in weakest or told.strength < self.told[weakest[key]].strength:
                weakest[key] = run
        return list(weakest.values())

    def _exchange(self, run: Run) -> None:
        """Exchange the two positions that are told apart most, where nothing else that moves would do anything."""
        told = self.told[run]
        change = self.points.change(told.state(), [alone(run, *told.pair)])
        if change > CHANGED:
            told.change = change
        else:  # the gradient is not the function's, at a place where it has none
            del self.told[run]
            if run not in self.retried:
                self.retried.add(run)
                self._pairs()
                if run in self.told:
                    self._exchange(run)

    def _look_for_others(self, run: Run) -> None:
        """Find axes that move along with a run."""
        if run not in self.told:
            some = [alone(run, k, (k + 1) % len(run.at)) for k in range(len(run.at))]
            if not any(self.points.matters(self.points.generic(number), some) for number in range(len(DRAWS))):
                self.verdicts[run] = "without effect"
                return
        for exchanges in self._candidates(run):
            change = max(self.points.change(self.points.generic(number), exchanges) for number in (ANY, POSITIVE))
            if change <= RELATIVE_TOLERANCE:
                self._miss(run, exchanges, change)
                return
        self.searched |= {run, *self.along}

    def _miss(self, run: Run, exchanges: Sequence[Exchange], change: float) -> None:
        sites = {(one.tensor, one.axes) for one in exchanges}
        for other in self.runs:
            if other is run or ((other.tensor, other.axes) in sites and len(other.at) == len(run.at)):
                self.verdicts[other] = "missed"
                self.told.pop(other, None)
        self.missed.append((run, exchanges, change))

    def _candidates(self, run: Run) -> Iterator[list[Exchange]]:
        """Sets of exchanges: two units of the graph, with all their sites; and axes that gradients show to be tied."""
        if self.explained is not None:
            for solution in (self.explained.solution, self.explained.free):
                found = self._units(run, solution)
                if found is not None:
                    yield exchange_of(solution, self.cells, *found)
        yield [alone(run, 0, 1)]
        for draw in (POSITIVE, ANY):
            yield from self._tied(run, draw)

    def _units(self, run: Run, solution: Solution) -> tuple[int, tuple[int, int]] | None:
        """Two units of one class on a run, in one block if they are in blocks."""
        at = _positions(run, self.explained)
        if at is None:
            return None
        kind, unit = solution.kind[at], solution.unit[at]
        for one in np.unique(kind[kind >= 0]):
            units = np.unique(unit[kind == one])
            parent = solution.classes[one].parent
            size = len(units) if parent is None else solution.classes[one].count // solution.classes[parent].count
            for block in np.unique(units // size):
                mine = units[units // size == block] if parent is not None else units
                if len(mine) > 1:
                    return int(one), (int(mine[0]), int(mine[1]))
        return None

    def _tied(self, run: Run, draw: int) -> Iterator[list[Exchange]]:
        """An exchange of two positions of a run, and of all that they are tied to on other axes."""
        first, second = (self._tied_to(run, at, draw) for at in (0, 1))
        both = [site for site in first if site in second and len(first[site]) == len(second[site])]
        found = [Exchange(*site, first[site], second[site]) for site in both]
        found = [one for one in found if not np.isin(one.a, one.b).any()]
        self.along = [other for other in self.runs if len(other.at) == len(run.at) and _site(other) in both]
        if found:
            yield found

    def _tied_to(self, run: Run, number: int, draw: int) -> dict[Site, Array]:
        """Positions of axes that one of a run's is tied to, its own among them, as gradients show.

        Tensors are alike along all axes of so many positions, or a multiple of it. Those found have other values: where
        the gradient differs from that at the other positions of an axis, what they are tied to lies.
        """
        count = len(run.at)
        base, other = (self.points.constant(one, self.free, count) for one in (draw, OTHER))
        names = [name for name in self.points.movable if name in self.points.names]
        sites: list[Site] = [(name, (d,)) for name in names for d, n in enumerate(base[name].shape) if n % count == 0]
        sites = [site for site in sites if (site[0], *site[1]) not in self.free]
        if (count, draw) not in self.parts:
            slopes = self.points.slopes(base, dict.fromkeys(name for name, _ in sites))
            in_parts = ((site, _parts(slopes(*site), count)) for site in sites)
            self.parts[count, draw] = {site: part for site, part in in_parts if part is not None}
        parts = {_site(run): run.at[None], **self.parts[count, draw]}
        found = {_site(run): run.at[[number]]}
        for _ in range(ROUNDS):
            state = {name: tensor.clone() for name, tensor in base.items()}
            for (name, axes), at in found.items():
                one = Exchange(name, axes, at, at)
                for each in self.points.names[name]:
                    one.put(state[each], other[each])
            slopes = self.points.slopes(state, dict.fromkeys(name for name, _ in parts))
            new = {
                site: np.union1d(part[_unlike(slopes(*site)[part])], found.get(site, [])).astype(np.int64)
                for site, part in parts.items()
            }
            new = {site: at for site, at in new.items() if len(at)}
            if {site: len(at) for site, at in new.items()} == {site: len(at) for site, at in found.items()}:
                break
            found = new
        return found


def _site(run: Run) -> Site:
    return run.tensor, run.axes


def _of_one_role(run: Run, explained: Explained | None) -> Iterator[Run]:
    """A run in parts whose positions the graph does not tell apart: of the first part of a fused matrix, say."""
    at = _positions(run, explained)
    if explained is None or at is None:
        yield run
        return
    free = explained.free
    moving = free.kind[at] >= 0
    roles = np.stack([free.kind[at].astype(np.uint64), np.where(moving, free.slot[at], np.uint64(0))], 1)
    _, role = np.unique(roles, axis=0, return_inverse=True)
    for one in dict.fromkeys(role.ravel().tolist()):
        mine = np.flatnonzero(role.ravel() == one)
        if len(mine) > 1:
            yield replace(run, at=run.at[mine])


def _parts(values: Array, count: int) -> Array | None:
    """Positions of an axis in parts [parts, positions] in each of which values are alike: all in one; parts of `count`
    neighbours; or of every so many. None: there are none, the axis stays."""
    whole = np.arange(len(values))
    for parts in (whole[None], whole.reshape(-1, count), whole.reshape(count, -1).T):
        if float(np.ptp(values[parts], axis=1).max()) <= CHANGED:
            return parts
    return None


def _unlike(values: Array) -> NDArray[np.bool_]:
    """Tell which values are not what most are in their row [rows, values]; none where they are not few."""
    unlike = np.abs(values - np.median(values, 1, keepdims=True)) > CHANGED
    few: NDArray[np.bool_] = 2 * np.count_nonzero(unlike, 1, keepdims=True) <= values.shape[1]
    return unlike & few


def _told_apart(values: Array) -> tuple[tuple[int, int], int, float]:
    """The two positions whose values differ most, how many differ from all others, and the largest difference."""
    order = np.argsort(values, kind="stable")
    steps = np.diff(values[order]) > CHANGED
    apart = int(np.count_nonzero(np.r_[True, steps] & np.r_[steps, True]))
    one, other = sorted((int(order[0]), int(order[-1])))
    return (one, other), apart, float(values.max() - values.min())


def _positions(run: Run, explained: Explained | None) -> Array | None:
    """A run's positions as the graph's labels number them."""
    labels = None if explained is None else explained.tensors.get(run.tensor)
    for one in () if labels is None else labels.cells:
        if sorted(one.dims) == sorted(run.axes):
            at = one.at.transpose([one.dims.index(axis) for axis in run.axes]).ravel()
            found: Array = at[run.at]
            return found
    return None


def why(run: Run, explained: Explained | None) -> Iterator[str]:
    """What holds a run, in words."""
    if explained is None:
        return
    at = _positions(run, explained)
    if at is None:
        if run.tensor not in explained.tensors:
            yield "not used in evaluation mode"
        return
    found = False
    free, kinds = explained.free, np.unique(explained.free.kind[at])
    for what, positions in explained.named:
        mine = np.isin(positions, at).any() or np.isin(free.kind[positions], kinds[kinds >= 0]).any()
        if mine:
            found = True
            yield what
    for what, positions in explained.solution.reduced:
        if np.isin(positions, at).any():
            found = True
            yield what
    if run.inside is not None and not found:
        yield f"parts of a unit of {run.inside}"


def reason(whys: Sequence[str]) -> tuple[str, ...]:
    """Reasons without the names of modules and nodes: axes are alike that have the same."""
    return tuple(dict.fromkeys(one.partition(" (node ")[0] for one in whys))
