"""Finding the images below a folder of class folders: in which order, and what is passed over."""

import os
from collections import deque
from pathlib import Path

from fastar.data.raw.raw_split import is_image, readable
from fastar.errors import printable

# Known without a look inside, which a million files would not be worth. Others are images if their content is one.
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)
_COPIES = ("~", ".bak", ".orig", ".part", ".tmp", ".crdownload")  # of an image that lies beside, or half of one
_NAMED = 3


class PassedOver:
    """Things among the images that are none: their number, and the first few by name and reason."""

    def __init__(self) -> None:
        self.count = 0
        self._first: dict[str, list[str]] = {}

    def add(self, name: str, reason: str) -> None:
        self.count += 1
        named = self._first.setdefault(reason, [])
        if len(named) <= _NAMED:
            named.append(printable(name))

    def __str__(self) -> str:
        """A line of words.

        >>> passed = PassedOver()
        >>> passed.add("cat/notes.txt", "no image")
        >>> str(passed)
        'passed over 1 that is no image of a class: cat/notes.txt (no image)'
        """
        parts = [
            f"{', '.join(named[:_NAMED])}{', ...' if len(named) > _NAMED else ''} ({reason})"
            for reason, named in self._first.items()
        ]
        what = "1 that is no image" if self.count == 1 else f"{self.count:,} that are no images"
        return f"passed over {what} of a class: {'; '.join(parts)}"


def reason_to_pass(name: str) -> str | None:
    """The reason why a file of this name is no image, whatever it holds; None: its content decides."""
    return "a copy, or a part of one" if name.lower().endswith(_COPIES) else None


def class_names(root: Path, passed: PassedOver | None = None) -> tuple[str, ...]:
    """The class folders of `root`, sorted by name; what else lies there goes to `passed`."""
    with readable(root):
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
        names = [entry.name for entry in entries if _kind(entry) == "folder" and not entry.name.startswith(".")]
    if passed is not None:
        for name in sorted({entry.name for entry in entries} - set(names)):
            passed.add(os.path.relpath(root / name, root.parent), "in no class folder")
    return tuple(names)


def images_below(folder: Path, passed: PassedOver) -> list[Path]:
    """The images in a class folder and the folders below it, in order of folder and name as torchvision's ImageFolder.

    A file with a suffix of `SUFFIXES` is one (decoding it says whether it is whole), any other if its content begins as
    one. Hidden folders are passed over, and hidden files unless their content begins as an image; what is neither file
    nor folder is never opened. Links are followed, each folder is read once.
    """
    found: list[tuple[str, str]] = []
    waiting = deque([str(folder)])
    with readable(folder):
        visited = {_identity(str(folder.parent))}
        while waiting:
            place = waiting.popleft()
            if _identity(place) in visited:
                passed.add(_shown(place, folder), "a link to a folder that is read already")
                continue
            visited.add(_identity(place))
            below: list[str] = []
            for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
                kind = _kind(entry)
                if kind == "folder" and not entry.name.startswith("."):
                    (waiting if entry.is_symlink() else below).append(entry.path)
                elif (reason := _reason(entry, kind)) is None:
                    found.append((place, entry.name))
                else:
                    passed.add(_shown(entry.path, folder), reason)
            waiting.extendleft(reversed(below))  # before links: a folder keeps its own name
    return [Path(place, name) for place, name in sorted(found)]


def _kind(entry: "os.DirEntry[str]") -> str:
    """Folder, file or other, links followed; nothing where a link leads to none that can be reached."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:
        if not entry.is_symlink():
            raise
    return "nothing" if entry.is_symlink() and not os.path.exists(entry.path) else "other"


def _reason(entry: "os.DirEntry[str]", kind: str) -> str | None:
    """The reason why an entry that is no folder to look into is passed over; None: it is an image."""
    hidden = entry.name.startswith(".")
    if kind in ("folder", "other"):
        return "hidden" if kind == "folder" else "no file"
    # A link to nothing too: an image that is missing is an error, or left out, where it is decoded.
    if not hidden and os.path.splitext(entry.name)[1].lower() in SUFFIXES:
        return None
    if kind == "nothing":
        return "a link to nothing"
    if (copy := reason_to_pass(entry.name)) is not None:
        return copy
    try:
        with open(entry.path, "rb") as stream:
            if is_image(stream):
                return None
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return "hidden" if hidden else "no image"


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _shown(path: str, folder: Path) -> str:
    return os.path.relpath(path, folder.parent.parent)
