"""Networks on corrupted images, and on images of no class: `fastar uncertainty --corruptions --ood`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import fastar
from run_cases import trained_run

import fastar as api
from fastar.data.corruptions import CORRUPTIONS, corrupted
from fastar.errors import FastarError
from fastar.evaluation.uncertainty import Average, auroc
from fastar.experiments.families import FAMILIES, Families
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.look import Look
from fastar.experiments.shift import changed_images
from fastar.experiments.shift.changed_images import Pixels, as_images_of, corrupted_splits, other_splits
from fastar.experiments.shift.shift_scores import OtherScores


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("shift") / "run"
    more = ["sources.number=3", "train.epochs=5", "dataset.limit=500", "dataset.validation=0.2", "star.epochs=4"]
    return trained_run(data, folder, *more, "evaluation.test_limit=60", "checkpoint.seconds=10")


def test_networks_see_the_corrupted_pixels(run: FinishedRun) -> None:
    """Whatever the batch size, and the second time as the first; what is not corrupted is the test set to the bit."""
    session = run.session
    pixels = Pixels(session)
    clean, labels = next(iter(session.data.splits()["test"]()))
    levels = (pixels.of(clean) * 255).round().byte()
    assert torch.equal(pixels.inputs(levels), clean)
    wanted = corrupted(pixels.of(clean), "shot noise", 3, seed=session.settings.seed, index=torch.arange(60))
    one = corrupted_splits(session, pixels)["shot noise 3"]
    for _ in range(2):
        found = [batch for batch, _ in one()]
        assert torch.equal(torch.cat(found), pixels.inputs((wanted * 255).round().byte()))
    evaluation = session.settings.evaluation.model_copy(update={"batch_size": 7})
    session.data._settings = session.settings.model_copy(update={"evaluation": evaluation})
    try:
        parts = list(corrupted_splits(session, pixels)["shot noise 3"]())
    finally:
        session.data._settings = session.settings
    assert len(parts) > 8
    assert torch.equal(torch.cat([batch for batch, _ in parts]), torch.cat(found))
    assert torch.equal(torch.cat([target for _, target in parts]), labels)


def test_what_is_not_kept_is_made_again(run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = Pixels(run.session)
    kept = next(iter(corrupted_splits(run.session, pixels)["gaussian noise 5"]()))[0]
    monkeypatch.setattr(changed_images, "KEPT", 0)
    again = corrupted_splits(run.session, pixels)["gaussian noise 5"]
    assert all(torch.equal(next(iter(again()))[0], kept) for _ in range(2))


def test_every_family_is_measured_at_every_severity(run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command, which also writes tables and a picture."""
    monkeypatch.delenv("COLUMNS", raising=False)  # of the terminal that tests run in, which may fold names
    folder = run.session.run.path
    options = ["--most", "2", "--repetitions", "2", "--corruptions", "--ood", "noise,blocks"]
    done = fastar("uncertainty", folder, *options, "--quiet")
    assert done.code == 0, done.err
    for said in ("ensemble at T", "accuracy over severity, mean of 8", "60 images of noise told from 60 test"):
        assert said in done.out
    assert (folder / "corruptions.png").read_bytes().startswith(b"\x89PNG")
    assert fastar("verify", folder, "--quiet").code == 0
    found = json.loads((folder / "uncertainty.json").read_text())
    of = found["corruptions"]
    names = ["source", "ensemble", "ensemble at T", "star", "star domain", "star domain at T"]
    assert list(of["families"]) == names
    for name in names:
        one, clean = of["families"][name], found["families"][name]
        assert one["mean"]["nll"]["mean"][0] == pytest.approx(clean["nll"]["mean"][-1], rel=1e-12)
        by_kind = [one["kinds"][kind]["nll"]["mean"][5] for kind in CORRUPTIONS]
        assert one["mean"]["nll"]["mean"][5] == pytest.approx(np.mean(by_kind))
    star = of["families"]["star"]
    assert star["repetitions"] == 1
    assert star["mean"]["accuracy"]["mean"][5] < star["mean"]["accuracy"]["mean"][0]
    look = Look(run.session, ["test"], corrupted_splits(run.session, Pixels(run.session)))
    (own,) = look(Families(run).members("star", 1))
    assert star["kinds"]["contrast"]["accuracy"]["mean"][4] == pytest.approx(look.accuracy(own, "contrast 4"))
    for other in found["ood"].values():
        assert other["samples"] == 60
        assert list(other["families"]) == list(FAMILIES)
        assert "mutual information" not in other["families"]["star"]
        assert 0 <= other["families"]["star domain"]["mutual information"]["auroc"]["mean"] <= 1


def test_strange_images_are_what_is_looked_for() -> None:
    """A higher score is stranger; all metrics are of the strange ones as positives."""
    own, other = Average(), Average()
    own.add(np.array([[0.9, 0.1], [0.6, 0.4]]))
    other.add(np.array([[0.5, 0.5], [0.7, 0.3]]))
    scores = OtherScores("test", ["noise"])
    scores.add("star", {"test": own, "noise": other})
    found = scores.results()["noise"]["families"]["star"]["confidence"]
    assert found["auroc"]["mean"] == auroc(np.array([0.1, 0.4, 0.5, 0.3]), np.array([0, 0, 1, 1], bool)) == 0.75
    assert found["fpr_95"]["mean"] == 0.5
    assert found["aupr"]["mean"] == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_images_of_another_set_take_the_run_s_form() -> None:
    colours = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    colours[:, 1] = 1
    assert torch.allclose(as_images_of(colours, (1, 2, 2)), torch.full((1, 1, 2, 2), 0.587, dtype=torch.float64))
    assert as_images_of(torch.ones(2, 1, 28, 28, dtype=torch.float64), (3, 32, 32)).shape == (2, 3, 32, 32)
    assert as_images_of(torch.ones(2, 3, 5, 7, dtype=torch.float64), (3, 5, 7)).min() == 1


def test_another_data_set_s_images(run: FinishedRun, tmp_path: Path) -> None:
    """Two IDX files of 28 x 28 pixels stand in for MNIST's test set."""
    for name, magic, shape in (
        ("train-images-idx3", 3, (30, 28, 28)),
        ("train-labels-idx1", 1, (30,)),
        ("t10k-images-idx3", 3, (20, 28, 28)),
        ("t10k-labels-idx1", 1, (20,)),
    ):
        values = np.arange(np.prod(shape), dtype=np.int64) % (10 if len(shape) == 1 else 251)
        header = bytes([0, 0, 8, magic]) + b"".join(int(n).to_bytes(4, "big") for n in shape)
        with gzip.open(tmp_path / f"{name}-ubyte.gz", "wb") as file:
            file.write(header + values.astype(np.uint8).tobytes())
    session = run.session
    dataset = session.settings.dataset.model_copy(update={"root": tmp_path, "directory": tmp_path / "data"})
    from dataclasses import replace

    other = replace(session, settings=session.settings.model_copy(update={"dataset": dataset}))
    split = other_splits(other, Pixels(session), ["mnist"])["mnist"]
    ((images, labels),) = split()
    assert (images.shape, split.samples, labels.shape) == ((20, 1, 8, 8), 20, (20,))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("digits", "ood=digits: is the run's own data set"),
        ("imagenet", "ood=imagenet: its images are of any size"),
        ("cats", "or of the made images: noise, gaussian, phase, blocks"),
    ],
)
def test_wrong_names_are_one_line(run: FinishedRun, names: str, said: str) -> None:
    done = fastar("uncertainty", run.session.run.path, "--ood", names, "--quiet")
    assert (done.code, done.err.count("\n"), said in done.err) == (2, 1, True), done.err


@pytest.mark.parametrize(
    "kind", [*(pytest.param(one, marks=pytest.mark.slow) for one in ("unit", "bytes")), "normalised"]
)
def test_a_user_s_images(kind: str, tmp_path: Path) -> None:
    """Numbers in [0, 1] and bytes are images; others are refused in a line."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
            )

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.layers(images.float())
            return found

    torch.manual_seed(0)
    images = torch.rand(60, 1, 4, 4)
    labels = (images.mean((1, 2, 3)) > 0.5).long() + (images[:, 0, 0, 0] > 0.5).long()
    inputs = {"bytes": (images * 255).byte(), "normalised": images * 2 - 1}.get(kind, images)
    recipe = api.Recipe(epochs=1, batch_size=20)
    sources = api.train_sources(Network, (inputs, labels), recipe, number=2, out=tmp_path, progress=False)
    api.train_star(Network, sources, (inputs, labels), recipe, out=tmp_path, progress=False)
    run = api.load_run(tmp_path, Network, (inputs, labels))
    if kind in ("unit", "bytes"):
        found = run.uncertainty(most=1, repetitions=1, corruptions=True, ood="gaussian").results
        assert found["corruptions"]["families"]["star"]["mean"]["nll"]["mean"][5] > 0
    else:
        with pytest.raises(FastarError, match=r"values from -0\.99"):
            run.uncertainty(most=1, repetitions=1, corruptions=True)
