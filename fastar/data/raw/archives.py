"""ImageNet's official archives, read where they lie: members are found once and read by their offset."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fastar.data.raw.listing import SUFFIXES, PassedOver, reason_to_pass
from fastar.data.raw.raw_split import ImageSplit, is_image, readable
from fastar.data.raw.tars import TarArchive, read_members
from fastar.errors import FastarError, first_line, printable
from fastar.runtime.json_files import read_file
from fastar.runtime.progress import SILENT, Progress

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
_LABELS = "data/ILSVRC2012_validation_ground_truth.txt"
_SYNSETS = "data/meta.mat"
_LARGEST = 1 << 28  # bytes of the development kit, unpacked; the official one has 10 million
SECONDS = 60.0  # to read meta.mat, which takes one

# SciPy's reader dies, or takes all memory, of files that are damaged: it has a process of its own.
READ_SYNSETS = """
import sys
sys.path[:] = sys.argv[1].split("\\n")
import io, json, resource
resource.setrlimit(resource.RLIMIT_DATA, (1 << 32, 1 << 32))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from scipy.io import loadmat
table = loadmat(io.BytesIO(sys.stdin.buffer.read()), squeeze_me=True)["synsets"]
print(json.dumps([[int(row["ILSVRC2012_ID"]), str(row["WNID"]), int(row["num_children"])] for row in table]))
"""


def archive_split(path: Path, classes: tuple[str, ...], members: list[tuple[str, str, int, int]]) -> ImageSplit:
    """The images inside an uncompressed tar archive, in order of class and name.

    `members` are (class, file name, offset of its bytes in the archive, size).
    """
    if not members:
        raise FastarError(f"{path}: holds no images; get it again")
    label_of = {name: label for label, name in enumerate(classes)}
    unknown = next((name for name, *_ in members if name not in label_of), None)
    if unknown is not None:
        raise FastarError(f"{path}: holds images of {unknown}, no class of the training set; use archives of one set")
    # A listing reads headers alone: the last image could lie beyond the end of a file that was cut off.
    end, size = max(offset + size for _, _, offset, size in members), path.stat().st_size
    if end > size:
        raise FastarError(f"{path}: is cut off ({size:,} bytes of at least {end:,}); get it again")
    members = sorted(members)
    return ImageSplit(
        path,
        classes,
        [f"{name}/{file}" for name, file, _, _ in members],
        np.array([label_of[name] for name, *_ in members], dtype=np.int64),
        np.array([place for _, _, *place in members], dtype=np.int64),
    )


def train_archive(path: Path, passed: PassedOver, progress: Progress = SILENT) -> ImageSplit:
    """The training images of an archive of one archive per class, such as n01440764.tar; that is the class's name.

    What is no image goes to `passed`.
    """
    members = []
    with _opened(path) as archive:
        inner = []
        for member in archive:
            if member.isfile() and member.name.endswith(".tar"):
                inner.append(member)
            elif not member.isdir():
                passed.add(f"{path.name}/{member.name}", "no archive of a class")
        archive.check_end()
        if not inner:
            raise FastarError(f"{path}: holds no archives of classes (n01440764.tar, ...); get it again")
        with progress.task(f"listing {path.name}", len(inner), "classes") as advance:
            for class_archive in inner:
                name = Path(class_archive.name).stem
                stream = archive.extractfile(class_archive)
                assert stream is not None  # it is a file
                try:
                    with TarArchive.open(fileobj=stream, mode="r:", encoding="utf-8") as images:
                        members += [
                            (name, file, class_archive.offset_data + offset, size)
                            for file, offset, size in _images(images, f"{path.name}/{class_archive.name}", passed)
                        ]
                except tarfile.TarError as error:
                    raise FastarError(
                        f"{path}: {class_archive.name} in it is damaged ({error}); get it again"
                    ) from error
                advance()
    return archive_split(path, tuple(sorted({name for name, *_ in members})), members)


def val_archive(root: Path, classes: tuple[str, ...], passed: PassedOver, progress: Progress = SILENT) -> ImageSplit:
    """The validation images in `root`, with the labels of the development kit beside them; see `train_archive`."""
    path = root / VAL_ARCHIVE
    with progress.task(f"listing {path.name}", 1, "archives") as advance, _opened(path) as archive:
        images = sorted(_images(archive, path.name, passed))
        advance()
    names = _validation_classes(root)
    if len(names) != len(images):
        raise FastarError(f"{path}: holds {len(images)} images, {DEVKIT} has {len(names)} labels; get both again")
    # Label number k is of the image whose name ends in k: sorted by name, the k-th.
    members = [(name, *image) for name, image in zip(names, images, strict=True)]
    return archive_split(path, classes, members)


@contextmanager
def _opened(path: Path) -> Iterator[TarArchive]:
    try:
        with readable(path), TarArchive.open(path, mode="r:", encoding="utf-8") as archive:
            yield archive
    except tarfile.TarError as error:
        raise FastarError(f"{path}: not a whole, uncompressed tar archive ({error}); get it again") from error


def _images(archive: TarArchive, where: str, passed: PassedOver) -> Iterator[tuple[str, int, int]]:
    """(file name, offset, size) of the images in an archive."""
    for member in archive:
        name = Path(member.name).name
        if member.isdir():
            continue
        reason = "no file" if not member.isfile() else "hidden" if name.startswith(".") else reason_to_pass(name)
        if reason is None and Path(name).suffix.lower() not in SUFFIXES:
            stream = archive.extractfile(member)
            assert stream is not None  # it is a file
            reason = None if is_image(stream) else "no image"
        if reason is None:
            yield name, member.offset_data, member.size
        else:
            passed.add(f"{where}/{member.name}", reason)
    archive.check_end()


def _validation_classes(root: Path) -> list[str]:
    """The class of each validation image in order, from the development kit in `root`."""
    labels, synsets = (_devkit_file(root, name) for name in (_LABELS, _SYNSETS))
    # Numbers 1 to 1000 are the classes; above are the nodes of WordNet over them.
    leaves = {number: name for number, name, children in _synsets(synsets, root / DEVKIT) if children == 0}
    try:
        return [leaves[int(line)] for line in labels.decode("ascii").split()]
    except (KeyError, ValueError) as error:
        raise FastarError(f"{root / DEVKIT}: its labels or meta.mat are damaged ({error}); get it again") from error


def _synsets(
    content: bytes, where: Path, script: str = READ_SYNSETS, seconds: float = SECONDS
) -> list[tuple[int, str, int]]:
    """(number, name, number of children) of each row of meta.mat."""
    command = [sys.executable, "-c", script, "\n".join(filter(None, sys.path))]  # nothing of the current folder
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired as error:
        raise FastarError(f"{where}: reading its meta.mat takes more than {seconds:g} s; get it again") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = f"signal {-done.returncode}" if done.returncode < 0 else printable(said[-1])[:200] if said else "no word"
        raise FastarError(f"{where}: its labels or meta.mat are damaged ({why}); get it again")
    return [tuple(row) for row in json.loads(done.stdout)]


def _devkit_file(root: Path, name: str) -> bytes:
    folder, packed = root / DEVKIT, root / f"{DEVKIT}.tar.gz"
    try:
        if (folder / name).exists():
            return read_file(folder / name, _LARGEST)
        if not packed.is_file():
            raise FastarError(
                f"{root}: has {VAL_ARCHIVE} but not {packed.name}, which holds its labels; put it there too"
            )
        member = f"{DEVKIT}/{name}"
        return read_members(packed, (member,), _LARGEST)[member]
    except (OSError, tarfile.TarError, KeyError) as error:
        raise FastarError(f"{packed}: {name} cannot be read ({first_line(error)}); get it again") from error
