"""The paper's tables and figures: what each runs, and its numbers, from `paper.yaml`. Imports no torch."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from fastar.config.recipes import read_paper, recipe_path
from fastar.errors import FastarError

FILE = Path(__file__).with_name("paper.yaml")
SCALES = ("full", "small", "smoke")
# Figures of a configuration's own `paper` section.
OF_CONFIG = {"regular": "regular_loss", "star": "star_loss", "RR": "regular_regular", "SR": "star_regular"}


@cache
def paper() -> dict[str, Any]:
    """All ids in the paper's order, each with its title and its parts."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is ten times faster, where PyYAML has it
    found: dict[str, Any] = yaml.load(FILE.read_text(encoding="utf-8"), loader)
    return found


def check_id(name: str) -> None:
    """Raise FastarError unless there is a table or figure of this name."""
    if name not in paper():
        near = difflib.get_close_matches(name, paper(), n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise FastarError(f"{name}: no such table or figure: {guess}`fastar reproduce --list` lists them")


def parts_of(name: str, scale: str) -> list[dict[str, Any]]:
    """The parts of a table or figure at a scale, those left out that it does not have; their rows' names are texts, and
    each row has its `figures`: name -> value, or [mean, standard deviation].

    Raises:
        FastarError: no such table or figure, or scale.
    """
    check_id(name)
    if scale not in SCALES:
        raise FastarError(f"--scale {scale}: choose smoke, small or full")
    found = []
    for given in paper()[name]["parts"]:
        part = {key: value for key, value in given.items() if key not in SCALES}
        for other in SCALES[1 : SCALES.index(scale) + 1]:
            part |= given.get(other, {})
        if not part.pop("skip", False):
            part["rows"] = {str(row): _row(part, dict(of)) for row, of in part.get("rows", {}).items()}
            found.append(part)
    return found


def _row(part: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {key: given.pop(key) for key in ("config", "set", "curves") if key in given}
    own = read_paper(recipe_path(Path(row["config"]))) if "config" in row else None
    if own is not None and part.get("split", "train") == "train":
        numbers = {figure: getattr(own, name) for figure, name in OF_CONFIG.items()}
        given = {figure: list(number) for figure, number in numbers.items() if number is not None} | given
    return {**row, "figures": given}
