"""Attempts at a run, forked by a process of its own, so that none has to import and compile everything again.

Not by the tests' own process: with a CUDA build of torch, autograd keeps a thread per GPU, and once it has them no fork
can compute gradients. This one (`python attempts.py DATA`) computes none.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

from run_cases import small

from fastar.experiments import train_star
from fastar.experiments.star_domain import prepare_session
from fastar.training import RegularStep, StarStep

SECONDS = 300  # for a machine with everything else to do; nothing is asserted on time


class Attempts:
    """The process, as tests use it: `begin` an attempt, `hear` what it does."""

    def __init__(self, data: Path):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, __file__, str(data)]
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


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # in one piece, whichever process writes


def serve(data: Path) -> None:
    """Fork an attempt for every request on standard input. What takes time and computes no gradient is done before."""
    context = prepare_session(small(data), data / "never")
    _ = context.data.train, context.data.test, context.network.symmetry
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                say(f"begun {os.getpid()}")
                attempt(data, **request)
                code = 0
            except BaseException:  # noqa: BLE001 (a fork must not go on to serve)
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        say(f"ended {os.waitstatus_to_exitcode(status)}")


def attempt(data: Path, folder: str, overrides: list[str], steps: int, stop_in_save: int) -> None:
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
        fsync(handle)

    os.fsync = told
    train_star(small(data, *overrides), Path(folder))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
