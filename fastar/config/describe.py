"""All settings with type, default and meaning, as Markdown: for the documentation. Imports no torch."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from fastar.config import settings as module
from fastar.config.settings import DATA_FOLDER, Settings


@dataclass(frozen=True)
class Described:
    """A setting: its dotted key, type and default as a user writes them, and its meaning in Markdown."""

    key: str
    type: str
    default: str
    meaning: str


def settings_markdown() -> str:
    """A section with a table for each section of settings, in the order of the YAML files."""
    lines = []
    for name, section in sections().items():
        lines += [f"## `{name}`" if name else "## At the top", "", _one_line(section.__doc__), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for one in described(name, section):
            cells = (f"`{one.key}`", one.type.replace("|", "\\|"), f"`{one.default}`", one.meaning.replace("|", "\\|"))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def sections() -> dict[str, type[BaseModel]]:
    """The sections by their dotted names; those settings that are in none by the name "" in the end."""
    return {**dict(_sections("", Settings)), "": Settings}


def described(name: str, section: type[BaseModel]) -> Iterator[Described]:
    """The settings of a section, its sub-sections left out."""
    meanings = _docstrings(section)
    for key, field in section.model_fields.items():
        if not _is_section(field.annotation):
            default = "needed" if field.is_required() else _shown(field.get_default())
            default = DATA_FOLDER if (name, key) == ("dataset", "directory") else default  # whatever FASTAR_DATA says
            yield Described(f"{name}.{key}".strip("."), _type_text(field.annotation), default, meanings[key])


def _sections(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        section: Any = field.annotation
        if _is_section(section):
            yield f"{prefix}{name}", section
            yield from _sections(f"{prefix}{name}.", section)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The docstrings that stand below the fields of a class."""
    tree = ast.parse(inspect.getsource(module))
    body = next(one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == section.__name__).body
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = _one_line(ast.literal_eval(text.value))
    return found


def _one_line(text: str | None) -> str:
    """A docstring as a cell of a table: the items of lists stand on lines of their own."""
    return " ".join(re.sub(r"\s*\n *- ", "<br>- ", text or "").split())


def _shown(value: Any) -> str:
    """A value as YAML and `key=value` have it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return str(value)


def _type_text(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_text(one) for one in args)
    if origin is tuple:
        inner = [_type_text(one) for one in args if one is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in args else f"[{', '.join(inner)}]"
    if args:  # Annotated
        return _type_text(args[0])
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Path: "path", type(None): "`null`"}
    return names[annotation]
