"""Derive the permutation symmetries of any model from its graph (torch.export), and prove them on random weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from fastar.config import MatchingSettings
from fastar.errors import FastarError
from fastar.flat.state_check import is_vector, tensors_of
from fastar.symmetry import cache
from fastar.symmetry.axes import FIXED, Axis, AxisSolver, fixed
from fastar.symmetry.axis_views import Copies, Dims, factor_length
from fastar.symmetry.random_network import ExampleInputs
from fastar.symmetry.rules.call import Call, Refused
from fastar.symmetry.rules.table import apply_rule, is_fill
from fastar.symmetry.symmetry import Group, Member, Symmetry, without_groups
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
        symmetry = _derived(model, trace(model, example_inputs, kind), allow_partial)
        if verify:
            verify_symmetry(model, symmetry, example_inputs, controls=False)
        cache.keep(record, symmetry)
    return symmetry


def _derived(model: nn.Module, program: torch.export.ExportedProgram, allow_partial: bool) -> Symmetry:
    """The symmetry of a traced graph; where it is refused with buffers that move, they stay, as constants do."""
    movable = _movable(model, program)
    for buffers in (movable, frozenset[str]()) if movable else ():
        with suppress(FastarError):
            return _Derivation(model, program, buffers).symmetry()
    last = movable if allow_partial else frozenset[str]()
    return _Derivation(model, program, last, allow_partial=allow_partial).symmetry()


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


class _Derivation:
    """One pass over a traced graph.

    Args:
        movable: names of the buffers, beside batch-norm statistics, that may move.
        supposing: let everything move that is neither an input nor an output, whatever it is, and refuse nothing: shows
            which of it is held by what.
    """

    def __init__(
        self,
        model: nn.Module,
        program: torch.export.ExportedProgram,
        movable: frozenset[str],
        *,
        allow_partial: bool = False,
        supposing: bool = False,
    ):
        self.model, self.name, self.program, self.solver = model, type(model).__name__, program, AxisSolver()
        self.allow_partial, self.movable, self.supposing = allow_partial, movable, supposing
        self.empty = without_groups(model)
        self.specs = {getattr(spec.arg, "name", ""): spec for spec in program.graph_signature.input_specs}
        self.tensors: dict[str, tuple[Axis, ...]] = {}
        self.first_use: dict[str, int] = {}
        self.moving: set[fx.Node] = set()  # nodes that depend on a parameter, or a statistic of a batch-norm
        self.others: dict[str, str] = {}  # what else the graph begins with, inputs aside, and what to call it
        self.frozen: list[str] = []

    def symmetry(self) -> Symmetry:
        self._follow()
        return replace(self.empty, groups=self._groups(), frozen=(*self.frozen, *self._held_by()))

    def _follow(self) -> None:
        """Labels of all nodes: what has to move together is then in the solver."""
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
                    where = self._where(node)
                    self.others[where] = where
                    if self.supposing:
                        labels[node] = self._fresh(where, node.meta["val"])
                if node not in self.moving and not self.supposing:
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
            dims = one.dims if isinstance(one, Dims) else ()
            long = [dim for dim in dims if any(factor_length(f) > 1 for f in dim if not isinstance(f, Copies))]
            if len(long) > 1:
                self.solver.fix(*_axes(one))

    def _labels(self, node: fx.Node, labels: dict[fx.Node, Any]) -> Any:
        """Labels of an operation's result; one that is not understood has a fixed result if its inputs are fixed."""
        try:
            return apply_rule(node, labels, self.solver)
        except Refused as why:
            if self.supposing:
                return self._suppose(node, labels, str(why))
            for used in node.all_input_nodes:
                if used not in self.moving:  # buffers alone: they can stay
                    self.solver.fix(*_axes(labels[used]))
            axes = [axis for used in node.all_input_nodes for axis in _axes(labels[used])]
            if node in self.moving and not all(self.solver.is_fixed(axis) for axis in axes):
                if not self.allow_partial:
                    raise self._refusal(node, str(why)) from why
                self.frozen.append(f"{self._where(node)}: {why}; the units of its inputs stay in place")
            self.solver.fix(*axes)
            return _held(node)

    def _first_name(self, name: str) -> str:
        return self.empty.tied.get(name, name)

    def _statistics(self) -> set[str]:
        """Placeholders that are some batch-norm's running mean or variance, and nothing else: buffers that may move."""
        found = set()
        for node in self.program.graph.nodes:
            if node.op == "call_function" and "batch_norm" in str(node.target):
                arguments = Call(node, {}, self.solver).arguments
                values = (arguments.get(name) for name in ("running_mean", "running_var"))
                found |= {value.name for value in values if isinstance(value, fx.Node)}
        return found

    def _placeholder(self, node: fx.Node, statistics: set[str]) -> Any:
        value, spec = node.meta.get("val"), self.specs[node.name]
        learned = spec.kind == InputKind.PARAMETER or (node.name in statistics and spec.target in self.empty.buffers)
        if learned:
            self.moving.add(node)
        elif spec.kind != InputKind.USER_INPUT and isinstance(value, Tensor):
            self.others[self._first_name(spec.target)] = self._said(spec)
        moves = learned or spec.target in self.movable or (self.supposing and spec.kind != InputKind.USER_INPUT)
        if moves and isinstance(value, Tensor):
            return self._fresh(self._first_name(spec.target), value)
        return _held(node)

    def _fresh(self, name: str, value: Tensor) -> Dims:
        """Labels of a tensor about which nothing is known, the same ones wherever it is used."""
        if name not in self.tensors:
            self.tensors[name] = tuple(self.solver.fresh(int(n)) for n in value.shape)
        return Dims.plain(self.tensors[name])

    def _suppose(self, node: fx.Node, labels: dict[fx.Node, Any], why: str) -> Any:
        """An operation that is not understood holds what it reads, and has a value for each unit of its result."""
        where, value = self._where(node), node.meta.get("val")
        self.others[where] = f"{where}: {why}"
        values = value if isinstance(value, tuple | list) else [value]
        results = [[self.solver.fresh(int(n)) for n in one.shape] if isinstance(one, Tensor) else [] for one in values]
        read = [axis for used in node.all_input_nodes for axis in _axes(labels[used])]
        self.tensors[where] = (*(axis for result in results for axis in result), *read)
        found = [Dims.plain(result) for result in results]
        return found if isinstance(value, tuple | list) else found[0]

    def _held_by(self) -> list[str]:
        """A line for each set of units that stays because something else than an input has a value for each."""
        if not self.others:
            return []
        supposed = _Derivation(self.model, self.program, self.movable, supposing=True)
        supposed._follow()
        sites: dict[int, list[tuple[str, int]]] = {}
        sizes: dict[int, int] = {}
        for tensor, axes in supposed.tensors.items():
            for axis, label in enumerate(axes):
                for segment in supposed.solver.resolve(label):
                    stays = tensor not in self.tensors or self.solver.is_fixed(self.tensors[tensor][axis])
                    if segment.var != FIXED and stays:
                        sites.setdefault(segment.var, []).append((tensor, axis))
                        sizes[segment.var] = segment.size
        lines = []
        for var, those in sites.items():
            holders = dict.fromkeys(supposed.others[tensor] for tensor, _ in those if tensor in supposed.others)
            of_parameters = [(tensor, axis) for tensor, axis in those if tensor in self.empty.parameters]
            if holders and of_parameters:
                first = next((tensor for tensor, axis in of_parameters if axis == 0), of_parameters[0][0])
                lines.append(f"{_module(first)} ({sizes[var]} units): held by {', '.join(holders)}")
        return lines

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
        for node in output.all_input_nodes:
            self.solver.fix(*_axes(labels[node]))

    def _groups(self) -> tuple[Group, ...]:
        """Unknowns that stayed free, as groups in order of first use; parents directly before their first child."""
        sizes: dict[int, int] = {}
        members: dict[int, list[Member]] = {}
        for tensor in sorted(self.tensors, key=lambda t: self.first_use.get(t, -1)):
            if tensor not in self.first_use:
                continue  # never used: leave it as it is
            for axis, label in enumerate(self.tensors[tensor]):
                offset = 0
                for segment in self.solver.resolve(label):
                    if segment.var != FIXED:
                        sizes[segment.var] = segment.size
                        for name in self.empty.names.get(tensor, (tensor,)):
                            site = Member(name, axis, segment.inner, segment.outer, offset)
                            members.setdefault(segment.var, []).append(site)
                    offset += segment.length
        learned = {var for var, sites in members.items() if any(m.tensor in self.empty.parameters for m in sites)}
        over = [self.solver.parent_of(var) for var in learned]
        members = {  # not those of buffers alone, whose order then says nothing
            var: sites
            for var, sites in members.items()
            if var in learned or any(found is not None and found[0].var == var for found in over)
        }
        parents = {var: found[0] for var in members if (found := self.solver.parent_of(var)) is not None}
        taken: dict[str, int] = {}
        named: dict[int, str] = {}
        for var, sites in members.items():
            producers = [m.tensor for m in sites if m.axis == 0 and m.tensor in self.empty.parameters]
            named[var] = _numbered(_module((producers or [sites[0].tensor])[0]), taken)
        for var, parent in parents.items():
            if parent.var not in named:
                named[parent.var] = _numbered(f"{named[var].partition('#')[0]}:blocks", taken)
                sizes[parent.var] = parent.size
        first_use = {
            var: min(self.first_use[self._first_name(m.tensor)] for m in sites) for var, sites in members.items()
        }
        groups: dict[int, Group] = {}
        for var in sorted(members, key=first_use.__getitem__):
            above = parents.get(var)
            for one in (above.var, var) if above is not None else (var,):
                whose = named[parents[one].var] if one in parents else None
                groups.setdefault(one, Group(named[one], sizes[one], tuple(members.get(one, ())), whose))
        return tuple(groups.values())

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


def _module(tensor: str) -> str:
    """The module that a tensor is of; at the top, the tensor itself."""
    module, _, leaf = tensor.rpartition(".")
    return module or leaf


def _numbered(base: str, taken: dict[str, int]) -> str:
    """`base`, or where it is taken `base#1`, `base#2` ..."""
    count = taken[base] = taken.get(base, -1) + 1
    return f"{base}#{count}" if count else base


def _held(node: fx.Node) -> Any:
    """Labels of a value that does not move: of one tensor, of several, or of none."""

    def held(value: Any) -> Any:
        if isinstance(value, Tensor):
            return Dims.plain([fixed(int(n)) for n in value.shape])
        return [held(one) for one in value] if isinstance(value, tuple | list) else None

    return held(node.meta.get("val"))


def _axes(labels: Any) -> list[Axis]:
    """All axes in the labels of a node, whether of one tensor or of several."""
    if isinstance(labels, list):
        return [axis for one in labels for axis in _axes(one)]
    return list(labels.axes()) if isinstance(labels, Dims) else []
