"""Everything that needs a GPU, in one call, most valuable first: a smoke test, benchmarks, the tests marked `gpu`.

    python tools/gpu_suite.py [--budget 540] [--out tools/results] [--only NAME ...] [--skip NAME ...] [--list]

Each part runs in a process of its own within what is left of the budget, and is ended with all that it started when
its time is over. Every line is written to `OUT/<device>-<date>.json` as it comes, with device, driver, versions, commit
and date; a part that fails or runs out of time is recorded as that, with the lines it had. Needs no network, and fastar
need not be installed: what it imports may be wheels on PYTHONPATH (tools/pack_wheels.sh); in a copy without .git,
--commit (or FASTAR_COMMIT) names the commit. `--small` tries the suite itself with small problems, `--cpu` the same on
a CPU; nothing of that is published as a GPU's figure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import IO, Any

import torch

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
# This checkout's fastar, installed or not: an offline machine has the checkout and wheels.
sys.path.insert(0, str(ROOT))

from fastar.benchmarks import where  # noqa: E402
from fastar.checkpoints import write_atomically  # noqa: E402
from fastar.errors import FastarError  # noqa: E402


@dataclass(frozen=True)
class Part:
    """One command of the suite, and the seconds it may take. `small`: its arguments for a trial; `on_device`: whether
    it is told the device."""

    name: str
    arguments: tuple[str, ...]
    limit: float
    small: tuple[str, ...]
    on_device: bool = False


def _tool(name: str, limit: float, arguments: str, small: str, label: str | None = None, device: bool = True) -> Part:
    script = str(TOOLS / f"{name}.py")
    return Part(label or name, (script, *arguments.split()), limit, (script, *small.split()), device)


def gpu_tests(workers: int) -> tuple[str, ...]:
    """The tests marked `gpu`, of the files that have some, by so many processes where pytest-xdist is there."""
    marked = re.compile(r"(?<![\"'`])(?<![\"'`]@)pytest\.mark\.gpu\b")  # the mark itself, not a text about it
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if marked.search(path.read_text("utf-8"))]
    shared = ("-n", str(workers)) if workers > 1 and util.find_spec("xdist") is not None else ()
    # -vv: a line for each test as it ends (the project asks for -q), so that a part out of time still says what failed.
    options = ("-vv", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-rfE", *shared)
    return ("-m", "pytest", "-m", "gpu", *options, "--durations=5", *(str(path.relative_to(ROOT)) for path in files))


STEP = "--arch resnet18 --batch 128 --precision bf16"
SMALL = "--arch resnet8 --width 0.25 --batch 8 --size 16"
SMALL_STEP = f"{SMALL} --rounds 2 --repeats 2"
PARTS = (
    _tool("gpu_smoke", 110, "", "--small"),
    _tool("bench_step", 70, f"{STEP} --modes eager graph", f"{SMALL_STEP} --modes eager graph"),
    _tool("bench_kernels", 45, "--millions 11 100", "--millions 1 --rounds 2 --repeats 2"),
    _tool(
        "bench_matching",
        120,
        "--arch resnet18 --sources 50 --repeats 3 --against rebasin --rebasin-seconds 30",
        "--arch resnet8 --width 0.25 --sources 3 --steps 2 --repeats 2 --against rebasin --rebasin-seconds 5",
    ),
    _tool(
        "bench_epoch",
        90,
        f"{STEP} --graph --sources 50 --rounds 4 --warm-images 2560 --seconds 60",
        f"{SMALL} --graph --sources 2 --images 64 --warm-images 32 --rounds 2",
    ),
    _tool(
        "bench_imagenet",
        130,
        "--precision bf16 --threads 16 --rounds 4",
        "--size 32 --width 0.125 --batch 4 --sources 2 --counts 3 40 --images 40 --rounds 2 --repeats 2 --threads 2",
    ),
    Part("tests", gpu_tests(8), 120, gpu_tests(1)),
    _tool(
        "bench_step",
        130,
        f"{STEP} --modes compiled compiled-graph",
        f"{SMALL_STEP} --modes compiled compiled-graph",
        label="bench_step_compiled",
    ),
    _tool("bench_barrier", 60, "--images 600", "--images 20 --size 16 --batch 8 --workers 2"),
    _tool(
        "bench_kernels", 50, "--sweep --rounds 10", "--millions 1 --rounds 2 --repeats 2", label="bench_kernels_sweep"
    ),
    _tool(
        "bench_step",
        45,
        f"{STEP} --modes graph --cudnn-benchmark",
        f"{SMALL_STEP} --modes graph --cudnn-benchmark",
        label="bench_step_cudnn_benchmark",
    ),
    _tool("bench_loader", 80, "", "--images 64 --batch 16 --workers 2 --size 32 --rounds 2", device=False),
)


def gpu_facts() -> dict[str, str]:
    """The NVIDIA driver's version and the GPU's power limit and highest clock, or why they are not known."""
    asked = {"driver": "driver_version", "power_limit": "power.limit", "max_clock": "clocks.max.sm"}
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(asked.values())}", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        values = found.stdout.strip().splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return {"driver": f"unknown ({type(error).__name__})"}
    return dict(zip(asked, values, strict=False))


def run_part(
    part: Part,
    arguments: tuple[str, ...],
    limit: float,
    on_line: Callable[[list[dict[str, Any]]], None] = lambda lines: None,
) -> dict[str, Any]:
    """Run one part; its JSON lines, how it ended, and the end of what it printed if it did not end well.

    Args:
        on_line: told of all lines so far after each.
    """
    start = time.perf_counter()
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # so that it can be ended with all that it started
    )
    printed: dict[str, list[str]] = {"stdout": [], "stderr": []}
    lines: list[dict[str, Any]] = []

    def read(stream: IO[str], into: list[str]) -> None:
        for text in stream:
            into.append(text)
            if stream is process.stdout and text.startswith("{") and text.rstrip().endswith("}"):
                with suppress(ValueError):  # a line that only looks like one
                    lines.append(json.loads(text))
                    on_line(lines)

    assert process.stdout is not None
    assert process.stderr is not None
    streams = {"stdout": process.stdout, "stderr": process.stderr}
    readers = [
        threading.Thread(target=read, args=(stream, printed[name]), daemon=True) for name, stream in streams.items()
    ]
    for reader in readers:
        reader.start()
    outcome: dict[str, Any] = {}
    try:
        outcome["exit_code"] = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        outcome = {"exit_code": None, "stopped_after_seconds": limit}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for reader in readers:
            reader.join(timeout=10)  # what left the group may hold the pipes open
    out, errors = "".join(printed["stdout"]), "".join(printed["stderr"])
    result = {
        "part": part.name,
        "arguments": [str(a).replace(str(ROOT) + os.sep, "") for a in arguments],
        **outcome,
        "seconds": round(time.perf_counter() - start, 1),
        "lines": lines,
    }
    summary = re.findall(r"^\d+ (?:passed|failed|skipped|error).*$", out, re.MULTILINE)
    if summary:
        result["summary"] = summary[-1]
    failed = re.findall(r"^(?:.* )?(?:FAILED|ERROR)(?: .*)?$", out, re.MULTILINE)
    if failed:
        result["failed"] = [text[:300] for text in failed if "tests/" in text]
    if outcome["exit_code"] != 0 or any("error" in line for line in lines):
        result["end_of_output"] = (out + errors).strip().replace(str(ROOT) + os.sep, "")[-6000:]
    return result


def results_file(folder: Path, device: str, date: str) -> Path:
    """A file that is not there yet: a second suite of a day has its own."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    names = (f"{slug}-{date}{f'-{number}' if number > 1 else ''}.json" for number in range(1, 1000))
    return next(path for path in (folder / name for name in names) if not path.exists())


def state_of(result: dict[str, Any]) -> str:
    """How a part ended, in a few words."""
    lines = result.get("lines", [])
    wrong = sum("error" in line for line in lines)
    if "skipped" in result:
        return str(result["skipped"])
    if "stopped_after_seconds" in result:
        how = f"OUT OF TIME ({result['stopped_after_seconds']:.0f} s)"
    else:
        how = "ok" if result["exit_code"] == 0 else f"FAILED ({result['exit_code']})"
    return f"{how}, {result['seconds']} s, {len(lines)} lines, {wrong} of errors. {result.get('summary', '')}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=TOOLS / "results", help="folder of the results file")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="parts to run")
    parser.add_argument("--skip", nargs="+", choices=names, default=[], help="parts to leave out")
    parser.add_argument("--list", action="store_true", help="list the parts and stop")
    parser.add_argument("--commit", help="of this copy, where it has no .git")
    parser.add_argument("--small", action="store_true", help="try the suite itself: small problems")
    parser.add_argument("--cpu", action="store_true", help="small problems on the CPU")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{part.name}: {' '.join(part.arguments)} (at most {part.limit:g} s)" for part in PARTS))
        return 0
    if not arguments.cpu and not torch.cuda.is_available():
        raise FastarError("no GPU here: run on one, or try the suite with --cpu")
    if arguments.commit:
        os.environ["FASTAR_COMMIT"] = arguments.commit
    small = arguments.small or arguments.cpu
    device = torch.device("cpu" if arguments.cpu else "cuda")
    start = time.perf_counter()
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    record: dict[str, Any] = {**where(device), **gpu_facts(), "date": today, "small": small, "parts": []}
    if arguments.commit and record["versions"]["commit"] == "unknown":
        record["versions"]["commit"] = arguments.commit
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = results_file(arguments.out, record["device"], today)
    bad = 0

    def write(result: dict[str, Any]) -> None:
        written = {**record, "parts": [*record["parts"], result]}
        write_atomically(path, (json.dumps(written, indent=1) + "\n").encode())

    for part in PARTS:
        if part.name not in arguments.only or part.name in arguments.skip:
            continue
        left = arguments.budget - (time.perf_counter() - start)
        given = (part.small if small else part.arguments) + (("--device", device.type) if part.on_device else ())

        def so_far(lines: list[dict[str, Any]], part: Part = part) -> None:
            write({"part": part.name, "exit_code": None, "skipped": "not finished", "lines": lines})

        if left < 10:
            result: dict[str, Any] = {"part": part.name, "exit_code": None, "skipped": "no time left in the budget"}
        else:
            result = run_part(part, given, min(part.limit, left), so_far)
        write(result)
        record["parts"].append(result)
        bad += result["exit_code"] != 0
        print(f"{part.name}: {state_of(result)}", flush=True)
    print(path)
    return 1 if bad else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the part that runs ends with it
    try:
        sys.exit(main())
    except FastarError as error:
        print(f"gpu_suite: {error}", file=sys.stderr)
        sys.exit(2)
