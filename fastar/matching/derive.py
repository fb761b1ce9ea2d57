"""Derive the permutation symmetries of any model from its graph (torch.export), and prove them on random weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from fastar.errors import FastarError
from fastar.matching import proofs
from fastar.matching.axes import FIXED, Axis, AxisSolver, fixed
from fastar.matching.calls import Refused
from fastar.matching.rules import apply_rule, is_fill
from fastar.matching.symmetry import Group, Member, Symmetry
from fastar.matching.tracing import trace
from fastar.matching.trials import ExampleInputs
from fastar.matching.verify import verify_symmetry
from fastar.matching.views import Dims


def derive_symmetry(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    verify: bool = True,
    allow_partial: bool = False,
    cached: bool = True,
    name: object = None,
) -> Symmetry:
    """The groups of hidden units of `model` that can be permuted without changing what it computes.

    The model is copied and traced in evaluation mode; labels of axes are propagated from operation to operation, inputs
    and outputs held in place. `model` itself is not touched. Batch sizes in `example_inputs` do not matter.

    Args:
        example_inputs: positional inputs as a tuple, or keyword inputs as a mapping; what is no tensor is a constant.
            Every output is held in place: leave out what is not compared (`use_cache=False` for transformers).
        verify: also prove the result numerically (`verify_symmetry`).
        allow_partial: where the symmetry of an operation cannot be proven, hold all axes of its inputs in place and go
            on; `Symmetry.frozen` says where.
        cached: take what was derived and proven before for the same graph (`fastar.matching.proofs`), and keep what is
            proven now.
        name: of fastar's own architectures: what builds them (name, options, shape; JSON), so that what is kept is
            found without tracing. Not for other models: their code may change under the same name.

    Raises:
        FastarError: the model cannot be traced, or an operation's symmetry cannot be proven; names node and operation.
    """
    kind = type(model).__name__
    if not isinstance(example_inputs, tuple | list | Mapping) or not example_inputs:
        raise FastarError(
            f"example_inputs of {kind} are a {type(example_inputs).__name__}: give a tuple of what its forward takes, "
            "or a mapping of keywords"
        )
    by_name = by_graph = found = None
    if cached and verify and name is not None:
        by_name = proofs.digest_of_name(name, model, example_inputs, allow_partial=allow_partial)
        found = proofs.find(by_name)
    if found is not None:
        return found
    program = trace(model, example_inputs, kind)
    if cached and verify:
        by_graph = proofs.digest_of_graph(program, model, allow_partial=allow_partial)
        found = proofs.find(by_graph)
    if found is None:
        found = _Derivation(model, program, kind, allow_partial).symmetry()
        if verify:
            verify_symmetry(model, found, example_inputs, controls=False)
            proofs.keep(by_graph, found)
    proofs.keep(by_name, found)
    return found


class _Derivation:
    """One pass over a traced graph."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram, name: str, allow_partial: bool):
        self.name, self.program, self.solver = name, program, AxisSolver()
        self.allow_partial = allow_partial
        persistent = model.state_dict(keep_vars=True)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.buffers = {n: t for n, t in persistent.items() if n not in self.parameters and isinstance(t, Tensor)}
        first_name: dict[int, str] = {}
        self.canonical = {n: first_name.setdefault(id(p), n) for n, p in self.parameters.items()}
        self.tensors: dict[str, tuple[Axis, ...]] = {}
        self.first_use: dict[str, int] = {}
        self.moving: set[fx.Node] = set()  # nodes that depend on anything that might move
        self.frozen: list[str] = []

    def symmetry(self) -> Symmetry:
        labels: dict[fx.Node, Any] = {}
        statistics = self._statistics()
        for position, node in enumerate(self.program.graph.nodes):
            if node.op == "placeholder":
                labels[node] = self._placeholder(node, statistics)
            elif node.op == "call_function":
                for used in node.all_input_nodes:
                    target = self._target(used)
                    if target is not None:
                        self.first_use.setdefault(target, position)
                if any(used in self.moving for used in node.all_input_nodes) and not is_fill(node):
                    self.moving.add(node)
                labels[node] = self._labels(node, labels)
            elif node.op == "get_attr":
                labels[node] = _held(node)
            elif node.op != "output":
                raise self._refusal(node, "unknown kind of node")
        self._fix_outputs(labels)
        return Symmetry(
            groups=self._groups(),
            parameters={n: tuple(p.shape) for n, p in self.parameters.items()},
            buffers={n: tuple(b.shape) for n, b in self.buffers.items()},
            tied={n: first for n, first in self.canonical.items() if n != first},
            frozen=tuple(self.frozen),
        )

    def _labels(self, node: fx.Node, labels: dict[fx.Node, Any]) -> Any:
        """Labels of an operation's result; one that is not understood has a fixed result if its inputs are fixed."""
        try:
            return apply_rule(node, labels, self.solver)
        except Refused as why:
            axes = [axis for used in node.all_input_nodes for axis in _axes(labels[used])]
            if node in self.moving and not all(self.solver.is_fixed(axis) for axis in axes):
                if not self.allow_partial:
                    raise self._refusal(node, str(why)) from why
                self.frozen.append(f"{self._where(node)}: {why}; the units of its inputs stay in place")
            for axis in axes:
                self.solver.fix(axis)
            return _held(node)

    def _spec(self, node: fx.Node) -> Any:
        for spec in self.program.graph_signature.input_specs:
            if getattr(spec.arg, "name", None) == node.name:
                return spec
        raise self._refusal(node, "an input without a description")

    def _target(self, node: fx.Node) -> str | None:
        """The parameter or buffer that a placeholder stands for."""
        if node.op != "placeholder":
            return None
        target = self._spec(node).target
        return self.canonical.get(target, target)

    def _statistics(self) -> set[str]:
        """Placeholders that are some batch-norm's running mean or variance, and nothing else: buffers that may move."""
        found = set()
        for node in self.program.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if node.op == "call_function" and schema is not None and "batch_norm" in schema.name:
                for argument, value in zip(schema.arguments, node.args, strict=False):
                    if argument.name in ("running_mean", "running_var") and isinstance(value, fx.Node):
                        found.add(value.name)
        return found

    def _placeholder(self, node: fx.Node, statistics: set[str]) -> Any:
        value, spec = node.meta.get("val"), self._spec(node)
        movable = spec.kind == InputKind.PARAMETER or (node.name in statistics and spec.target in self.buffers)
        if not movable or not isinstance(value, Tensor):
            return _held(node)
        self.moving.add(node)
        target = self.canonical.get(spec.target, spec.target)
        if target not in self.tensors:
            self.tensors[target] = tuple(self.solver.fresh(int(n)) for n in value.shape)
        return Dims.plain(self.tensors[target])

    def _fix_outputs(self, labels: dict[fx.Node, Any]) -> None:
        for spec in self.program.graph_signature.output_specs:
            if spec.kind != OutputKind.USER_OUTPUT:
                raise FastarError(
                    f"cannot derive the permutation groups of {self.name}: it changes {spec.target!r} in evaluation "
                    "mode; a forward pass must leave parameters, buffers and inputs alone"
                )
        (output,) = [node for node in self.program.graph.nodes if node.op == "output"]
        for node in output.all_input_nodes:
            for axis in _axes(labels[node]):
                self.solver.fix(axis)

    def _groups(self) -> tuple[Group, ...]:
        """Unknowns that stayed free, as groups in order of first use; parents directly before their first child."""
        sizes: dict[int, int] = {}
        members: dict[int, list[Member]] = {}
        names: dict[str, list[str]] = {}
        for name, first in self.canonical.items():
            names.setdefault(first, []).append(name)
        for tensor in sorted(self.tensors, key=lambda t: self.first_use.get(t, -1)):
            if tensor not in self.first_use:
                continue  # never used: leave it as it is
            for axis, label in enumerate(self.tensors[tensor]):
                offset = 0
                for segment in self.solver.resolve(label):
                    if segment.var != FIXED:
                        sizes[segment.var] = segment.size
                        for name in names.get(tensor, [tensor]):
                            place = Member(name, axis, segment.inner, segment.outer, offset)
                            members.setdefault(segment.var, []).append(place)
                    offset += segment.length
        parents = {var: found[0] for var in members if (found := self.solver.parent_of(var)) is not None}
        taken: dict[str, int] = {}
        named: dict[int, str] = {}
        for var, places in members.items():
            producers = [m.tensor for m in places if m.axis == 0 and m.tensor in self.parameters]
            module, _, leaf = (producers or [places[0].tensor])[0].rpartition(".")
            named[var] = _numbered(module or leaf, taken)
        for var, parent in parents.items():
            if parent.var not in named:
                named[parent.var] = _numbered(f"{named[var].partition('#')[0]}:blocks", taken)
                sizes[parent.var] = parent.size
        first_use = {
            var: min(self.first_use[self.canonical.get(m.tensor, m.tensor)] for m in places)
            for var, places in members.items()
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
