"""One line of JSON per case: what was measured, on what, of which versions; or why it was not."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fastar.kernels import backend

from bench.timing import Timing, quantiles
from fastar.errors import FastarError
from fastar.runs import versions


class CannotRun(FastarError):
    """What this machine lacks for a case: nothing is wrong."""


def line(bench: str, timing: Timing, device: torch.device, **facts: Any) -> str:
    """The JSON line of one case: its name and facts, milliseconds (and of the CPU), n, device, versions and commit."""
    record = {
        "bench": bench,
        "case": timing.case.name,
        **timing.case.facts,
        **facts,
        "ms": {name: value * 1e3 for name, value in quantiles(timing.seconds).items()},
        **({"cpu_ms": {name: value * 1e3 for name, value in quantiles(timing.cpu).items()}} if timing.cpu else {}),
        "n": len(timing.seconds),
        **({"first_s": timing.first} if timing.first else {}),
        **where(device),
    }
    return json.dumps(record)


def claim(
    bench: str,
    text: str,
    peer: str,
    seconds: Mapping[str, Sequence[float]],
    cpu: Mapping[str, Sequence[float]] | None = None,
    **facts: Any,
) -> str:
    """The JSON line of a claim, a row of the table in docs/benchmarks.md: fastar beside a peer that took turns with it.

    `times` is the peer's time over fastar's, within each round; `cpu_times` the same of CPU time.

    Args:
        text: what was done.
        peer: by whom else.
        seconds: of each round, `ours` and `peer`'s.
        cpu: the same of all processors.
        facts: device, versions, threads, and what else is to be recorded (`where`).
    """
    record: dict[str, Any] = {"bench": bench, "claim": text, "peer": peer, "n": len(seconds["ours"])}
    for unit, key, found in (("s", "times", seconds), ("cpu_s", "cpu_times", cpu)):
        if found is not None:
            pairs = zip(found["peer"], found["ours"], strict=True)
            record[unit] = {side: quantiles(values) for side, values in found.items()}
            record[key] = quantiles([theirs / ours for theirs, ours in pairs])
    return json.dumps({**record, **facts})


def failure(bench: str, case: str, error: Exception, device: torch.device, **facts: Any) -> str:
    """The JSON line of a case that has no figure: `skipped` and why for `CannotRun`, else `error` and what was wrong,
    which is told on stderr in full as well."""
    if isinstance(error, CannotRun):
        why = {"skipped": str(error)}
    else:
        print(f"{bench}, {case}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        why = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]}
    return json.dumps({"bench": bench, "case": case, **why, **facts, **where(device)})


def where(device: torch.device) -> dict[str, Any]:
    """The device, the kernels' path on it, and versions with the commit."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return {"device": name, "kernels": backend(device), "versions": {**versions(), "cuda": torch.version.cuda}}


@contextmanager
def failing_alone(bench: str, case: str, device: torch.device, **facts: Any) -> Iterator[None]:
    """Whatever goes wrong inside is told as the case's line, and ends nothing else."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - an error of any kind is the case's result
        print(failure(bench, case, error, device, **facts), flush=True)
