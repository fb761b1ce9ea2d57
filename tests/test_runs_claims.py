"""Claims of parts of shared work: one process at a time, whatever dies, moves or stands still meanwhile."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastar.errors import FastarError
from fastar.runs import lock, read_holder, write_atomically
from fastar.runs.claims import Processes, claim
from fastar.runs.lock import NAME, Holder

SECONDS = 60  # for a machine with everything else to do; nothing is asserted on time


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """That of a part, in a folder of parts."""
    return tmp_path / "parts" / "part"


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system without locks, or with those of each host alone."""

    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture(params=["flock", "no-flock"])
def any_locks(request: pytest.FixtureRequest) -> str:
    if request.param == "no-flock":
        request.getfixturevalue("without_flock")
    return str(request.param)


def left_by(folder: Path, *, age: float = 0.0, **changes: Any) -> None:
    """The lock file of another process, last touched `age` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = {"host": "elsewhere", "pid": 7, "started": 0, "since": 0.0, **changes}
    (folder / NAME).write_text(json.dumps(holder))
    now = time.time()
    os.utime(folder / NAME, (now - age, now - age))


def is_ours(folder: Path, **how: Any) -> bool:
    with claim(folder, **how) as ours:
        return ours


def test_one_of_two_has_it_and_nothing_is_left(folder: Path, any_locks: str) -> None:
    with running(folder.parent, 1, any_locks) as others:
        with claim(folder) as first:
            assert first
            holder = read_holder(folder)
            assert holder is not None
            assert (holder.host, holder.pid) == (socket.gethostname(), os.getpid())
            assert told(others, "part") == ["0"]
            assert told(others, "") == ["let go"]
            assert read_holder(folder) == holder
            (folder / "checkpoint").write_text("kept")
        assert [path.name for path in folder.iterdir()] == ["checkpoint"]
        (folder / "checkpoint").unlink()
        assert told(others, "part") == ["1"]
        assert not is_ours(folder)
        assert told(others, "") == ["let go"]
    assert not folder.parent.exists()


def test_a_folder_that_another_removes_at_that_moment_is_not_ours(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def removed_before(path: Any, *more: Any, **how: Any) -> int:
        if Path(path) == folder:
            folder.rmdir()
        return opened(path, *more, **how)

    monkeypatch.setattr(os, "open", removed_before)
    assert not is_ours(folder)
    monkeypatch.undo()
    written = lock._write

    def removed_within(*given: Any) -> None:
        folder.rmdir()
        written(*given)

    monkeypatch.setattr(lock, "_write", removed_within)
    assert not is_ours(folder)
    monkeypatch.undo()
    assert is_ours(folder)


def test_folders_around_it_may_be_removed_while_it_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, times = os.mkdir, [0]

    def removed(path: Any, *more: Any, **how: Any) -> None:
        if Path(path) == folder and folder.parent.exists() and times[0] < 3:
            times[0] += 1
            folder.parent.rmdir()
        made(path, *more, **how)

    monkeypatch.setattr(os, "mkdir", removed)
    assert is_ours(folder)
    assert times == [3]


@pytest.mark.parametrize("age", [-1e6, 0.0, 1e6], ids=["its clock is ahead", "as ours", "its clock is behind"])
def test_a_host_that_vanished_is_taken_over_by_our_own_clock(folder: Path, age: float) -> None:
    """Whatever the times in its file say: it is watched for so long, from one look to the next."""
    left_by(folder, age=age)
    assert not is_ours(folder, dead_seconds=0.2)
    begin = time.monotonic()
    while not is_ours(folder, dead_seconds=0.2):
        assert time.monotonic() - begin < SECONDS
        time.sleep(0.01)
    assert time.monotonic() - begin >= 0.19
    assert not folder.exists()


def test_a_host_that_lives_is_not_taken_over(folder: Path) -> None:
    left_by(folder)
    for touch in range(30):  # more often than it would be taken for dead
        assert not is_ours(folder, dead_seconds=0.2)
        os.utime(folder / NAME, ns=(touch, touch))
        time.sleep(0.02)
    holder = read_holder(folder)
    assert holder is not None
    assert holder.host == "elsewhere"


@pytest.mark.usefixtures("any_locks")
def test_a_process_that_was_killed_here_is_taken_over_at_once(folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left_by(folder, host=socket.gethostname(), pid=process.pid)
    assert is_ours(folder)


@pytest.mark.usefixtures("any_locks")
@pytest.mark.parametrize("content", ["", "{", '{"host": "x"}'])
def test_a_damaged_lock_file_blocks_nothing(folder: Path, content: str) -> None:
    folder.mkdir(parents=True)
    (folder / NAME).write_text(content)
    assert is_ours(folder)
    assert not folder.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_where_nothing_can_be_written_one_line_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(self: Path, *arguments: Any, **more: Any) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(FastarError, match=rf"part: cannot be made \({os.strerror(number)}\); free space") as caught:
            is_ours(folder)
        assert "\n" not in str(caught.value)
    folder.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(FastarError, match=rf"lock.json: cannot be written \({os.strerror(number)}\); free space"):
            is_ours(folder)
    assert list(folder.iterdir()) == []
    assert is_ours(folder)


COME_AT_ONCE = """
import errno, fcntl, os, socket, sys, time
from pathlib import Path
from fastar.runs.claims import claim

def refuse(handle, how):
    raise OSError(errno.ENOTSUP, "no locks")

if sys.argv[2] == "no-flock":
    fcntl.flock = refuse
sys.addaudithook(lambda event, given: time.sleep(0.001) if event in ("open", "os.rename", "os.link") else None)
folder = Path(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    with claim(folder / line.strip()) as ours:
        print(int(ours), flush=True)
        sys.stdin.readline()
    print("let go", flush=True)
"""


@pytest.mark.parametrize("before", ["nothing", "dead", "damaged"])
def test_of_several_at_one_moment_one_has_it(tmp_path: Path, before: str) -> None:
    """Without the kernel's locks: at a new folder, and at one whose holder is gone."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with running(tmp_path, 4) as others:
        for one in range(25):
            if before != "nothing":
                left_by(tmp_path / str(one), host=socket.gethostname(), pid=ended.pid)
            if before == "damaged":
                (tmp_path / str(one) / NAME).write_text("")
            answers = told(others, str(one))
            assert answers.count("1") <= 1, (one, answers)
            assert told(others, "") == ["let go"] * 4


@pytest.mark.usefixtures("without_flock")
def test_one_that_was_alive_after_all_keeps_its_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host touches its lock, or a third one takes it, when it has been judged and is about to be removed."""
    left_by(folder)
    judged, stamp = lock._take, lock._stamp

    def judge(*given: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Holder, "gone", lambda holder: True)
            return judged(*given)

    def stamped(path: Path) -> Any:  # after the first look
        found = stamp(path)
        os.utime(path, (1, 1))
        return found

    monkeypatch.setattr(lock, "_take", judge)
    monkeypatch.setattr(lock, "_stamp", stamped)
    assert not is_ours(folder)
    assert [path.name for path in folder.iterdir()] == [NAME]
    holder = read_holder(folder)
    assert holder is not None
    assert holder.host == "elsewhere"


def test_without_links_a_file_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    with claim(folder) as first, claim(folder) as second:
        assert (first, second) == (True, False)
        assert [path.name for path in folder.iterdir()] == [NAME]
    assert not folder.exists()


STOPS = """
import os, signal, socket, sys
from pathlib import Path
from fastar.errors import FastarError
from fastar.runs import claims, write_atomically
from fastar.runs.claims import claim

socket.gethostname = lambda: "elsewhere"
claims.TOUCH_SECONDS = 0.01
folder = Path(sys.argv[1])
with claim(folder) as ours:
    write_atomically(folder / "checkpoint", b"first")
    print("held", flush=True)
    sys.stdin.readline()
    for path in (folder / "checkpoint", folder / "another"):
        try:
            write_atomically(path, b"of the one that stood still")
        except FastarError as error:
            print(error, flush=True)
"""


@pytest.mark.usefixtures("without_flock")
def test_a_process_that_stood_still_writes_nothing_more(folder: Path) -> None:
    """Suspended on another host until it was taken for dead, and continued."""
    with subprocess.Popen(
        [sys.executable, "-c", STOPS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert not is_ours(folder, dead_seconds=1)
        other.send_signal(signal.SIGSTOP)
        end = time.monotonic() + SECONDS
        while True:
            with claim(folder, dead_seconds=1) as ours:
                if ours:
                    write_atomically(folder / "checkpoint", b"second")
                    other.send_signal(signal.SIGCONT)
                    out, _ = other.communicate("\n", timeout=SECONDS)
                    break
            assert time.monotonic() < end
            time.sleep(0.05)
    who = f"process {os.getpid()} on {socket.gethostname()}"
    wanted = f"{folder}: taken over by another fastar ({who}) while this one stood still; this one writes nothing more"
    assert [line.startswith(wanted) for line in out.splitlines()] == [True, True], out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"checkpoint": b"second"}


def test_processes_at_work_are_those_that_live(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    left_by(tmp_path / "processes" / "lives", host=socket.gethostname(), pid=os.getppid())
    left_by(tmp_path / "processes" / "vanished", age=lock.DEAD_SECONDS + 1)
    left_by(tmp_path / "processes" / "elsewhere", age=lock.DEAD_SECONDS - 60)
    (tmp_path / "processes" / "empty").mkdir()
    with processes.joined():
        assert [(one.host, one.pid) for one in processes.others()] == [
            ("elsewhere", 7),
            (socket.gethostname(), os.getppid()),
        ]
        assert len(processes.locks()) == 4
    assert {path.name for path in (tmp_path / "processes").iterdir()} == {"lives", "vanished", "elsewhere", "empty"}


def test_threads_of_a_process_are_told_apart(folder: Path) -> None:
    found, all_asked = list[bool](), threading.Barrier(8)

    def come() -> None:
        with claim(folder) as ours:
            found.append(ours)
            all_asked.wait()

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [False] * 7 + [True]


def test_one_that_dies_while_it_takes_over_is_waited_for_as_a_holder_is(folder: Path) -> None:
    left_by(folder, host=socket.gethostname(), pid=(1 << 31) - 1)
    (folder / f".{NAME}.0.tmp").touch()
    assert not is_ours(folder, dead_seconds=0.2)
    end = time.monotonic() + SECONDS
    while not is_ours(folder, dead_seconds=0.2):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not folder.exists()


@contextmanager
def running(folder: Path, count: int, locks: str = "no-flock") -> Iterator[list[subprocess.Popen[str]]]:
    """So many processes that claim the part of `folder` that a line names, until the next line."""
    command = [sys.executable, "-c", COME_AT_ONCE, str(folder), locks]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = [subprocess.Popen(command, text=True, **pipes) for _ in range(count)]
    try:
        assert [one.stdout.readline() for one in started if one.stdout is not None] == ["ready\n"] * count
        yield started
    finally:
        for one in started:
            one.kill()
            one.communicate()


def told(others: list[subprocess.Popen[str]], line: str) -> list[str]:
    """What each says to a line."""
    for one in others:
        assert one.stdin is not None
        one.stdin.write(line + "\n")
        one.stdin.flush()
    return [one.stdout.readline().strip() for one in others if one.stdout is not None]
