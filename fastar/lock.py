"""Who is using a run folder: a file that names host and process, beside the kernel's own lock."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fastar.errors import FastarError

NAME = "lock.json"
# A living holder touches its file this often; one on another host that has not for so long is taken for dead.
TOUCH_SECONDS = 20.0
DEAD_SECONDS = 120.0


@dataclass(frozen=True)
class Holder:
    """A process that holds, or held, a run folder."""

    host: str
    pid: int
    started: int
    """The process's start in the kernel's clock ticks (0: not known), so that a number used again is not mistaken."""
    since: float
    """Seconds since 1970."""
    device: int = 0
    inode: int = 0
    """Of the folder that is held (0: not known), so that a copy of it is not mistaken."""

    @classmethod
    def here(cls, folder: Path) -> Holder:
        """This process, as holder of `folder`."""
        there = folder.stat()
        started = _start_of(os.getpid()) or 0
        return cls(socket.gethostname(), os.getpid(), started, time.time(), there.st_dev, there.st_ino)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def gone(self) -> bool | None:
        """Whether the process has ended; None where it runs, or ran, on another host."""
        if self.host != socket.gethostname():
            return None
        started = _start_of(self.pid)
        return started is None or (started > 0 and self.started > 0 and started != self.started)

    def of_another(self, folder: Path) -> bool:
        """Whether it held another folder, of which `folder` is a copy. Known on its own host alone: numbers of devices
        and files may differ between hosts that share a folder."""
        if self.inode == 0 or self.host != socket.gethostname():
            return False
        there = folder.stat()
        return (self.device, self.inode) != (there.st_dev, there.st_ino)


def _start_of(pid: int) -> int | None:
    """When process `pid` started (see `Holder.started`); None: there is none, 0: there is one, and no more is known."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return 0
        return 0
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def read_holder(folder: Path) -> Holder | None:
    """Who the lock file of `folder` names; None: no such file, not a whole one, or one that was copied here."""
    try:
        holder = Holder(**json.loads((folder / NAME).read_text()))
        return None if holder.of_another(folder) else holder
    except (OSError, ValueError, TypeError):
        return None


def is_held(folder: Path) -> bool:
    """Whether a living process holds `folder`, as far as its lock file tells; takes no lock."""
    holder = read_holder(folder)
    if holder is None:
        return False
    gone = holder.gone()
    return _age(folder) < DEAD_SECONDS if gone is None else not gone


def _age(folder: Path) -> float:
    """Seconds since the lock file was touched, by the file system's clock (hosts' clocks differ)."""
    probe = folder / f".{NAME}.{os.getpid()}.tmp"
    try:
        touched = (folder / NAME).stat().st_mtime
        try:
            probe.touch()
            now = probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)
    except PermissionError:  # somebody else's folder, being listed
        now = time.time()
    except OSError:
        return float("inf")
    return now - touched


@contextmanager
def hold(folder: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold `folder` for this process until the block ends.

    The kernel's lock on the folder decides where the file system has one; it goes with the process. The lock file says
    who holds it, to people and to hosts that do not share the kernel's lock, and is all where there is none.

    Args:
        folder: it exists.
        say: told when the lock of a process that has ended is taken over.

    Raises:
        FastarError: another process holds it (named), or the lock cannot be written.
        OSError: the folder cannot be opened.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        guarded = _flock(handle)
        holder = read_holder(folder)
        if guarded is False:
            who = f" ({holder})" if holder else ""
            raise FastarError(f"{folder}: in use by another fastar{who}; wait for it or choose --out")
        if holder is not None:
            gone = holder.gone()
            if gone is None:
                age = _age(folder)
                if age < DEAD_SECONDS:
                    raise FastarError(
                        f"{folder}: in use by another fastar ({holder}, seen {max(age, 0):.0f} s ago); wait for it or "
                        f"choose --out; if it is gone, try again in {DEAD_SECONDS - max(age, 0):.0f} s"
                    )
            elif not gone and guarded is None and holder.pid != os.getpid():
                raise FastarError(f"{folder}: in use by another fastar ({holder}); wait for it or choose --out")
            say(f"{folder}: {holder} held it and is gone; going on")
        mine = Holder.here(folder)
        _write(folder, mine)
        with _touched(folder / NAME):
            try:
                yield
            finally:
                if read_holder(folder) == mine:
                    with suppress(OSError):  # a folder that is gone, or has become read-only
                        (folder / NAME).unlink()
    finally:
        os.close(handle)


def _write(folder: Path, holder: Holder) -> None:
    path = folder / NAME
    try:
        path.unlink(missing_ok=True)
        with path.open("x") as file:  # where two come at once, it is there for one of them
            file.write(json.dumps(asdict(holder)) + "\n")
    except FileExistsError as error:
        raise FastarError(f"{folder}: in use by another fastar ({read_holder(folder)}); wait for it") from error
    except OSError as error:
        what = f"{path}: cannot be written ({error.strerror}); free space or choose another folder"
        raise FastarError(what) from error


def _flock(handle: int) -> bool | None:
    """Take the kernel's lock: True, or False where somebody else has it; None: the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def _touched(file: Path) -> Iterator[None]:
    """Inside, a thread touches `file` every now and then."""
    done = threading.Event()

    def touch() -> None:
        while not done.wait(TOUCH_SECONDS):
            with suppress(OSError):
                os.utime(file)

    thread = threading.Thread(target=touch, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
