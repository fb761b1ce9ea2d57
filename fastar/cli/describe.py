"""All commands with their options, as Markdown: for the documentation. Imports no torch."""

from __future__ import annotations

from typing import Any

import typer

from fastar.cli.main import app


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
