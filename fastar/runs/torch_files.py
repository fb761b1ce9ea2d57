"""Files that torch.save wrote: checked before they are unpickled, and the state dict within what was saved."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastar.errors import FastarError
from fastar.runs.model_names import require_file


def read_torch(path: Path) -> Any:
    """The content of a file of torch.save, on the CPU; no code of it runs, and its own checksums hold.

    Raises:
        FastarError: missing or damaged, or more than weights.
    """
    require_file(path)
    try:
        _check_members(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # truncated, no pickle, or one that would run code
        wanted = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        why = f"it asks for {wanted[1]}" if wanted else "damaged, or more than tensors"
        raise FastarError(f"{path}: cannot be read as weights only: {why}; save model.state_dict() alone") from error
    except Exception as error:  # what is damaged is met anywhere within torch and pickle: any exception says that
        lines = re.sub(r"\x1b\[\d*m", "", str(error)).split("\n")
        why = f"{type(error).__name__}: {lines[0][:120]}"
        raise FastarError(f"{path}: not a readable PyTorch file ({why}); restore it or leave it out") from error


def _check_members(path: Path) -> None:
    """Raise ValueError unless each member of the zip file `path` has the checksum that is stored with it, which torch
    does not look at, and none is marked as a folder, of which torch reads nothing and gives what memory held.

    Older files are no zip files, and have no checksums.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        bad = archive.testzip()
        folders = [member.filename for member in archive.infolist() if member.is_dir() or member.external_attr & 0x10]
    if folders:
        raise ValueError(f"{folders[0]} is marked as a folder (damaged)")
    if bad is not None:
        raise ValueError(f"{bad} has another checksum than was saved (damaged)")


@dataclass(frozen=True)
class Found:
    """A state dict within what was saved.

    Args:
        state: name -> tensor.
        under: the entries that lead to it, outermost first.
        left: what else was there, by name.
    """

    state: dict[str, Tensor] = field(repr=False)
    under: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


_CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
)
_AVERAGED = re.compile(r"(^|[_.\-])(ema|swa|avg|averaged?|shadow)([_.\-]|$)", re.IGNORECASE)
_NO_MODEL = re.compile(r"optim|sched|scaler|rng|random", re.IGNORECASE)
_DEPTH = 4


def is_averaged(name: str) -> bool:
    """Tell whether an entry or a prefix has a name that averages of a training's weights have."""
    return _AVERAGED.search(name) is not None


def state_within(content: Any, where: str) -> Found:
    """The state dict in what torch.save was given: bare, or an entry of what a training keeps beside.

    The plain weights are preferred to an average of them (EMA).

    Args:
        where: what errors call it.

    Raises:
        FastarError: none, or several that may be meant.
    """
    under: list[str] = []
    left: list[str] = []
    while len(under) < _DEPTH:
        if not isinstance(content, Mapping):
            break
        chosen = _chosen(content, where)
        if chosen is None:
            break
        left += [".".join([*under, str(name)]) for name in content if name != chosen]
        under.append(chosen)
        content = content[chosen]
    if not isinstance(content, Mapping):
        raise FastarError(f"{where}: expected a state dict, found {type(content).__name__}; save model.state_dict()")
    # State that modules keep of their own (`get_extra_state`) is no weight.
    extra = [name for name in content if isinstance(name, str) and name.rpartition(".")[2] == "_extra_state"]
    state = {name: value for name, value in content.items() if name not in extra}
    other = [name for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if other:
        raise FastarError(
            f"{where}: entry {other[0]!r} is no named tensor; save model.state_dict() alone or as 'state_dict'"
        )
    return Found(state, tuple(under), (*left, *extra))


def _chosen(content: Mapping[Any, Any], where: str) -> str | None:
    """The entry of `content` that holds the model; None: it is a state dict itself, or nothing that is known."""
    named = [name for name in _CONTAINERS if isinstance(content.get(name), Mapping)]
    bare = any(isinstance(value, Tensor) for value in content.values())
    full = [name for name in named if _holds_tensors(content[name])]
    others = [name for name, value in content.items() if isinstance(name, str) and _holds_tensors(value)]
    others = [name for name in others if name not in named and not _NO_MODEL.search(name)]
    plain = [name for name in others if not is_averaged(name)]
    for some in (full, *(() if bare or named else (plain, others))):
        if len(some) > 1:
            raise FastarError(
                f"{where}: holds several networks ({', '.join(map(repr, some))}); save the one that is meant alone"
            )
        if some:
            return some[0]
    return named[0] if named else None


def _holds_tensors(value: Any, depth: int = _DEPTH) -> bool:
    if not isinstance(value, Mapping) or depth == 0 or "param_groups" in value:
        return False
    if any(isinstance(one, Tensor) for one in value.values()):
        return True
    return any(_holds_tensors(value[name], depth - 1) for name in _CONTAINERS if name in value)
