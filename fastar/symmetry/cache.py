"""Proven symmetries of fastar's own architectures, kept on disk, so that the next run of one need not derive it again.

The graph of such a network follows from its name, options and shape. A record is found by these, the names and shapes
of the tensors, the sources of `fastar/symmetry` and `fastar/models`, and the versions of Python and torch. Users'
networks are traced and proven in every process: their code may change under the same name.

CPU seconds on one thread, torch 2.13 (the first trace of a process takes 1.5 more):

| network | trace | derive | prove |
|---|---|---|---|
| mlp | 0.15 | 0.00 | 0.00 |
| resnet18, 32 x 32 | 0.95 | 0.03 | 0.95 |
| a user's ViT-B/16, 224 x 224 | 2.3 | 0.03 | 7.9 |

Records lie in `FASTAR_CACHE`/symmetries (by default ~/.cache/fastar/symmetries); FASTAR_CACHE=off keeps none.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._pytree import tree_map

from fastar.config.settings import cache_folder
from fastar.errors import FastarError
from fastar.flat.forward import Batch
from fastar.runs import write_atomically
from fastar.runtime.json_files import content_digest, read_object, sealed, unsealed
from fastar.symmetry.symmetry import Symmetry, without_groups

_log = logging.getLogger(__name__)
_FASTAR = Path(__file__).parent.parent


def record_of(name: object, model: nn.Module, example_inputs: Batch, **options: object) -> Path | None:
    """The file that holds the symmetry of an architecture; None if none is kept, or `model` runs others' code.

    Args:
        name: what builds the architecture: its name, options and shape; JSON.
    """
    kept = cache_folder()
    if kept is None or not _runs_own_code(model):
        return None
    what = {
        "name": name,
        "class": type(model).__qualname__,
        "tensors": asdict(without_groups(model)),
        "inputs": str(tree_map(lambda x: (x.dtype, x.shape) if isinstance(x, Tensor) else x, example_inputs)),
        "options": options,
        "sources": [_sources(room) for room in ("symmetry", "models")],
        "versions": [platform.python_version(), torch.__version__],
    }
    return kept / "symmetries" / f"{content_digest(what)}.json"


def _runs_own_code(model: nn.Module) -> bool:
    """Tell whether all modules are fastar's or torch's, and nothing is hooked to them."""

    def hooked(attributes: dict[str, Any], start: str = "") -> bool:
        return any(value for key, value in attributes.items() if key.startswith(start) and key.endswith("_hooks"))

    return not hooked(vars(hooks), "_global_") and all(
        type(module).__module__.partition(".")[0] in ("torch", "fastar")
        and "forward" not in vars(module)
        and not hooked(vars(module))
        for module in model.modules()
    )


@cache
def _sources(room: str) -> str:
    """Digest of the sources in a folder of fastar."""
    files = sorted((_FASTAR / room).rglob("*.py"))
    return hashlib.sha256(b"\0".join(file.name.encode() + b"\0" + file.read_bytes() for file in files)).hexdigest()


def find(record: Path | None) -> Symmetry | None:
    """The symmetry in a record; None if there is none, or it is damaged."""
    if record is None:
        return None
    try:
        content, whole = unsealed(read_object(record))
        if not whole:
            raise ValueError("it has no digest")
        return TypeAdapter(Symmetry).validate_python(content["symmetry"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, FastarError) as why:
        _log.warning("%s: not read (%s); the symmetry is derived again", record, why)
        return None


def keep(record: Path | None, symmetry: Symmetry) -> None:
    """Write down that `symmetry` was proven. A full disk is not an error."""
    if record is None:
        return
    try:
        write_atomically(record, json.dumps(sealed({"symmetry": asdict(symmetry)})).encode())
    except FastarError as why:
        _log.warning("%s", why)
