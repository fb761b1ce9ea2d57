"""Networks of the user's own, named as `module:function` on the command line."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastar.errors import FastarError

Example = tuple[Tensor, ...] | Mapping[str, Tensor]
"""Arguments of a network's forward: positional inputs, or inputs by keyword."""


def own_model(reference: str, input_shape: str | None = None) -> tuple[nn.Module, Example]:
    """The network that `reference` makes, in evaluation mode on the CPU, and example inputs for it.

    Args:
        reference: `module:function`, looked for in the current folder too, or `file.py:function`. The function takes
            no arguments and returns a network, or (network, example inputs): a tensor, a tuple of tensors, or a mapping
            of keywords to tensors.
        input_shape: `2x3x32x32`: floating-point zeros of this shape as the example, in place of the function's.

    Raises:
        FastarError: nothing of this name, a function that raises or returns something else, or no example inputs.
    """
    function = _function(reference)
    try:
        made = function()
    except (Exception, SystemExit) as error:
        raise FastarError(
            f"--model {reference}: calling it failed ({type(error).__name__}: {' '.join(str(error).split())}); it is "
            "called without arguments and returns a network"
        ) from error
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise FastarError(
            f"--model {reference}: returned {type(model).__name__}, not a torch.nn.Module; return a network, or "
            "(network, example inputs)"
        )
    if input_shape is not None:
        example = torch.zeros(_shape(input_shape), dtype=torch.float32, device="cpu")
    if example is None:
        raise FastarError(
            f"--model {reference}: no example inputs to trace it with; give --input-shape, such as 2x3x32x32, or "
            "return (network, example inputs)"
        )
    inputs = (example,) if isinstance(example, Tensor) else example
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    if not isinstance(inputs, tuple | list | Mapping) or not all(isinstance(value, Tensor) for value in values):
        raise FastarError(
            f"--model {reference}: example inputs must be a tensor, a tuple of tensors, or a mapping of keywords to "
            "tensors"
        )
    return model.cpu().eval(), inputs if isinstance(inputs, Mapping) else tuple(inputs)


def _function(reference: str) -> Any:
    name, colon, attribute = reference.rpartition(":")
    if not colon or not name or not attribute:
        raise FastarError(f"--model {reference}: write module:function or file.py:function, such as mynets:build")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as `python -m` has it
    file = Path(name) if name.endswith(".py") or os.sep in name else None
    if file is not None and not file.is_file():
        raise FastarError(f"--model {reference}: there is no file {file}; name one, or an installed module")
    try:
        module = importlib.import_module(name) if file is None else _module_in(file)
    except (Exception, SystemExit) as error:
        remedy = "run from the folder that holds it, or install it"
        if "torchvision::" in str(error):
            remedy = "torchvision is of another build than torch: `fastar doctor` says more"
        elif file is not None:
            remedy = "mend it; what is to run as a program alone belongs under `if __name__ == '__main__'`"
        raise FastarError(
            f"--model {reference}: cannot import {name} ({type(error).__name__}: {' '.join(str(error).split())}); "
            f"{remedy}"
        ) from error
    found = getattr(module, attribute, None)
    if found is None:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise FastarError(f"--model {reference}: {name} has no {attribute}; {hint}it is {module.__file__}")
    if not callable(found):
        raise FastarError(f"--model {reference}: {attribute} is {type(found).__name__}, not a function")
    return found


def _module_in(file: Path) -> ModuleType:
    """The module that a file holds; it may import its neighbours."""
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    # A name of its own: the file's may be another module's.
    spec = importlib.util.spec_from_file_location(f"fastar_model_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError("no Python source; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _shape(text: str) -> tuple[int, ...]:
    parts = text.replace(",", "x").split("x")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise FastarError(f"--input-shape {text}: write lengths joined by x, such as 2x3x32x32")
    return tuple(int(part) for part in parts)
