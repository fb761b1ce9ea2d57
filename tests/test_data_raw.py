"""Raw formats: every reader gives back the arrays that were stored, and names what is damaged."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_samples import (
    cifar_binary_files,
    cifar_python_files,
    idx_bytes,
    raw_dataset,
    write_archive,
    write_files,
    write_folders,
    write_idx,
)
from PIL import Image

from fastar.config import DATASETS, dataset_spec
from fastar.data.convert import prepare
from fastar.data.ffcv.format import FixedLayout
from fastar.data.ffcv.write import write_beton
from fastar.data.in_memory import load
from fastar.data.raw.cifar import CifarUnpickler
from fastar.data.raw.find import find_raw
from fastar.data.raw.raw_split import ArraySplit
from fastar.errors import FastarError

FASHION = Path("/usr/share/datasets/fashion-mnist")
CIFAR_JPEG = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "cifar10-jpeg.tar.xz"


def assert_same(found, raw):
    for split in ("train", "test"):
        got, want = getattr(found, split), getattr(raw, split)
        assert len(got) == len(want)
        assert got.labels.tolist() == want.labels.tolist()
        for index in range(len(want)):
            image, label = got[index]
            assert np.array_equal(image, want[index][0])
            assert image.dtype == np.uint8
            assert label == want[index][1]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("form", ["python", "python protocol 4", "binary", "python archive", "binary archive"])
def test_cifar_in_every_official_form(tmp_path, name, form):
    raw = raw_dataset(name, 100, 100)
    number = name.removeprefix("cifar")
    kind = form.split()[0]
    files = (
        cifar_binary_files(raw, name)
        if kind == "binary"
        else cifar_python_files(raw, name, protocol=4 if "4" in form else 2)
    )
    if form.endswith("archive"):
        write_archive(tmp_path / f"cifar-{number}-{kind}.tar.gz", "any-folder", files)
    else:
        write_files(tmp_path / "sub" / DATASETS[name].folders[kind == "binary"], files)
    root = tmp_path if form.endswith("archive") else tmp_path / "sub"
    found = find_raw(DATASETS[name], root)
    assert_same(found, raw)
    assert found.digest == raw.digest  # of the content, whatever the format


def test_cifar_archive_can_be_named_itself(tmp_path):
    raw = raw_dataset("cifar10")
    path = tmp_path / "cifar-10-python.tar.gz"
    write_archive(path, "cifar-10-batches-py", cifar_python_files(raw, "cifar10"))
    assert_same(find_raw(DATASETS["cifar10"], path), raw)


def test_pickle_as_python_2_and_old_numpy_wrote_it(tmp_path):
    """The official files' opcodes: names of old numpy, strings as BINSTRING, no Python 3 helpers."""
    data = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 3072)
    raw_bytes = data.tobytes()

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    stream = (
        b"\x80\x02}(" + short(b"data") + b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85"
        b"U\x01btR(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff"
        b"\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + len(raw_bytes).to_bytes(4, "little") + raw_bytes + b"tb"
        + short(b"labels") + b"](K\x03K\x09eu."
    )  # fmt: skip
    batch = CifarUnpickler(io.BytesIO(stream)).load()
    assert np.array_equal(batch[b"data"].array, data)
    assert batch[b"labels"] == [3, 9]


class Evil:
    def __reduce__(self):
        return os.system, ("touch EVIL",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": Evil(), b"labels": []}), "system"),
        (b"", "not a readable CIFAR pickle"),
        (pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"labels": [0] * 4}, 2)[:-300], "not a readable"),
        (pickle.dumps([1, 2]), "no 'data'"),
        (pickle.dumps({b"data": np.zeros((4, 3072), np.float32), b"labels": [0] * 4}, 2), "unsigned bytes"),
        (pickle.dumps({b"data": np.zeros((4, 10), np.uint8), b"labels": [0] * 4}, 2), "no 'data'"),
        (pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"fine_labels": [0] * 4}, 2), "no list 'labels'"),
        (pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"labels": [0] * 3}, 2), "4 images but 3 labels"),
        (pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 11, 0]}, 2), "sample 2: label 11"),
        (pickle.dumps({b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, "2", 0]}, 2), "no list"),
    ],
)
def test_damaged_or_hostile_pickles_are_named(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    files = cifar_python_files(raw_dataset("cifar10"), "cifar10") | {"data_batch_3": content}
    write_files(tmp_path, files)
    with pytest.raises(FastarError, match=message) as caught:
        find_raw(DATASETS["cifar10"], tmp_path)
    assert "data_batch_3" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "EVIL").exists()


@pytest.mark.parametrize("name", ["eval", "getattr", "exec"])
def test_unpickler_admits_no_builtins(name):
    with pytest.raises(FastarError, match="do not trust"):
        CifarUnpickler(io.BytesIO(f"cbuiltins\n{name}\n.".encode())).load()


def test_array_state_must_fill_its_shape():
    good = pickle.dumps(np.zeros((2, 3072), np.uint8), 2)
    bad = good.replace(b"K\x02M\x00\x0c\x86", b"K\x03M\x00\x0c\x86")  # says 3 rows
    assert bad != good
    with pytest.raises(FastarError, match="does not fill"):
        CifarUnpickler(io.BytesIO(bad)).load()


def test_missing_and_truncated_cifar_files(tmp_path):
    files = cifar_python_files(raw_dataset("cifar10"), "cifar10")
    del files["data_batch_4"]
    write_files(tmp_path / "a", files)
    with pytest.raises(FastarError, match="data_batch_4: missing"):
        find_raw(DATASETS["cifar10"], tmp_path / "a")
    write_archive(tmp_path / "b" / "cifar-10-python.tar.gz", "x", files)
    with pytest.raises(FastarError, match="holds no data_batch_4"):
        find_raw(DATASETS["cifar10"], tmp_path / "b")
    archive = tmp_path / "b" / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(FastarError, match=r"tar\.gz: cannot be read"):
        find_raw(DATASETS["cifar10"], tmp_path / "b")
    binary = cifar_binary_files(raw_dataset("cifar10"), "cifar10")
    binary["test_batch.bin"] = binary["test_batch.bin"][:-1]
    write_files(tmp_path / "c", binary)
    with pytest.raises(FastarError, match=r"test_batch\.bin: .* not whole images"):
        find_raw(DATASETS["cifar10"], tmp_path / "c")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx(tmp_path, name, zipped):
    raw = raw_dataset(name)
    write_idx(tmp_path / DATASETS[name].folders[1], raw, zipped)
    found = find_raw(DATASETS[name], tmp_path)
    assert_same(found, raw)
    assert found.digest == raw.digest


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda data: data[:-1], "truncated"),
        ("train-images-idx3-ubyte", lambda data: b"", "not an IDX file"),
        ("t10k-labels-idx1-ubyte", lambda data: b"\0\0\x0d\x01" + data[4:], "not an IDX file"),
        ("t10k-labels-idx1-ubyte", lambda data: idx_bytes(np.zeros(7)), "30 images but 7 labels"),
        ("train-labels-idx1-ubyte", lambda data: data[:-1] + b"\x0a", "sample 59: label 10"),
        ("t10k-images-idx3-ubyte", lambda data: idx_bytes(np.zeros((30, 20, 28))), "20x28"),
        ("train-images-idx3-ubyte", lambda data: b"\x1f\x8b" + data, "cannot be read"),
    ],
)
def test_damaged_idx_is_named(tmp_path, part, change, message):
    write_idx(tmp_path, raw_dataset("mnist"), zipped=False)
    path = tmp_path / part
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(FastarError, match=message) as caught:
        find_raw(DATASETS["mnist"], tmp_path)
    assert part.split("-")[0] in str(caught.value)


def test_missing_idx_file_is_named(tmp_path):
    write_idx(tmp_path, raw_dataset("mnist"), zipped=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FastarError, match="t10k-labels-idx1-ubyte"):
        find_raw(DATASETS["mnist"], tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_class_folders(tmp_path, name):
    raw = raw_dataset(name)
    write_folders(tmp_path, raw)
    found = find_raw(DATASETS[name], tmp_path)
    order = np.argsort(raw.train.labels, kind="stable")  # the folders' order: class by class, then by file name
    assert found.train.labels.tolist() == raw.train.labels[order].tolist()
    for position, index in enumerate(order):
        assert np.array_equal(found.train[position][0], raw.train.images[index])
    assert found.train.classes == DATASETS[name].classes


def test_grey_and_palette_files_and_a_png_called_jpeg_become_rgb(tmp_path):
    raw = raw_dataset("cifar10")
    write_folders(tmp_path, raw)
    grey = np.arange(1024, dtype=np.uint16).reshape(32, 32).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "train" / "airplane" / "a.png")
    Image.fromarray(raw.train.images[0]).convert("P").save(tmp_path / "train" / "airplane" / "b.JPEG", "PNG")
    found = find_raw(DATASETS["cifar10"], tmp_path).train
    names = [name.rsplit("/", 1)[-1] for name in found.names]
    assert np.array_equal(found[names.index("a.png")][0], np.repeat(grey[..., None], 3, axis=2))
    assert found[names.index("b.JPEG")][0].shape == (32, 32, 3)


def test_class_folders_digest_follows_content(tmp_path):
    write_folders(tmp_path, raw_dataset("cifar10"))
    before = find_raw(DATASETS["cifar10"], tmp_path).digest
    assert find_raw(DATASETS["cifar10"], tmp_path).digest == before
    path = sorted((tmp_path / "test" / "cat").iterdir())[0]
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(path)
    assert find_raw(DATASETS["cifar10"], tmp_path).digest != before


def test_numbered_class_folders(tmp_path):
    raw = raw_dataset("cifar100", 200, 100)
    write_folders(tmp_path, raw)
    for split in ("train", "test"):
        for label, name in enumerate(DATASETS["cifar100"].classes):
            (tmp_path / split / name).rename(tmp_path / split / str(label))
    found = find_raw(DATASETS["cifar100"], tmp_path)
    assert {int(name.split("/")[0]) for name in found.train.names} == set(range(100))
    assert [int(name.split("/")[0]) for name in found.train.names] == found.train.labels.tolist()


def test_bad_class_folders(tmp_path):
    spec = DATASETS["cifar10"]
    write_folders(tmp_path, raw_dataset("cifar10"))
    first = sorted((tmp_path / "train" / "airplane").iterdir())[0]
    content, layout = first.read_bytes(), FixedLayout(60, 10, (32, 32, 3))

    def message() -> str:
        with pytest.raises(FastarError) as caught:
            write_beton(tmp_path / "x.beton", find_raw(spec, tmp_path).train, np.arange(1), layout)
        return str(caught.value)

    for damaged in (content[: len(content) // 2], b"", b"not an image", content[:60] + bytes(40) + content[100:]):
        first.write_bytes(damaged)
        assert f"{first}: cannot be read as an image" in message()
    Image.fromarray(np.zeros((32, 31, 3), np.uint8)).save(first)
    assert f"{first}: image is uint8 [32, 31, 3], must be uint8 [32, 32, 3]" in message()
    Image.fromarray(np.zeros((32, 32), np.uint16)).save(first)
    assert f"{first}: I;16 pixels are not 8-bit" in message()
    for path in (tmp_path / "train" / "airplane").iterdir():
        path.unlink()
    assert "holds no images" in message()
    (tmp_path / "train" / "airplane").rename(tmp_path / "train" / "plane")
    assert "missing airplane; unknown plane" in message()
    (tmp_path / "test").rename(tmp_path / "tset")
    assert "neither test/ nor val/" in message()


def test_registry_names_the_nearest():
    with pytest.raises(FastarError, match=r"did you mean 'cifar10'.*digits.*cifar100"):
        dataset_spec("cifar_10")
    for name, spec in DATASETS.items():
        assert spec.name == name
        assert len(set(spec.classes)) == len(spec.classes)
        assert spec.mean is None or len(spec.mean) == spec.channels
    assert len(DATASETS["cifar100"].classes) == 100
    # Official labels are in order of name; class folders rely on the same order.
    assert list(DATASETS["cifar100"].classes) == sorted(DATASETS["cifar100"].classes)
    assert list(DATASETS["cifar10"].classes) == sorted(DATASETS["cifar10"].classes)


def test_missing_raw_data_says_where_and_how(tmp_path, monkeypatch):
    with pytest.raises(FastarError, match=r"cifar-10-python\.tar\.gz from https://") as caught:
        find_raw(DATASETS["cifar10"], tmp_path)
    assert str(tmp_path) in str(caught.value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FastarError, match=r"looked in data, .*--data-root"):
        find_raw(DATASETS["cifar10"], None)
    # Another dataset's class folders in ./data are not mistaken for this one's.
    write_folders(tmp_path / "data", raw_dataset("mnist"))
    with pytest.raises(FastarError, match="no raw data found"):
        find_raw(DATASETS["cifar10"], None)
    write_files(tmp_path / "data" / "cifar-10-batches-py", cifar_python_files(raw_dataset("cifar10"), "cifar10"))
    assert len(find_raw(DATASETS["cifar10"], None).train) == 60


def test_digits_come_with_scikit_learn(tmp_path):
    sklearn = pytest.importorskip("sklearn.datasets")
    raw = find_raw(DATASETS["digits"], None)
    assert (len(raw.train), len(raw.test)) == (1437, 360)
    images, labels = sklearn.load_digits(return_X_y=True)
    both = np.concatenate([raw.train.images, raw.test.images]).reshape(1797, 64)
    assert (both % 15 == 0).all()

    def rows(pixels, targets):
        return sorted(map(tuple, np.concatenate([pixels, targets[:, None]], axis=1).astype(int).tolist()))

    assert rows(both // 15, np.concatenate([raw.train.labels, raw.test.labels])) == rows(images, labels)
    shares = np.bincount(raw.test.labels) / np.bincount(labels)
    assert np.abs(shares - 0.2).max() < 0.005  # one image of a class is 0.0057
    assert raw.digest == find_raw(DATASETS["digits"], None).digest
    files = prepare("digits", directory=tmp_path, raw=raw)
    assert files.digest.startswith("5fddd7a29ac3")  # as ever: models name the data that they were trained on


def test_array_split_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="uint8"):
        ArraySplit(np.zeros((2, 4, 4, 1), np.float32), np.zeros(2), ("a",), "x")
    with pytest.raises(FastarError, match="holds no images"):
        ArraySplit(np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0), ("a",), "x")


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_real_fashion_mnist_is_found_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw = find_raw(DATASETS["fashion-mnist"], None)
    assert (len(raw.train), len(raw.test)) == (60_000, 10_000)
    assert np.bincount(raw.train.labels).tolist() == [6000] * 10
    assert raw.train.labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert abs(raw.train.images.mean() / 255 - 0.2860) < 1e-4  # the published mean


@pytest.mark.data
@pytest.mark.skipif(not CIFAR_JPEG.is_file(), reason="../shared/data/cifar10-jpeg.tar.xz is absent")
def test_real_cifar_class_folders(tmp_path):
    """From the JPEG files to batches. The archive starts with its test split; the images of both come from there."""
    taken: dict[str, int] = {}
    with tarfile.open(CIFAR_JPEG) as archive:
        for member in archive:
            path = Path(member.name)
            count = taken.get(path.parent.name, 0)
            if member.isfile() and count < 24:
                taken[path.parent.name] = count + 1
                target = tmp_path / "raw" / ("train" if count < 12 else "test") / path.parent.name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
            if len(taken) == 10 and min(taken.values()) == 24:
                break
    files = prepare("cifar10", raw=tmp_path / "raw", directory=tmp_path / "betons")
    train = load(files, "train", "cpu")
    assert train.labels.tolist() == [label for label in range(10) for _ in range(12)]
    assert 100 < train.images.double().mean() < 140  # photographs, not noise around a constant
    assert train.images.double().std() > 40
    for path in (tmp_path / "raw" / "test" / "truck").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(FastarError, match=r"truck/\d+\.jpg: cannot be read as an image"):
        prepare("cifar10", raw=tmp_path / "raw", directory=tmp_path / "other")
    assert not (tmp_path / "other").exists()
