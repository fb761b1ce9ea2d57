"""README's performance section, from the files under `tools/results/`: what was promised, and what was measured.

    python tools/performance_table.py [--write] [--results DIR]    # print it, or put it between README.md's markers

Tables for each device, whose files count together: of a figure measured twice the later one. Only what ran on a GPU is
shown; results of the simulated one, of a CPU or of small problems are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.promises import GROUPS, Group, Lines, Measured

from fastar.errors import FastarError
from fastar.runs.model_files import write_atomically
from fastar.runtime.device import SIMULATED

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- performance: made by tools/performance_table.py -->", "<!-- /performance -->"
CPU_BENCHES = ("loader",)  # what is measured on a GPU's host


def started(result: tuple[str, dict[str, Any]]) -> str:
    """When a file was begun: its lines count before those of later ones."""
    return str(result[1].get("started", ""))


def check(name: str, record: dict[str, Any]) -> None:
    """FastarError unless the file holds figures of a GPU."""
    device = str(record.get("device", ""))
    if device == SIMULATED or record.get("small") or device.startswith("cpu") or not device:
        what = "small problems" if record.get("small") else f"device {device!r}"
        raise FastarError(f"{name}: no GPU's figures ({what}); delete it, or give another --results")


def section(results: list[tuple[str, dict[str, Any]]]) -> str:
    """Markdown of all results: for each device tables of what was promised, with what was measured last.

    Raises:
        FastarError: a file that was not measured on a GPU.
    """
    for name, record in results:
        check(name, record)
    if not results:
        return "No GPU figure has been measured yet; `python tools/gpu_suite.py --call 1` and `--call 2` measure them."
    return "\n\n".join(device_section(device, results) for device in dict.fromkeys(r["device"] for _, r in results))


def device_section(device: str, results: list[tuple[str, dict[str, Any]]]) -> str:
    """The tables of one device, between what its files are of and the parts that never finished."""
    files = [(name, record) for name, record in results if record["device"] == device]
    parts = [part for _, record in files for part in record["parts"]]
    lines = Lines(
        line
        for part in parts
        for line in part.get("lines", [])
        if line.get("device") == device or line.get("bench") in CPU_BENCHES
    )
    ended = {part["part"]: part.get("exit_code") == 0 for part in parts}  # the last time that each was run

    def all_of(find: Callable[[dict[str, Any]], object]) -> str:
        return ", ".join(dict.fromkeys(str(find(record)) for _, record in files))

    links = ", ".join(f"[{name}](tools/results/{name})" for name, _ in files)
    power = all_of(lambda r: r.get("power_limit", "power limit unknown"))
    cores, cpu = all_of(lambda r: r["cores"]), all_of(lambda r: r["cpu"])
    dates, versions = all_of(lambda r: r["date"]), all_of(lambda r: r["versions"]["torch"])
    driver, commits = all_of(lambda r: r["driver"]), all_of(lambda r: r["versions"]["commit"])
    head = (
        f"**{device}** ({power}; host: {cores} cores of {cpu}), {dates}, torch {versions}, driver {driver}, commit "
        f"{commits} ({links}). Medians, with quartiles in brackets, of n measurements; times that are divided were "
        "measured in one process."
    )
    unfinished = [name for name, good in ended.items() if not good]
    tables = [f"{group.problem}:\n\n{table(group, lines)}" for group in GROUPS]
    return "\n\n".join([head, *tables, *([f"Failed or not finished: {', '.join(unfinished)}."] if unfinished else [])])


def table(group: Group, lines: Lines) -> str:
    """A row for each figure."""
    rows = ["| figure | target | measured | n | met |", "|---|---|---|---|---|"]
    for figure in group.figures:
        found = figure.find(lines) or Measured("not measured")
        met = {None: "", True: "yes", False: "no"}[found.met]
        rows.append(f"| {figure.what} | {figure.target} | {found.text} | {found.n or ''} | {met} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="change README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "tools" / "results", help="folder of results files")
    arguments = parser.parse_args()
    results = []
    for path in arguments.results.glob("*.json"):
        try:
            results.append((path.name, json.loads(path.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise FastarError(f"{path}: not valid JSON ({error}); measure again or delete it") from error
    text = section(sorted(results, key=started))
    if not arguments.write:
        print(text)
        return
    readme = ROOT / "README.md"
    before, start, rest = readme.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise FastarError(f"{readme}: the markers {START} and {END} are missing")
    write_atomically(readme, f"{before}{START}\n{text}\n{END}{after}".encode())


if __name__ == "__main__":
    try:
        main()
    except FastarError as error:
        print(f"performance_table: {error}", file=sys.stderr)
        sys.exit(2)
