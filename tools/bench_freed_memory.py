"""Training steps by glibc's default and with freed memory kept: CPU time, page faults, peak memory; a JSON line each.

    python tools/bench_freed_memory.py --arch resnet18 --width 0.25 [--rounds 6] [--steps 4]

What the allocator has learnt stays with a process, so each measurement is one of its own, and the two ways take turns.
`kept` is `fastar.runtime.memory.freed_memory_kept`, which trainings run in. `default_over_kept` is of CPU time, round
by round. On a busy machine CPU time and page faults count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import torch
from bench import add_problem_arguments, problem_of, quantiles, where

from fastar.runtime.memory import freed_memory_kept

WAYS = ("default", "kept")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """The cost of a step in this process: ms of CPU time, those of the system, page faults; peak memory in MB."""
    import resource  # of Unix alone

    problem = problem_of(arguments)
    run = problem.endless(problem.regular_step() if arguments.kind == "regular" else problem.star_step())
    with freed_memory_kept() if arguments.way == "kept" else nullcontext():
        for _ in range(2):
            run()
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(arguments.steps):
            run()
        after = resource.getrusage(resource.RUSAGE_SELF)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    found = {
        "cpu_ms": 1e3 * (user + system),
        "system_ms": 1e3 * system,
        "page_faults": after.ru_minflt - before.ru_minflt,
    }
    return {**{name: value / arguments.steps for name, value in found.items()}, "peak_mb": after.ru_maxrss * 1024 / 1e6}


def measured_apart(kind: str, way: str) -> dict[str, float]:
    """`measure` in another process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--kind", kind, "--way", way]
    found: dict[str, float] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_problem_arguments(parser)
    parser.add_argument("--rounds", type=int, default=6, help="processes of each way")
    parser.add_argument("--steps", type=int, default=4, help="in each process, after two that are not counted")
    parser.add_argument("--kind", choices=("regular", "star"), help="of steps; default: both")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments)))
        return
    for kind in (arguments.kind,) if arguments.kind else ("regular", "star"):
        rounds = [{way: measured_apart(kind, way) for way in WAYS} for _ in range(arguments.rounds)]
        ratios = [one["default"]["cpu_ms"] / one["kept"]["cpu_ms"] for one in rounds]
        record: dict[str, Any] = {"bench": "freed memory", "case": kind, **problem_of(arguments).facts()}
        for way in WAYS:
            record[way] = {key: quantiles([one[way][key] for one in rounds]) for key in rounds[0][way]}
        record |= {"default_over_kept": quantiles(ratios), "n": arguments.rounds}
        print(json.dumps({**record, **where(torch.device(arguments.device))}), flush=True)


if __name__ == "__main__":
    main()
