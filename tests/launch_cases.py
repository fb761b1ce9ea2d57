"""Jobs that take no time, in place of calls of the `fastar` command."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from fastar.launch.jobs import Job, Jobs


@dataclass(frozen=True)
class Script(Job):
    """A job that runs Python's code, its only argument."""

    def command(self) -> list[str]:
        return [sys.executable, "-c", *self.arguments]


def scripts(out: Path, code: str, *, makes: list[str], last: str = "pass") -> Jobs:
    """Jobs in the folder `out`, which is also their current one; each part, and each worker, runs `code`.

    Args:
        makes: names of files that are missing until they are there.
        last: code of the last job.
    """
    job = Script("worker", (code,))
    return Jobs(
        out=out,
        parts=(job, job),
        worker=job,
        last=Script("star", (last,)),
        missing=lambda: [name for name in makes if not (out / name).exists()],
        unit="files",
        device="cpu",
    )
