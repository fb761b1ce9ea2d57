"""One process at a time in a run folder: the kernel's lock, and a file that names host and process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fastar.errors import FastarError
from fastar.runs import hold, is_held, lock, read_holder
from fastar.runs.lock import NAME, Holder


def left_by(folder: Path, *, age: float = 0.0, **changes: Any) -> None:
    """The lock file of another process, last touched `age` seconds ago."""
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "started": 0, "since": 0.0, **changes}
    (folder / NAME).write_text(json.dumps(holder))
    now = time.time()
    os.utime(folder / NAME, (now - age, now - age))


@pytest.fixture
def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system without locks."""

    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refuse)


def refusal(folder: Path) -> str:
    with pytest.raises(FastarError) as caught, hold(folder):
        pytest.fail("held by two")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_file_names_host_and_process_and_goes_with_the_lock(tmp_path: Path) -> None:
    said: list[str] = []
    with hold(tmp_path, said.append):
        holder = read_holder(tmp_path)
        assert holder is not None
        assert (holder.host, holder.pid) == (socket.gethostname(), os.getpid())
        assert is_held(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not is_held(tmp_path)
    assert said == []


def test_another_process_is_named(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from fastar.runs.lock import hold\nwith hold(Path(sys.argv[1])):\n"
    code += " print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert f"in use by another fastar (process {other.pid} on {socket.gethostname()})" in refusal(tmp_path)
        assert is_held(tmp_path)
        other.kill()
        other.wait()
    assert (tmp_path / NAME).exists()  # killed: it could not clean up
    assert not is_held(tmp_path)
    said: list[str] = []
    with hold(tmp_path, said.append):
        assert said == [f"{tmp_path}: process {other.pid} on {socket.gethostname()} held it and is gone; going on"]


@pytest.mark.usefixtures("without_flock")
def test_without_the_kernel_s_lock_the_file_is_the_guard(tmp_path: Path, ended: int) -> None:
    left_by(tmp_path, pid=os.getppid())
    assert f"in use by another fastar (process {os.getppid()}" in refusal(tmp_path)
    left_by(tmp_path, pid=ended)
    with hold(tmp_path):
        assert "in use" in refusal_of_a_child(tmp_path)


def refusal_of_a_child(folder: Path) -> str:
    code = (
        "import errno, fcntl, sys; from pathlib import Path; from fastar.runs.lock import hold\n"
        "def refuse(*arguments): raise OSError(errno.ENOTSUP, 'no locks')\n"
        "fcntl.flock = refuse\n"
        "with hold(Path(sys.argv[1])): pass"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


@pytest.mark.usefixtures("without_flock")
def test_a_number_that_another_process_has_now_is_stale(tmp_path: Path) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("when a process started is read from /proc")
    left_by(tmp_path, pid=os.getppid(), started=1)
    assert not is_held(tmp_path)
    with hold(tmp_path):
        pass


@pytest.mark.parametrize("alive", [True, False])
def test_another_host_s_lock_is_watched(tmp_path: Path, alive: bool) -> None:
    left_by(tmp_path, host="elsewhere", pid=7, age=30)
    assert is_held(tmp_path)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if alive and len(said) == 1:  # the other host's thread
            threading.Timer(0.05, os.utime, [tmp_path / NAME]).start()

    if alive:
        with pytest.raises(FastarError, match=r"in use by another fastar \(process 7 on elsewhere\); wait"):
            hold(tmp_path, say, dead_seconds=60).__enter__()
    else:
        with hold(tmp_path, say, dead_seconds=0.1):
            assert is_held(tmp_path)
        assert said[1] == f"{tmp_path}: process 7 on elsewhere held it and is gone; going on"
    assert said[0].startswith(f"{tmp_path}: watching for ")


def test_a_container_may_have_this_host_s_name(tmp_path: Path, ended: int) -> None:
    """And its own process numbers: one that does not run here may run there."""
    if not Path("/proc/self/ns/pid").exists():
        pytest.skip("the namespace is read from /proc")
    left_by(tmp_path, pid=ended, namespace=7, inode=1)
    assert is_held(tmp_path)
    holder = read_holder(tmp_path)
    assert holder is not None
    assert holder.gone() is None
    left_by(tmp_path, pid=ended, namespace=Holder.here(tmp_path).namespace)
    assert not is_held(tmp_path)


def test_another_host_s_old_lock_is_nobody_s(tmp_path: Path) -> None:
    left_by(tmp_path, host="elsewhere", pid=7, age=lock.DEAD_SECONDS + 1)
    assert not is_held(tmp_path)


def test_a_holder_touches_its_lock(tmp_path: Path) -> None:
    with hold(tmp_path, touch_seconds=0.001):
        os.utime(tmp_path / NAME, (0, 0))
        end = time.monotonic() + 60
        while (tmp_path / NAME).stat().st_mtime == 0:
            assert time.monotonic() < end, "not touched"
            time.sleep(0.001)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "x"}', '{"nonsense": 1}'])
def test_a_damaged_lock_file_blocks_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / NAME).write_text(content)
    assert not is_held(tmp_path)
    with hold(tmp_path):
        pass


def test_a_process_that_waits_for_its_parent_is_gone(tmp_path: Path) -> None:
    """A zombie holds nothing."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert Holder(socket.gethostname(), process.pid, 0, 0.0).gone()
    process.wait()


def test_a_lock_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a folder that is read-only (root may write into those, so the system's answer is made)."""

    def refuse(self: Path, *arguments: Any, **more: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", refuse)
    assert "lock.json: cannot be written (Read-only file system)" in refusal(tmp_path)


@pytest.mark.parametrize("guard", ["flock", "file"])
def test_a_copy_of_a_folder_in_use_is_not_in_use(tmp_path: Path, request: pytest.FixtureRequest, guard: str) -> None:
    """Its lock file names a living process, which holds another folder."""
    if guard == "file":
        request.getfixturevalue("without_flock")
    original, copy = tmp_path / "run", tmp_path / "copy"
    original.mkdir()
    holder = Holder(socket.gethostname(), os.getppid(), 0, 0.0, original.stat().st_dev, original.stat().st_ino)
    left_by(original, **asdict(holder))
    assert is_held(original)
    shutil.copytree(original, copy)
    assert not is_held(copy)
    assert read_holder(copy) is None
    said: list[str] = []
    with hold(copy, said.append):
        assert is_held(copy)
    assert said == []
    assert list(copy.iterdir()) == []
    assert is_held(original)


def test_a_folder_that_was_moved_is_still_in_use(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with hold(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "moved")
        assert is_held(tmp_path / "moved")


def test_another_host_s_folder_may_have_another_number_here(tmp_path: Path) -> None:
    left_by(tmp_path, host="elsewhere", pid=7, device=1, inode=1)
    assert is_held(tmp_path)
    assert read_holder(tmp_path) == Holder("elsewhere", 7, 0, 0.0, 1, 1)


def test_a_file_is_locked_where_folders_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.setattr(lock, "HANDLE", ".lock")
    with hold(tmp_path):
        assert "in use by another fastar" in refusal(tmp_path)
        lock.check_held(tmp_path / "file")
    with hold(tmp_path):
        pass
