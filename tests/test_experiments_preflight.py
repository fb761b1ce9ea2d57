"""Checks made before the data of a run are written."""

from __future__ import annotations

import re
import shutil
import tarfile
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import psutil
import pytest
import torch
from cli_cases import fastar, refused, tiny
from PIL import Image

from fastar.config import Settings, load_settings
from fastar.data.counts import DataCounts, data_counts
from fastar.data.raw import class_folders
from fastar.experiments.plan import preflight
from fastar.experiments.reuse import finished_results
from fastar.experiments.session import new_session
from fastar.runs import RunFolder

FITS = "this run does not fit: disk: "


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes of four training images and two test images."""
    root = tmp_path / "raw"
    for split, count in (("train", 4), ("val", 2)):
        for number in range(3 * count):
            path = root / split / f"c{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((12, 12, 3), 20 * number, np.uint8)).save(path)
    return root


def pack(root: Path) -> None:
    """The training images as ImageNet's archive holds them: nobody knows their number before it is read."""
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as archive:
        for folder in sorted((root / "train").iterdir()):
            packed = Path(shutil.make_archive(str(root / folder.name), "tar", folder))
            archive.add(packed, packed.name)
            packed.unlink()
    shutil.rmtree(root / "train")


def images(tmp_path: Path, name: str = "imagefolder", *overrides: str) -> list[str]:
    """Options of a run of `root` as a set of its own, or as ImageNet."""
    called = ["--name", "mine"] if name == "imagefolder" else []
    return [
        *("--dataset", name, *called, "--arch", "mlp", "--quiet", "--sources", "2", "--heldout", "0"),
        *("--data-root", str(tmp_path / "raw"), "--out", str(tmp_path / "run")),
        *(f"dataset.directory={tmp_path / 'betons'}", "dataset.resolution=8", "model.width=4", "train.epochs=1"),
        *("train.batch_size=4", "evaluation.points=2", "device=cpu", "workers=1", *overrides),
    ]


@pytest.mark.parametrize("command", ["train-star", "train-sources"])
def test_a_run_that_does_not_fit_is_refused_before_its_data_are_written(
    command: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options in (images(tmp_path), [*tiny(tmp_path / "betons"), "--out", str(tmp_path / "run")]):
        said = refused(command, *options, "sources.number=1000000000")
        assert said.startswith(FITS), said
        assert not (tmp_path / "betons").exists()
        assert not (tmp_path / "run").exists()
    nothing = images(tmp_path, "imagefolder", "dataset.val_share=0.1")  # nor are images that are not there as asked
    assert "holds test images already" in refused(command, *nothing, "sources.number=1000000000")


@pytest.mark.parametrize("listed", [True, False])
def test_what_was_taken_for_granted_is_checked_again_by_the_files(listed: bool, root: Path, tmp_path: Path) -> None:
    """ImageNet's published 1,000 classes are not those of a network for three."""
    if not listed:
        pack(root)
    options = [word for word in images(tmp_path, "imagenet", "gpu_memory=1GiB") if word != "--quiet"]
    for written, classes, checks in ((False, 3 if listed else 1000, 2), (True, 3, 1)):
        counts = data_counts(settings_of(tmp_path, "imagenet"))
        assert counts is not None
        assert (counts.written, counts.classes) == (written, classes)
        done = fastar("train-sources", *options)
        assert done.code == 0, done.err
        assert done.err.count("where it bounds nothing") == checks


def test_rows_that_memory_cannot_hold_are_refused_before_the_data_are_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By arithmetic: nothing is run, and no plan is made."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    said = refused("train-star", *images(tmp_path))
    assert re.fullmatch(
        r"this run does not fit: host: training needs .* are there \(see `fastar plan`\)",
        said,
    )
    assert not (tmp_path / "betons").exists()


def test_the_check_takes_no_time_to_speak_of(tmp_path: Path) -> None:
    """No network is run, nothing is derived or faked: one is built, for its sizes."""
    settings = settings_of(tmp_path, "digits")
    counts = data_counts(settings)
    assert counts is not None
    one = new_session(settings, RunFolder(tmp_path / "run"))
    with mock.patch.object(torch.nn.Module, "__call__", side_effect=AssertionError("a network was run")):
        preflight.check_run(one, counts)
    assert "symmetry" not in one.__dict__


def test_asking_for_very_many_sources_lists_none_of_them(tmp_path: Path) -> None:
    """Ten million took a minute and gigabytes before anything was said."""
    settings = settings_of(tmp_path, "digits")
    many = settings.model_copy(update={"sources": settings.sources.model_copy(update={"number": 10**6})})
    tracemalloc.start()
    try:
        assert finished_results(many, RunFolder(tmp_path / "run")) is None
        assert tracemalloc.get_traced_memory()[1] < 1e6  # a list of their names takes a hundred times that
    finally:
        tracemalloc.stop()


def test_images_that_are_not_written_are_counted(root: Path, tmp_path: Path) -> None:
    counts = data_counts(settings_of(tmp_path, "imagefolder"))
    assert counts == DataCounts(12, 0, 6, held=0, classes=3, written=False)


def settings_of(tmp_path: Path, name: str) -> Settings:
    """As `images`."""
    overrides = [word for word in images(tmp_path, name) if "=" in word]
    if name != "digits":
        overrides += [f"dataset.root={tmp_path / 'raw'}", *(["dataset.own_name=mine"] if name == "imagefolder" else [])]
    else:
        overrides = [word for word in overrides if not word.startswith(("dataset.resolution", "model."))]
    return load_settings(dataset=name, arch="mlp", overrides=overrides)


def test_an_archive_that_is_not_read_does_not_matter(root: Path, tmp_path: Path) -> None:
    (root / "ILSVRC2012_img_train.tar").touch()
    (root / "val").rename(root / "test")
    assert class_folders.count_images(root) == (12, 6, 3)
    outcome = fastar("train-star", *images(tmp_path))
    assert outcome.code == 0, outcome


def test_images_that_only_an_archive_counts_are_written_first(root: Path, tmp_path: Path) -> None:
    pack(root)
    assert class_folders.count_images(root) is None
    outcome = fastar("train-star", *images(tmp_path))
    assert outcome.code == 0, outcome


TOO_LARGE = "train.batch_size={} is more than the {} training samples; lower it or set train.drop_last=false"


@pytest.mark.parametrize("command", ["train-star", "plan"])
def test_a_batch_beyond_the_images_is_refused_before_they_are_written(
    command: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where --out is not given, a run goes below the folder it is started in
    options = images(tmp_path, "imagefolder", "train.batch_size=13")
    if command == "plan":
        options = [f"dataset.root={tmp_path / 'raw'}", *options]
        for option in ("--data-root", "--out"):
            del options[options.index(option) : options.index(option) + 2]
    assert refused(command, *options) == TOO_LARGE.format(13, 12)
    digits = ["--dataset", "digits", f"dataset.directory={tmp_path / 'betons'}", "--quiet", "device=cpu"]
    assert refused(command, *digits, "train.batch_size=1438") == TOO_LARGE.format(1438, 1437)
    assert refused(command, *digits, "train.batch_size=401", "dataset.limit=400") == TOO_LARGE.format(401, 400)
    assert not (tmp_path / "betons").exists()
    assert not (tmp_path / "run").exists()


def test_a_batch_beyond_the_images_may_be_short(root: Path, tmp_path: Path) -> None:
    options = images(tmp_path, "imagefolder", "train.batch_size=13", "train.drop_last=false")
    outcome = fastar("train-sources", *options)
    assert outcome.code == 0, outcome.err


def test_a_limit_beyond_the_images_is_refused_before_they_are_written(root: Path, tmp_path: Path) -> None:
    said = refused("train-star", *images(tmp_path, "imagefolder", "dataset.limit=13"))
    assert said == "limit=13 is more than the 12 train images of mine; lower it"
    assert not (tmp_path / "betons").exists()
