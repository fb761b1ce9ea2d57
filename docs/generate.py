"""The pages command-line.md and configuration.md, made from the code.

python docs/generate.py            # after a change of an option or a setting; a test holds the pages up to date
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from fastar.cli.main import app
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
    tree = ast.parse(inspect.getsource(sys.modules[section.__module__]))
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


def commands_markdown() -> str:
    """A section for each command: what it does, its arguments and options in a table, and examples."""
    group: Any = typer.main.get_command(app)  # typer may carry click within itself, so its types have no fixed name
    lines = []
    for name, command in group.commands.items():
        text, _, examples = (command.help or "").partition("\nExample")
        lines += [f"## `fastar {name}`", "", text.strip(), "", "| option | meaning | default |", "|---|---|---|"]
        for parameter in command.params:
            if parameter.name != "help":
                lines.append(f"| {' | '.join(_cells(parameter))} |")
        lines += ["", "```sh", *(line.strip() for line in examples.splitlines() if "fastar" in line), "```", ""]
    return "\n".join(lines)


def _cells(parameter: Any) -> tuple[str, str, str]:
    meaning = (parameter.help or "").replace("|", "\\|")
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`", meaning, ""
    names = ", ".join((*parameter.opts, *parameter.secondary_opts))
    value = f" {parameter.metavar}" if parameter.metavar else ""
    default = "" if parameter.default is None or isinstance(parameter.default, bool) else f"`{parameter.default}`"
    return f"`{names}{value}`".replace("|", "\\|"), meaning, default


COMMANDS = """# Command line

Every command says the same with `--help`. Any setting can be given as `key=value` too.
<!-- made by docs/generate.py -->
"""
SETTINGS = """# Configuration

Every setting is a key of a YAML file (`--config FILE`, or the name of a recipe: `fastar configs`), and can be given on
the command line as `section.key=value`. A run folder's `config.yaml` has all of them as they were. Unknown keys are
refused, with the nearest known one. Old names still load, with one line that says the new one.
<!-- made by docs/generate.py -->
"""


def pages() -> dict[Path, str]:
    """Texts by the pages that they belong to."""
    folder = Path(__file__).resolve().parent
    return {
        folder / "command-line.md": f"{COMMANDS}\n{commands_markdown().rstrip()}\n",
        folder / "configuration.md": f"{SETTINGS}\n{settings_markdown().rstrip()}\n",
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
