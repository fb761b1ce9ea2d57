"""Everything that needs a GPU, in one call: the tests marked `gpu`, then every benchmark, most valuable first.

    python tools/gpu_suite.py [--budget 540] [--out tools/results] [--only NAME ...] [--list]

Each part runs in a process of its own within what is left of the budget. After each, the results so far are written to
`OUT/<device>-<date>.json` with device, driver, versions, commit and date; a part that fails or runs out of time is
recorded as that. Needs no network, and fastar need not be installed: what it imports may be wheels on PYTHONPATH
(tools/pack_wheels.sh); in a copy without .git, FASTAR_COMMIT names the commit. On a machine without a GPU the same
parts run on the CPU with `--cpu` (small problems, to try the suite itself); nothing of that is to be published as a
GPU's figure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# This checkout's fastar, installed or not: an offline machine has the checkout and wheels (tools/pack_wheels.sh).
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastar.benchmarks import where
from fastar.checkpoints import write_atomically
from fastar.errors import FastarError

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent


@dataclass(frozen=True)
class Part:
    """One command of the suite. `small`: its arguments for a trial on the CPU."""

    name: str
    arguments: tuple[str, ...]
    limit: float
    small: tuple[str, ...]


def _tool(name: str, limit: float, arguments: str, small: str, label: str | None = None) -> Part:
    script = str(TOOLS / f"{name}.py")
    return Part(label or name, (script, *arguments.split()), limit, (script, *small.split()))


SMALL = "--arch resnet8 --batch 8 --size 16 --device cpu"
PARTS = (
    Part(
        "tests", ("-m", "pytest", "-m", "gpu"), 150, ("-m", "pytest", "-m", "gpu", "tests/test_kernels_operations.py")
    ),
    _tool("bench_step", 60, "--arch resnet18 --batch 128 --precision bf16", f"{SMALL} --rounds 3"),
    _tool("bench_kernels", 40, "--millions 11 100", "--millions 1 --rounds 3 --device cpu"),
    _tool(
        "bench_matching",
        120,
        "--arch resnet18 --sources 50 --repeats 3 --against rebasin",
        "--arch resnet8 --sources 2 --steps 2 --device cpu",
    ),
    _tool(
        "bench_epoch",
        120,
        "--arch resnet18 --batch 128 --precision bf16 --sources 50 --rounds 3",
        f"{SMALL} --sources 2 --images 64 --warm-images 32 --rounds 2",
    ),
    _tool(
        "bench_step",
        120,
        "--arch resnet18 --batch 128 --precision bf16 --graph --compile",
        f"{SMALL} --rounds 3",
        label="bench_step_graph_compile",
    ),
    _tool(
        "bench_imagenet",
        150,
        "--precision bf16 --threads 16 --rounds 4",
        "--size 32 --width 0.125 --batch 4 --sources 2 --counts 3 --images 40 --rounds 2 --device cpu",
    ),
    _tool("bench_barrier", 60, "", ""),
    _tool("bench_loader", 60, "", ""),
)


def driver() -> str:
    """The NVIDIA driver's version, or why it is not known."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"
    return found.stdout.strip().splitlines()[0]


def run_part(part: Part, arguments: tuple[str, ...], limit: float) -> dict[str, Any]:
    """Run one part; its JSON lines, how it ended, and the end of what it printed if it did not end well."""
    start = time.perf_counter()
    command = [sys.executable, *arguments]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, env=environment)
        outcome: dict[str, Any] = {"exit_code": done.returncode}
        printed, errors = done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        outcome = {"exit_code": None, "stopped_after_seconds": limit}
        printed, errors = _text(error.stdout), _text(error.stderr)
    lines = [json.loads(text) for text in printed.splitlines() if text.startswith("{") and text.endswith("}")]
    result = {
        "part": part.name,
        "arguments": [str(a).replace(str(ROOT) + os.sep, "") for a in arguments],
        **outcome,
        "seconds": round(time.perf_counter() - start, 1),
        "lines": lines,
    }
    summary = re.findall(r"^\d+ (?:passed|failed|skipped).*$", printed, re.MULTILINE)
    if summary:
        result["summary"] = summary[-1]
    if outcome["exit_code"] != 0:
        result["end_of_output"] = (printed + errors).strip().replace(str(ROOT) + os.sep, "")[-4000:]
    return result


def _text(captured: bytes | str | None) -> str:
    return captured.decode(errors="replace") if isinstance(captured, bytes) else captured or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=TOOLS / "results", help="folder of the results file")
    parser.add_argument("--only", nargs="+", choices=names, help="parts to run")
    parser.add_argument("--list", action="store_true", help="list the parts and stop")
    parser.add_argument("--cpu", action="store_true", help="try the suite on a CPU, with small problems")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{part.name}: {' '.join(part.arguments)} (at most {part.limit:g} s)" for part in PARTS))
        return
    if not arguments.cpu and not torch.cuda.is_available():
        raise FastarError("no GPU here: run on one, or try the suite with --cpu")
    device = torch.device("cpu" if arguments.cpu else "cuda")
    start = time.perf_counter()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    record: dict[str, Any] = {**where(device), "driver": driver(), "date": today, "parts": []}
    slug = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    path = arguments.out / f"{slug}-{today}.json"
    for part in PARTS:
        if arguments.only and part.name not in arguments.only:
            continue
        left = arguments.budget - (time.perf_counter() - start)
        if left < 10:
            result: dict[str, Any] = {"part": part.name, "exit_code": None, "skipped": "no time left in the budget"}
        else:
            result = run_part(part, part.small if arguments.cpu else part.arguments, min(part.limit, left))
        record["parts"].append(result)
        write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
        state = "ok" if result["exit_code"] == 0 else result.get("skipped") or f"FAILED ({result['exit_code']})"
        print(f"{part.name}: {state}, {len(result.get('lines', []))} lines, {result.get('summary', '')}", flush=True)
    print(path)


if __name__ == "__main__":
    try:
        main()
    except FastarError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        sys.exit(2)
