"""Families of networks around a star, and `fastar uncertainty`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_cases import fastar
from run_cases import SMALL, small

import fastar as api
from fastar.config import load_settings
from fastar.errors import FastarError
from fastar.evaluation.predictions import Labels, probabilities
from fastar.experiments import train_star
from fastar.experiments.averages import uncertainty
from fastar.experiments.families import FAMILIES, Families
from fastar.experiments.finished_run import FinishedRun, finished_run
from fastar.experiments.statistics_batches import statistics_batches
from fastar.runs import RunFolder


def build() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


@pytest.fixture(scope="module", params=["mlp", "resnet8"])
def run(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A small finished run of three sources, without batch-norm and with it."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    limits = ["sources.number=3", "dataset.limit=200", "evaluation.test_limit=120", "checkpoint.minutes=0"]
    options = [*SMALL, f"dataset.directory={data}", "model.width=0.25", "star.epochs=2", *limits]
    settings = small(data, *limits)
    if request.param == "resnet8":
        settings = load_settings(dataset="digits", arch="resnet8", overrides=options)
    train_star(settings, folder)
    return finished_run(RunFolder(folder))


def predicted(run: FinishedRun, members: object) -> list[np.ndarray]:
    session = run.session
    found = probabilities(
        session.network.build(seed=0),
        session.network.layout,
        members,  # type: ignore[arg-type]
        {"test": session.data.splits()["test"]},
        Labels(),
        samples=120,
        statistics_batches=partial(statistics_batches, session),
        loss=session.loss,
    )
    return [one["test"] for one in found]


def test_the_far_end_of_the_star_domain_is_the_ensemble(run: FinishedRun) -> None:
    """All t = 1, no source twice: matched sources compute what they did, with statistics re-estimated for both. It
    proves matching, statistics and averaging at once."""
    far = predicted(run, Families(run, t=1.0, replace=False).members("star domain", 3))
    ensemble = predicted(run, Families(run).members("ensemble", 3))
    assert np.abs(np.mean(far, 0) - np.mean(ensemble, 0)).max() < 1e-5
    assert np.abs(ensemble[0] - ensemble[1]).max() > 1e-3


def test_the_near_end_of_the_star_domain_is_the_star(run: FinishedRun) -> None:
    (star,) = predicted(run, Families(run).members("star", 1))
    for near in predicted(run, Families(run, t=0.0).members("star domain", 3)):
        assert np.array_equal(near, star)


def test_the_ball_has_its_radius(run: FinishedRun) -> None:
    star = run.session.network.layout.flatten(run.star.state).double()
    for member in Families(run, radius=0.25).members("ball", 2):
        row = member.row_on(torch.device("cpu")).double()
        assert float((row - star).norm() / star.norm()) == pytest.approx(0.25, rel=1e-5)


def test_repetitions_are_other_draws_and_the_same_again(run: FinishedRun) -> None:
    names = [[one.name for one in Families(run).members("star domain", 4, r)] for r in (0, 1, 0)]
    assert names[0] == names[2] != names[1]
    assert names[0][:2] == [one.name for one in Families(run).members("star domain", 2, 0)]


def test_every_family_is_measured_at_every_k(run: FinishedRun) -> None:
    found = uncertainty(run, most=4, repetitions=2)
    assert list(found["families"]) == list(FAMILIES)
    assert {name: len(of["k"]) for name, of in found["families"].items()} == {
        **dict.fromkeys(("source", "star", "mean"), 1),
        "ensemble": 3,
        **dict.fromkeys(("star domain", "pairs", "ball"), 4),
    }
    one = found["families"]["star"]
    assert one["accuracy"]["mean"][0] == pytest.approx(float(run.star.metadata["test_accuracy"]), abs=0.02)
    assert found["samples"] == 120
    assert sum(found["reliability"]["star domain"]["count"]) == 120
    # An average of one network of the ensemble is a source: disagreement 0.
    assert found["families"]["ensemble"]["disagreement"]["mean"][0] == 0
    assert found["families"]["ensemble"]["disagreement"]["mean"][-1] > 0
    json.dumps(found, allow_nan=False)


def test_the_command_writes_table_and_pictures(whole: Path, tmp_path: Path) -> None:
    done = fastar("uncertainty", whole, "--most", "2", "--repetitions", "2", "--quiet")
    assert done.code == 0, done.err
    assert "star domain against ensemble" in done.out
    assert json.loads((whole / "uncertainty.json").read_text())["families"]["pairs"]["k"] == [1, 2]
    for name in ("uncertainty.png", "reliability.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")


def test_temperature_is_found_on_validation_samples(data: Path, tmp_path: Path) -> None:
    settings = small(data, "dataset.validation=0.2", "checkpoint.minutes=0")
    train_star(settings, tmp_path / "run")
    found = uncertainty(finished_run(RunFolder(tmp_path / "run")), most=2, repetitions=1, families=["star", "ensemble"])
    of = found["families"]["star"]
    assert found["split"] == "test"
    assert of["temperature"]["mean"][0] > 0
    assert of["nll_t"]["mean"][0] <= of["nll"]["mean"][0] + 0.02
    before, at = (found["families"][name] for name in ("ensemble", "ensemble at T"))
    assert at["k"] == before["k"] == [1, 2]
    assert at["nll"] == before["nll_t"]
    assert at["accuracy"] == before["accuracy"]
    assert at["ece"] == before["ece_t"] != before["ece"]


def test_from_python_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(90, 4)
    data = inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()
    recipe = api.Recipe(epochs=2, batch_size=30)
    sources = api.train_sources(build, data, recipe, number=3, out=tmp_path, progress=False)
    api.train_star(build, sources, data, recipe, out=tmp_path, progress=False)
    with pytest.raises(FastarError, match="give build and train to fastar"):
        api.load_run(tmp_path).uncertainty()
    found = api.load_run(tmp_path, build, data).uncertainty(most=2, repetitions=2)
    assert found.value > 0
    assert repr(found).startswith("Uncertainty(NLL on train: source ")
    assert len(found.plot(metric="ece").get_lines()) == len(FAMILIES)
    run = api.load_run(tmp_path, build, data)
    fused = run.fuse(student=True)
    assert fused.value == fused.results["predictors"]["star"]["accuracy"]
    assert "student" in fused.table()
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))
    assert fused.to_frame()["predictor"] == list(fused.results["predictors"])
    with pytest.raises(FastarError, match="has no heldouts"):
        run.perturb()
    with pytest.raises(FastarError, match=r"its inputs are \[4\], no images"):
        run.uncertainty(corruptions=True)
    with pytest.raises(FastarError, match="was given from Python"):
        finished_run(RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: is no run folder"),
        (["RUN", "--most", "0"], "most=0: give at least 1"),
        (["RUN", "--repetitions", "0"], "repetitions=0: give at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, whole: Path) -> None:
    done = fastar("uncertainty", *(str(whole) if one == "RUN" else one for one in arguments), "--quiet")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert said in done.err


def test_a_run_without_its_star_says_so(data: Path, tmp_path: Path) -> None:
    from fastar.experiments.star_domain import train_sources

    train_sources(small(data), tmp_path / "run")
    with pytest.raises(FastarError, match="its star is not trained yet"):
        finished_run(RunFolder(tmp_path / "run"))


def test_other_losses_have_no_class_probabilities(run: FinishedRun) -> None:
    from fastar.losses import find_loss

    with pytest.raises(FastarError, match="trained by cross_entropy"):
        next(
            probabilities(
                run.session.network.build(seed=0),
                run.session.network.layout,
                [],
                {},
                Labels(),
                samples=1,
                loss=find_loss("mse"),
            )
        )
