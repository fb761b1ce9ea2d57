"""What benchmarks measured, as Markdown tables, from the files that `tools/gpu_suite.py` writes.

    python tools/show_results.py FILE.json [...]

A row for each line that a benchmark printed: its facts, and its figures as median (quartiles).
The targets stand in docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FACTS = ("arch", "batch", "size", "precision", "parameters", "sources", "kernels", "pipeline", "threads", "workers")


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def figures(line: Mapping[str, Any]) -> Iterator[str]:
    """`name median (q25 to q75)` of quantiles, `name value` of single numbers."""
    for name, value in line.items():
        if isinstance(value, Mapping) and {"median", "q25", "q75"} <= value.keys():
            yield f"{name} {number(value['median'])} ({number(value['q25'])} to {number(value['q75'])})"
        elif isinstance(value, float) and name not in FACTS:
            yield f"{name} {number(value)}"


def table(record: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown: the machine, a row for each measurement, and the parts that failed."""
    versions = record["versions"]
    yield f"{record['device']}, {record['date']}, torch {versions['torch']}, commit {versions['commit']}\n"
    yield "| benchmark | case | of | n | measured |\n|---|---|---|---|---|"
    for part in record["parts"]:
        for line in part.get("lines", []):
            facts = ", ".join(f"{name} {line[name]}" for name in FACTS if name in line)
            told = line["error"] if "error" in line else "; ".join(figures(line))
            case = line.get("case", line.get("claim", ""))
            yield f"| {line.get('bench', '')} | {case} | {facts} | {line.get('n', '')} | {told} |"
    failed = [part["part"] for part in record["parts"] if part.get("exit_code") != 0]
    if failed:
        yield f"\nFailed or not finished: {', '.join(failed)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    for path in parser.parse_args().files:
        try:
            print("\n".join(table(json.loads(path.read_text(encoding="utf-8")))))
        except OSError as error:
            sys.exit(f"show_results: {path}: cannot be read ({error.strerror})")
        except (ValueError, KeyError, TypeError):
            sys.exit(f"show_results: {path}: not a file of tools/gpu_suite.py; give one that it has written")


if __name__ == "__main__":
    main()
