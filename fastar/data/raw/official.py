"""The published MD5 of official files: one of the same name that is another is used, and said."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastar.data.raw.listing import readable
from fastar.runtime.progress import SILENT, Progress

_BLOCK = 1 << 22
_LONG = 1 << 30  # bytes whose reading is shown


def note_other_files(md5: Mapping[str, str], files: Iterable[Path], progress: Progress) -> None:
    """One line for the raw `files` that have an official name (a key of `md5`) and are not what was published under it.

    Reads them whole, so it is for when their data are written, which is once. They are used all the same: images that
    were encoded again, or archives that were packed again, may be meant.
    """
    others = []
    for path in files:
        if path.name in md5 and _md5(path, progress) != md5[path.name]:
            others.append(path)
    if others:
        names = ", ".join(path.name for path in others)
        progress.line(
            f"{others[0].parent}: {names}: not as published (by MD5); used as found. "
            "If that is not meant, get the official files again"
        )


def _md5(path: Path, progress: Progress) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with readable(path), path.open("rb") as file:
        size = path.stat().st_size
        with (progress if size >= _LONG else SILENT).task(f"hashing {path.name}", size, "bytes") as advance:
            while block := file.read(_BLOCK):
                digest.update(block)
                advance(len(block))
    return digest.hexdigest()
