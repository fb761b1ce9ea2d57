"""Symmetries that were derived and proven before, kept on disk, so that the next run of an architecture does not prove
them again.

What a model's symmetry is follows from its graph (torch.export), so a record is found by a digest of the graph itself:
every operation with its arguments, shapes and types; which inputs of the graph are which parameters and buffers, and
which of these are one tensor; the values of constants and of buffers that are not batch-norm statistics; the sources
of this room, and the versions of Python and torch. A model is therefore traced every time, whatever it is made of.

fastar's own architectures are not: their graph follows from their name and options, so that these, the names and
shapes of tensors and the sources of architectures find the record, if all their modules are fastar's or torch's and
nothing is hooked to them.

The folder is `FASTAR_CACHE`/symmetries (by default ~/.cache/fastar/symmetries); FASTAR_CACHE=off keeps nothing on disk.
Beside it the process remembers what it has found.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as hooks

from fastar.errors import FastarError
from fastar.runs import write_atomically
from fastar.symmetry.symmetry import Group, Member, Symmetry

_log = logging.getLogger(__name__)
_remembered: dict[str, Symmetry] = {}


class _Unknown(Exception):
    """A value in a graph whose digest would not say what it is."""


def folder() -> Path | None:
    """Where records are kept; None: nowhere."""
    chosen = os.environ.get("FASTAR_CACHE", "~/.cache/fastar")
    return None if chosen == "off" else Path(chosen).expanduser() / "symmetries"


def digest_of_graph(program: torch.export.ExportedProgram, model: nn.Module, **options: object) -> str | None:
    """The name of a traced model's record, 64 hexadecimal digits; None where the graph holds what has no digest."""
    try:
        signature = program.graph_signature
        specs = [[str(s.kind), repr(s.arg), s.target] for s in (*signature.input_specs, *signature.output_specs)]
        return _digest(
            ["graph", _graph(program.graph_module), specs, _values(program), _tensors(model), sorted(options.items())],
            "symmetry",
        )
    except _Unknown as why:
        _log.debug("%s: its symmetry is not kept: %s", type(model).__name__, why)
        return None


def digest_of_name(name: object, model: nn.Module, example_inputs: object, **options: object) -> str | None:
    """The name of the record of one of fastar's own architectures; None if `model` runs other code than fastar's.

    Args:
        name: what builds the architecture: its name, options and shape; JSON.
    """
    for module in model.modules():
        own = any(hooked for key, hooked in vars(module).items() if key.endswith("_hooks"))
        if own or "forward" in vars(module) or type(module).__module__.partition(".")[0] not in ("torch", "fastar"):
            return None
    if any(getattr(hooks, key) for key in vars(hooks) if key.startswith("_global_") and key.endswith("_hooks")):
        return None
    try:
        what = [
            "name",
            name,
            type(model).__qualname__,
            _tensors(model),
            _shapes(example_inputs),
            sorted(options.items()),
        ]
        return _digest(what, "symmetry", "models")
    except _Unknown:
        return None


def _digest(what: object, *rooms: str) -> str:
    try:
        text = json.dumps([what, platform.python_version(), torch.__version__, [_sources(room) for room in rooms]])
    except (TypeError, ValueError) as why:
        raise _Unknown(str(why)) from why
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _sources(room: str) -> str:
    """Digest of the sources in a folder of fastar."""
    files = sorted((Path(__file__).parent.parent / room).rglob("*.py"))
    return hashlib.sha256(b"\0".join(file.name.encode() + b"\0" + file.read_bytes() for file in files)).hexdigest()


def _tensors(model: nn.Module) -> list[list[Any]]:
    """Name, shape, kind and first name of all tensors of the state dict."""
    first: dict[int, str] = {}
    return [
        [name, list(tensor.shape), isinstance(tensor, nn.Parameter), first.setdefault(id(tensor), name)]
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.state_dict(keep_vars=True).items())
        if isinstance(tensor, Tensor)
    ]


def _graph(module: fx.GraphModule) -> list[Any]:
    """All nodes of a graph, and of the graphs that they call."""
    nodes: list[Any] = []
    for node in module.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        where = list(stack.values())[-1][0] if stack else ""
        called = None
        if node.op == "get_attr":
            value = module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            called = _graph(value) if isinstance(value, fx.GraphModule) else _value(value)
        operation = isinstance(node.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator)
        target = str(node.target)
        if node.op == "call_function" and not operation:
            target = f"{getattr(node.target, '__module__', '?')}.{getattr(node.target, '__qualname__', target)}"
        arguments = [_plain(node.args), _plain(node.kwargs)]
        nodes.append([node.op, node.name, target, where, called, arguments, _plain(node.meta.get("val"))])
    return nodes


def _plain(value: Any) -> Any:
    """An argument or a result as JSON that tells types apart."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, fx.Node):
        return ["node", value.name]
    if isinstance(value, Tensor):
        return ["tensor", str(value.dtype), list(map(str, value.shape)), list(map(str, value.stride()))]
    if isinstance(value, int | float | complex | torch.dtype | torch.device | torch.layout | torch.memory_format):
        return [type(value).__name__, repr(value)]
    if isinstance(value, tuple | list):
        return [type(value).__name__, *map(_plain, value)]
    if isinstance(value, slice):
        return ["slice", _plain(value.start), _plain(value.stop), _plain(value.step)]
    if isinstance(value, Mapping):
        return ["mapping", *([str(key), _plain(one)] for key, one in value.items())]
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return ["symbol", str(value)]
    raise _Unknown(f"a value of type {type(value).__name__}")


def _value(tensor: Any) -> str:
    """Digest of a tensor's values."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        raise _Unknown(f"a constant of type {type(tensor).__name__}")
    flat = tensor.detach().cpu().contiguous().flatten()
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + data).hexdigest()


def _values(program: torch.export.ExportedProgram) -> list[list[str]]:
    """Digests of constants and of buffers that are used, batch-norm statistics left out."""
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    out = []
    for spec in program.graph_signature.input_specs:
        target, name = spec.target, getattr(spec.arg, "name", None)
        if target is None or name not in used or target.endswith(("running_mean", "running_var")):
            continue
        value = program.constants.get(target, program.state_dict.get(target))
        if not isinstance(value, nn.Parameter):
            out.append([target, _value(value)])
    return out


def _shapes(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ["mapping", *([str(key), _shapes(one)] for key, one in value.items())]
    return [type(value).__name__, *map(_shapes, value)] if isinstance(value, tuple | list) else _plain(value)


def find(digest: str | None) -> Symmetry | None:
    """The symmetry that was proven under this digest."""
    if digest is None:
        return None
    if digest in _remembered:
        return _remembered[digest]
    where = folder()
    if where is None:
        return None
    try:
        text = (where / f"{digest}.json").read_text()
        whole, _, body = text.partition("\n")
        if hashlib.sha256(body.encode()).hexdigest() != whole:
            return None
        _remembered[digest] = _symmetry(json.loads(body)["symmetry"])
        return _remembered[digest]
    except (OSError, ValueError, KeyError, TypeError, FastarError) as why:
        if not isinstance(why, FileNotFoundError):
            _log.warning("%s: not read (%s); the symmetry is derived again", where / f"{digest}.json", why)
        return None


def keep(digest: str | None, symmetry: Symmetry) -> None:
    """Write down that `symmetry` was proven. A full disk is not an error."""
    if digest is None:
        return
    _remembered[digest] = symmetry
    where = folder()
    if where is None:
        return
    body = json.dumps({"symmetry": asdict(symmetry)})
    text = hashlib.sha256(body.encode()).hexdigest() + "\n" + body
    try:
        write_atomically(where / f"{digest}.json", text.encode())
    except FastarError as why:
        _log.warning("%s", why)


def _symmetry(record: dict[str, Any]) -> Symmetry:
    return Symmetry(
        groups=tuple(
            Group(g["name"], g["size"], tuple(Member(**m) for m in g["members"]), g["parent"]) for g in record["groups"]
        ),
        parameters={name: tuple(shape) for name, shape in record["parameters"].items()},
        buffers={name: tuple(shape) for name, shape in record["buffers"].items()},
        tied=record["tied"],
        frozen=tuple(record["frozen"]),
    )
