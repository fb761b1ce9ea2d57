"""Derive the permutation symmetries of any model from its graph (torch.export), and prove them on random weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from fastar.errors import FastarError
from fastar.matching.axes import FIXED, Axis, AxisSolver, fixed
from fastar.matching.calls import Refused
from fastar.matching.rules import apply_rule
from fastar.matching.symmetry import Group, Member, Symmetry
from fastar.matching.verify import verify_symmetry


def derive_symmetry(model: nn.Module, example_inputs: tuple[Tensor, ...], *, verify: bool = True) -> Symmetry:
    """The groups of hidden units of `model` that can be permuted without changing what it computes.

    The model is copied and traced in evaluation mode; labels of axes are propagated from operation to operation, inputs
    and outputs held in place. `model` itself is not touched. Batch sizes in `example_inputs` do not matter.

    Args:
        verify: also prove the result numerically (`verify_symmetry`).

    Raises:
        FastarError: the model cannot be traced, or an operation's symmetry cannot be proven; names node and operation.
    """
    name = type(model).__name__
    program = _trace(model, example_inputs, name)
    symmetry = _Derivation(model, program, name).symmetry()
    if verify:
        verify_symmetry(model, symmetry, example_inputs)
    return symmetry


def _trace(model: nn.Module, example_inputs: tuple[Tensor, ...], name: str) -> torch.export.ExportedProgram:
    """A functional graph of ATen operations, with linear, convolution and normalisation kept whole."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(copy.deepcopy(model).eval(), example_inputs)
            return program.run_decompositions({})
    except Exception as error:
        # torch.export raises many kinds of errors, also from the model's own code; all of them mean the same here.
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FastarError(
            f"cannot trace {name} with torch.export to find its permutation groups: {first_line}; "
            "its forward must not branch on values"
        ) from error


class _Derivation:
    """One pass over a traced graph."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram, name: str):
        self.name, self.program, self.solver = name, program, AxisSolver()
        persistent = model.state_dict(keep_vars=True)
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.buffers = {n: t for n, t in persistent.items() if n not in self.parameters and isinstance(t, Tensor)}
        first_name: dict[int, str] = {}
        self.canonical = {n: first_name.setdefault(id(p), n) for n, p in self.parameters.items()}
        self.tensors: dict[str, tuple[Axis, ...]] = {}
        self.first_use: dict[str, int] = {}

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
                try:
                    labels[node] = apply_rule(node, labels, self.solver)
                except Refused as why:
                    raise self._refusal(node, str(why)) from why
            elif node.op != "output":
                raise self._refusal(node, "unknown kind of node")
        self._fix_outputs(labels)
        return Symmetry(
            groups=self._groups(),
            parameters={n: tuple(p.shape) for n, p in self.parameters.items()},
            buffers={n: tuple(b.shape) for n, b in self.buffers.items()},
            tied={n: first for n, first in self.canonical.items() if n != first},
        )

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

    def _placeholder(self, node: fx.Node, statistics: set[str]) -> tuple[Axis, ...]:
        value, spec = node.meta.get("val"), self._spec(node)
        if not isinstance(value, Tensor):
            return ()
        shape = tuple(int(n) for n in value.shape)
        movable = spec.kind == InputKind.PARAMETER or (node.name in statistics and spec.target in self.buffers)
        if not movable:
            return tuple(fixed(n) for n in shape)
        target = self.canonical.get(spec.target, spec.target)
        if target not in self.tensors:
            self.tensors[target] = tuple(self.solver.fresh(n) for n in shape)
        return self.tensors[target]

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
        """Unknowns that stayed free, as groups in order of first use."""
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
        groups: list[Group] = []
        for var, places in members.items():
            producers = [m.tensor for m in places if m.axis == 0 and m.tensor in self.parameters]
            module, _, leaf = (producers or [places[0].tensor])[0].rpartition(".")
            base = module or leaf
            taken = sum(1 for g in groups if g.name == base or g.name.startswith(f"{base}#"))
            groups.append(Group(f"{base}#{taken}" if taken else base, sizes[var], tuple(places)))
        order = {id(g): min(self.first_use[self.canonical.get(m.tensor, m.tensor)] for m in g.members) for g in groups}
        return tuple(sorted(groups, key=lambda g: order[id(g)]))

    def _refusal(self, node: fx.Node, why: str) -> FastarError:
        stack = node.meta.get("nn_module_stack") or {}
        module = list(stack.values())[-1][0] if stack else ""
        where = f" in module {module!r}" if module else ""
        return FastarError(
            f"cannot derive the permutation groups of {self.name}: {node.target} (node {node.name}{where}): {why}; "
            "it is not matched rather than matched wrongly: rewrite that part, or run without matching"
        )


def _axes(labels: Any) -> list[Axis]:
    """All axes in the labels of a node, whether of one tensor or of several."""
    if labels and labels[0] and isinstance(labels[0][0], tuple):
        return [axis for one in labels for axis in one]
    return list(labels)
