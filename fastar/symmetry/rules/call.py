"""One operation of a traced graph, as the rules of `fastar.symmetry.rules.table` see it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves

from fastar.symmetry import labels
from fastar.symmetry.labels import Labels
from fastar.symmetry.positions import Constraints

Result = Labels | list[Any] | None
# Why positions are held that could move if it were not for the values or the order of something else, which is named.
HELD = "held"


class Refused(Exception):
    """The symmetry of an operation cannot be proven; the text says what stands in the way."""


class Call:
    """One operation of the graph: its arguments by schema name, their labels, and the shape of its result.

    Args:
        why: names the operation, where it holds something in place.
    """

    def __init__(self, node: fx.Node, known: Constraints, of: dict[fx.Node, Any], why: str):
        self.node, self.known, self.why, self._of = node, known, why, of
        self.held: list[tuple[str, Labels, set[int]]] = []
        schema = getattr(node.target, "_schema", None)
        arguments = [] if schema is None else schema.arguments
        defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
        given = dict(zip((a.name for a in arguments), node.args, strict=False))
        self.arguments: dict[str, Any] = {**defaults, **given, **node.kwargs}

    def __getitem__(self, name: str) -> Any:
        """The argument called `name` as it stands in the graph."""
        return self.arguments[name]

    @property
    def first(self) -> fx.Node:
        """The first tensor argument."""
        return self.tensors()[0]

    def tensors(self) -> list[fx.Node]:
        """The tensor arguments in order, lists included."""
        return [one for one in tree_leaves((self.node.args, self.node.kwargs)) if isinstance(one, fx.Node)]

    def labels(self, argument: Any = None) -> Labels:
        """Labels of a tensor argument: a graph node, its schema name, or the first."""
        node = self.first if argument is None else argument
        found = self._of[self.arguments[node] if isinstance(node, str) else node]
        if not isinstance(found, Labels):
            raise Refused(f"uses {node}, which is not one tensor")
        now = labels.current(self.known, found)
        if now is None:
            raise Refused(f"uses a part of {node}, of which another operation uses all")
        return now

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result, of the first one if there are several."""
        value = self.node.meta["val"]
        value = value[0] if isinstance(value, tuple | list) else value
        return tuple(int(n) for n in value.shape)

    def hold(self, x: Labels, dims: Iterable[int], because: str = "") -> None:
        """Hold dimensions of `x` in place, counted from either end. `because`: what users are told, where it is not
        plain from the operation that nothing else could be."""
        which = {d % len(x.shape) for d in dims}
        labels.hold(self.known, x, which, HELD if because else self.why)
        if because:
            self.held.append((because, x, which))

    def broadcast(self, operands: Sequence[Labels], shape: Sequence[int] | None = None) -> Labels:
        """Labels of a function, value by value, of tensors whose last dimensions are the result's."""
        return labels.broadcast(self.known, self.shape if shape is None else shape, operands, self.why)

    def inside(self, x: Labels, dims: Collection[int]) -> Labels:
        """`x`, to which a function that treats positions along `dims` alike may be applied."""
        return labels.inside(self.known, x, {d % len(x.shape) for d in dims})
