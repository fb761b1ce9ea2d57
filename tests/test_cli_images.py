"""Runs on images of any size, from raw class folders to barriers; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_cases import fastar, refused
from PIL import Image

from fastar.runs import read_metadata


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise, a light and a dark one: 16 training and 4 test images."""
    root = tmp_path_factory.mktemp("images") / "raw"
    generator = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for number in range(count):
            path = root / split / ("light", "dark")[number % 2] / f"{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 100, (20 + number, 30, 3)) + (0 if number % 2 else 120)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def options(root: Path) -> list[object]:
    return [
        *("--dataset", "imagefolder", "--name", "two", "--arch", "resnet8", "--quiet"),
        f"dataset.directory={root.parent / 'betons'}",
        *("dataset.resolution=8", "model.width=0.25", "train.epochs=1", "train.batch_size=8", "evaluation.points=2"),
        *("device=cpu", "workers=1"),
    ]


def test_a_run_barriers_and_matching(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [*options(root), "--data-root", root, "--out", out, "--sources", 2, "--heldout", 0]
    done = fastar("train-star", *arguments, "--json")
    assert done.code == 0, done.err
    results = json.loads(done.out)
    assert results["sources"] == 2
    metadata = read_metadata(out / "star.safetensors")
    assert metadata["input_shape"] == [3, 8, 8]
    assert (metadata["classes"], metadata["called"], metadata["crop"]) == (2, "two", "random-resized")
    assert (root.parent / "betons" / "two" / "train.beton").is_file()
    other = refused("train-sources", *arguments, "dataset.crop=resize256-crop224")
    assert "dataset.crop was 'random-resized', now 'resize256-crop224'" in other

    first, second = sorted((out / "sources").glob("*.safetensors"))
    matched = fastar("match", first, second, "--json", f"dataset.directory={tmp_path}")  # needs no data
    assert matched.code == 0, matched.err
    assert json.loads(matched.out)["units"] > 0
    measured = fastar(
        "barrier", first, second, "--json", "--points", 2, f"dataset.directory={root.parent / 'betons'}", "device=cpu"
    )
    assert measured.code == 0, measured.err
    path = json.loads(measured.out)["paths"][0]
    assert path["test_loss"][0] > 0
    assert path["train_accuracy"][0] in [k / 16 for k in range(17)]  # every one of the 16 images counted
    trained = read_metadata(first)
    assert path["test_accuracy"][0] in [k / 4 for k in range(5)]
    assert trained["dataset_digest"] == metadata["dataset_digest"]


def test_sources_of_class_folders_alone(root: Path, tmp_path: Path) -> None:
    given = options(root)
    given[given.index("two")] = "one"
    arguments = [*given, "--data-root", root / "train", "--out", tmp_path / "run", "--sources", 1, "--heldout", 0]
    assert "--val-share 0.1" in refused("train-sources", *arguments)
    done = fastar("train-sources", *arguments, "--val-share", "0.25")
    assert done.code == 0, done.err
    counts = json.loads((root.parent / "betons" / "one" / "metadata.json").read_text())["counts"]
    assert counts == {"train": 12, "test": 4}
    assert fastar("train-sources", *arguments, "--val-share", "0.25").code == 0
    other = refused("train-sources", *arguments[:-4], "--out", tmp_path / "other", "--val-share", "0.5")
    assert "written with val-share=0.25, asked for val-share=0.5" in other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "imagefolder"], "give --name NAME (dataset.own_name)"),
        (["--dataset", "cifar10", "--name", "x"], "own_name='x' is for --dataset imagefolder, not for cifar10"),
        (["--dataset", "imagefolder", "--name", "cifar10"], "own_name='cifar10' is another dataset's name"),
        (["--dataset", "imagefolder", "--name", "a b"], "dataset.own_name='a b'"),
        (["--dataset", "digits", "dataset.resolution=64"], "resolution belongs to imagenet and imagefolder"),
        (["--dataset", "digits", "dataset.order=pages"], "order belongs to imagenet and imagefolder"),
        (["--dataset", "digits", "dataset.limit=1438"], "limit=1438 is more than the 1437 train images of digits"),
        (["--dataset", "imagenet", "--data-root", "nowhere"], "nowhere: no such folder"),
        (["--dataset", "imagenet", "--arch", "resnet8"], "holds no finished dataset; give the images with --data-root"),
        (["--dataset", "imagenet", "--data-root", ".", "model.widht=2"], "did you mean 'width'?"),
        (["--dataset", "imagenet", "--val-share", "0.1"], "val_share belongs to imagefolder; imagenet has test images"),
        (["--dataset", "imagefolder", "--name", "x", "--val-share", "1"], "dataset.val_share=1"),
        (["--dataset", "image-net"], "did you mean 'imagenet'?"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    places = ["--quiet", "--out", tmp_path / "run", f"dataset.directory={tmp_path / 'betons'}", "device=cpu"]
    assert message in refused("train-sources", *arguments, *places)
    assert not list((tmp_path / "run").glob("sources/*"))
