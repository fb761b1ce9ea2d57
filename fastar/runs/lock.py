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
from fastar.runtime.json_files import read_object

NAME = "lock.json"
# A living holder touches its file this often; one on another host that has not for so long is taken for dead.
TOUCH_SECONDS = 20.0
DEAD_SECONDS = 120.0
# The keys of a lock file that are whole numbers.
_NUMBERS = {"started", "device", "inode"}


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
        found = read_object(folder / NAME)
        # A file of another version may know less.
        if any(type(found.get(key)) is not int for key in ("pid", *(found.keys() & _NUMBERS))):
            return None
        if not (isinstance(found.get("host"), str) and 0 < found["pid"] < 1 << 31):
            return None
        holder = Holder(**found)
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
    except OSError:
        return float("inf")
    try:
        try:
            probe.touch()
            now = probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)
    except OSError:  # somebody else's folder, being listed, or a full disk
        now = time.time()
    return now - touched


def _is_touched_within(folder: Path, seconds: float) -> bool:
    """Wait for the lock file to be touched, so long by this process's own clock."""
    end, first = time.monotonic() + seconds, _stamp(folder)
    while first is not None and time.monotonic() < end:
        time.sleep(seconds / 40)
        now = _stamp(folder)
        if now != first:
            return now is not None
    return False


def _stamp(folder: Path) -> tuple[int, int] | None:
    try:
        with (folder / NAME).open("rb") as file:  # opened: a network file system may answer `stat` from what it knew
            there = os.fstat(file.fileno())
    except OSError:
        return None
    return there.st_ino, there.st_mtime_ns


@dataclass(frozen=True)
class _Lease:
    """A folder that this process holds."""

    folder: Path
    """Absolute."""
    handle: int
    """The open folder's file descriptor."""
    holder: Holder

    def lost(self) -> str | None:
        """Say what became of it, for users; None: it is still held."""
        try:
            opened, there = os.fstat(self.handle), self.folder.stat()
            same = (opened.st_dev, opened.st_ino) == (there.st_dev, there.st_ino)
        except OSError:
            same = False
        if not same:
            return (
                f"{self.folder}: moved, deleted or replaced while it was in use; nothing more is written; move it back "
                "and run the same command, or choose another --out"
            )
        now = read_holder(self.folder)
        if now == self.holder:
            return None
        who = f"taken over by another fastar ({now})" if now else f"its {NAME} is gone: taken over, or deleted by hand"
        return f"{self.folder}: {who} while this one stood still; this one writes nothing more; wait, or choose --out"


_leases: list[_Lease] = []


def lost(path: Path) -> str | None:
    """Say what became of the folder around `path` that this process began to hold; None: held, or none of its own."""
    whole = Path(os.path.abspath(path))
    return next((lease.lost() for lease in reversed(_leases) if whole.is_relative_to(lease.folder)), None)


def check_held(path: Path) -> None:
    """Raise FastarError if `path` lies in a folder that this process has begun to hold, and has lost.

    Asked before anything there is written or deleted: a process that stood still (a suspended machine, a network file
    system that hangs) does not know that another one has taken its folder over.
    """
    what = lost(path)
    if what is not None:
        raise FastarError(what)


@contextmanager
def hold(folder: Path, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold `folder` for this process until the block ends.

    The kernel's lock on the folder decides where the file system has one; it goes with the process. The lock file says
    who holds it, to people and to hosts that do not share the kernel's lock, and is all where there is none. Clocks of
    hosts differ: a holder on another host is taken for dead only if its file is not touched while this process waits.

    Args:
        folder: it exists.
        say: told when another host's lock is watched, and when one is taken over.

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
                if -TOUCH_SECONDS < age < DEAD_SECONDS:
                    raise FastarError(
                        f"{folder}: in use by another fastar ({holder}, seen {max(age, 0):.0f} s ago); wait for it or "
                        f"choose --out; if it is gone, try again in {DEAD_SECONDS - max(age, 0):.0f} s"
                    )
                seconds = 2 * TOUCH_SECONDS if age > 0 else DEAD_SECONDS
                say(f"{folder}: watching for {seconds:.0f} s whether {holder} is still there")
                if _is_touched_within(folder, seconds):
                    raise FastarError(f"{folder}: in use by another fastar ({holder}); wait for it or choose --out")
            elif not gone and guarded is None and holder.pid != os.getpid():
                raise FastarError(f"{folder}: in use by another fastar ({holder}); wait for it or choose --out")
            say(f"{folder}: {holder} held it and is gone; going on")
        lease = _Lease(Path(os.path.abspath(folder)), handle, Holder.here(folder))
        _write(folder, lease.holder)
        _leases.append(lease)
        try:
            with _touched(lease):
                yield
        finally:
            _leases.remove(lease)
            if lease.lost() is None:
                with suppress(OSError):  # a folder that has become read-only
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
def _touched(lease: _Lease) -> Iterator[None]:
    """Inside, a thread touches the lock file every now and then, as long as it is this process's."""
    done = threading.Event()

    def touch() -> None:
        while not done.wait(TOUCH_SECONDS):
            if lease.lost() is None:
                with suppress(OSError):
                    os.utime(lease.folder / NAME)

    thread = threading.Thread(target=touch, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
