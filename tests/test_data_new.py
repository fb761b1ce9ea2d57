"""The developer's recipe for a new data set: one entry that carries its facts, and a reader where its form is new."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastar.cli.main import main
from fastar.config import DATASETS, DatasetSpec, dataset_spec, load_settings, register
from fastar.errors import FastarError

PACKAGE = """
import numpy as np

from fastar.config import DatasetSpec, register
from fastar.data.raw.raw_split import ArraySplit, RawDataset

register(
    DatasetSpec(
        name="stripes",
        reader="stripes_package:read",
        obtain="make stripes.npz",
        arch="mlp",
        classes=("lying", "standing", "none"),
        channels=1,
        height=6,
        width=6,
        folders=("stripes",),
    )
)


def read(place, spec):
    if not (place / "stripes.npz").exists():
        return None
    found = np.load(place / "stripes.npz")
    train, test = (
        ArraySplit(found[f"{split}_images"], found[f"{split}_labels"], spec.classes, f"{place}/stripes.npz, {split}")
        for split in ("train", "test")
    )
    return RawDataset(train, test, "stripes", place)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package outside fastar, which registers a data set, and the raw data of it."""
    import numpy as np

    generator, arrays = np.random.default_rng(0), {}
    for split, count in (("train", 90), ("test", 30)):
        labels = np.arange(count) % 3
        images = generator.integers(0, 60, (count, 6, 6, 1), dtype=np.uint8)
        images[labels == 0, 2] += 150
        images[labels == 1, :, 2] += 150
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    (tmp_path / "raw" / "stripes").mkdir(parents=True)
    np.savez(tmp_path / "raw" / "stripes" / "stripes.npz", **arrays)
    (tmp_path / "stripes_package.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    DATASETS.pop("stripes", None)


def run(command: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0


def test_a_new_set_is_one_entry(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    __import__("stripes_package")
    monkeypatch.setenv("FASTAR_CACHE", str(package / "cache"))
    assert load_settings(dataset="stripes").model.arch == "mlp"
    options = ["--dataset", "stripes", "--data-root", str(package / "raw"), "--sources", "2", "--heldout", "1"]
    settings = ["train.epochs=4", "train.batch_size=15", "model.width=8", "evaluation.points=3"]
    out = package / "out"
    command = ["train-star", *options, "--out", str(out), f"dataset.directory={package / 'betons'}", *settings]
    run(command)
    results = json.loads((out / "results.json").read_text())
    assert results["test"]["star_loss"] < 1.0  # chance is 1.10
    run(command)  # what is there is used again


def test_a_name_is_registered_once() -> None:
    with pytest.raises(FastarError, match="registered already"):
        register(DatasetSpec(name="digits", reader="idx", obtain=""))
    register(dataset_spec("digits"))  # a package that is imported again
