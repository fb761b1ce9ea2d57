"""The configurations that ship at a glance, with the paper's figures beside: `fastar configs`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from fastar.config import Settings, load_settings
from fastar.config.recipes import Figure, Paper, names, read_paper, recipe_path
from fastar.runtime.standard_streams import plus_minus


@dataclass(frozen=True)
class Entry:
    """One configuration, at the scale asked for."""

    name: str
    settings: Settings
    paper: Paper | None

    def as_dict(self) -> dict[str, Any]:
        paper = None if self.paper is None else self.paper.model_dump(mode="json")
        return {"config": self.name, "settings": self.settings.model_dump(mode="json"), "paper": paper}


def catalogue(scale: str = "full") -> list[Entry]:
    """Every configuration that ships, the paper's in its order first."""
    found = []
    for name in names():
        path = recipe_path(Path(name))
        found.append(Entry(name, load_settings(file=path, scale=scale), read_paper(path)))
    return sorted(found, key=_place)


def _place(entry: Entry) -> tuple[Any, ...]:
    if entry.paper is None:
        return (True,)
    kind, _, number = entry.paper.where.partition(" ")
    return False, kind != "table", kind, int(number), entry.settings.dataset.name, entry.settings.sources.number


def catalogue_table(entries: Iterable[Entry]) -> Table:
    """One row each: what is trained, and the paper's train barriers and where it has them."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("config", no_wrap=True)
    table.add_column("Z + H", justify="right", no_wrap=True)
    for column in ("paper", "regular", "star"):
        table.add_column(column, no_wrap=True)
    for entry in entries:
        sources, paper = entry.settings.sources, entry.paper or Paper(where="")
        table.add_row(
            entry.name,
            f"{sources.number} + {sources.heldout}",
            paper.where,
            _shown(paper.regular_regular),
            _shown(paper.star_regular),
        )
    return table


def _shown(figure: Figure | None) -> str:
    if figure is None:
        return ""
    mean, deviation = figure
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} {plus_minus()}{deviation:.3f}"
