"""A table or figure of the paper: run, compared, and kept as `ID.json`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastar.config.paper import paper, parts_of
from fastar.errors import refusal
from fastar.experiments.reproduce.beside import as_paper, order_held, z_of
from fastar.experiments.reproduce.needed_runs import POINTS
from fastar.experiments.reproduce.shared_runs import SharedRuns
from fastar.experiments.sweeps.points import trainings
from fastar.runs import versions, write_json
from fastar.runtime.progress import SILENT, Progress


def reproduce(
    name: str, out: Path, *, scale: str = "full", overrides: Sequence[str] = (), progress: Progress = SILENT
) -> dict[str, Any]:
    """Run what is missing of a table or figure, and compare. Runs lie below `out`; models of equal recipes are shared.

    Args:
        name: an id of `fastar.config.paper`.
        out: of all tables and figures at this scale.
        overrides: `key=value` over the settings of all runs.

    Returns:
        The content of `out`/ID.json: title, scale, and parts; each has kind, name, config, rows (name -> figure ->
        ours, paper, z), order (`order_held`), failed (row -> why it could not be run), draw and files (what a picture
        is made of). Between other scales than full and the paper z is None: they are other networks.

    Raises:
        FastarError: as the runs raise it; what is finished stays.
    """
    from fastar.experiments.reproduce.kinds import KINDS  # imports torch, which `listed` does not need

    runs, parts, begin = SharedRuns(out, scale, overrides, progress), [], time.perf_counter()
    with refusal(f"{out}: cannot be used as the folder of a reproduction", "choose another (--out)"):
        out.mkdir(parents=True, exist_ok=True)
    for part in parts_of(name, scale):
        folder = out / "-".join([name, *([part["name"]] if "name" in part else [])])
        progress.line(f"{folder.name}: {part['kind']}")
        found = KINDS[part["kind"]](runs, part, folder)
        parts.append(
            {
                "kind": part["kind"],
                "name": part.get("name"),
                "config": part.get("config"),
                "split": part.get("split", "train"),
                "rows": _compared(part, found.rows, scale),
                "order": order_held(part.get("order", ()), found.rows),
                "failed": found.failed,
                "draw": found.draw,
                "files": {row: str(file.relative_to(out)) for row, file in found.files.items()},
                "curves": {row: of["curves"] for row, of in part["rows"].items() if "curves" in of},
            }
        )
    result = {
        "id": name,
        "title": paper()[name]["title"],
        "scale": scale,
        "parts": parts,
        "seconds": time.perf_counter() - begin,
        "versions": versions(),
    }
    write_json(out / f"{name}.json", result)
    return result


def _compared(part: dict[str, Any], rows: dict[str, Any], scale: str) -> dict[str, Any]:
    """Our rows, each figure with the paper's where there is one."""
    found: dict[str, Any] = {}
    for row, figures in rows.items():
        theirs = part["rows"].get(row, {}).get("figures", {})
        found[row] = {}
        for name, ours in figures.items():
            number = as_paper(theirs[name]) if name in theirs else None
            z = z_of(ours, number) if number is not None and scale == "full" else None
            found[row][name] = {"ours": {key: ours[key] for key in ("mean", "std", "n")}, "paper": number, "z": z}
    return found


def listed(out: Path, *, scale: str = "full", overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Each table and figure: id, title, the regular models and the stars that it trains at a scale, those that it
    shares with others counted too, the configurations, and whether its results are in `out`."""
    found = []
    for name, of in paper().items():
        runs, points, configs = SharedRuns(out, scale, overrides), [], dict[str, None]()
        for part in parts_of(name, scale):
            some = POINTS[part["kind"]](runs, part, out / name)
            points += some
            configs |= dict.fromkeys(f"{one.settings.dataset.name} {one.settings.model.arch}" for one in some)
        regular, stars = trainings(points)
        found.append(
            {
                "id": name,
                "title": of["title"],
                "networks": list(configs),
                "regular": regular,
                "stars": stars,
                "done": (out / f"{name}.json").is_file(),
            }
        )
    return found
