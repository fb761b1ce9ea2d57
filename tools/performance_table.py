"""README's performance section, made from the files under `tools/results/`: only what was measured is shown.

python tools/performance_table.py [--write]     # print it, or put it between the markers in README.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastar.checkpoints import write_atomically
from fastar.errors import FastarError

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- performance: made by tools/performance_table.py -->", "<!-- /performance -->"


def section(results: list[tuple[str, dict[str, Any]]]) -> str:
    """Markdown of all results: a table per file, a row per case, with what the case itself says of ratios."""
    gpu = [entry for entry in results if not entry[1]["device"].startswith("cpu")]
    parts = []
    if not gpu:
        parts.append("No GPU figure has been measured yet; `python tools/gpu_suite.py` measures them.")
    for name, record in results:
        versions = record["versions"]
        parts.append(
            f"**{record['device']}**, {record['date']}, torch {versions['torch']}, commit {versions['commit']} "
            f"([{name}](tools/results/{name})):\n"
        )
        rows = ["| benchmark | case | median ms (quartiles) | n | ratios |", "|---|---|---|---|---|"]
        for part in record["parts"]:
            rows += [row(line) for line in part.get("lines", []) if "ms" in line]
        parts.append("\n".join(rows) if len(rows) > 2 else "No case finished.")
        failed = [part["part"] for part in record["parts"] if part.get("exit_code") != 0]
        if failed:
            parts.append(f"Not finished: {', '.join(failed)}.")
    return "\n\n".join(parts)


def row(line: dict[str, Any]) -> str:
    """One case as a table row."""
    ms = line["ms"]
    ratios = "; ".join(
        f"{key} {value['median']:.3g} ({value['q25']:.3g} to {value['q75']:.3g})"
        for key, value in line.items()
        if key != "ms" and isinstance(value, dict) and "median" in value
    )
    facts = ", ".join(f"{key} {line[key]}" for key in ("arch", "parameters", "sources", "batch") if key in line)
    case = f"{line['case']}{f' ({facts})' if facts else ''}"
    spread = f"{ms['median']:.3g} ({ms['q25']:.3g} to {ms['q75']:.3g})" if "q25" in ms else f"{ms['median']:.3g}"
    return f"| {line['bench']} | {case} | {spread} | {line['n']} | {ratios} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="change README.md")
    arguments = parser.parse_args()
    results = []
    for path in sorted((ROOT / "tools" / "results").glob("*.json")):
        try:
            results.append((path.name, json.loads(path.read_text(encoding="utf-8"))))
        except ValueError as error:
            raise FastarError(f"{path}: not valid JSON ({error}); measure again or delete it") from error
    text = section(results)
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
