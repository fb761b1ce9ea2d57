"""Attempts at a run, forked by a process of its own, so that none has to import and compile everything again.

Not by the tests' own process: with a CUDA build of torch, autograd keeps a thread per GPU, and once it has them no fork
can compute gradients. This one (`python attempts.py KIND DATA`) computes none.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from run_cases import small
from task_cases import build, saved_run, tensors

import fastar
from fastar.experiments import train_star
from fastar.experiments.star_domain import prepare_session
from fastar.training import RegularStep, StarStep

SECONDS = 300  # for a machine with everything else to do; nothing is asserted on time


class Attempts:
    """The process, as tests use it: `begin` an attempt, `hear` what it does.

    Args:
        data: folder of the .beton files of digits.
        kind: of the run: digits, or a task of a user's own with data of this kind (`task_cases.saved_run`).
    """

    def __init__(self, data: Path, kind: str = "digits"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, __file__, kind, str(data)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment
        )

    def __enter__(self) -> Attempts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def begin(self, folder: Path, *overrides: str, steps: int = 0, stop_in_save: int = 0) -> int:
        """Begin an attempt at the run in `folder`; returns its process id.

        Args:
            steps: it waits to be killed with this step at the latest; 0: never.
            stop_in_save: it waits to be killed inside this save of a training; 0: in none.
        """
        assert self.process.stdin is not None
        request = {"folder": str(folder), "overrides": overrides, "steps": steps, "stop_in_save": stop_in_save}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        kind, pid = self.hear().split()
        assert kind == "begun"
        return int(pid)

    def hear(self) -> str:
        """The next of: "step" (one is done), "save" (waiting inside one), "ended CODE" (negative: the signal)."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        assert ready, "the run hangs"
        line: bytes = self.process.stdout.readline()
        assert line, f"the process that forks attempts has ended: {self.process.wait()}"
        return line.decode().strip()

    def ended(self) -> int:
        """Wait for the attempt's end: its exit code, negative for the signal that killed it."""
        while not (line := self.hear()).startswith("ended "):
            assert line in ("step", "save")
        return int(line.split()[1])


def killed_until_ended(
    attempts: Attempts, folder: Path, moments: random.Random, most: int | None = None
) -> tuple[int, int]:
    """Begin the run in `folder` again and again until it ends by itself, and kill it at random moments.

    Args:
        most: kills.

    Returns:
        How often it was killed, and how many of these were within a save.
    """
    kills = within_saves = 0
    while True:
        stop_in_save = moments.choice([0, 0, 1, 2, 2, 2])
        steps = moments.choice([1, 1, 2])
        limit = 4 if stop_in_save else steps + 1  # however late the kill comes
        if kills == most:
            attempts.begin(folder)
            assert attempts.ended() == 0
            return kills, within_saves
        pid = attempts.begin(folder, steps=limit, stop_in_save=stop_in_save)
        start, last = time.perf_counter(), ""
        while stop_in_save or steps:
            last = attempts.hear()
            if last != "step":
                break
            steps -= 1
            start, took = time.perf_counter(), time.perf_counter() - start
        if last.startswith("ended"):
            assert last == "ended 0"
            return kills, within_saves
        if last == "step":
            time.sleep(moments.uniform(0, min(took, 0.02)))  # anywhere in the next step, and its save
        os.kill(pid, signal.SIGKILL)
        assert attempts.ended() == -signal.SIGKILL
        kills += 1
        within_saves += last == "save"


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # in one piece, whichever process writes


def serve(kind: str, data: Path) -> None:
    """Fork an attempt for every request on standard input. What takes time and computes no gradient is done before."""
    if kind == "digits":
        context = prepare_session(small(data), data / "never")
        _ = context.data.train, context.data.test, context.network.symmetry
    else:
        fastar.match(build(), build(), example_inputs=tensors(2)[0])  # imports what tracing needs

    def run(folder: Path, overrides: list[str]) -> None:
        if kind == "digits":
            train_star(small(data, *overrides), folder)
        else:
            saved_run(kind, folder)

    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                say(f"begun {os.getpid()}")
                attempt(run, **request)
                code = 0
            except BaseException:  # noqa: BLE001 (a fork must not go on to serve)
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        say(f"ended {os.waitstatus_to_exitcode(status)}")


def attempt(
    run: Callable[[Path, list[str]], None], folder: str, overrides: list[str], steps: int, stop_in_save: int
) -> None:
    """Do the run, telling of every step and of the save that is waited in."""
    done = 0
    for kind in (RegularStep, StarStep):

        def telling(self: Any, *arguments: Any, call: Any = kind.__call__) -> Any:
            nonlocal done
            done += 1
            if done == steps:
                signal.pause()
            loss = call(self, *arguments)
            say("step")
            return loss

        kind.__call__ = telling  # type: ignore[method-assign]
    fsync, saves = os.fsync, 0

    def told(handle: int) -> None:
        nonlocal saves
        if "in-training" in os.readlink(f"/proc/self/fd/{handle}"):
            saves += 1
            if saves == stop_in_save:
                say("save")
                signal.pause()
            return  # a kill loses nothing that was written; waiting for a busy disk, no attempt would get anywhere
        fsync(handle)

    os.fsync = told
    run(Path(folder), overrides)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
