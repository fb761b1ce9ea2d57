"""Permutation groups of other libraries' networks: a table for docs/symmetries.md, one row per network.

    python tools/symmetry_table.py                    all that are installed, as a table
    python tools/symmetry_table.py resnet50 gpt2      some of them
    python tools/symmetry_table.py --write            the table between the marks in docs/symmetries.md

Networks are built without weights. Seconds are of CPU time on this machine, so that others may work on it; tracing with
derivation and proof apart.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from symmetry_networks import NETWORKS

from fastar.errors import FastarError
from fastar.symmetry import Symmetry, derive_symmetry, verify_symmetry

DOCS = Path(__file__).resolve().parent.parent / "docs" / "symmetries.md"
BEGIN, END = "<!-- table: python tools/symmetry_table.py --write -->", "<!-- end of table -->"


@dataclass(frozen=True)
class Found:
    """What is told of a network. Seconds are of CPU time: of tracing and deriving, and of the proof."""

    name: str
    package: str
    symmetry: Symmetry
    graph: float
    proof: float

    def units(self, *, blocks: bool = False) -> int:
        """Units of all groups, or of those in blocks."""
        return sum(group.size for group in self.symmetry.groups if group.parent or not blocks)


COLUMNS: dict[str, Callable[[Found], str]] = {
    "network": lambda found: found.name,
    "of": lambda found: found.package,
    "groups": lambda found: str(len(found.symmetry.groups)),
    "units": lambda found: f"{found.units():,}",
    "of these in blocks": lambda found: f"{found.units(blocks=True):,}",
    "lines of what is held": lambda found: str(len(found.symmetry.frozen)),
    "seconds (graph + proof)": lambda found: f"{found.graph:.1f} + {found.proof:.1f}",
}
"""Heading -> cell. The first two are told of a network that is refused too."""


def row(name: str) -> str:
    """One line of the table."""
    package = NETWORKS[name].func.__name__.removeprefix("_")
    model, inputs = NETWORKS[name]()
    began = time.process_time()
    try:
        symmetry = derive_symmetry(model, inputs, verify=False)
        derived = time.process_time()
        verify_symmetry(model, symmetry, inputs, controls=False)
    except FastarError as why:
        return line([name, package, f"refused: {str(why).replace('|', '/')}"])
    found = Found(name, package, symmetry, derived - began, time.process_time() - derived)
    return line([cell(found) for cell in COLUMNS.values()])


def line(cells: list[str]) -> str:
    """Cells of a line, those that are missing empty."""
    return f"| {' | '.join(cells + [''] * (len(COLUMNS) - len(cells)))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    listed = ", ".join(NETWORKS)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"networks (default: all installed): {listed}")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCS.name}")
    options = parser.parse_args()
    for name in options.names:
        if name not in NETWORKS:
            parser.error(f"no network {name!r}: give some of {listed}")
    warnings.simplefilter("ignore")
    names = options.names or list(NETWORKS)
    lines = [line(list(COLUMNS)), "|---" * len(COLUMNS) + "|"]
    for name in names:
        try:
            lines.append(row(name))
        except ModuleNotFoundError as missing:
            lines.append(line([name, str(missing.name), "not installed"]))
        print(lines[-1], file=sys.stderr, flush=True)
    where = f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} CPU thread(s)"
    table = "\n".join([*lines, "", f"Seconds are of CPU time: {where}."])
    if options.write:
        pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
        text = DOCS.read_text()
        if not re.search(pattern, text, re.DOTALL):
            raise SystemExit(f"{DOCS}: the marks {BEGIN} and {END} are missing")
        DOCS.write_text(re.sub(pattern, lambda _: f"{BEGIN}\n{table}\n{END}", text, flags=re.DOTALL))
    else:
        print(table)


if __name__ == "__main__":
    main()
