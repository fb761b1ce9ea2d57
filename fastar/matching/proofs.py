"""Symmetries that were derived and proven before, kept on disk, so that the next run of an architecture pays neither.

A record is found by a digest of everything that decides what a model computes, its weights aside: the pickled modules
(every attribute, names, shapes and ties of tensors, forward hooks), the code of their classes' functions, the example
inputs (shapes and types of tensors, other values whole), the sources of this room, and the versions of Python and
torch. It also names each source file of which a function ran in the forward pass that proved it, or that holds a class
of one of the modules, with a digest of the file: where any differs, the record does not count. What is left unseen is
what a forward pass reads from elsewhere: environment variables, files, variables of modules of which no function runs.
Models that cannot be pickled, or run code that is in no file (a notebook), are derived every time.

The folder is `FASTAR_CACHE`/symmetries (by default ~/.cache/fastar/symmetries); FASTAR_CACHE=off keeps nothing on disk.
Beside it the process remembers what it has found.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import os
import pickle
import platform
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastar.atomic import write_atomically
from fastar.errors import FastarError
from fastar.matching.symmetry import Group, Member, Symmetry

_log = logging.getLogger(__name__)
_remembered: dict[str, tuple[dict[str, str], Symmetry]] = {}


def folder() -> Path | None:
    """Where records are kept; None: nowhere."""
    chosen = os.environ.get("FASTAR_CACHE", "~/.cache/fastar")
    return None if chosen == "off" else Path(chosen).expanduser() / "symmetries"


def digest_of(model: nn.Module, example_inputs: object, **options: object) -> str | None:
    """The name of a model's record, 64 hexadecimal digits; None where it cannot be told what the model computes."""
    file = io.BytesIO()
    try:
        pickle.Pickler(file, protocol=4).dump(
            (skeleton(model).eval(), _shapes(example_inputs), sorted(options.items()))
        )
    except (pickle.PicklingError, TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError) as why:
        _log.debug("%s cannot be pickled, so that its symmetry is not kept: %s", type(model).__name__, why)
        return None
    seen = json.dumps([platform.python_version(), torch.__version__, _room(), [_code(c) for c in _classes(model)]])
    return hashlib.sha256(file.getvalue() + seen.encode()).hexdigest()


def _classes(model: nn.Module) -> list[type]:
    """The classes of all modules and their bases, torch's own left out."""
    found = {base: None for module in model.modules() for base in type(module).__mro__}
    return [one for one in found if one.__module__.partition(".")[0] not in ("torch", "builtins")]


def _code(one: object) -> Any:
    """What a class or function does, as lists and texts: it may have been replaced since its file was read."""
    if isinstance(one, type):
        return [one.__module__, one.__qualname__, [[name, _code(value)] for name, value in sorted(vars(one).items())]]
    if isinstance(one, types.CodeType):
        names = [*one.co_names, *one.co_varnames, *one.co_freevars]
        return [one.co_code.hex(), names, [_code(constant) for constant in one.co_consts]]
    if isinstance(one, classmethod | staticmethod):
        return _code(one.__func__)
    if isinstance(one, property):
        return _code(one.fget)
    code = getattr(one, "__code__", None)
    if code is not None:
        return _code(code)
    if isinstance(one, frozenset):
        return sorted(map(repr, one))
    return repr(one) if isinstance(one, str | bytes | int | float | bool | tuple | None) else type(one).__name__


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters and buffers have shapes but no values and take no memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ("tensor", tuple(value.shape), str(value.dtype))
    if isinstance(value, Mapping):
        return sorted((str(key), _shapes(one)) for key, one in value.items())
    return [_shapes(one) for one in value] if isinstance(value, tuple | list) else value


@cache
def _room() -> str:
    """Digest of the sources that derive and prove."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextmanager
def watching(files: set[str]) -> Iterator[None]:
    """Inside, `files` collects the names of the files whose functions are called in this thread."""
    before = sys.getprofile()

    def called(frame: Any, event: str, argument: object) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    sys.setprofile(called)
    try:
        yield
    finally:
        sys.setprofile(before)


def _digests(files: set[str]) -> dict[str, str] | None:
    """File -> digest, torch and Python themselves left out; None where code that ran is in no file."""
    ours = str(Path(__file__).parent)
    known = (str(Path(torch.__file__).parent), sysconfig.get_paths()["stdlib"], ours, "<frozen", "<string>")
    out = {}
    for file in files:
        third_party = "site-packages" in file and not file.startswith(known[0])
        if file.startswith(known) and not third_party:
            continue
        try:
            out[file] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except OSError:
            return None
    return out


def find(digest: str) -> Symmetry | None:
    """The symmetry that was proven under this digest, if all the code that ran then is as it was."""
    if digest in _remembered:
        files, symmetry = _remembered[digest]
        return symmetry if _digests(set(files)) == files else None
    where = folder()
    if where is None:
        return None
    try:
        text = (where / f"{digest}.json").read_text()
        whole, _, body = text.partition("\n")
        if hashlib.sha256(body.encode()).hexdigest() != whole:
            return None
        record = json.loads(body)
        if _digests(set(record["files"])) != record["files"]:
            return None
        _remembered[digest] = record["files"], _symmetry(record["symmetry"])
        return _remembered[digest][1]
    except (OSError, ValueError, KeyError, TypeError, FastarError) as why:
        if not isinstance(why, FileNotFoundError):
            _log.warning("%s: not read (%s); the symmetry is derived again", where / f"{digest}.json", why)
        return None


def keep(digest: str, model: nn.Module, symmetry: Symmetry, ran: set[str]) -> None:
    """Write down that `symmetry` was proven; `ran` are the files whose functions ran. A full disk is not an error."""
    homes = {getattr(sys.modules.get(one.__module__), "__file__", None) or "?" for one in _classes(model)}
    where, digests = folder(), _digests(ran | homes)
    if digests is None:
        return
    _remembered[digest] = digests, symmetry
    if where is None:
        return
    body = json.dumps({"files": digests, "symmetry": asdict(symmetry)})
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
