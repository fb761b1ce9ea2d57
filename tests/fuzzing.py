"""Damage to every kind of file that fastar reads: `python tests/fuzzing.py --seed S --seconds 30`, or `--case K` of it.

Each case copies a set of good files, damages one of them, and reads them as a user's command would. A case fails by

- an exception that is no FastarError, a signal, a hang, or memory beyond a limit;
- a value other than the original's, read without complaint, where the kind of file has a checksum;
- a file made, changed or removed outside what the command may write.

A case is a function of seed and number alone, so a failure is repeated by what it prints.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import io
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import fastar
from data_samples import cifar_binary_files, cifar_python_files, raw_dataset, write_archive, write_files, write_folders
from data_samples import write_idx as write_idx_files
from run_cases import Killed, at_call, kill, small
from test_data_archives import devkit, jpeg, tar

from fastar.config import dataset_spec, load_settings
from fastar.data.convert import prepare
from fastar.data.ffcv.folder import open_files
from fastar.data.in_memory import load
from fastar.data.raw.class_folders import find_images
from fastar.data.raw.find import find_raw
from fastar.data.raw.raw_split import RawSplit
from fastar.data.streaming import StreamingDataset
from fastar.errors import FastarError
from fastar.experiments import train_star
from fastar.runs.model_files import load_checkpoint
from fastar.training import StarStep

HANG_SECONDS = 120
MEMORY = 6 << 30


@dataclass(frozen=True)
class Kind:
    """A set of good files, and a reader of them.

    Args:
        make: writes the good files into an empty folder.
        read: what a user's command makes of the folder: any value that can be compared; FastarError where it refuses.
        checked: names (patterns) of files that have a checksum: damaged, they may not be read as another value.
        damaged: names (patterns) of the files that are damaged.
        writes: `read` may write into the folder.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    checked: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ("*",)
    writes: bool = False


def digest(*arrays: np.ndarray) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.shape}{array.dtype}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def pixels(*splits: RawSplit) -> str:
    """Every image and label, each image read as the writers read it."""
    found = hashlib.sha256()
    for split in splits:
        for index in range(len(split)):
            image, label = split[index]
            found.update(f"{image.shape}{label}".encode() + np.ascontiguousarray(image).tobytes())
    return found.hexdigest()


def read_raw(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        raw = find_raw(dataset_spec(name), folder)
        return pixels(raw.train, raw.test)

    return read


def read_images(folder: Path) -> object:
    splits = find_images(folder)
    return pixels(splits.train, splits.test)


def make_cifar_archive(folder: Path) -> None:
    files = cifar_python_files(raw_dataset("cifar10", 20, 10), "cifar10")
    write_archive(folder / "cifar-10-python.tar.gz", "cifar-10-batches-py", files)


def make_cifar_folder(folder: Path) -> None:
    write_files(folder, cifar_python_files(raw_dataset("cifar10", 20, 10), "cifar10"))


def make_cifar_binary(folder: Path) -> None:
    write_files(folder, cifar_binary_files(raw_dataset("cifar10", 20, 10), "cifar10"))


def make_png_folders(folder: Path) -> None:
    write_folders(folder, raw_dataset("cifar10", 20, 10))


def make_jpeg_folders(folder: Path) -> None:
    for split, count in (("train", 6), ("val", 3)):
        for number in range(count):
            place = folder / split / f"class{number % 3}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number}.JPEG").write_bytes(jpeg(number))


def make_imagenet(folder: Path) -> None:
    classes = {
        name: tar({f"{name}_{i}.JPEG": jpeg(10 * k + i) for i in range(2)})
        for k, name in enumerate(("n01", "n02", "n03"))
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(
        tar({f"{name}.tar": content for name, content in classes.items()})
    )
    images = {f"ILSVRC2012_val_{i + 1:08}.JPEG": jpeg(50 + i) for i in range(3)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(images))
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar(devkit([1, 2, 3]), "w:gz"))


def make_devkit_folder(folder: Path) -> None:
    make_imagenet(folder)
    (folder / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    for name, content in devkit([1, 2, 3]).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def make_data(folder: Path) -> None:
    prepare("digits", directory=folder, workers=1, limit=60)


def read_data(folder: Path) -> object:
    found = [load(open_files(folder / "digits"), split, "cpu") for split in ("train", "test")]
    return digest(*(part.numpy() for data in found for part in (data.images, data.labels)))


def make_streaming(folder: Path) -> None:
    raw = folder.with_name(f"{folder.name}-raw")
    make_jpeg_folders(raw)
    prepare("imagefolder", own_name="made", raw=raw, directory=folder, workers=1)
    shutil.rmtree(raw)


def read_streaming(folder: Path) -> object:
    files, parts = open_files(folder / "made"), []
    for split in ("train", "test"):
        data = StreamingDataset(files, split, "cpu", size=16, threads=1)
        parts += [part.numpy() for batch in data.sequential(4) for part in batch]
    return digest(*parts)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU(), torch.nn.Linear(5, 3))


def make_pt(folder: Path, zipped: bool = True) -> None:
    torch.save(network().state_dict(), folder / "a.pt", _use_new_zipfile_serialization=zipped)


def read_model(folder: Path) -> object:
    path = next((path for path in folder.iterdir()), folder / "a.pt")  # gone: asked for all the same
    state = load_checkpoint(path).state
    return {name: (str(value.dtype), digest(value.float().numpy())) for name, value in state.items()}


def make_foreign(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(network().state_dict(), folder / "a.safetensors", {"format": "pt"})


def make_run(folder: Path) -> None:
    data = folder.with_name(f"{folder.name}-data")
    train_star(small(data, "star.epochs=2"), folder / "run")
    shutil.rmtree(data)


def make_stopped(folder: Path) -> None:
    """A run that was killed in its star's second epoch."""
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        at_call(patch, StarStep, 5, kill)
        train_star(small(folder / "data", *STOPPED), folder / "run")


def read_stopped(folder: Path) -> object:
    """It goes on: whatever checkpoint it goes on from, the star is the same."""
    train_star(small(folder / "data", *STOPPED), folder / "run")
    return digest(*(value.numpy() for value in load_checkpoint(folder / "run" / "star.safetensors").state.values()))


STOPPED = ("star.epochs=2",)


def command(*arguments: object, codes: tuple[int, ...] = (0,)) -> str:
    """What a command prints; FastarError where it ends with the code of bad input.

    Anything but the codes that it may end with, or more than one line about an error, is a failure.
    """
    outcome = fastar(*arguments)
    if outcome.code == 2:
        if outcome.out or outcome.err.count("\n") != 1 or not outcome.err.startswith("fastar: "):
            raise AssertionError(f"not one line: {outcome}")
        raise FastarError(outcome.err)
    if outcome.code not in codes:
        raise AssertionError(f"exit code {outcome.code}: {outcome}")
    return outcome.out


def read_run(folder: Path) -> object:
    """Listed whatever it holds; checked: damage is said (code 1)."""
    command("runs", folder)
    with contextlib.suppress(FastarError):
        command("report", folder / "run")
    if "all well" not in command("verify", folder / "run", codes=(0, 1)):
        raise FastarError("verify found the damage")
    return "all well"


def make_settings(folder: Path) -> None:
    (folder / "run.yaml").write_text(load_settings(dataset="digits").to_yaml())


def read_settings(folder: Path) -> object:
    return load_settings(file=folder / "run.yaml").to_yaml()


def make_pair(folder: Path) -> None:
    for name in ("a", "b"):
        torch.save(network().state_dict(), folder / f"{name}.pt")
    (folder / "net.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))\n"
    )


def read_pair(folder: Path) -> object:
    """Matched: a file is there if, and only if, the command says so."""
    out = folder / "out.safetensors"
    out.unlink(missing_ok=True)
    model = ("--model", f"{folder / 'net.py'}:build", "--input-shape", "2x6")
    try:
        command("match", folder / "a.pt", folder / "b.pt", *model, "--out", out)
    except FastarError:
        if out.exists():
            raise AssertionError("refused, and written all the same") from None
        raise
    state = load_checkpoint(out).state
    out.unlink()
    return {name: digest(value.float().numpy()) for name, value in state.items()}


KINDS: dict[str, Kind] = {
    "cifar archive": Kind(make_cifar_archive, read_raw("cifar10"), checked=("*",)),
    "cifar folder": Kind(make_cifar_folder, read_raw("cifar10")),
    "cifar binary": Kind(make_cifar_binary, read_raw("cifar10")),
    "idx": Kind(lambda folder: write_idx_files(folder, raw_dataset("mnist", 20, 10), False), read_raw("mnist")),
    "idx.gz": Kind(
        lambda folder: write_idx_files(folder, raw_dataset("mnist", 20, 10), True), read_raw("mnist"), checked=("*",)
    ),
    "png folders": Kind(make_png_folders, read_raw("cifar10")),
    "jpeg folders": Kind(make_jpeg_folders, read_images),
    "imagenet": Kind(make_imagenet, read_images, checked=("*.gz",)),
    "devkit": Kind(make_devkit_folder, read_images, damaged=("meta.mat", "*.txt")),
    "beton": Kind(make_data, read_data, checked=("*.beton", "metadata.json")),
    # Checksums that are damaged are made again, once the images have been compared with the metadata's digest.
    "beton of any size": Kind(make_streaming, read_streaming, checked=("*",), writes=True),
    ".pt": Kind(make_pt, read_model, checked=("*",)),
    "legacy .pt": Kind(lambda folder: make_pt(folder, zipped=False), read_model),
    "foreign .safetensors": Kind(make_foreign, read_model),
    "run": Kind(make_run, read_run, checked=("*.safetensors", "results.json"), writes=True),  # report draws its picture
    "stopped run": Kind(
        make_stopped, read_stopped, checked=("*",), damaged=("in-training/*/*", "sources/*", "log.jsonl"), writes=True
    ),
    "settings": Kind(make_settings, read_settings),
    "pair": Kind(make_pair, read_pair, checked=("*.pt",), damaged=("*.pt",), writes=True),
}

TOKENS = (
    b"\x00" * 64,
    b"\xff" * 64,
    b"[" * 3000,
    b'{"a":' * 3000,
    b"9" * 5000,
    b"1e999",
    b"NaN",
    b"null",
    b"true",
    b"-1",
    b"!!python/object:os.system",
    b"&a [*a]",
    b"2020-13-45",
    b"\n",
    b"\xed\xa0\x80",
    b"../../outside",
)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """`content` with one fault: a bit, a byte, a cut, a hole, zeros, a part moved or doubled, or an unkind token."""
    size = len(content)
    place = chance.randrange(size + 1)
    length = min(chance.choice((1, 2, 4, 16, 100, 5000)), size)
    what = chance.randrange(9)
    if what in (0, 1) and size:  # a bit flips more often than anything else
        place = min(place, size - 1)
        return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
    if what == 2:
        return content[:place] + chance.randbytes(length) + content[place + length :]
    if what == 3:
        return content[:place]
    if what == 4:
        return content[:place] + content[place + length :]
    if what == 5:
        return content[:place] + bytes(min(length, size - place)) + content[place + length :]
    if what == 6:
        return content[:place] + content[place : place + length] + content[place:]
    token = chance.choice(TOKENS)
    if what == 7:
        return content[:place] + token + content[place:]
    return content[:place] + token + content[place + len(token) :]


def unkind(path: Path, chance: random.Random) -> str:
    """Put something in the place of a file: nothing, a folder, a pipe, a link to nowhere or to itself."""
    path.unlink()
    what = chance.choice(("gone", "folder", "pipe", "dangling link", "link to itself", "no permission", "huge hole"))
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "dangling link":
        path.symlink_to(path.with_name("nowhere"))
    elif what == "link to itself":
        path.symlink_to(path)
    elif what == "no permission":
        path.touch(mode=0)
    elif what == "huge hole":
        with path.open("wb") as file:
            file.truncate(1 << 36)
    return what


def matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.match(pattern) for pattern in patterns)


def inventory(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, link and folder below `folder`."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size if not path.is_dir() else 0, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }


class Fuzz:
    """Cases in a folder of their own: `good` files, the `case`'s copy, and `around`, which must stay as it is."""

    def __init__(self, folder: Path, kinds: list[str]):
        self.folder = folder
        self.kinds = {name: KINDS[name] for name in kinds}
        self.good: dict[str, object] = {}
        self.around = folder / "around"
        for name in ("home", "tmp", "here"):
            (self.around / name).mkdir(parents=True, exist_ok=True)
        os.environ.update(HOME=str(self.around / "home"), TMPDIR=str(self.around / "tmp"))
        os.chdir(self.around / "here")
        tempfile.tempdir = None

    def prepared(self, name: str) -> Path:
        """Good files of a kind, made when it is first asked for; its reader is warm then."""
        place = self.folder / "good" / name.replace(" ", "-")
        if name not in self.good:
            place.mkdir(parents=True)
            self.kinds[name].make(place)
            values = [self.kinds[name].read(self.copy(place)) for _ in range(2)]
            assert values[0] == values[1], f"{name}: not read the same twice"
            self.good[name] = values[0]
        return place

    def copy(self, good: Path) -> Path:
        place = self.folder / "case"
        if place.exists():
            shutil.rmtree(place)
        shutil.copytree(good, place)
        return place

    def case(self, seed: int, number: int) -> str:
        """Run one case; returns what was done, raises where it fails."""
        chance = random.Random(f"{seed} {number}")
        name = chance.choice(sorted(self.kinds))
        kind, good = self.kinds[name], self.prepared(name)
        place = self.copy(good)
        files = sorted(path for path in place.rglob("*") if path.is_file() and matches(path, kind.damaged))
        path = chance.choice(files)
        what = "damaged"
        if chance.random() < 0.1:
            what = unkind(path, chance)
        else:
            path.write_bytes(damaged(path.read_bytes(), chance))
        changed = what != "damaged" or path.read_bytes() != (good / path.relative_to(place)).read_bytes()
        told = f"case {number} of seed {seed}: {name}, {path.relative_to(place)} {what}"
        print(told, flush=True)
        before, inside = inventory(self.around), inventory(place)
        try:
            value = kind.read(place)
        except FastarError as error:
            if len(str(error).splitlines()) != 1:
                raise AssertionError(f"more than one line: {error}") from error
        else:
            same = value == self.good[name]
            assert same or not changed or not matches(path, kind.checked), "read as another value"
        assert inventory(self.around) == before, f"changed outside: {set(inventory(self.around)) ^ set(before)}"
        assert kind.writes or inventory(place) == inside, "changed what it was to read"
        return told


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Inside, a hang ends the process with its traceback."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--kind", action="append", choices=sorted(KINDS))
    parser.add_argument("--keep-going", action="store_true", help="tell of every failure, not only of the first")
    asked = parser.parse_args()
    faulthandler.enable()
    with tempfile.TemporaryDirectory(prefix="fastar-fuzz-") as folder:
        fuzz = Fuzz(Path(folder), asked.kind or sorted(KINDS))
        for name in fuzz.kinds:
            with limited(10 * HANG_SECONDS):
                fuzz.prepared(name)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        end, number, failures = time.monotonic() + asked.seconds, 0, 0
        while time.monotonic() < end:
            number = number if asked.case is None else asked.case
            told = io.StringIO()
            try:
                with limited(HANG_SECONDS):
                    fuzz.case(asked.seed, number)
            except BaseException:  # noqa: BLE001 (whatever it is, it is the finding)
                traceback.print_exc(file=told)
                print(told.getvalue(), flush=True)
                failures += 1
                if not asked.keep_going:
                    break
            if asked.case is not None:
                break
            number += 1
        os.chdir("/")
    print(f"seed {asked.seed}: {number} cases, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
