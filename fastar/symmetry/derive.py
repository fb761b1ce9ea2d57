"""Derive the permutation symmetries of any model from its graph (torch.export), and prove them on random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from fastar.config import MatchingSettings
from fastar.errors import FastarError
from fastar.flat.state_check import is_vector, tensors_of
from fastar.symmetry import cache
from fastar.symmetry.frozen import Explained, held_by, missed_freedom
from fastar.symmetry.groups import Irregular, groups_of
from fastar.symmetry.labels import Labels, fresh, settled
from fastar.symmetry.positions import Array, Constraints, Solution, solve
from fastar.symmetry.random_network import ExampleInputs
from fastar.symmetry.rules.call import HELD, Call, Refused
from fastar.symmetry.rules.table import apply_rule, is_fill
from fastar.symmetry.symmetry import Symmetry, without_groups
from fastar.symmetry.trace import trace
from fastar.symmetry.verify import verify_symmetry


def symmetry_by_settings(
    settings: MatchingSettings,
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    allow_partial: bool = False,
    name: object = None,
) -> Symmetry:
    """`derive_symmetry`, but no groups for `matching.method=none`, which needs none; nothing is traced then.

    Raises:
        FastarError: as `derive_symmetry`.
    """
    if settings.method == "none":
        return without_groups(model)
    return derive_symmetry(model, example_inputs, allow_partial=allow_partial, name=name)


def derive_symmetry(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    verify: bool = True,
    allow_partial: bool = False,
    name: object = None,
) -> Symmetry:
    """The groups of hidden units of `model` that can be permuted without changing what it computes.

    The model is copied and traced in evaluation mode; labels of axes are propagated from operation to operation, inputs
    and outputs held in place. `model` itself is not touched. Batch sizes in `example_inputs` do not matter.

    Args:
        example_inputs: positional inputs as a tuple, or keyword inputs as a mapping; what is no tensor is a constant.
            Every output is held in place: leave out what is not compared. Where a module's `config.use_cache` is set
            (Hugging Face), the copy is told to return no keys and values for later tokens.
        verify: also prove the result numerically (`verify_symmetry`).
        allow_partial: where the symmetry of an operation cannot be proven, hold all axes of its inputs in place and go
            on; `Symmetry.frozen` says where.
        name: of fastar's own architectures: what builds them (name, options, shape; JSON). What was proven under it
            is kept on disk (`fastar.symmetry.cache`). Not for other models: their code may change under one name.

    Raises:
        FastarError: the model cannot be traced, or an operation's symmetry cannot be proven; names node and operation.
    """
    kind = type(model).__name__
    if not isinstance(example_inputs, tuple | list | Mapping) or not example_inputs:
        raise FastarError(
            f"example_inputs of {kind} are a {type(example_inputs).__name__}: give a tuple of what its forward takes, "
            "or a mapping of keywords"
        )
    record = None
    if verify and name is not None:
        record = cache.record_of(name, model, example_inputs, allow_partial=allow_partial)
    symmetry = cache.find(record)
    if symmetry is None:
        _, symmetry = _derived(model, trace(model, example_inputs, kind), allow_partial)
        if verify:
            verify_symmetry(model, symmetry, example_inputs, controls=False)
        cache.keep(record, symmetry)
    return symmetry


def explain(model: nn.Module, example_inputs: ExampleInputs) -> Explained:
    """Trace and derive again, and tell what holds what. FastarError where the model cannot be traced."""
    derivation, _ = _derived(model, trace(model, example_inputs, type(model).__name__), True)
    return derivation.explained()


def _derived(
    model: nn.Module, program: torch.export.ExportedProgram, allow_partial: bool
) -> tuple[_Derivation, Symmetry]:
    """The symmetry of a traced graph; where it is refused with buffers that move, they stay, as constants do."""
    movable = _movable(model, program)
    for buffers in (movable, frozenset[str]()) if movable else ():
        with suppress(FastarError):
            derivation = _Derivation(model, program, buffers)
            return derivation, derivation.symmetry()
    last = movable if allow_partial else frozenset[str]()
    derivation = _Derivation(model, program, last, allow_partial=allow_partial)
    return derivation, derivation.symmetry()


def _movable(model: nn.Module, program: torch.export.ExportedProgram) -> frozenset[str]:
    """The buffers that may have a value for each unit: of one axis, as what goes beyond is a table (`_hold_table`); of
    the state dict, as others cannot be written permuted; of real numbers or yes and no, as whole numbers are indices or
    counts; and with memory of their own."""
    tensors = tensors_of(model)
    at: dict[int, set[int]] = {}
    for tensor in (*tensors.values(), *model.buffers()):
        if tensor.numel() and tensor.device.type != "meta":
            at.setdefault(tensor.untyped_storage().data_ptr(), set()).add(id(tensor))
    shared = {one for those in at.values() if len(those) > 1 for one in those}
    used = {spec.target for spec in program.graph_signature.input_specs if spec.kind == InputKind.BUFFER}
    return frozenset(
        name
        for name, tensor in tensors.items()
        if name in used
        and not isinstance(tensor, nn.Parameter)
        and (tensor.is_floating_point() or tensor.dtype == torch.bool)
        and id(tensor) not in shared
        and is_vector(tensor)
    )


REFUSED = "refused"  # why positions are held that an operation reads or writes that is not understood
OUTPUT = "output 0"


class _Derivation:
    """One pass over a traced graph.

    Args:
        movable: names of the buffers, beside batch-norm statistics, that may move.
    """

    def __init__(
        self,
        model: nn.Module,
        program: torch.export.ExportedProgram,
        movable: frozenset[str],
        *,
        allow_partial: bool = False,
    ):
        self.model, self.name, self.program, self.known = model, type(model).__name__, program, Constraints()
        self.allow_partial, self.movable = allow_partial, movable
        self.empty = without_groups(model)
        self.specs = {getattr(spec.arg, "name", ""): spec for spec in program.graph_signature.input_specs}
        self.tensors: dict[str, Labels] = {}  # of parameters and buffers that have any
        self.first_use: dict[str, int] = {}
        self.moving: set[fx.Node] = set()  # nodes that depend on a parameter, or a statistic of a batch-norm
        self.others: list[tuple[str, Array]] = []  # what else may hold positions: what to call it, and those it has
        self.shown: list[tuple[str, Array]] = []  # outputs after the first
        self.refused: list[tuple[fx.Node, str, Array]] = []

    def symmetry(self) -> Symmetry:
        """The groups that are found. FastarError where an operation is not understood that reads what could move."""
        self._follow()
        so_far = solve(self.known) if self.known.in_blocks else None
        self.tensors = {name: settled(self.known, labels, so_far) for name, labels in self.tensors.items()}
        if self.refused and not self.allow_partial:
            free = solve(self.known, [REFUSED])
            for node, why, at in self.refused:
                if (free.kind[at] >= 0).any():
                    raise self._refusal(node, why)
        while True:
            solution = solve(self.known)
            try:
                groups, arranged = groups_of(solution, self.tensors, self.first_use, self.empty)
            except Irregular as held:
                self.known.missed.append((str(held), held.at))
                self.known.hold(held.at, str(held))
            else:
                return replace(self.empty, groups=groups, arranged=arranged, frozen=(*self._frozen(solution),))

    def explained(self) -> Explained:
        """What holds positions, once the symmetry is derived."""
        reasons = self.known.reasons()
        given: set[fx.Node] = set()  # nodes that depend on inputs, and on no parameter
        reading = set()
        for node in self.program.graph.nodes:
            spec = self.specs.get(node.name)
            known = spec is not None and node.op == "placeholder" and spec.kind == InputKind.USER_INPUT
            reads = any(used in given for used in node.all_input_nodes)
            if known or (reads and node not in self.moving):
                given.add(node)
            if reads:
                reading.add(self._where(node))
        named = [
            (f"the input, read by {why}" if why in reading else why, self.known.held_for(why))
            for why in reasons
            if why not in (HELD, REFUSED)
        ]
        holders = (*self.others, *self.shown, *named)
        return Explained(self.tensors, solve(self.known), solve(self.known, reasons), holders)

    def _follow(self) -> None:
        """Labels of all nodes: what has to move together is then known."""
        labels: dict[fx.Node, Any] = {}
        statistics = self._statistics()
        for position, node in enumerate(self.program.graph.nodes):
            if node.op == "placeholder":
                labels[node] = self._placeholder(node, statistics)
            elif node.op == "call_function":
                for used in node.all_input_nodes:
                    if used.op == "placeholder":
                        self.first_use.setdefault(self._first_name(self.specs[used.name].target), position)
                if any(used in self.moving for used in node.all_input_nodes) and not is_fill(node):
                    self.moving.add(node)
                labels[node] = self._labels(node, labels)
                if not node.all_input_nodes and not is_fill(node) and isinstance(node.meta.get("val"), Tensor):
                    labels[node] = self._constant(self._where(node), node.meta["val"])
                if node not in self.moving:
                    self._hold_table(labels[node])
            elif node.op == "get_attr":
                labels[node] = _held(node)
            elif node.op != "output":
                raise self._refusal(node, "unknown kind of node")
        self._fix_outputs(labels)

    def _hold_table(self, labels: Any) -> None:
        """Hold what no parameter goes into and has two axes or more: a table (positions, frequencies, masks of pairs),
        which all networks of an architecture have in common. A value for each unit has one axis, and copies."""
        for one in labels if isinstance(labels, list) else [labels]:
            if isinstance(one, Labels) and sum(n > 1 and d not in one.alike for d, n in enumerate(one.shape)) > 1:
                self.known.hold(_positions(one), HELD)

    def _labels(self, node: fx.Node, labels: dict[fx.Node, Any]) -> Any:
        """Labels of an operation's result; one that is not understood holds what it reads, and its result."""
        call = Call(node, self.known, labels, self._where(node))
        try:
            found = apply_rule(call, labels)
        except Refused as refused:
            return self._refuse(node, labels, str(refused))
        for because, x, dims in call.held:
            at = [one.at.ravel() for one in x.touching(dims)]
            self.others.append((f"{call.why}: {because}", np.concatenate(at) if at else np.zeros(0, np.int64)))
        return found

    def _refuse(self, node: fx.Node, labels: dict[fx.Node, Any], why: str) -> Any:
        read = {used: _positions(labels[used]) for used in node.all_input_nodes}
        result = _made(node.meta.get("val"), lambda value: fresh(self.known, value.shape))
        at = np.concatenate([*read.values(), _positions(result)])
        self.known.hold(at, REFUSED)
        mine = [read[used] for used in read if used in self.moving]
        if mine:  # buffers alone can stay
            self.refused.append((node, why, np.concatenate(mine)))
        self.others.append((f"{self._where(node)}: {why}", np.concatenate(mine) if mine else at))
        return result

    def _first_name(self, name: str) -> str:
        return self.empty.tied.get(name, name)

    def _statistics(self) -> set[str]:
        """Placeholders that are some batch-norm's running mean or variance, and nothing else: buffers that may move."""
        found = set()
        for node in self.program.graph.nodes:
            if node.op == "call_function" and "batch_norm" in str(node.target):
                arguments = Call(node, self.known, {}, "").arguments
                values = (arguments.get(name) for name in ("running_mean", "running_var"))
                found |= {value.name for value in values if isinstance(value, fx.Node)}
        return found

    def _placeholder(self, node: fx.Node, statistics: set[str]) -> Any:
        value, spec = node.meta.get("val"), self.specs[node.name]
        learned = spec.kind == InputKind.PARAMETER or (node.name in statistics and spec.target in self.empty.buffers)
        if learned:
            self.moving.add(node)
        if spec.kind == InputKind.USER_INPUT or not isinstance(value, Tensor):
            return _held(node)
        name = self._first_name(spec.target)
        if learned or spec.target in self.movable:
            if name not in self.tensors:
                self.tensors[name] = fresh(self.known, value.shape)
                if len(node.users) == 1 and learned:
                    arrays = (self.known.array_of(one.at) for one in self.tensors[name].cells)
                    self.known.loose |= {array: name for array in arrays if array is not None}
                if not learned:
                    self.others.append((self._said(spec), _positions(self.tensors[name])))
            return self.tensors[name]
        constant = spec.kind == InputKind.CONSTANT_TENSOR or (spec.kind == InputKind.BUFFER and not spec.persistent)
        values = self.program.constants.get(spec.target) if constant else None
        return self._constant(self._said(spec), value, values if isinstance(values, Tensor) else None)

    def _constant(self, what: str, value: Tensor, values: Tensor | None = None) -> Labels:
        """Labels of what has a value for each position and cannot move, named where it holds others.

        Args:
            values: those that all networks of the architecture have, if they are known.
        """
        alike = frozenset(d for d, n in enumerate(value.shape) if n > 1 and values is not None and _alike(values, d))
        every = fresh(self.known, value.shape)
        found = Labels(every.shape, tuple(one for one in every.cells if one.dims[0] not in alike), alike)
        self.known.hold(_positions(found), HELD)
        self.others.append((what, _positions(found)))
        return found

    def _frozen(self, solution: Solution) -> list[str]:
        parameters = {name: x for name, x in self.tensors.items() if name in self.empty.parameters}
        missed = missed_freedom(parameters, [*self.known.missed, *solution.reduced])
        if not self.others and not self.shown:
            return missed
        buffers = {self._said(spec) for spec in self.specs.values() if spec.target in self.movable}
        free = solve(self.known, [HELD, REFUSED])
        return [*held_by(parameters, [*self.others, *self.shown], buffers, solution, free), *missed]

    def _said(self, spec: Any) -> str:
        """A name for an input of the graph that is neither a parameter nor the user's."""
        if spec.kind == InputKind.BUFFER and spec.persistent:
            return f"buffer {spec.target!r}"
        if spec.kind == InputKind.BUFFER:
            return f"buffer {spec.target!r}, which is not in the state dict (persistent=False)"
        if spec.target.startswith("lifted_tensor"):
            return f"a constant of its forward pass ({spec.target})"
        return f"attribute {spec.target!r}, which is not in the state dict (make it a buffer)"

    def _fix_outputs(self, labels: dict[fx.Node, Any]) -> None:
        for spec in self.program.graph_signature.output_specs:
            if spec.kind != OutputKind.USER_OUTPUT:
                raise FastarError(
                    f"cannot derive the permutation groups of {self.name}: it changes {spec.target!r} in evaluation "
                    "mode; a forward pass must leave parameters, buffers and inputs alone"
                )
        (output,) = [node for node in self.program.graph.nodes if node.op == "output"]
        shown = [spec.arg.name for spec in self.program.graph_signature.output_specs if hasattr(spec.arg, "name")]
        names = _names_of_outputs(self.program)
        nodes = {node.name: node for node in output.all_input_nodes}
        for number, name in enumerate(shown):
            at = _positions(labels[nodes[name]]) if name in nodes else np.zeros(0, np.int64)
            self.known.hold(at, HELD if number else OUTPUT)
            if number:  # what a second output shows may well be hidden units
                self.shown.append((f"output {names.get(number, number)}", at))

    def _refusal(self, node: fx.Node, why: str) -> FastarError:
        where = self._where(node)
        remedy = "rewrite that part"
        if "parametrizations." in where:
            remedy = "remove the parametrisation first (torch.nn.utils.parametrize.remove_parametrizations)"
        elif "dropout" in str(node.target):
            remedy = "leave dropout out of evaluation mode (F.dropout(x, p, self.training))"
        return FastarError(
            f"cannot derive the permutation groups of {self.name}: {where}: {why}; it is not matched rather than "
            f"matched wrongly: {remedy}, hold it in place (allow_partial=True, on the command line --allow-partial), "
            "write a PermutationSpec (in Python), or run without matching (method none)"
        )

    def _where(self, node: fx.Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        module = list(stack.values())[-1][0] if stack else ""
        where = f" in module {module!r}" if module else ""
        return f"{node.target} (node {node.name}{where})"


def _made(value: Any, make: Callable[[Tensor], Labels]) -> Any:
    """Labels of one tensor, of several, or of none."""
    if isinstance(value, Tensor):
        return make(value)
    return [_made(one, make) for one in value] if isinstance(value, tuple | list) else None


def _names_of_outputs(program: torch.export.ExportedProgram) -> dict[int, str]:
    """Number of an output -> its name in a mapping, as it is written."""
    spec = program.call_spec.out_spec
    numbered = tree_unflatten(list(range(spec.num_leaves)), spec)
    paths, _ = tree_flatten_with_path(numbered)
    last: dict[int, Any] = {int(number): path[-1] for path, number in paths if path}
    return {number: repr(key.key) for number, key in last.items() if isinstance(getattr(key, "key", None), str)}


def _alike(values: Tensor, d: int) -> bool:
    """Tell whether all slices along a dimension are equal."""
    return bool((values == values.narrow(d, 0, 1)).all())


def _held(node: fx.Node) -> Any:
    """Labels of a value that does not move."""
    return _made(node.meta.get("val"), lambda value: Labels(tuple(value.shape)))


def _positions(labels: Any) -> Array:
    """All positions in the labels of a node, whether of one tensor or of several, and those that its values number."""
    if isinstance(labels, list):
        return np.concatenate([np.zeros(0, np.int64), *map(_positions, labels)])
    if not isinstance(labels, Labels):
        return np.zeros(0, np.int64)
    numbers = np.zeros(0, np.int64) if labels.numbers is None else labels.numbers
    return np.concatenate([numbers, *(one.at.ravel() for one in labels.cells)])
