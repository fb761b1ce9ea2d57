"""A certificate that a symmetry is complete: why each axis that stays cannot move, by numbers; or what was missed.

See `fastar.symmetry.symmetric_point` for the proof.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from fastar.errors import FastarError
from fastar.symmetry.derive import explain
from fastar.symmetry.freedom import Search, reason
from fastar.symmetry.held import Exchange, Run, held_runs, in_words
from fastar.symmetry.random_network import ExampleInputs, RandomNetwork
from fastar.symmetry.symmetric_point import Points
from fastar.symmetry.symmetry import Symmetry


@dataclass(frozen=True)
class Held:
    """An axis, or a stretch of it, that stays in order.

    Args:
        tensor: the parameter; `axes`: one axis, or several that are read as one.
        positions: how many stay.
        inside: the group whose units have them inside; None: no group moves the axis there.
        why: what holds them in the graph, in words.
        verdict: "proven": exchanging two positions changes the outputs, by `change` of their largest value, whatever
            moves along as `reach` says. "derived": the same by the gradient of the outputs, and not exchanged.
            "missed": they can move (`Certificate.missed`). "without effect": the outputs do not depend on them.
            "open": neither shown to stay nor to move. "untried": there was no time.
        apart: how many of the positions are told from all others by the gradient.
    """

    tensor: str
    axes: tuple[int, ...]
    positions: int
    inside: str | None
    why: tuple[str, ...]
    verdict: str
    reach: str | None = None
    change: float | None = None
    apart: int = 0

    @property
    def where(self) -> str:
        """Tensor and axis in words."""
        inside = "" if self.inside is None else f", inside units of {self.inside}"
        return f"{in_words(self.tensor, self.axes)} ({self.positions} positions{inside})"


@dataclass(frozen=True)
class Missed:
    """Freedom that is there and in no group: positions of these axes can change places, all at once.

    Args:
        change: of the outputs, relative to their largest value.
    """

    axes: tuple[str, ...]
    positions: int
    change: float

    def __str__(self) -> str:
        return (
            f"missed freedom: {self.positions} positions of {', '.join(self.axes)} can change places together, and no "
            f"group moves them (the outputs change by {self.change:.1g})"
        )


@dataclass(frozen=True)
class Certificate:
    """What is known of every axis of every parameter that no group moves.

    Args:
        network: its class.
        untraced: why there is no graph that says what holds axes; None: there is one.
        passes: forward passes that were made.
    """

    network: str
    held: tuple[Held, ...]
    missed: tuple[Missed, ...] = ()
    untraced: str | None = None
    passes: int = field(default=0, compare=False)

    @property
    def complete(self) -> bool:
        """Every axis that stays is shown to have to stay, or has no effect."""
        return not self.missed and all(one.verdict not in ("missed", "open", "untried") for one in self.held)

    def lines(self) -> list[str]:
        """A line for each class of axes that are alike, and one for each that could have moved."""
        classes: dict[tuple[Any, ...], list[Held]] = {}
        for one in self.held:
            if one.verdict != "missed":
                verdict = "proven" if one.verdict == "derived" else one.verdict
                classes.setdefault((reason(one.why), verdict, one.inside is None), []).append(one)
        out = [_line(those) for those in classes.values()]
        if self.untraced is not None:
            out.append(f"no graph: {self.untraced}")
        out += [str(one) for one in self.missed]
        if self.complete:
            out.append("complete: every axis that no group moves is shown to stay")
        return out

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**asdict(self), "complete": self.complete}


def certify(
    model: nn.Module,
    symmetry: Symmetry,
    example_inputs: ExampleInputs,
    *,
    seed: int = 0,
    seconds: float | None = None,
    clock: Callable[[], float] = time.process_time,
) -> Certificate:
    """Show by numbers, in float64 on random weights, that all axes that `symmetry` leaves in place have to stay.

    For each of them, weights are taken at which moves of all other axes do nothing, and two of its positions change
    places: if the outputs change, it moves with no set of axes. Where they do not, axes that move along are looked for,
    by the graph and by gradients; if all together leave the outputs as they are, this is `Certificate.missed`.

    Limits: positions are exchanged that lie alike on all axes (in order, as stretches, or several times after each
    other), or that the graph says belong together. A symmetry that needs another order of units on one axis than on
    another, and that the graph does not show, is not looked for where `Held.reach` is not `ANYTHING`.

    Args:
        symmetry: derived, or written down (`PermutationSpec`). `model` is copied, not touched.
        seconds: begin no further trial after so many; what was not tried is said.

    Raises:
        FastarError: the model does not run on the example inputs in float64.
    """
    untraced, explained = None, None
    began = clock()
    try:
        explained = explain(model, example_inputs)
    except FastarError as why:
        untraced = str(why)
    network = RandomNetwork(model, example_inputs, seed)
    points = Points(network, symmetry, lambda: seconds is None or clock() - began < seconds)
    search = Search(points, list(held_runs(symmetry)), explained)
    search.run()
    held = tuple(_held(run, search) for run in search.runs)
    missed = tuple(Missed(_axes(exchanges), len(run.at), change) for run, exchanges, change in search.missed)
    return Certificate(type(model).__name__, held, missed, untraced, points.passes)


def _held(run: Run, search: Search) -> Held:
    """What is known of a run."""
    told = search.told.get(run)
    verdict = search.verdicts.get(run, "open" if run in search.searched else "untried")
    if told is not None:
        verdict = "derived" if told.change is None else "proven"
    return Held(
        *(run.tensor, run.axes, len(run.at), run.inside, search.whys[run], verdict),
        *((None, None, 0) if told is None else (told.reach, told.change, told.apart)),
    )


def _axes(exchanges: Sequence[Exchange]) -> tuple[str, ...]:
    """The axes of exchanges, in words."""
    return tuple(dict.fromkeys(in_words(one.tensor, one.axes) for one in exchanges))


def _line(those: Sequence[Held]) -> str:
    """A line for axes that are alike: of the one with the least change."""
    changes = [one for one in those if one.change is not None]
    first = min(changes, key=lambda one: one.change or 0.0) if changes else those[0]
    alike = f" and {len(those) - 1} alike" if len(those) > 1 else ""
    whys = "; ".join(reason(first.why) if len(those) > 1 else first.why) or "nothing found that holds it"
    return f"{first.where}{alike}: {whys}; {_verdict(first, len(changes), len(those))}"


def _verdict(first: Held, exchanged: int, count: int) -> str:
    if first.verdict == "without effect":
        return "the outputs do not depend on it"
    if first.verdict == "open":
        return "not decided: neither shown to stay nor seen to move"
    if first.verdict == "untried":
        return "not tried: no time"
    if first.change is None:
        return f"told apart by the gradient of the outputs, {first.reach}; no exchange tried"
    rest = f" ({count - exchanged} of them by the gradient alone)" if exchanged < count else ""
    return f"an exchange changes the outputs by {first.change:.2g} of their largest, {first.reach}{rest}"
