"""Output of commands: tables, lines, JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable

WIDE = 1000


def print_table(table: object) -> None:
    from rich.console import Console

    # A file or a pipe has no width: rich would take 80 columns, and fold and cut what is wider.
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    # Names are printed as they are, whatever brackets and colons are in them.
    Console(width=WIDE if piped else None, markup=False, emoji=False).print(table)


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def print_json(content: object) -> None:
    print(json.dumps(content))
