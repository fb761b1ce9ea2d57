"""One process at a time in a folder: the kernel's lock (filelock), and a file that says who has it.

The kernel's lock decides where the file system has one; it goes with the process. The file, `lock.json`, says who holds
the folder, to people and to hosts that do not share the kernel's lock, and is all where there is none.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import pydantic

from fastar.errors import FastarError, refusal
from fastar.runtime.json_files import read_file

NAME = "lock.json"
# What is opened and locked: the folder itself; on Windows, which opens no folders, a file in it.
HANDLE = ".lock" if os.name == "nt" else ""
# A living holder touches its file this often; one on another host that has not for so long is taken for dead.
TOUCH_SECONDS = 20.0
DEAD_SECONDS = 120.0
# Between two looks at a folder that is waited for, at first and at last.
FIRST_LOOK_SECONDS, LOOK_SECONDS = 0.02, 1.0


class InUse(FastarError):
    """Another process holds a folder."""


@pydantic.dataclasses.dataclass(frozen=True, config={"strict": True, "defer_build": True})
class Holder:
    """A process that holds, or held, a run folder."""

    host: str
    pid: Annotated[int, pydantic.Field(gt=0, lt=1 << 31)]
    started: int
    """The process's start in the kernel's clock ticks (0: not known), so that a number used again is not mistaken."""
    since: float
    """Seconds since 1970."""
    device: int = 0
    inode: int = 0
    """The numbers of the folder that is held (0: not known), so that a copy of it is not mistaken."""
    namespace: int = 0
    """Of process numbers (0: not known): containers on one host may share its name, and have each their own."""

    @classmethod
    def here(cls, folder: Path) -> Holder:
        """This process, as holder of `folder`."""
        there = folder.stat()
        started = _start_of(os.getpid()) or 0
        return cls(socket.gethostname(), os.getpid(), started, time.time(), there.st_dev, there.st_ino, _namespace())

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def gone(self) -> bool | None:
        """Tell whether the process has ended; None where it runs, or ran, on another host."""
        if not self._is_here():
            return None
        started = _start_of(self.pid)
        return started is None or (started > 0 and self.started > 0 and started != self.started)

    def _is_here(self) -> bool:
        return self.host == socket.gethostname() and self.namespace in (0, _namespace())

    def of_another(self, folder: Path) -> bool:
        """Tell whether it held another folder, of which `folder` is a copy. Known on its own host alone: numbers of
        devices and files may differ between hosts that share a folder."""
        if self.inode == 0 or not self._is_here():
            return False
        there = folder.stat()
        return (self.device, self.inode) != (there.st_dev, there.st_ino)


@cache
def _holder() -> pydantic.TypeAdapter[Holder]:
    """The reader of a lock file's JSON; built when one is met."""
    return pydantic.TypeAdapter(Holder)


def _namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _start_of(pid: int) -> int | None:
    """The start of process `pid` (see `Holder.started`); None: there is none, 0: there is one, and no more is known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        import psutil  # only here: it takes time

        return 0 if psutil.pid_exists(pid) else None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def read_holder(folder: Path) -> Holder | None:
    """The process that the lock file of `folder` names; None: no such file, a damaged one, or one copied here."""
    try:
        holder = _holder().validate_json(read_file(folder / NAME))
        return None if holder.of_another(folder) else holder
    except (OSError, ValueError):
        return None


def is_held(folder: Path, now: float | None = None) -> bool:
    """Tell whether a living process holds `folder`, as far as its lock file says; takes no lock, and writes nothing.

    Args:
        now: seconds since 1970 by the file system's clock; None: by this host's.
    """
    holder, stamp = read_holder(folder), _stamp(folder / NAME)
    if holder is None or stamp is None:
        return False
    gone = holder.gone()
    return (time.time() if now is None else now) - stamp[1] / 1e9 < DEAD_SECONDS if gone is None else not gone


def touched(folder: Path) -> float | None:
    """When the lock file of `folder` was touched last, in seconds since 1970 by the file system's clock; None: no
    such file. Of a folder that this process holds, that is at most `TOUCH_SECONDS` ago."""
    stamp = _stamp(folder / NAME)
    return None if stamp is None else stamp[1] / 1e9


_Stamp = tuple[int, int, int]  # a lock file's number, the nanoseconds of its last touch, and its size


def _stamp(path: Path) -> _Stamp | None:
    """The stamp of a lock file; None: there is none."""
    try:
        with path.open("rb") as file:  # opened: a network file system may answer `stat` from what it knew
            there = os.fstat(file.fileno())
    except OSError:
        return None
    return there.st_ino, there.st_mtime_ns, there.st_size


def _is_touched_within(path: Path, seconds: float) -> bool:
    """Wait for a lock file to be touched, so long by this process's own clock: those of hosts differ."""
    first = _stamp(path)
    while _is_seen_alive(path, seconds):
        if _stamp(path) != first:
            return True
        time.sleep(seconds / 40)
    return False


# Files that are watched: each one's stamp, and when that was first seen by this process.
_watched: dict[Path, tuple[_Stamp, float]] = {}


def _is_seen_alive(path: Path, seconds: float) -> bool:
    """Tell whether a lock file has been touched, or is new, within so many seconds; watched from one call to the
    next."""
    stamp, now = _stamp(path), time.monotonic()
    before, since = _watched.pop(path, (None, now))
    if stamp is None or (before == stamp and now - since >= seconds):
        return False
    _watched[path] = stamp, since if before == stamp else now
    return True


@dataclass(frozen=True)
class _Lease:
    """A folder that this process holds."""

    folder: Path
    """Absolute."""
    handle: int
    """The file descriptor of the folder, or of the file in it, that is locked."""
    holder: Holder
    guards: tuple[Path, ...]
    """Files and folders, absolute, that are written to only while it is held."""

    def lost(self) -> str | None:
        """Say what became of it, for users; None: it is still held."""
        shown = next((path for path in self.guards[1:] if self.folder.is_relative_to(path)), self.folder)
        try:
            same = os.path.samestat(os.fstat(self.handle), (self.folder / HANDLE).stat())
        except OSError:
            same = False
        if not same:
            return (
                f"{shown}: moved, deleted or replaced while it was in use; nothing more is written; move it back "
                "and run it again, or choose another run folder (out)"
            )
        now = read_holder(self.folder)
        if now == self.holder:
            return None
        who = f"taken over by another fastar ({now})" if now else f"its {NAME} is gone: taken over, or deleted by hand"
        return (
            f"{shown}: {who} while this one stood still; this one writes nothing more; wait, or choose another "
            "run folder (out)"
        )


_leases: list[_Lease] = []


def lost(path: Path) -> str | None:
    """Say what became of the folder that this process began to hold, and that guards `path`; None: it is still held,
    or there is none. The one that was begun last counts."""
    whole = Path(os.path.abspath(path))
    return next((lease.lost() for lease in reversed(_leases) if any(map(whole.is_relative_to, lease.guards))), None)


def check_held(path: Path) -> None:
    """Raise FastarError if `path` is guarded by a folder that this process has begun to hold, and has lost.

    Asked before anything there is written or deleted: a process that stood still (a suspended machine, a network file
    system that hangs) does not know that another one has taken its folder over.
    """
    what = lost(path)
    if what is not None:
        raise FastarError(what)


@contextmanager
def hold(
    folder: Path,
    say: Callable[[str], None] | None = lambda line: None,
    *,
    guards: Sequence[Path] = (),
    wait: bool = False,
    touch_seconds: float = TOUCH_SECONDS,
    dead_seconds: float = DEAD_SECONDS,
) -> Iterator[None]:
    """Hold `folder` for this process until the block ends.

    A holder on another host is taken for dead if its file is not touched for `dead_seconds`, while this process waits.

    Args:
        folder: it exists.
        say: told when another host's lock is watched, when one is taken over, and when one is waited for; None: another
            host's lock counts at once.
        guards: what is written to only while it is held, beside the folder itself.
        wait: until another process lets it go.

    Raises:
        InUse: another process holds it (named), and `wait` is not set.
        FastarError: the lock cannot be written.
        OSError: the folder cannot be opened.
    """
    own = _waited_for(folder, say, dead_seconds) if wait else taken(folder, say, dead_seconds)
    with held_as_taken(folder, own, guards, touch_seconds):
        yield


@contextmanager
def held_as_taken(folder: Path, own: Taken, guards: Sequence[Path], touch_seconds: float) -> Iterator[None]:
    """Keep what was taken until the block ends; then the lock file goes, and the kernel's lock."""
    whole = tuple(Path(os.path.abspath(path)) for path in (folder, *guards))
    lease = _Lease(whole[0], *own, whole)
    _leases.append(lease)
    done = threading.Event()
    thread = threading.Thread(target=_touch, args=(lease, touch_seconds, done), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _leases.remove(lease)
        if lease.lost() is None:
            with suppress(OSError):  # a folder that has become read-only
                (folder / NAME).unlink()
        os.close(lease.handle)


Taken = tuple[int, Holder]  # the locked handle of a folder, and what its lock file says


def _waited_for(folder: Path, say: Callable[[str], None] | None, dead_seconds: float) -> Taken:
    """What is taken of `folder`, once nobody else holds it."""
    seconds, said = FIRST_LOOK_SECONDS, False
    while True:
        try:
            return taken(folder, None, dead_seconds)
        except InUse as error:
            if seconds >= LOOK_SECONDS and say is not None and not said:
                say(f"waiting: {str(error).partition(';')[0]}")
                said = True
        time.sleep(seconds)
        seconds = min(2 * seconds, LOOK_SECONDS)


def taken(folder: Path, say: Callable[[str], None] | None, dead_seconds: float) -> Taken:
    """The handle of `folder`, locked, and what was written into its lock file.

    Args:
        say: as of `hold`; None: another host's lock is not watched here, but from one call to the next.

    Raises:
        InUse, FastarError, OSError: as `hold`; nothing is held then.
    """
    handle = os.open(folder / HANDLE, os.O_RDWR | os.O_CREAT if HANDLE else os.O_RDONLY)
    try:
        gone = _take(folder, handle, say, dead_seconds)
        if not os.path.samestat(os.fstat(handle), (folder / HANDLE).stat()):
            raise InUse(f"{folder}: in use by another fastar (it was replaced just now); run it again")
        holder = Holder.here(folder)
        _write(folder, holder, gone, dead_seconds)
    except BaseException:
        os.close(handle)
        raise
    return handle, holder


def _take(folder: Path, handle: int, say: Callable[[str], None] | None, dead_seconds: float) -> _Stamp | None:
    """Take the kernel's lock, and make sure that nobody else holds the folder without it; the stamp of the lock file
    of one that held it and is gone, or of a damaged one."""
    from filelock import lock_descriptor  # only here: what reads runs takes no lock, and the import 20 ms

    try:
        locked: bool | None = lock_descriptor(handle, blocking=False)
    except OSError:  # the file system has no locks
        locked = None
    stamp, holder = _stamp(folder / NAME), read_holder(folder)  # in this order: a file that comes between is another's
    held = locked is False
    if holder is not None and not held:
        gone = holder.gone()
        if gone is None:
            if say is not None:
                say(f"{folder}: watching for {dead_seconds:.0f} s whether {holder} is still there")
            held = (_is_seen_alive if say is None else _is_touched_within)(folder / NAME, dead_seconds)
        else:
            held = not gone and locked is None and holder.pid != os.getpid()
    if held:
        who = f" ({holder})" if holder else ""
        raise InUse(f"{folder}: in use by another fastar{who}; wait for it or choose another run folder (out)")
    if holder is not None and say is not None:
        say(f"{folder}: {holder} held it and is gone; going on")
    return stamp


def _write(folder: Path, holder: Holder, gone: _Stamp | None, dead_seconds: float) -> None:
    """Write the lock file, whole at once, in place of the one with the stamp `gone`; of several at once one does."""
    path, own = folder / NAME, folder / f".{NAME}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    with refusal(f"{path}: cannot be written", "free space or choose another folder"):
        try:
            with own.open("xb") as file:
                file.write(_holder().dump_json(holder) + b"\n")
            with nullcontext() if gone is None else _taking_over(folder, dead_seconds):
                if gone is not None and _stamp(path) == gone:
                    path.unlink()
                _link(own, path)
        except (FileExistsError, FileNotFoundError) as error:  # another was first, or has removed the folder
            raise InUse(f"{folder}: in use by another fastar ({read_holder(folder)}); wait for it") from error
        finally:
            with suppress(OSError):
                own.unlink()


@contextmanager
def _taking_over(folder: Path, dead_seconds: float) -> Iterator[None]:
    """Be the only one to remove the lock file, or raise FileExistsError. One that dies inside is watched."""
    path = folder / f".{NAME}.0.tmp"
    try:
        path.open("xb").close()
    except FileExistsError:
        if _stamp(path) is not None and not _is_seen_alive(path, dead_seconds):
            path.unlink(missing_ok=True)
        raise
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _link(file: Path, path: Path) -> None:
    """Give a whole file another name, or raise FileExistsError where something has it."""
    try:
        os.link(file, path)
    except FileExistsError:
        if file.stat().st_nlink == 1:  # else it was done, and a network file system asked for it twice
            raise
    except OSError:  # the file system has no links
        with path.open("xb") as copy:
            copy.write(file.read_bytes())


def _touch(lease: _Lease, seconds: float, done: threading.Event) -> None:
    """Touch the lock file every `seconds`, as long as it is this process's."""
    while not done.wait(seconds):
        if lease.lost() is None:
            with suppress(OSError):
                os.utime(lease.folder / NAME)
