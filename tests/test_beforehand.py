"""What is said against a run before its data are written, and that a GPU is not touched before that."""

from __future__ import annotations

import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import fastar, refused, tiny
from PIL import Image

from fastar import data
from fastar.config import Settings, load_settings
from fastar.errors import FastarError
from fastar.experiments import plan, star_domain
from fastar.experiments import preflight as beforehand
from fastar.experiments import session as context
from fastar.experiments.reuse import finished_results
from fastar.experiments.session import Session, new_session
from fastar.runs import RunFolder
from fastar.runtime.progress import SilentProgress

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
def test_what_was_taken_for_granted_is_checked_again_by_the_files(
    listed: bool, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ImageNet's published 1,000 classes are not those of a network for three."""
    seen = []
    look = plan.check_fits

    def looking(one: Session) -> Any:
        found = look(one)
        seen.append((beforehand.is_written(one), plan.data_facts(one).classes))
        return found

    monkeypatch.setattr(beforehand, "check_fits", looking)
    if not listed:
        monkeypatch.setattr(data, "count_images", lambda root, val_share: None)
    done = fastar("train-sources", *images(tmp_path, "imagenet"))
    assert done.code == 0, done.err
    assert seen == [(False, 3 if listed else 1000), (True, 3)]
    assert fastar("train-sources", *images(tmp_path, "imagenet")).code == 0
    assert seen[2:] == [(True, 3)]  # once, where there is nothing to write


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


def test_a_plan_counts_images_that_are_not_written(root: Path, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "imagefolder")
    facts = plan.data_facts(new_session(settings, RunFolder(tmp_path / "run")))
    assert (facts.train, facts.test, facts.classes, facts.written) == (12, 6, 3, False)


def settings_of(tmp_path: Path, name: str) -> Settings:
    """As `images`."""
    overrides = [word for word in images(tmp_path, name) if "=" in word]
    if name == "imagefolder":
        overrides += ["dataset.own_name=mine", f"dataset.root={tmp_path / 'raw'}"]
    else:
        overrides = [word for word in overrides if not word.startswith(("dataset.resolution", "model."))]
    return load_settings(dataset=name, arch="mlp", overrides=overrides)


class Log(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("name", ["imagefolder", "digits"])
def test_a_gpu_is_touched_by_another_process_until_the_data_are_written(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a device that is called a GPU: what would touch it is written down instead."""
    events: list[object] = []
    monkeypatch.setattr(context, "resolve_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    settings = settings_of(tmp_path, name)
    monkeypatch.setattr(beforehand, "use_device", lambda one: events.append(("used", beforehand.is_written(one))))
    monkeypatch.setattr(
        beforehand, "_check_elsewhere", lambda one: events.append(("asked", beforehand.is_written(one)))
    )
    monkeypatch.setattr(beforehand, "check_fits", lambda one: events.append("fits"))
    one = star_domain.prepare_session(settings, tmp_path / "run")
    assert events == []
    beforehand.prepare_data(one)
    asked = [("asked", False)] if name == "imagefolder" else []  # the others are written in less time than that takes
    assert events == [*asked, ("used", True), "fits"]
    events.clear()
    beforehand.prepare_data(star_domain.prepare_session(settings, tmp_path / "run"))
    assert events == [("used", True), ("used", True), "fits"]


def test_another_process_says_the_same(root: Path, tmp_path: Path) -> None:
    heard = Log()
    settings = settings_of(tmp_path, "imagefolder")
    many = settings.model_copy(update={"sources": settings.sources.model_copy(update={"number": 10**9})})
    one = new_session(many, RunFolder(tmp_path / "run"), heard)
    with pytest.raises(FastarError) as here:
        beforehand._check(one)
    with pytest.raises(FastarError) as there:
        beforehand._check_elsewhere(one)
    assert str(there.value).startswith(FITS)
    # But for what is free, which changes all the time.
    assert str(there.value).split(" are needed")[0] == str(here.value).split(" are needed")[0]
    assert heard.lines == []


@pytest.mark.parametrize(("code", "said"), [(0, ""), (1, "Traceback\nKeyError: 'x'\n"), (-9, "")])
def test_a_process_that_fails_does_not_stop_the_run_but_is_told(
    code: int, said: str, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Log()
    monkeypatch.setattr(
        subprocess, "run", lambda command, **more: subprocess.CompletedProcess(command, code, stdout="", stderr=said)
    )
    beforehand._check_elsewhere(new_session(settings_of(tmp_path, "imagefolder"), RunFolder(tmp_path / "run"), heard))
    why = {0: None, 1: "(KeyError: 'x')", -9: "(exit code -9)"}[code]
    assert [line.endswith(str(why)) for line in heard.lines] == ([] if why is None else [True])


def test_an_archive_that_is_not_read_does_not_matter(root: Path, tmp_path: Path) -> None:
    (root / "ILSVRC2012_img_train.tar").touch()
    (root / "val").rename(root / "test")
    assert data.count_images(root) == (12, 6, 3)
    outcome = fastar("train-star", *images(tmp_path))
    assert outcome.code == 0, outcome


def test_images_that_only_an_archive_counts_are_written_first(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "is_packed", lambda root, val_share: True)
    monkeypatch.setattr(data, "count_images", lambda root, val_share: None)
    outcome = fastar("train-star", *images(tmp_path))
    assert outcome.code == 0, outcome


TOO_LARGE = "train.batch_size={} is more than the {} training images; lower it or set train.drop_last=false"


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


def test_of_sets_of_one_size_a_batch_is_checked_without_touching_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "resolve_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(beforehand, "use_device", lambda one: pytest.fail("the GPU was touched"))
    settings = settings_of(tmp_path, "digits")
    large = settings.model_copy(update={"train": settings.train.model_copy(update={"batch_size": 2000})})
    with pytest.raises(FastarError, match="^" + TOO_LARGE.format(2000, 1437)):
        beforehand.prepare_data(new_session(large, RunFolder(tmp_path / "run")))
    assert not (tmp_path / "betons").exists()


def test_a_batch_beyond_the_images_may_be_short(root: Path, tmp_path: Path) -> None:
    options = images(tmp_path, "imagefolder", "train.batch_size=13", "train.drop_last=false")
    outcome = fastar("train-sources", *options)
    assert outcome.code == 0, outcome.err


def test_a_limit_beyond_the_images_is_refused_before_they_are_written(root: Path, tmp_path: Path) -> None:
    said = refused("train-star", *images(tmp_path, "imagefolder", "dataset.limit=13"))
    assert said == "limit=13 is more than the 12 train images of mine; lower it"
    assert not (tmp_path / "betons").exists()
