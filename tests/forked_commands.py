"""`fastar` commands, several at a time, as forks of a process that has imported everything.

Not forks of the tests' own process, as in `attempts`. This one (`python forked_commands.py DATA`) computes nothing
before it forks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from fastar.cli.main import main

SECONDS = 300  # for a machine with everything else to do; nothing is asserted on time


class Commands:
    """The process that forks, as tests use it.

    Args:
        folder: where the commands' stderr is kept.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self.running: set[int] = set()
        self._codes: dict[int, int] = {}

    def __enter__(self) -> Commands:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_all()
        self.process.kill()
        self.process.communicate()

    def begin(self, *arguments: object) -> int:
        """Begin `fastar ARGUMENTS`; its process id."""
        pid = int(self._ask({"begin": [str(one) for one in arguments], "folder": str(self.folder)}))
        self.running.add(pid)
        return pid

    def ended(self) -> dict[int, int]:
        """The exit codes (negative: the signal) of those that have ended."""
        self._codes |= {int(pid): int(code) for pid, code in json.loads(self._ask({"ended": True})).items()}
        self.running -= set(self._codes)
        return self._codes

    def end_of(self, pid: int) -> int:
        """Wait for the end of one; its exit code."""
        end = time.monotonic() + SECONDS
        while (code := self.ended().get(pid)) is None:
            assert time.monotonic() < end, "the command hangs"
            time.sleep(0.02)
        return code

    def stderr(self, pid: int) -> str:
        """What it has said."""
        path = self.folder / f"{pid}.err"
        return path.read_text() if path.exists() else ""

    def end_all(self) -> None:
        """End those that are left."""
        for pid in sorted(self.running):
            os.kill(pid, signal.SIGKILL)
            self.end_of(pid)

    def wait(self) -> list[int]:
        """Wait for the end of all that are running; their exit codes."""
        return [self.end_of(pid) for pid in sorted(self.running)]

    def _ask(self, question: object) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()


def serve() -> None:
    """Fork a command for every request on standard input, and say which have ended."""
    import fastar.data.ffcv.read
    import fastar.experiments.star_domain
    import fastar.symmetry.derive  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "begin" not in request:
            found = {}
            while True:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    break
                if not pid:
                    break
                found[pid] = os.waitstatus_to_exitcode(status)
            print(json.dumps(found), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_RDWR), 0)
                os.dup2(0, 1)
                os.dup2(os.open(f"{request['folder']}/{os.getpid()}.err", os.O_WRONLY | os.O_CREAT), 2)
                main(request["begin"])
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 0
            finally:
                os._exit(code)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
