"""Everything that needs a GPU, most valuable first: a smoke test, benchmarks, the tests marked `gpu`.

    python tools/gpu_suite.py --call 1      # smoke test, steps, kernels, matching, epochs
    python tools/gpu_suite.py --call 2      # ImageNet's sizes, the tests, barriers, loading, torch.compile
    python tools/gpu_suite.py [--budget 540] [--out tools/results] [--only NAME ...] [--skip NAME ...] [--list]

Two calls, each inside its own 540 s, do everything. (Without --call all parts are tried in one budget.) Each part runs
in a process of its own; it may take its limit (--list), and whatever the limits of the parts after it leave over; a
part whose limit is more than is left is not begun, which is said. One that does not end in time is stopped with all
that it started, and keeps the lines it had: run it again with --only and a larger --budget.

Every line is written to `OUT/<device>-<date>[-call-N].json` as it comes, with device, driver, versions, commit and
date; what fails, or cannot be done on this machine, is recorded as that. Needs no network, and fastar need not be
installed: what it imports may be wheels on PYTHONPATH (tools/pack_wheels.sh); in a copy without .git, --commit (or
FASTAR_COMMIT) names the commit. Put the files into tools/results; `python tools/show_results.py FILE` prints them as
tables. `--small` tries the suite itself with small problems, `--cpu` the same on a CPU; nothing of that
is published as a GPU's figure. Exit code 1: a part failed, or was not finished.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()  # before torch, which takes long where the disk is cold: it is part of the budget

import torch  # noqa: E402

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
# This checkout's fastar, installed or not: an offline machine has the checkout and wheels.
sys.path.insert(0, str(ROOT))

from bench import where  # noqa: E402
from bench.parts import run_part  # noqa: E402

from fastar.errors import FastarError  # noqa: E402
from fastar.runs import write_atomically  # noqa: E402


@dataclass(frozen=True)
class Part:
    """One command of the suite, which of its two calls it is in, and the seconds it may take. `small`: its arguments
    for a trial; `on_device`: whether it is told the device."""

    name: str
    call: int
    arguments: tuple[str, ...]
    limit: float
    small: tuple[str, ...]
    on_device: bool = False


def _tool(
    name: str, call: int, limit: float, arguments: str, small: str, label: str | None = None, device: bool = True
) -> Part:
    script = str(TOOLS / f"{name}.py")
    return Part(label or name, call, (script, *arguments.split()), limit, (script, *small.split()), device)


def gpu_tests(workers: int, names: str = "test_*.py") -> tuple[str, ...]:
    """The tests marked `gpu`, of the files that have some, by so many processes where pytest-xdist is there."""
    marked = re.compile(r"(?<![\"'`])(?<![\"'`]@)pytest\.mark\.gpu\b")  # the mark itself, not a text about it
    files = [path for path in sorted((ROOT / "tests").glob(names)) if marked.search(path.read_text("utf-8"))]
    shared = ("-n", str(workers), "--dist=worksteal") if workers > 1 and util.find_spec("xdist") is not None else ()
    # -vv: a line for each test as it ends (the project asks for -q), so that a part out of time still says what failed.
    options = ("-vv", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-rfE", *shared)
    return ("-m", "pytest", "-m", "gpu", *options, "--durations=5", *(str(path.relative_to(ROOT)) for path in files))


STEP = "--arch resnet18 --batch 128 --precision bf16"
SMALL = "--arch resnet8 --width 0.25 --batch 8 --size 16"
SMALL_MATCHING = "--arch resnet8 --width 0.25 --sources 3 --steps 2 --repeats 2"
SMALL_STEP = f"{SMALL} --rounds 2 --repeats 2"
# The most valuable first. A limit is half as much again as a part is thought to take on an H100 with 16 cores: 15 s
# until Python, torch and CUDA are there, 1 s for each kernel that Triton compiles, 40 to 60 s for each of two networks
# that torch.compile does; estimates, until results say better. The limits of a call are CALL seconds together; what
# is compiled comes late in its call, since it gains what the parts before it leave over.
PARTS = (
    _tool("gpu_smoke", 1, 100, "", "--small"),
    _tool("bench_step", 1, 85, f"{STEP} --modes eager graph", f"{SMALL_STEP} --modes eager graph"),
    _tool("bench_kernels", 1, 70, "--millions 11 100", "--millions 1 --rounds 2 --repeats 2"),
    _tool(
        "bench_matching",
        1,
        120,
        "--arch resnet18 --sources 50 --repeats 3 --assignment --against rebasin --rebasin-seconds 30",
        f"{SMALL_MATCHING} --assignment --against rebasin --rebasin-seconds 5",
    ),
    _tool(
        "bench_epoch",
        1,
        105,
        f"{STEP} --graph --sources 50 --rounds 4 --warm-images 2560 --seconds 45 --matching weight activation",
        f"{SMALL} --graph --sources 2 --images 64 --warm-images 32 --rounds 2 --matching weight activation",
    ),
    _tool(
        "bench_imagenet",
        2,
        140,
        "--precision bf16 --threads 16 --images 10000 --rounds 4",
        "--size 32 --width 0.125 --batch 4 --sources 2 --counts 3 40 --images 40 --rounds 2 --repeats 2 --threads 2",
    ),
    Part("tests", 2, gpu_tests(8), 80, gpu_tests(1, "test_training_store.py")),
    _tool("bench_barrier", 2, 40, "--images 600", "--images 20 --size 16 --batch 8 --workers 2"),
    _tool(
        "bench_loader",
        2,
        70,
        "--pipeline cifar10 imagenet --batch 64",
        "--pipeline cifar10 imagenet --images 64 --batch 16 --workers 2 --size 32 --rounds 2",
        device=False,
    ),
    _tool(
        "bench_step",
        2,
        150,
        f"{STEP} --modes compiled compiled-graph compiled-star",
        f"{SMALL_STEP} --modes compiled compiled-graph compiled-star",
        label="bench_step_compiled",
    ),
    _tool(
        "bench_step",
        1,
        45,
        f"{STEP} --modes graph --cudnn-benchmark",
        f"{SMALL_STEP} --modes graph --cudnn-benchmark",
        label="bench_step_cudnn_benchmark",
    ),
    _tool(
        "bench_kernels",
        2,
        45,
        "--millions 100 --sweep --rounds 10",
        "--millions 1 --rounds 2 --repeats 2",
        label="bench_kernels_sweep",
    ),
)
CALL = 525.0
# What a CPU cannot be asked for.
NEEDS_GPU = ("--graph",)


def seconds_for(limits: Sequence[float], left: float) -> float | None:
    """What the first of these parts may take where `left` seconds are left: its limit, and what the others' limits
    leave over; None where even its limit is more than is left.

    >>> seconds_for([100, 50, 30], 300)
    220
    >>> seconds_for([100, 50, 30], 120)
    100
    >>> seconds_for([100, 50, 30], 90) is None
    True
    """
    own, *later = limits
    return None if left < own else max(own, left - sum(later))


def gpu_facts() -> dict[str, str]:
    """The NVIDIA driver's version, the GPU's power limit and highest clock, and what others did with it when the suite
    began; or why they are not known."""
    asked = {
        "driver": "driver_version",
        "power_limit": "power.limit",
        "max_clock": "clocks.max.sm",
        "memory_used_before": "memory.used",
        "utilization_before": "utilization.gpu",
    }
    try:
        query = ["nvidia-smi", f"--query-gpu={','.join(asked.values())}", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        values = found.stdout.strip().splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        return {"driver": f"unknown ({type(error).__name__})"}
    return dict(zip(asked, values, strict=False))


def host_facts() -> dict[str, Any]:
    """The host's processor and the cores this process may use: what loading is measured on."""
    with suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
        if found is not None:
            return {"cpu": found.group(1), "cores": len(os.sched_getaffinity(0))}
    return {"cpu": platform.machine(), "cores": os.cpu_count()}


def results_file(folder: Path, device: str, date: str, call: int | None = None) -> Path:
    """A file that is not there yet: a second suite of a day has its own, and so has each call."""
    slug = "-".join([re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-"), date, *([f"call-{call}"] if call else [])])
    names = (f"{slug}{f'-{number}' if number > 1 else ''}.json" for number in range(1, 1000))
    return next(path for path in (folder / name for name in names) if not path.exists())


def state_of(result: dict[str, Any]) -> str:
    """How a part ended, in a few words, and what of it was left out."""
    lines = result.get("lines", [])
    wrong = sum("error" in line for line in lines)
    if "skipped" in result:
        return str(result["skipped"])
    if "stopped_after_seconds" in result:
        how = f"OUT OF TIME ({result['stopped_after_seconds']:.0f} s)"
    else:
        how = "ok" if result["exit_code"] == 0 else f"FAILED ({result['exit_code']})"
    told = f"{how}, {result['seconds']} s, {len(lines)} lines, {wrong} of errors. {result.get('summary', '')}".rstrip()
    reasons = Counter(str(line["skipped"]) for line in lines if "skipped" in line)
    reasons.update(f"{option} needs a GPU" for option in result.get("without", ()))
    return "".join([told, *(f"\n    left out: {reason} ({number})" for reason, number in reasons.items())])


def arguments_for(part: Part, small: bool, device: torch.device) -> tuple[tuple[str, ...], list[str]]:
    """What a part is given, and the options that are left out because a CPU cannot be asked for them."""
    given = (part.small if small else part.arguments) + (("--device", device.type) if part.on_device else ())
    without = [option for option in given if device.type == "cpu" and option in NEEDS_GPU]
    return tuple(option for option in given if option not in without), without


def chosen_parts(arguments: argparse.Namespace) -> list[Part]:
    """The parts asked for, in their order."""
    return [
        part
        for part in PARTS
        if part.name in (arguments.only or [part.name])
        and part.name not in arguments.skip
        and arguments.call in (None, part.call)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--call", type=int, choices=[1, 2], help="which of the two calls that do everything this is")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--out", type=Path, default=TOOLS / "results", help="folder of the results file")
    parser.add_argument("--only", nargs="+", choices=names, help="parts to run")
    parser.add_argument("--skip", nargs="+", choices=names, default=[], help="parts to leave out")
    parser.add_argument("--list", action="store_true", help="list the parts and stop")
    parser.add_argument("--commit", help="of this copy, where it has no .git")
    parser.add_argument("--small", action="store_true", help="try the suite itself: small problems")
    parser.add_argument("--cpu", action="store_true", help="small problems on the CPU")
    arguments = parser.parse_args()
    parts = chosen_parts(arguments)
    if not parts:
        raise FastarError("no part is left: --only and --skip leave none of this call (--list shows all)")
    if arguments.list:
        for part in parts:
            print(f"{part.name}: call {part.call}, at most {part.limit:g} s: {' '.join(part.arguments)}")
        return 0
    if not arguments.cpu and not torch.cuda.is_available():
        raise FastarError("no GPU here: run on one, or try the suite with --cpu")
    if arguments.commit:
        os.environ["FASTAR_COMMIT"] = arguments.commit
    small = arguments.small or arguments.cpu
    device = torch.device("cpu" if arguments.cpu else "cuda")
    now = datetime.datetime.now(datetime.timezone.utc)
    record: dict[str, Any] = {
        **where(device),
        **gpu_facts(),
        **host_facts(),
        "date": now.date().isoformat(),
        "started": now.isoformat(timespec="seconds"),
        "call": arguments.call,
        "small": small,
        "parts": [],
    }
    if arguments.commit and record["versions"]["commit"] == "unknown":
        record["versions"]["commit"] = arguments.commit
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = results_file(arguments.out, record["device"], record["date"], arguments.call)
    bad = 0

    def write(result: dict[str, Any]) -> None:
        written = {**record, "parts": [*record["parts"], result]}
        write_atomically(path, (json.dumps(written, indent=1) + "\n").encode())

    for number, part in enumerate(parts):
        left = arguments.budget - (time.perf_counter() - BEGIN)
        given, without = arguments_for(part, small, device)

        def so_far(lines: list[dict[str, Any]], part: Part = part) -> None:
            write({"part": part.name, "exit_code": None, "skipped": "not finished", "lines": lines})

        seconds = seconds_for([later.limit for later in parts[number:]], left)
        if seconds is None:
            why = f"not begun: it may take {part.limit:.0f} s, {max(left, 0):.0f} s are left"
            result: dict[str, Any] = {"part": part.name, "exit_code": None, "skipped": why}
        else:
            result = run_part(part, given, seconds, so_far)
            result |= {"without": without} if without else {}
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
