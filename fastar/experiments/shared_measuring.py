"""A run's paths measured by all processes at work on it: each takes some points, and writes files that others read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastar.evaluation.paths import Values
from fastar.experiments.session import Session
from fastar.experiments.work_list import Wait, alone_at
from fastar.runs import delete, write_json
from fastar.runtime.json_files import read_object, unsealed

# So many parts for each process at the beginning: one that is slower, or comes later, finds some too.
PARTS = 3


class SharedMeasuring:
    """Shares points out to the processes at work on a run (`evaluation.paths.Share`). Where memory does not hold all
    points at once, a process that goes on later finds what was measured, too.

    Args:
        of: a digest of all that the values depend on.
        processes: that there are to be at least.
    """

    def __init__(self, session: Session, of: str, processes: int = 1):
        self._session, self._run, self._of, self._least = session, session.run, of, processes

    def __call__(self, count: int, chunk: int, measure: Callable[[range], list[Values]]) -> list[Values]:
        # Each part is a pass over the data: they are as large as memory allows, unless there are others to take some.
        processes = max(self._least, 1 + len(self._run.processes.others()))
        size = chunk if processes == 1 else min(chunk, -(-count // (PARTS * processes)))
        if size >= count and not self._run.measured.is_dir():
            return measure(range(count))
        missing, found = dict(enumerate(self._parts(count, size))), dict[int, list[Values]]()
        wait = Wait(self._session)
        while missing:
            taken = False
            for number, part in list(missing.items()):
                values = self._read(number)
                if values is None:
                    with self._run.claim("measured", number) as ours:
                        if ours:
                            values = self._read(number)  # another may have finished it just now
                        if ours and values is None:
                            values, taken = measure(part), True
                            write_json(self._file(number), {"of": self._of, "values": _as_text(values)})
                if values is not None:
                    found[number] = values
                    del missing[number]
            if missing and not taken:
                wait([("measured", number) for number in missing])
        return [values for number in sorted(found) for values in found[number]]

    def _parts(self, count: int, size: int) -> list[range]:
        """The numbers of the points of each part, as the process that came first has them."""
        file = self._run.measured / "parts.json"
        with alone_at(self._session, "parts"):
            kept = _read(file)
            if (kept.get("of"), kept.get("count")) == (self._of, count):
                size = int(kept["size"])
            else:
                for path in self._run.measured.glob("*"):
                    delete(path)
                write_json(file, {"of": self._of, "count": count, "size": size})
        return [range(begin, min(begin + size, count)) for begin in range(0, count, size)]

    def _file(self, number: int) -> Path:
        return self._run.measured / f"{number:04d}.json"

    def _read(self, number: int) -> list[Values] | None:
        """The values of a part; None: they are not there, damaged, or of something else."""
        kept = _read(self._file(number))
        return _as_numbers(kept["values"]) if kept.get("of") == self._of else None


def _read(file: Path) -> dict[str, Any]:
    """The content of a file; nothing where it is not there, or damaged."""
    try:
        return unsealed(read_object(file))[0]
    except (OSError, ValueError):
        return {}


def _as_text(values: list[Values]) -> list[dict[str, dict[str, str]]]:
    """All bits, of what is not finite too, which the files do not take as numbers."""
    return [{split: {name: one.hex() for name, one in m.items()} for split, m in of.items()} for of in values]


def _as_numbers(values: list[dict[str, dict[str, str]]]) -> list[Values]:
    return [{split: {k: float.fromhex(one) for k, one in m.items()} for split, m in of.items()} for of in values]
