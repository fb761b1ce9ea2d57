"""Workers on this machine: processes of the command that share its cores and GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastar.errors import refusal
from fastar.launch.jobs import Job, Jobs, check_done
from fastar.launch.shared_folder import say_if_without_locks
from fastar.runtime.progress import Progress

# Between two looks at the workers.
LOOK_SECONDS = 0.1


class Places:
    """Places of workers: the share of this machine's cores that each gets, and its GPU where there are several.

    Args:
        device: the setting.
        number: of workers; None: one for each GPU, or for each core where there is none.
        most: there is no work for more.
    """

    def __init__(self, device: str, number: int | None, most: int):
        from fastar.runtime.device import cpus  # imports torch

        self.gpus = visible_gpus(device)
        wanted = number or len(self.gpus) or cpus()
        self.number, self.used_gpus = max(1, min(wanted, most)), min(wanted, len(self.gpus))
        self.threads = max(1, cpus() // self.number)

    def environment(self, worker: int) -> dict[str, str]:
        """Variables of a worker's environment (0, 1, ...) that differ from this process's."""
        asked = os.environ.get("OMP_NUM_THREADS", "")
        threads = min(self.threads, int(asked)) if asked.isdecimal() and int(asked) else self.threads
        gpu = {"CUDA_VISIBLE_DEVICES": self.gpus[worker % len(self.gpus)]} if len(self.gpus) > 1 else {}
        return {"OMP_NUM_THREADS": str(threads), **gpu}

    def __str__(self) -> str:
        what = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        if not self.gpus:
            return what
        return f"{what} and {'GPU ' + self.gpus[0] if len(self.gpus) == 1 else 'one of GPUs ' + ', '.join(self.gpus)}"


def visible_gpus(device: str) -> list[str]:
    """The names of the GPUs that workers may use, as CUDA_VISIBLE_DEVICES has them; none where they run on the CPU."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        return []
    if ":" in device:  # one that was chosen
        return [device.rpartition(":")[2]]
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(number) for number in range(count)] if named is None else named.split(",")[:count]


class Workers:
    """Processes at work, each with a log.

    Args:
        job: what each of them does.
        environments: of each, what differs from this process's.
        logs: folder of their logs, which is there.
    """

    def __init__(self, job: Job, environments: Sequence[Mapping[str, str]], logs: Path):
        self._processes, self._logs, self._told = list[subprocess.Popen[bytes]](), list[Path](), set[str]()
        self._ends, self._last, self._killed = list[int](), dict[int, str](), dict[int, str]()
        for number, environment in enumerate(environments, start=1):
            path = logs / f"local-{job.name}-{number}.log"
            with refusal(f"{path}: cannot be written", "free space or choose another run folder (out)"):
                log = path.open("ab")
            with log:
                self._logs.append(path)
                self._ends.append(path.stat().st_size)
                self._processes.append(
                    subprocess.Popen(
                        job.command(),
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=log,
                        env={**os.environ, **environment},
                        start_new_session=True,  # Ctrl-C is this process's, which passes it on
                    )
                )

    def at_work(self) -> bool:
        """Tell whether one is still at work."""
        return any(process.poll() is None for process in self._processes)

    def lines(self) -> Iterator[str]:
        """Lines that they have said since, each with its worker's number; what several say is said once. One that was
        killed gets a line too."""
        for number, (path, process) in enumerate(zip(self._logs, self._processes, strict=True), start=1):
            code = process.poll()
            with path.open("rb") as file:
                file.seek(self._ends[number - 1])
                text = file.read()
            whole = text if code is not None else text[: text.rfind(b"\n") + 1]
            self._ends[number - 1] += len(whole)
            for line in whole.decode(errors="backslashreplace").splitlines():
                if line.strip():
                    self._last[number] = line
                    if line not in self._told:
                        self._told.add(line)
                        yield f"[{number}] {line}"
            if code is not None and code < 0 and number not in self._killed:
                self._killed[number] = f"killed by {signal.Signals(-code).name}"
                yield f"[{number}] {self._killed[number]}; what it left is there for others to go on with"

    def reasons(self) -> list[str]:
        """The last lines of those that failed, then what killed others."""
        codes = {number: process.poll() for number, process in enumerate(self._processes, start=1)}
        again = "run it again to go on, with fewer workers where memory was short"
        return [
            *(line for number, line in self._last.items() if (codes[number] or 0) > 0),
            *(f"worker {number} was {killed}; {again}" for number, killed in self._killed.items()),
        ]

    def stop(self) -> None:
        """Let all of them save and end; kill them where that is interrupted."""
        try:
            for process in self._processes:
                process.terminate()
            for process in self._processes:
                process.wait()
        except BaseException:
            for process in self._processes:
                process.kill()
            raise


@contextmanager
def workers(job: Job, environments: Sequence[Mapping[str, str]], logs: Path, progress: Progress) -> Iterator[Workers]:
    """Workers that are waited for at the end of the block, and stopped, so that they save, where it ends otherwise."""
    started = Workers(job, environments, logs)
    try:
        yield started
        while started.at_work():
            time.sleep(LOOK_SECONDS)
    except BaseException:
        started.stop()
        raise
    finally:
        for line in started.lines():
            progress.line(line)


def work(jobs: Jobs, places: Places, progress: Progress) -> None:
    """Do the parts of `jobs` by workers on this machine.

    Raises:
        FastarError: something is missing in the end.
    """
    missing = len(jobs.missing())
    if not missing:
        return
    environments = [places.environment(number) for number in range(places.number)]
    with jobs.logged():
        say_if_without_locks(jobs.logs, progress)
        with progress.task(f"{places.number} workers", total=missing, unit=jobs.unit) as advance:
            with workers(jobs.worker, environments, jobs.logs, progress) as started:
                while started.at_work():
                    for line in started.lines():
                        progress.line(line)
                    left = len(jobs.missing())
                    if left < missing:
                        advance(missing - left)
                        missing = left
                    time.sleep(LOOK_SECONDS)
            advance(missing - len(jobs.missing()))
        check_done(jobs, started.reasons())


@contextmanager
def companions(jobs: Jobs, places: Places, progress: Progress) -> Iterator[None]:
    """Processes that do the last job beside this one, where there are several GPUs: its barriers are shared."""
    others = [places.environment(number) for number in range(1, places.used_gpus)]
    if not others:
        yield
        return
    jobs.logs.mkdir(parents=True, exist_ok=True)
    with workers(jobs.measure or jobs.last, others, jobs.logs, progress):
        yield
