"""Writing, checking and reading .beton files: what goes in comes out, and nothing damaged or unfinished passes."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import TroubledSplit, cifar_python_files, raw_dataset, write_files, write_folders, write_idx
from ffcv.fields.rgb_image import RGBImageField, SimpleRGBImageDecoder
from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType, get_metadata_type

from fastar.config import DATASETS
from fastar.data.convert import Form, prepare
from fastar.data.encode import Encoding, encoded_images
from fastar.data.ffcv.checksums import measured, verify_beton
from fastar.data.ffcv.folder import open_files
from fastar.data.ffcv.format import FixedLayout, check_beton
from fastar.data.ffcv.read import read_images
from fastar.data.ffcv.write import write_beton
from fastar.data.in_memory import load
from fastar.data.raw.raw_split import ArraySplit, RawDataset
from fastar.errors import FastarError


def layout_of(name: str, count: int) -> FixedLayout:
    spec = DATASETS[name]
    return FixedLayout(count, len(spec.classes), (spec.height, spec.width, spec.channels))


def write(path, name="cifar10", count=300, workers=2):
    raw = raw_dataset(name, count).train
    layout = layout_of(name, count)
    write_beton(path, raw, np.arange(count), layout, workers=workers)
    return raw, layout


def converted(directory, raw=None, **options):
    """`raw`, or what is there, as if it were CIFAR-10."""
    return prepare("cifar10", directory=directory, raw=raw, **options)


def debris(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.quick
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_round_trip(tmp_path, name, compiled):
    raw, layout = write(tmp_path / "x.beton", name, 777, workers=3)  # more than one page for 32x32 RGB
    threads = torch.get_num_threads()
    beton = check_beton(tmp_path / "x.beton", layout)
    images = [some.copy() for some in read_images(beton, 100, compile_from=0 if compiled else 1000)]
    assert [len(some) for some in images] == [100] * 7 + [77]
    assert np.array_equal(np.concatenate(images), raw.images)
    assert np.array_equal(beton.labels, raw.labels)
    assert torch.get_num_threads() == threads


def test_importing_ffcv_compiles_no_dictionary_and_changes_none():
    """4 s in every process; `fastar.data.ffcv` has the reason why FFCV needs none."""
    look = """
import fastar.data.ffcv, numba.typed
from ffcv.fields.rgb_image import IMAGE_MODES
print(type(IMAGE_MODES).__module__, dict(IMAGE_MODES), numba.typed.Dict.__module__)
"""
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "builtins {'jpg': 0, 'raw': 1} numba.typed.typeddict\n"


def test_torch_keeps_its_threads_through_a_read(tmp_path):
    _, layout = write(tmp_path / "x.beton")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for _ in read_images(check_beton(tmp_path / "x.beton", layout)):
            pass
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_leaving_early_leaves_no_thread(tmp_path):
    _, layout = write(tmp_path / "x.beton")
    before = threading.active_count()
    for stop_after in (1, 29, 30):
        batches = read_images(check_beton(tmp_path / "x.beton", layout), batch_size=10)
        for _ in range(stop_after):
            next(batches)
        batches.close()
        assert threading.active_count() == before


def test_failing_loader_thread_raises_its_own_error(tmp_path, monkeypatch):
    _, layout = write(tmp_path / "x.beton")

    def failing(self):
        def decode(batch_indices, destination, metadata, storage_state):
            if batch_indices[0] >= 100:
                raise RuntimeError("the cable was pulled")
            return destination[: len(batch_indices)]

        return decode

    monkeypatch.setattr(SimpleRGBImageDecoder, "generate_code", failing)
    before = threading.active_count()
    batches = read_images(check_beton(tmp_path / "x.beton", layout), batch_size=50)
    assert [len(next(batches)) for _ in range(2)] == [50, 50]
    with pytest.raises(FastarError, match=r"x\.beton: .*the cable was pulled"):
        next(batches)
    assert threading.active_count() == before


def change(path, offset, content):
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


DAMAGES = {
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "short": (lambda path: path.write_bytes(path.read_bytes()[:10]), "truncated in its header"),
    "only fields": (lambda path: path.write_bytes(path.read_bytes()[:500]), "its header or its fields are not"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), "truncated"),
    "last byte": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated"),
    "grown": (lambda path: path.write_bytes(path.read_bytes() + bytes(24)), "allocation table"),
    "foreign": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100_000)), "its header or its fields are not"),
    "unfinished": (lambda path: change(path, 0, bytes(HeaderType.itemsize)), "its header or its fields are not"),
    "page size": (lambda path: change(path, HeaderType.fields["page_size"][1], b"\x01"), "its header"),
    "count": (lambda path: change(path, HeaderType.fields["num_samples"][1], b"\x07"), "holds 263 samples"),
    "table elsewhere": (
        lambda path: change(path, HeaderType.fields["alloc_table_ptr"][1], b"\xff"),
        "allocation table",
    ),
    "field name": (lambda path: change(path, HeaderType.itemsize + 1, b"X"), "its fields"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "x.beton"
    _, layout = write(path)
    break_it, message = DAMAGES[damage]
    break_it(path)
    with pytest.raises(FastarError, match=message) as caught:
        next(read_images(check_beton(path, layout)))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("field", ["label", "mode", "width", "data_ptr", "sample_id", "ptr", "size"])
def test_every_table_entry_is_checked(tmp_path, field):
    path = tmp_path / "x.beton"
    _, layout = write(path)
    assert len(check_beton(path, layout).labels) == 300
    header = np.fromfile(path, HeaderType, 1)[0]
    start = HeaderType.itemsize + 2 * FieldDescType.itemsize
    table = np.memmap(path, get_metadata_type(list(layout.fields().values())), "r+", start, (300,))
    allocations = np.memmap(path, ALLOC_TABLE_TYPE, "r+", int(header["alloc_table_ptr"]), (300,))
    if field == "label":
        table["f1"][17] = 10
    elif field in ("mode", "width", "data_ptr"):
        table["f0"][field][17] += np.uint8(1)
    else:
        allocations[field][17] += 1
    table.flush()
    allocations.flush()
    with pytest.raises(FastarError, match=r"x\.beton"):
        check_beton(path, layout)


def test_layout_of_another_dataset_is_refused(tmp_path):
    write(tmp_path / "x.beton", "mnist", 300)
    with pytest.raises(FastarError, match="fields are not what fastar writes for 32x32x3"):
        check_beton(tmp_path / "x.beton", layout_of("cifar10", 300))


def test_verification_notices_a_wrong_label_and_a_wrong_pixel(tmp_path):
    raw, layout = write(tmp_path / "x.beton")
    every = np.arange(300)
    verify_beton(tmp_path / "x.beton", raw, every, layout)
    labels = raw.labels.copy()
    labels[123] = (labels[123] + 1) % 10
    with pytest.raises(FastarError, match="sample 123 differs"):
        verify_beton(tmp_path / "x.beton", ArraySplit(raw.images, labels, raw.classes, "other"), every, layout)
    images = raw.images.copy()
    images[299, 31, 31, 2] ^= 1  # the last image is always in the sample
    with pytest.raises(FastarError, match="sample 299 differs from other, sample 299"):
        verify_beton(tmp_path / "x.beton", ArraySplit(images, raw.labels, raw.classes, "other"), every, layout)


def test_verification_measures_mean_and_std_exactly(tmp_path):
    raw, layout = write(tmp_path / "x.beton")
    mean, std = measured(check_beton(tmp_path / "x.beton", layout))
    pixels = raw.images.astype(np.float64) / 255
    # Sums are exact integers; what is left is the rounding of NumPy's own float64 mean.
    np.testing.assert_allclose(mean, pixels.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std((0, 1, 2)), rtol=1e-10)


def troubled(trouble: str, at: int = 200) -> RawDataset:
    """Images of which one makes trouble in the process that encodes it; none of those that a prediction samples."""
    return RawDataset(TroubledSplit(600, trouble, at), TroubledSplit(10), "made up", None)


def written(directory, raw, **options):
    return prepare("imagefolder", own_name="set", directory=directory, raw=raw, form=Form(shuffled=False), **options)


def children() -> set[str]:
    return set(Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("killed", "writer process ended .*signal 9"),
        pytest.param("gone", "writer process ended .*exit code 0", marks=pytest.mark.slow),
        ("damaged", "^image.jpg: damaged; replace it$"),
        pytest.param("fails", "made-up/200: cannot be encoded .KeyError", marks=pytest.mark.slow),
    ],
)
def test_trouble_in_a_process_ends_the_writing_and_leaves_nothing(tmp_path, trouble, message):
    before = children()
    with pytest.raises(FastarError, match=message) as caught:
        written(tmp_path / "new" / "betons", troubled(trouble))
    assert "\n" not in str(caught.value)
    assert debris(tmp_path) == []
    assert children() == before


@pytest.mark.slow
def test_processes_encode_what_this_one_does_in_the_same_order():
    split = TroubledSplit(30)
    alone = list(encoded_images(split, range(30), Encoding(), 1))
    assert list(encoded_images(split, range(30), Encoding(), 3, alone=10)) == alone
    assert len(set(alone)) == 30


def test_a_process_that_encodes_imports_neither_torch_nor_ffcv():
    look = "import sys, fastar.data.encode; print({'torch', 'ffcv', 'numba', 'pydantic'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(("height", "width"), [(40, 30), (31, 64), (700, 500), (90, 1203)])
def test_images_are_encoded_as_ffcv_does(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for mode, share in (("raw", 0.0), ("jpg", 1.0)):
        field = RGBImageField(write_mode=mode, max_resolution=400, jpeg_quality=70)
        row, kept = np.zeros(1, field.metadata_type), []
        field.encode(row, image, lambda size, kept=kept: (0, kept.append(np.empty(size, np.uint8)) or kept[-1]))
        found = Encoding(400, share, 70).encode(image, 0, "x")
        assert found.content == kept[0].tobytes()
        assert (found.mode, found.height, found.width) == tuple(row[0][key] for key in ("mode", "height", "width"))


def test_interrupt_leaves_nothing_and_the_same_command_goes_on(tmp_path):
    before = children()
    threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "betons", troubled("hangs"))
    assert debris(tmp_path) == []
    assert children() == before
    assert written(tmp_path / "betons", troubled("")).count("train") == 600


@pytest.mark.slow
def test_processes_end_with_a_killed_parent_and_the_next_run_cleans_up(tmp_path):
    parent = multiprocessing.get_context("fork").Process(target=written, args=(tmp_path, troubled("slow", -1)))
    parent.start()
    family = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    assert within(60, lambda: len(family.read_text().split()) == 2)
    workers = family.read_text().split()
    parent.kill()
    parent.join()
    assert within(60, lambda: not any(alive(worker) for worker in workers))
    assert debris(tmp_path) == ["set", "set/train.beton.partial"]
    with pytest.raises(FastarError, match="holds no finished dataset"):
        written(tmp_path, None)
    written(tmp_path, troubled(""))
    names = ["metadata.json", "test.beton", "test.checksums", "train.beton", "train.checksums"]
    assert debris(tmp_path / "set") == names


def within(seconds: float, condition) -> bool:
    """Wait until `condition()` holds; False if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_disk_too_small_is_refused_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(FastarError, match=r"90 images need about .* MB, the disk has 1\.0 MB free; free some$"):
        converted(tmp_path / "betons", raw_dataset("cifar10"))
    assert debris(tmp_path) == []


def test_disk_that_fills_up_while_writing(tmp_path):
    """A file size limit stands in for a full disk: writes come back short first, then fail."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, hard))
        with pytest.raises(FastarError, match=r"train\.beton.*disk full while writing"):
            converted(tmp_path / "betons", raw_dataset("cifar10", 3000, 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert debris(tmp_path) == []


def test_prepare_writes_once_and_reuses(tmp_path):
    raw = raw_dataset("cifar10", 200, 100)
    write_files(tmp_path / "raw", cifar_python_files(raw, "cifar10"))
    files = prepare("cifar10", raw=tmp_path / "raw", directory=tmp_path / "betons")
    assert debris(tmp_path / "betons") == [
        "cifar10",
        "cifar10/metadata.json",
        "cifar10/test.beton",
        "cifar10/train.beton",
    ]
    assert files.metadata["counts"] == {"train": 200, "test": 100}
    assert tuple(files.metadata["mean"]) == (0.485, 0.456, 0.406)
    assert files.input_shape == (3, 32, 32)
    stamp = files.path("train").stat().st_mtime_ns
    again = prepare("cifar10", directory=tmp_path / "betons")  # raw data no longer needed
    assert again.metadata == files.metadata
    assert prepare("cifar10", raw=tmp_path / "raw", directory=tmp_path / "betons").digest == files.digest
    assert files.path("train").stat().st_mtime_ns == stamp
    split = load(again, "test", "cpu")
    assert np.array_equal(split.images.numpy(), raw.test.images)
    assert split.labels.tolist() == raw.test.labels.tolist()


def test_digest_is_of_the_content_alone(tmp_path):
    raw = raw_dataset("mnist", 300, 100)
    write_idx(tmp_path / "plain", raw, zipped=False)
    write_idx(tmp_path / "zipped", raw, zipped=True)
    first = prepare("mnist", raw=tmp_path / "plain", directory=tmp_path / "a", workers=1)
    second = prepare("mnist", raw=tmp_path / "zipped", directory=tmp_path / "b", workers=3)
    assert first.digest == second.digest
    raw.train.images[7, 3, 3, 0] ^= 1
    write_idx(tmp_path / "changed", raw, zipped=True)
    third = prepare("mnist", raw=tmp_path / "changed", directory=tmp_path / "c")
    assert third.digest != first.digest
    with pytest.raises(FastarError, match="written from other images"):
        prepare("mnist", raw=tmp_path / "changed", directory=tmp_path / "a")


def test_other_settings_are_refused_naming_them(tmp_path):
    write_folders(tmp_path / "raw", raw_dataset("cifar10", 100, 50))
    directory = tmp_path / "betons"
    files = prepare("cifar10", raw=tmp_path / "raw", directory=directory, limit=40)
    assert files.metadata["counts"] == {"train": 40, "test": 40}
    assert np.bincount(load(files, "train", "cpu").labels).tolist() == [4] * 10
    with pytest.raises(FastarError, match="limit=40, asked for limit=None"):
        prepare("cifar10", directory=directory)
    (directory / "cifar10").rename(directory / "cifar100")
    with pytest.raises(FastarError, match="name=cifar10, asked for name=cifar100"):
        prepare("cifar100", directory=directory, limit=100)
    for wrong in ({"limit": 9}, {"workers": 0}):
        with pytest.raises(FastarError, match=r"limit=9|workers=0"):
            prepare("cifar10", directory=directory, **wrong)


def test_files_replaced_or_damaged_later_are_refused(tmp_path):
    files = converted(tmp_path, raw_dataset("cifar10", 100, 50))
    content = files.path("train").read_bytes()
    other, _ = write(tmp_path / "other.beton", "cifar10", 100)

    files.path("train").write_bytes((tmp_path / "other.beton").read_bytes()[:-5])
    with pytest.raises(FastarError, match="truncated"):
        open_files(files.path("train").parent)
    changed = bytearray(content)
    position = content.index(other.images[50].tobytes())  # both come from the same made-up images
    changed[position + 100] ^= 1
    files.path("train").write_bytes(changed)
    with pytest.raises(FastarError, match=r"not the file that metadata\.json describes"):
        prepare("cifar10", directory=tmp_path)
    with pytest.raises(FastarError, match="its pixels are not those that were written"):
        load(files, "train", "cpu")
    files.path("train").write_bytes(content)
    assert open_files(files.path("train").parent).digest == files.digest

    metadata = json.loads((files.path("train").parent / "metadata.json").read_text())
    for text, message in (
        ("{", "damaged"),
        (json.dumps({**metadata, "format": 9}), "format 9"),
        (json.dumps({**metadata, "mean": [0, 0, 0]}), "edited by hand"),
        (json.dumps({key: value for key, value in metadata.items() if key != "files"}), "damaged"),
    ):
        (files.path("train").parent / "metadata.json").write_text(text)
        with pytest.raises(FastarError, match=message):
            open_files(files.path("train").parent)


def test_a_beton_without_metadata_is_not_overwritten(tmp_path):
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "train.beton").write_bytes(b"somebody else's")
    with pytest.raises(FastarError, match=r"train\.beton: has no metadata\.json beside it"):
        converted(tmp_path, raw_dataset("cifar10"))
    assert (tmp_path / "cifar10" / "train.beton").read_bytes() == b"somebody else's"


@pytest.mark.parametrize("kept", [(), ("train.beton.partial",), ("metadata.json",), ("metadata.json", "train.beton")])
def test_a_conversion_killed_at_any_step_starts_again(tmp_path, kept):
    """Leavings of a SIGKILL: partial files, then the metadata, then the first renamed file."""
    finished = converted(tmp_path, raw_dataset("cifar10"))
    folder = finished.path("train").parent
    (folder / "train.beton.partial").write_bytes(b"half")
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()
    again = converted(tmp_path, raw_dataset("cifar10"))
    assert again.digest == finished.digest
    assert sorted(path.name for path in folder.iterdir()) == ["metadata.json", "test.beton", "train.beton"]
    assert len(load(again, "train", "cpu")) == 60


def test_two_writers_at_once(tmp_path):
    results, errors = [], []

    def run():
        try:
            results.append(converted(tmp_path, raw_dataset("cifar10")))
        except FastarError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert results[0].metadata == results[1].metadata
    assert open_files(results[0].path("train").parent).metadata == results[0].metadata


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FastarError, match="cannot be created"):
        converted(tmp_path / "file", raw_dataset("cifar10"))
