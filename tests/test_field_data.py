"""Faults of data that users met: one CPU, damaged archives, damaged .beton files."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from cli_cases import tiny
from data_samples import cifar_binary_files, raw_dataset, write_archive, write_idx
from PIL import Image
from test_runs_model_files import files_at_most

from fastar.config.datasets import DATASETS
from fastar.data.convert import prepare
from fastar.data.ffcv.folder import DatasetFiles, open_files, verify_folder
from fastar.data.ffcv.format import check_beton
from fastar.data.raw.archives import train_archive
from fastar.data.raw.cifar import find_cifar
from fastar.data.raw.find import note_other_files
from fastar.data.raw.idx import read_idx
from fastar.data.raw.listing import PassedOver
from fastar.data.streaming import StreamingDataset
from fastar.errors import FastarError
from fastar.runtime.progress import SILENT, Progress, SilentProgress

SECONDS = 120  # a run that hangs is ended then; one that does not takes a few

# Its processes see one CPU from the first line on, as in a job of one core.
ON_ONE_CPU = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
WRITE = "import sys, pathlib; from fastar.data.convert import prepare; "
WRITE += "prepare('cifar100', raw=pathlib.Path(sys.argv[1]), directory=pathlib.Path(sys.argv[2]))"


def ends(code: str, cache: Path, *arguments: object) -> None:
    """`code` in a process of its own on one CPU ends with exit code 0."""
    environment = {**os.environ, "FASTAR_CACHE": str(cache), "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE_CPU + code, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """The archive of a small CIFAR-100."""
    raw, path = raw_dataset("cifar100", 12, 6), tmp_path / "raw" / "cifar-100-binary.tar.gz"
    write_archive(path, "cifar-100-binary", cifar_binary_files(raw, "cifar100"))
    return path


def test_a_process_on_one_cpu_that_wrote_data_ends(tmp_path: Path, cifar: Path) -> None:
    ends(WRITE, tmp_path / "cache", cifar, tmp_path / "data")
    assert (tmp_path / "data" / "cifar100" / "train.beton").is_file()


@pytest.mark.slow
def test_a_run_on_one_cpu_with_nothing_there_before_ends(tmp_path: Path) -> None:
    run = "from fastar.cli.main import main; main()"
    ends(run, tmp_path / "cache", "train-star", *tiny(tmp_path / "data"), "--out", tmp_path / "run")
    assert (tmp_path / "run" / "results.json").is_file()


class Listening(SilentProgress):
    """Keeps the lines that it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def images(tmp_path: Path) -> DatasetFiles:
    """10 images of differing sizes, some raw and some JPEG, in two classes; two for testing."""
    generator = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "raw" / ("val" if number > 9 else "train") / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20 + number, 40, 3), dtype=np.uint8)).save(path)
    return prepare("imagefolder", own_name="made", raw=tmp_path / "raw", directory=tmp_path, workers=1)


def read(files: DatasetFiles, progress: Progress = SILENT) -> list[bytes]:
    data = StreamingDataset(files, "train", "cpu", size=16, threads=1, progress=progress)
    return [pixels.numpy().tobytes() + labels.numpy().tobytes() for pixels, labels in data.sequential(4)]


def change(path: Path, place: int, bits: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bits]))


def used_places(files: DatasetFiles) -> np.ndarray:
    """Of the training file: every place whose byte says something."""
    beton, end = check_beton(files.path("train"), files.layout("train")), files.path("train").stat().st_size
    front, allocated = beton.tables
    runs = [(0, len(front)), (end - len(allocated), end)]
    runs += [(int(start), int(start + size)) for start, size in zip(beton.pointers, beton.sizes, strict=True)]
    return np.concatenate([np.arange(*run) for run in runs])


def test_no_changed_byte_of_a_streamed_file_is_trained_on(images: DatasetFiles) -> None:
    """Opened without its fingerprint, which does not read the whole of larger files."""
    folder, whole = images.folder, read(images)
    places = used_places(images)
    for place in places[np.linspace(0, len(places) - 1, 60).astype(int)].tolist():
        change(images.path("train"), place)
        with pytest.raises(FastarError, match="write it again"):
            read(DatasetFiles(folder, images.metadata))
        change(images.path("train"), place)
    assert read(open_files(folder)) == whole
    assert verify_folder(folder) == []


def test_a_streamed_file_without_checksums_is_read_once_to_make_them(images: DatasetFiles) -> None:
    """So it is with files of an earlier version, and where checksums are damaged."""
    folder, whole, told = images.folder, read(images), Listening()
    kept = folder / "train.checksums"
    content = kept.read_bytes()
    for damage in (kept.unlink, lambda: change(kept, 90), lambda: kept.write_bytes(b"")):
        damage()
        told.lines.clear()
        assert read(open_files(folder), told) == whole
        (line,) = told.lines
        assert line.endswith("train.beton: no checksums of its images are kept; it is read once to make them")
        assert kept.read_bytes() == content
    kept.unlink()
    told.lines.clear()
    files = open_files(folder)
    with files_at_most(len(content) // 2):
        assert read(files, told) == read(files, told) == whole  # where they cannot be kept: once in each run
    assert [line.split(";")[-1] for line in told.lines] == [
        " it is read once to make them",
        " each run reads the whole file until they can be kept",
    ]
    change(images.path("train"), int(check_beton(images.path("train"), images.layout("train")).pointers[3]))
    with pytest.raises(FastarError, match="its images are not those that were written"):
        read(DatasetFiles(folder, images.metadata))
    assert not kept.exists()


@pytest.fixture
def cifar_files(cifar: Path) -> DatasetFiles:
    return prepare("cifar100", raw=cifar, directory=cifar.parents[1] / "data")


@pytest.mark.parametrize("kind", ["images", "cifar_files"])
def test_verify_folder_names_what_is_damaged(kind: str, request: pytest.FixtureRequest) -> None:
    files: DatasetFiles = request.getfixturevalue(kind)
    folder = files.folder
    assert verify_folder(folder) == []
    change(files.path("train"), int(check_beton(files.path("train"), files.layout("train")).pointers[7]) + 5)
    (line,) = verify_folder(folder)
    assert line.startswith(f"{files.path('train')}: ")
    said = "not what was written (first: sample 7)" if kind == "images" else "not those that were written"
    assert line.endswith(f"{said}; delete {folder} and write it again")
    files.path("test").unlink()
    assert [line.split(":")[0] for line in verify_folder(folder)] == [str(files.path("train")), str(files.path("test"))]
    metadata = (folder / "metadata.json").read_text()
    (folder / "metadata.json").write_text(metadata.replace('"counts"', '"count5"'))
    (line,) = verify_folder(folder)
    assert line.startswith(f"{folder / 'metadata.json'}: ")
    (folder / "metadata.json").unlink()
    (line,) = verify_folder(folder)
    assert line.startswith(f"{folder / 'metadata.json'}: ")


def test_no_changed_word_of_the_metadata_is_believed(images: DatasetFiles, cifar_files: DatasetFiles) -> None:
    """A digest of all covers what the dataset's own does not, such as the augmentation."""
    for folder in (cifar_files.folder, images.folder):
        path = folder / "metadata.json"
        text = path.read_text()
        metadata = json.loads(text)
        for key in metadata:
            for changed in (
                {**metadata, key: ["other"]},
                {k: v for k, v in metadata.items() if k != key},
                {(k + "x" if k == key else k): v for k, v in metadata.items()},
            ):
                path.write_text(json.dumps(changed))
                with pytest.raises(FastarError, match=r"write it again|use another directory"):
                    open_files(folder)
        path.write_text(json.dumps({k: v for k, v in {**metadata, "format": 1}.items() if k != "sha256"}))
        assert open_files(folder).digest == metadata["digest"]  # as an earlier version wrote it
        for text_of_others in ("[" * 100_000, "null", "9" * 6000):
            path.write_text(text_of_others)
            with pytest.raises(FastarError, match="damaged"):
                open_files(folder)
        path.write_text(text)
        assert open_files(folder).metadata == metadata


def test_no_archive_with_a_flipped_bit_is_read(cifar: Path) -> None:
    """But in the time, the name and such of gzip's own header, of which no image depends."""
    whole, spec = cifar.read_bytes(), DATASETS["cifar100"]
    digest, header = find_cifar(cifar.parent, spec).digest, whole.index(b"\0", 10) + 1
    for number, place in enumerate([*range(10), *np.linspace(10, len(whole) - 1, 290).astype(int).tolist()]):
        change(cifar, place, 1 << number % 8)
        if place < header and cifar.read_bytes()[:4] == whole[:4]:
            assert find_cifar(cifar.parent, spec).digest == digest
        else:
            with pytest.raises(FastarError, match=r"^[^\n]*get the archive again$"):
                find_cifar(cifar.parent, spec)
        change(cifar, place, 1 << number % 8)
    cifar.write_bytes(whole[:-8])  # all that is in it is there, its checksum is not
    with pytest.raises(FastarError, match="get the archive again"):
        find_cifar(cifar.parent, spec)


def test_no_idx_file_with_a_flipped_bit_is_read(tmp_path: Path) -> None:
    write_idx(tmp_path, raw_dataset("mnist", 10, 10), zipped=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for number, place in enumerate(np.linspace(10, len(whole) - 1, 60).astype(int).tolist()):
        change(path, place, 1 << number % 8)
        with pytest.raises(FastarError, match=f"{path.name}: .*get the file again$"):
            read_idx(path, 3)
        change(path, place, 1 << number % 8)


@pytest.mark.parametrize("inner", [False, True])
def test_a_damaged_header_is_not_the_end_of_an_archive(tmp_path: Path, inner: bool) -> None:
    """Python's tarfile stops there without a word, and the images behind it would be missing."""

    def tar(files: dict[str, bytes]) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return stream.getvalue()

    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    images = [tar({f"{name}_{number}.png": png.getvalue() for number in range(3)}) for name in ("n1", "n2", "n3")]
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar({f"n{number}.tar": content for number, content in enumerate(images)}))
    assert len(train_archive(path, PassedOver())) == 9
    change(path, path.read_bytes().index(b"n2_2.png" if inner else b"n1.tar") + 1)
    with pytest.raises(FastarError, match="a damaged header at byte"):
        train_archive(path, PassedOver())


def test_official_names_with_other_content_are_said_once(cifar: Path) -> None:
    told = Listening()
    note_other_files({cifar.name: hashlib.md5(cifar.read_bytes()).hexdigest()}, [cifar], told)
    assert told.lines == []
    for _ in range(2):  # what is written already is not hashed again
        prepare("cifar100", raw=cifar.parent, directory=cifar.parents[1] / "data", progress=told)
        assert [f": {cifar.name}: not as published (by MD5)" in line for line in told.lines] == [True]
