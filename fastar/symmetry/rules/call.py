"""One operation of a traced graph, as the rules of `fastar.symmetry.rules.table` see it."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.utils._pytree import tree_leaves

from fastar.symmetry.axes import Axis, AxisSolver, length_of
from fastar.symmetry.axis_views import Dims, Draft

Labels = tuple[Axis, ...]
Result = Labels | Dims | list[Any] | None


class Refused(Exception):
    """The symmetry of an operation cannot be proven; the text says what stands in the way."""


class Call:
    """One operation of the graph: its arguments by schema name, their labels, and the shape of its result."""

    def __init__(self, node: fx.Node, labels: dict[fx.Node, Any], solver: AxisSolver):
        self.node, self.solver, self._labels = node, solver, labels
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

    def dims(self, argument: Any = None) -> Dims:
        """Labels of a tensor argument (a graph node, its schema name, or the first), whose axes may be in parts."""
        node = self.first if argument is None else argument
        found = self._labels[self.arguments[node] if isinstance(node, str) else node]
        if not isinstance(found, Dims):
            raise Refused(f"uses {node}, which is not one tensor")
        return found

    def operand(self, argument: Any) -> tuple[Dims, tuple[int, ...]]:
        """Labels and shape of a tensor argument, a graph node or its schema name."""
        node = self.arguments[argument] if isinstance(argument, str) else argument
        return self.dims(node), self.shape(node)

    def labels(self, argument: Any = None) -> Labels:
        """Labels of a tensor argument with one axis per dimension: parts of views are made independent."""
        draft = Draft(self.solver, self.dims(argument).dims)
        return tuple(draft.flatten(d) for d in range(len(draft.dims)))

    def shape(self, node: fx.Node | None = None) -> tuple[int, ...]:
        """Shape of the result, or of an argument."""
        value = (node or self.node).meta["val"]
        value = value[0] if isinstance(value, tuple | list) else value
        return tuple(int(n) for n in value.shape)

    def unmoved(self, axis: Axis, what: str) -> None:
        """Refuse unless `axis` is already known not to move: its units may not be cut, reversed or reordered."""
        if not self.solver.is_fixed(axis):
            raise Refused(f"{what} an axis of {length_of(axis)} hidden units")
