"""Code of users: functions named as `module:function`, how to run them, and digests of what they are written as."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from fastar.errors import FastarError, UserCodeError

# Modules between a command and the user's code.
_ON_THE_WAY = ("fastar", "torch", "contextlib")


def is_reference(text: str) -> bool:
    """Tell whether `text` names a function: `module:function` or `file.py:function`."""
    return ":" in text


def can_be_found(text: str) -> bool:
    """Tell whether `text` may name something that another program finds: what a script or a function holds it does not.

    >>> can_be_found("mynets:build"), can_be_found("__main__:build"), can_be_found("mynets:main.<locals>.build")
    (True, False, False)
    """
    return not text.startswith(("__main__:", "python:")) and "<" not in text


def check_reference(reference: str, option: str) -> None:
    """Raise FastarError unless `reference` names a function."""
    name, colon, attribute = reference.rpartition(":")
    if not colon or not name or not attribute:
        raise FastarError(f"{option} {reference}: write module:function or file.py:function, such as mynets:build")


def find_function(reference: str, option: str) -> Callable[..., Any]:
    """The function that `reference` names.

    Args:
        reference: `module:function`, looked for in the current folder too, or `file.py:function`.
        option: that it was given by, for errors.

    Raises:
        FastarError: nothing of this name, or no function.
    """
    check_reference(reference, option)
    name, _, attribute = reference.rpartition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the current folder, as `python -m` has it
    file = Path(name) if name.endswith(".py") or os.sep in name else None
    if file is not None and not file.is_file():
        raise FastarError(f"{option} {reference}: there is no file {file}; name one, or an installed module")
    try:
        module = importlib.import_module(name) if file is None else _module_in(file)
    except (Exception, SystemExit) as error:
        remedy = "run from the folder that holds it, or install it"
        if "torchvision::" in str(error):
            remedy = "torchvision is of another build than torch: `fastar doctor` says more"
        elif file is not None or not isinstance(error, ImportError):
            remedy = "mend it; what is to run as a program alone belongs under `if __name__ == '__main__'`"
        raise FastarError(
            f"{option} {reference}: cannot import {name} ({type(error).__name__}: {' '.join(str(error).split())}); "
            f"{remedy}"
        ) from error
    found: Any = getattr(module, attribute, None)
    if found is None:
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise FastarError(f"{option} {reference}: {name} has no {attribute}; {hint}it is {module.__file__}")
    if not callable(found):
        raise FastarError(f"{option} {reference}: {attribute} is {type(found).__name__}, not a function")
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
    module = sys.modules.get(spec.name)
    if module is not None and getattr(module, "__file__", None) == str(file):
        return module  # its classes are those of the models that were made before
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


@contextmanager
def users_code(what: str) -> Iterator[None]:
    """Inside, an error of a user's code is one line that says what was called; its traceback is shown above it.

    Memory that runs out is no error of the code: who called it says what to lower.
    """
    try:
        yield
    except FastarError:
        raise
    except (Exception, SystemExit) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            raise
        text = " ".join(str(error).split())
        raise UserCodeError(f"{what} failed ({type(error).__name__}{f': {text}' if text else ''})") from error


def users_traceback(error: UserCodeError) -> str:
    """The traceback of the error in the user's code, from its first frame that is not fastar's own, without torch's."""
    cause = error.__cause__
    if cause is None:
        return ""
    frames = cause.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _ON_THE_WAY:
        frames = frames.tb_next
    if frames is None:  # it never came to the user's code
        return ""
    shown = traceback.TracebackException(type(cause), cause, frames)
    kept = [frame for frame in shown.stack if f"{os.sep}site-packages{os.sep}torch{os.sep}" not in frame.filename]
    shown.stack = traceback.StackSummary.from_list(kept)
    return "".join(shown.format())


def name_of(function: Any) -> str:
    """The name that a function, a class or another callable is recorded under: `module:name`."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    called = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{getattr(function, '__module__', None) or type(function).__module__}:{called}"


def source_digest(objects: Iterable[Any]) -> str:
    """A SHA-256 of what functions and classes are written as, and of what else of their modules they use; of libraries
    (torch, fastar), of their names alone."""
    digest, waiting, seen = hashlib.sha256(), list(objects), list[Any]()
    for one in waiting:  # which grows
        if one in seen:
            continue
        seen.append(one)
        digest.update(_source(one).encode())
        if not (inspect.isroutine(one) or inspect.isclass(one)):  # an object that is called: what it holds, too
            digest.update((_value(one, own=True) or "").encode())
        for name, used in sorted(_used(one).items()):
            if inspect.isfunction(used) or inspect.isclass(used):
                waiting.append(used)
                continue
            own = getattr(used, "__module__", None) == getattr(one, "__module__", "")
            if (text := _value(used, own=own)) is not None:
                digest.update(f"{name}={text}".encode())
    return digest.hexdigest()


def _used(one: Any) -> dict[str, Any]:
    """Constants, functions and classes of its own module, or around it, that a function or a class uses, by names."""
    if isinstance(one, functools.partial):
        return {"": one.func}
    is_class = inspect.isclass(one)
    own = vars(one).values() if is_class else [one]
    found: dict[str, Any] = {base.__name__: base for base in (one.__bases__ if is_class else ())}
    for function in filter(inspect.isfunction, own):
        if "site-packages" not in function.__code__.co_filename:
            names = inspect.getclosurevars(function)
            found |= {**names.globals, **names.nonlocals}
    module = getattr(one, "__module__", None)
    return {
        name: used
        for name, used in found.items()
        if getattr(used, "__module__", module) == module or not (inspect.isroutine(used) or inspect.isclass(used))
    }


def _value(value: Any, *, own: bool = False, depth: int = 8) -> str | None:
    """A value as a text that is the same in another process: numbers, texts, arrays, tensors, collections, dataclasses
    and objects of a user's `own` classes; None of others."""
    if value is None or isinstance(value, int | float | str | bytes):
        return repr(value)
    if not depth or inspect.ismodule(value) or isinstance(value, functools.partial):
        return None
    if hasattr(value, "detach") and hasattr(value, "numpy"):  # of torch, which is not imported here
        value = value.detach().cpu()
        value = (value if "bfloat16" not in str(value.dtype) else value.float()).numpy()
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):
        digest = hashlib.sha256(value.tobytes()).hexdigest()
        return None if value.dtype.hasobject else f"{value.dtype}{value.shape}{digest}"
    if isinstance(value, Mapping):
        return repr([(str(key), _value(one, own=own, depth=depth - 1)) for key, one in value.items()])
    if isinstance(value, list | tuple):
        return repr([_value(one, own=own, depth=depth - 1) for one in value])
    if (own or dataclasses.is_dataclass(value)) and not (inspect.isroutine(value) or inspect.isclass(value)):
        held = {key: one for key, one in getattr(value, "__dict__", {}).items() if key != "training"}
        return _value(held, own=own, depth=depth - 1)
    return None


def _source(one: Any) -> str:
    if isinstance(one, functools.partial):
        return f"{_source(one.func)} {_value(one.args)} {_value(dict(sorted(one.keywords.items())))}"
    module = getattr(one, "__module__", None) or ""
    if module.partition(".")[0] in ("torch", "fastar"):
        return name_of(one)
    try:
        return inspect.getsource(one if inspect.isroutine(one) or inspect.isclass(one) else type(one))
    except (OSError, TypeError):  # typed in by hand, or written in C
        code = getattr(one, "__code__", None)
        return name_of(one) if code is None else f"{code.co_code.hex()} {code.co_consts!r} {code.co_names!r}"
