"""Processes that share the work of a run folder, as tests start and kill them: real claims and files, made trainings.

A training is a few intervals, each with a checkpoint at its end; a model's file lists them. Each process names a host
of its own choice, so that a test can take away a whole host; every file operation may take its time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastar.config import Settings
from fastar.errors import FastarError
from fastar.experiments import work_list
from fastar.experiments.session import new_session
from fastar.runs import CHECKPOINT, RunFolder, claims, lock, remove_checkpoints, write_atomically
from fastar.runs.lock import _start_of

INTERVALS = 3
"""Of a training: two end with a checkpoint, the last with the model."""
DEAD_SECONDS, TOUCH_SECONDS = 4.0, 0.05
"""In place of two minutes and of 20 s: of hosts that vanish, and of processes that live."""
FILE_OPERATIONS = {"open", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.utime", "os.scandir"}


@dataclass
class Crew:
    """Processes at work on the sources of one run folder.

    Args:
        folder: where the run's folder is made, and what the processes tell.
        locks: the file system has the kernel's locks, and all processes share them; else the lock files are all.
        delay: the most seconds that a slow file operation takes.
        failing: the numbers of the sources whose training fails.
        together: so many processes begin when all of them are there.
    """

    folder: Path
    settings: Settings
    locks: bool = True
    delay: float = 0.0
    failing: Sequence[int] = ()
    together: int = 1
    hosts: dict[int, str] = field(default_factory=dict)
    """Those that are alive."""

    def __post_init__(self) -> None:
        self.run = RunFolder(self.folder / "run")
        self.holders = self.folder / "holders"
        self.holders.mkdir()
        self.told = os.open(self.folder / "told", os.O_RDWR | os.O_CREAT | os.O_APPEND)

    @property
    def models(self) -> list[tuple[str, int]]:
        return [("source", number) for number in range(self.settings.sources.number)]

    def lines(self) -> list[list[str]]:
        """All that the processes told, in order: "work NUMBER INTERVAL" and others."""
        return [line.split() for line in (self.folder / "told").read_text().splitlines()]

    def size(self) -> int:
        """Bytes that were told."""
        return os.fstat(self.told).st_size

    def begin(self, host: str, seed: int) -> int:
        """Start a process; its number."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self._work(host, random.Random(seed))
                code = 0
            except FastarError as error:
                self._tell("refused", str(error))
                code = 2
            except BaseException:  # noqa: BLE001 (a fork must not go on to test)
                traceback.print_exc()
            finally:
                os._exit(code)
        self.hosts[pid] = host
        return pid

    def kill(self, pid: int) -> None:
        """End a process at once, and what it holds in the kernel with it."""
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        del self.hosts[pid]

    def ended(self) -> list[int]:
        """The exit codes of those that ended by themselves since."""
        codes = []
        for pid in list(self.hosts):
            there, status = os.waitpid(pid, os.WNOHANG)
            if there:
                codes.append(os.waitstatus_to_exitcode(status))
                del self.hosts[pid]
        return codes

    def close(self) -> None:
        for pid in list(self.hosts):
            self.kill(pid)
        os.close(self.told)

    def left(self) -> list[str]:
        """What the run folder holds beside its settings and models."""
        inside = [path for path in self.run.path.rglob("*") if path.parent != self.run.path / "sources"]
        return sorted(str(p.relative_to(self.run.path)) for p in inside if p.name not in ("config.yaml", "sources"))

    def _tell(self, *words: object) -> None:
        os.write(self.told, (" ".join(map(str, words)).replace("\n", " ") + "\n").encode())  # in one piece

    def _work(self, host: str, draws: random.Random) -> None:
        """What a process does, on its host."""
        socket.gethostname = lambda: host
        os.fsync = lambda handle: None  # a kill loses nothing that was written
        if not self.locks:
            fcntl.flock = _refuse  # type: ignore[assignment]
        for function in (claims.claim, lock.hold):
            function.__wrapped__.__kwdefaults__["dead_seconds"] = DEAD_SECONDS  # type: ignore[attr-defined]
        lock.DEAD_SECONDS = DEAD_SECONDS
        claims.TOUCH_SECONDS = TOUCH_SECONDS
        lock.LOOK_SECONDS = work_list.LOOK_SECONDS = 0.1
        if self.delay:
            sys.addaudithook(
                lambda event, given: (
                    time.sleep(draws.uniform(0, self.delay))
                    if event in FILE_OPERATIONS and draws.random() < 0.05
                    else None
                )
            )
        run = RunFolder(self.run.path)  # of this host
        session = new_session(self.settings, run)

        def train(model: tuple[str, int]) -> None:
            self._train(run, *model, draws)

        with run.open(self.settings):
            if self.together > 1:
                self._tell("joined")
            while self.together > 1 and self.lines().count(["joined"]) < self.together:
                time.sleep(0.01)
            work_list.train_missing(session, self.models, train, lambda count: None)

    def _train(self, run: RunFolder, kind: str, number: int, draws: random.Random) -> None:
        """Train a model from its newest checkpoint on."""
        holder = os.open(self.holders / str(number), os.O_RDWR | os.O_CREAT)
        other = int(os.pread(holder, 20, 0).strip() or 0)
        if other and other != os.getpid() and _start_of(other) is not None:
            self._tell("two", number, other, os.getpid())
        os.pwrite(holder, f"{os.getpid():<20}".encode(), 0)
        if number in self.failing:
            raise FastarError(f"source {number}: no good")
        folder = run.in_training(kind, number)
        saved = sorted(path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name))
        done = saved[-1].read_text() if saved else ""
        for interval in range(done.count("\n"), INTERVALS):
            time.sleep(draws.uniform(0, 0.002))
            self._tell("work", number, interval, os.getpid())
            done += f"{number} {interval}\n"
            last = interval + 1 == INTERVALS
            name = f"epoch-{interval + 1:05d}-step-{0:08d}.safetensors"
            write_atomically(run.model(kind, number) if last else folder / name, done.encode())
        os.pwrite(holder, b" " * 20, 0)
        os.close(holder)
        remove_checkpoints(folder)


def _refuse(handle: int, how: int) -> None:
    """As a file system without locks."""
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
