"""Jobs: calls of the `fastar` command that one run or sweep is made of, whoever starts them."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastar.config import Settings
from fastar.errors import FastarError, refusal
from fastar.experiments.reuse import model_paths
from fastar.runs import RunFolder, remove_if_empty
from fastar.runs.claims import JOBS
from fastar.runtime.progress import count_text

LAUNCHERS = ("local", "slurm", "ray")
# The most jobs of a run; no cluster takes more.
MOST_JOBS = 100_000
# Jobs that measure a run where nothing says how many are at work at once.
MEASURE = 8


@dataclass(frozen=True)
class Launcher:
    """Who starts jobs, and how many are at work at once (None: as many as there is room for)."""

    name: str
    at_once: int | None

    @classmethod
    def read(cls, text: str) -> Launcher:
        """The launcher that `text` names: local, slurm or ray, or with a number, such as local:4.

        Raises:
            FastarError: it names none, or fewer than one at once.
        """
        found = re.fullmatch(r"([^:]*)(?::(-?[0-9]+))?", text)
        if found is None or found[1] not in LAUNCHERS:
            names = ", ".join(LAUNCHERS)
            raise FastarError(
                f"--launcher {text}: is none of {names}; write one of them, or such as local:4 for 4 at once"
            )
        if found[2] is not None and int(found[2]) < 1:
            raise FastarError(f"--launcher {text}: nothing would be done; write 1 or more, such as {found[1]}:2")
        return cls(found[1], None if found[2] is None else int(found[2]))


@dataclass(frozen=True)
class Job:
    """A call of the command: its name, for people and for its log, and its arguments."""

    name: str
    arguments: tuple[str, ...]

    def command(self) -> list[str]:
        """The whole command, of this interpreter."""
        script = shutil.which("fastar", path=str(Path(sys.executable).parent))
        return [*([sys.executable, "-m", "fastar"] if script is None else [script]), *self.arguments]

    def __str__(self) -> str:
        return shlex.join(["fastar", *self.arguments])


@dataclass(frozen=True)
class Jobs:
    """The jobs of a run or sweep.

    Args:
        out: its folder, which all of them share.
        parts: jobs that can be done at once, and in any order.
        worker: does what the parts do, as far as nobody else does it.
        last: done after them: what is left.
        measure: what `last` does once the star is trained; None: there is no such part.
        shares: the most jobs that share `measure`.
        missing: names of what the parts are to make, and have not made.
        unit: what that is, for people.
        device: the setting.
    """

    out: Path
    parts: tuple[Job, ...]
    worker: Job
    last: Job
    missing: Callable[[], list[str]]
    unit: str
    device: str
    measure: Job | None = None
    shares: int = 1

    def stages(self, at_once: int | None) -> list[tuple[Job, ...]]:
        """The jobs, all of a stage after all of the one before: the parts, then what is left; of a run by several the
        star alone, and then its paths."""
        number = min(self.shares, at_once or MEASURE)
        if self.measure is None or number == 1:
            return [self.parts, (self.last,)]
        star = Job(self.last.name, (*self.last.arguments, "--measured-by", "0"))
        shared = (*self.measure.arguments, "--measured-by", str(number))
        return [self.parts, (star,), tuple(Job(f"measure-{part}", shared) for part in range(number))]

    @property
    def logs(self) -> Path:
        """Folder of the jobs' logs."""
        return self.out / JOBS

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Let jobs write logs. Where the block fails, or is stopped, before they begin anything, no trace is left."""
        with refusal(f"{self.logs}: cannot be written", "free space or choose another run folder (out)"):
            self.logs.mkdir(parents=True, exist_ok=True)
        try:
            yield
        except BaseException:
            if self.logs.is_dir() and all(path == self.logs for path in self.out.iterdir()):
                shutil.rmtree(self.logs)
                remove_if_empty(self.out)
            raise


def run_jobs(settings: Settings, run: RunFolder, arguments: Sequence[str], last: Sequence[str] = ()) -> Jobs:
    """The jobs of a whole run: one for each source and heldout that is missing; then the star, and its barriers.

    Args:
        arguments: options and settings of the run.
        last: more options of the last job.

    Raises:
        FastarError: too many models, or checkpoints that are given and not there.
    """
    own = settings.sources.trained()
    wanted = sum(own.values())
    if wanted > MOST_JOBS:
        raise FastarError(f"--launcher: {wanted:,} models, and at most {MOST_JOBS:,} jobs; lower sources.number")
    for kind in ("source", "heldout"):
        if kind not in own:
            model_paths(settings, run, kind)  # said now, not by the last job
    models = [(kind, index) for kind, number in own.items() for index in range(number)]
    train = ("train-sources", *arguments)

    def missing() -> list[str]:
        return [f"{kind} {index}" for kind, index in models if not run.finished(kind, index)]

    return Jobs(
        out=run.path,
        parts=tuple(
            Job(f"{kind}-{index}", (*train, "--only", str(number)))
            for number, (kind, index) in enumerate(models)
            if not run.finished(kind, index)
        ),
        worker=Job("worker", train),
        last=Job("star", ("train-star", *arguments, *last)),
        measure=Job("measure", ("train-star", *arguments)),
        shares=settings.sources.number + settings.sources.heldout,  # a path each from the star
        missing=missing,
        unit="models",
        device=settings.device,
    )


def sweep_jobs(settings: Settings, out: Path, points: Iterable[RunFolder], arguments: Sequence[str]) -> Jobs:
    """The jobs of a sweep: one for each of its points that is not finished, each of which takes what nobody does."""
    runs, sweep = tuple(points), ("sweep", *arguments)

    def missing() -> list[str]:
        return [run.path.name for run in runs if not run.results.is_file()]

    return Jobs(
        out=out,
        parts=tuple(Job(f"sweep-{number}", sweep) for number in range(len(missing()))),
        worker=Job("worker", sweep),
        last=Job("sweep", sweep),
        missing=missing,
        unit="points",
        device=settings.device,
    )


def planned(jobs: Jobs, stages: Sequence[Sequence[Job]], at_once: int | None, resources: str) -> dict[str, Any]:
    """The plan of what would be submitted: the commands, how many are at work at once, and what each of them gets."""
    parts, *after = ([str(job) for job in stage] for stage in stages)
    return {
        "jobs": parts,
        "at_once": at_once,
        "then": after,
        "resources": resources,
        "logs": str(jobs.logs),
    }


def planned_lines(plan: dict[str, Any]) -> list[str]:
    """`planned`, as it is printed."""
    number, at_once = len(plan["jobs"]), plan["at_once"]
    limit = "" if at_once is None else f", {at_once} at once"
    after = [(f"then {count_text(len(stage), 'job')}:", f"  {stage[0]}") for stage in plan["then"]]
    return [
        f"{count_text(number, 'job')}{limit}{':' if number else ''}",
        *(f"  {command}" for command in plan["jobs"]),
        *(line for lines in after for line in lines),
        f"each with {plan['resources']}; logs in {plan['logs']}",
    ]


def check_done(jobs: Jobs, reasons: Sequence[str] = ()) -> None:
    """Raise FastarError where something is missing that the jobs were to make.

    Args:
        reasons: the last lines of jobs that failed.
    """
    missing = jobs.missing()
    if not missing:
        return
    why = f": {reasons[0].removeprefix('fastar: ')}" if reasons else f"; see {jobs.logs}"
    named = f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
    raise FastarError(f"{jobs.out}: {named} could not be made ({len(missing)} in all){why}")
