"""Commands of a suite of benchmarks, each run in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

ROOT = Path(__file__).resolve().parent.parent.parent


class Named(Protocol):
    """A part of a suite."""

    @property
    def name(self) -> str: ...


def run_part(
    part: Named,
    arguments: tuple[str, ...],
    limit: float,
    on_line: Callable[[list[dict[str, Any]]], None] = lambda lines: None,
    *,
    cores: int | None = None,
) -> dict[str, Any]:
    """Run one part; its JSON lines, how it ended, and the end of what it printed if it did not end well.

    Args:
        on_line: told of all lines so far after each.
        cores: the first so many of those that this process may use, and torch threads; None: all, as the part chooses.
    """
    start = time.perf_counter()
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if cores is not None:
        environment["OMP_NUM_THREADS"] = str(cores)
    with _on_cores(cores):
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
    # As pytest ends, with a rule of = around it or without.
    summary = re.findall(r"^=*[ ]?(\d+ (?:passed|failed|skipped|error).*?)[ ]?=*$", out, re.MULTILINE)
    if summary:
        result["summary"] = summary[-1]
    failed = re.findall(r"^(?:.* )?(?:FAILED|ERROR)(?: .*)?$", out, re.MULTILINE)
    if failed:
        result["failed"] = [text[:300] for text in failed if "tests/" in text]
    if outcome["exit_code"] != 0 or any("error" in line for line in lines):
        result["end_of_output"] = (out + errors).strip().replace(str(ROOT) + os.sep, "")[-6000:]
    return result


@contextmanager
def _on_cores(count: int | None) -> Iterator[None]:
    """Inside, processes that are started run on so many of the cores that this one may use, where the system can."""
    if count is None or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
