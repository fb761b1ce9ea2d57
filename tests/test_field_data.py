"""What went wrong with data in earnest: one CPU, damaged archives, damaged .beton files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_cases import tiny
from PIL import Image

from fastar.data import ImageFiles, StreamingDataset, open_files, open_images, prepare, prepare_images, verify_folder
from fastar.data.beton import front_bytes, image_table
from fastar.errors import FastarError
from fastar.progress import SILENT, Progress, SilentProgress

SECONDS = 120  # a run that hangs is ended then; one that does not takes a few

# Its processes see one CPU from the first line on, as in a job of one core.
ON_ONE_CPU = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
WRITE = "import sys, pathlib; from fastar.data import prepare; "
WRITE += "prepare('digits', data_root=None, directory=pathlib.Path(sys.argv[1]), limit=20)"


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


def test_a_process_on_one_cpu_that_wrote_data_ends(tmp_path: Path) -> None:
    ends(WRITE, tmp_path / "cache", tmp_path / "data")
    assert (tmp_path / "data" / "digits" / "train.beton").is_file()


@pytest.mark.slow
def test_a_run_on_one_cpu_with_nothing_there_before_ends(tmp_path: Path) -> None:
    run = "from fastar.cli import main; main()"
    ends(run, tmp_path / "cache", "train-star", *tiny(tmp_path / "data"), "--out", tmp_path / "run")
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.fixture
def images(tmp_path: Path) -> ImageFiles:
    """10 images of differing sizes, some raw and some JPEG, in two classes; two for testing."""
    generator = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "raw" / ("val" if number > 9 else "train") / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20 + number, 40, 3), dtype=np.uint8)).save(path)
    return prepare_images("made", data_root=tmp_path / "raw", directory=tmp_path, workers=1)


def read(files: ImageFiles, progress: Progress = SILENT) -> list[bytes]:
    data = StreamingDataset(files, "train", "cpu", size=16, threads=1, progress=progress)
    return [pixels.numpy().tobytes() + labels.numpy().tobytes() for pixels, labels in data.sequential(4)]


def change(path: Path, place: int, bits: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ bits]))


def used_places(files: ImageFiles) -> np.ndarray:
    """Of the training file: every place whose byte says something."""
    data, table, sizes = image_table(files.train, files.layout("train"))
    front, allocated = front_bytes(data, files.layout("train"))
    runs = [(0, len(front)), (len(data) - len(allocated), len(data))]
    runs += [(int(start), int(start + size)) for start, size in zip(table["data_ptr"], sizes, strict=True)]
    return np.concatenate([np.arange(*run) for run in runs])


def test_no_changed_byte_of_a_streamed_file_is_trained_on(images: ImageFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the file were larger than what its fingerprint reads: those of images of any size are.
    monkeypatch.setattr("fastar.data.finished.check_unchanged", lambda files, split: None)
    folder, whole = images.folder, read(images)
    places = used_places(images)
    for place in places[np.linspace(0, len(places) - 1, 60).astype(int)].tolist():
        change(images.train, place)
        with pytest.raises(FastarError, match="write it again"):
            read(open_images(folder))
        change(images.train, place)
    assert read(open_images(folder)) == whole
    assert verify_folder(folder) == []


def test_a_streamed_file_without_checksums_is_read_once_to_make_them(images: ImageFiles) -> None:
    """Those that an earlier version wrote, or damaged ones."""
    folder, whole, said = images.folder, read(images), []

    class Listening(SilentProgress):
        def line(self, text: str) -> None:
            said.append(text)

    kept = folder / "train.checksums"
    content = kept.read_bytes()
    for damage in (kept.unlink, lambda: change(kept, 90), lambda: kept.write_bytes(b"")):
        damage()
        said.clear()
        assert read(open_images(folder), Listening()) == whole
        assert len(said) == 1
        assert "train.beton: no checksums of its images are kept; it is read once to make them" in said[0]
        assert kept.read_bytes() == content
    _, table, _ = image_table(images.train, images.layout("train"))
    change(images.train, int(table["data_ptr"][3]))
    kept.unlink()
    with pytest.raises(FastarError, match="its images are not those that were written"):
        read(ImageFiles(folder, images.metadata))
    assert not kept.exists()


@pytest.mark.parametrize("kind", ["images", "digits"])
def test_verify_folder_names_what_is_damaged(kind: str, images: ImageFiles, tmp_path: Path) -> None:
    files = images if kind == "images" else prepare("digits", data_root=None, directory=tmp_path, limit=20)
    folder = files.folder
    assert verify_folder(folder) == []
    _, table, _ = image_table(files.train, files.layout("train"))
    change(files.train, int(files.layout("train").pointers(table)[7]) + 5)
    (line,) = verify_folder(folder)
    assert line.startswith(f"{files.train}: ")
    assert line.endswith(f"not what was written (first: sample 7); delete {folder} and write it again") or (
        kind == "digits" and line.endswith(f"not those that were written; delete {folder} and write it again")
    )
    files.test.unlink()
    assert [line.split(":")[0] for line in verify_folder(folder)] == [str(files.train), str(files.test)]
    metadata = (folder / "metadata.json").read_text()
    (folder / "metadata.json").write_text(metadata.replace('"counts"', '"count5"'))
    (line,) = verify_folder(folder)
    assert line.startswith(f"{folder / 'metadata.json'}: ")
    (folder / "metadata.json").unlink()
    (line,) = verify_folder(folder)
    assert line.startswith(f"{folder / 'metadata.json'}: ")


def test_no_changed_word_of_the_metadata_is_believed(images: ImageFiles, tmp_path: Path) -> None:
    """What the dataset's digest does not cover, such as the augmentation, is covered by one of all."""
    files = prepare("digits", data_root=None, directory=tmp_path, limit=20)
    for folder, opened in ((files.folder, open_files), (images.folder, open_images)):
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
                    opened(folder)
        path.write_text(json.dumps({k: v for k, v in {**metadata, "format": 1}.items() if k != "sha256"}))
        assert opened(folder).digest == metadata["digest"]  # as an earlier version wrote it
        path.write_text(text)
        assert opened(folder).metadata == metadata
