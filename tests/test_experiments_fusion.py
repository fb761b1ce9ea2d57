"""Fusion of sources, and `fastar fuse`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_cases import fastar
from run_cases import trained_run

from fastar.experiments.families import Families
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.fusion import fuse
from fastar.experiments.look import Look


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """Three sources that have learned something, and validation samples."""
    folder = tmp_path_factory.mktemp("fusion") / "run"
    more = ["sources.number=3", "train.epochs=8", "dataset.validation=0.2", "dataset.limit=null", "star.mu=1"]
    return trained_run(data, folder, *more)


def test_every_predictor_is_what_it_says(run: FinishedRun) -> None:
    found, look = fuse(run), Look(run.session, ["validation", "test"])
    sources = list(look(map(Families(run).source, range(3))))
    labels = look.labels["test"]

    def accuracy(p: np.ndarray) -> float:
        return float((p.argmax(1) == labels).mean())

    of = {name: one["accuracy"] for name, one in found["predictors"].items()}
    assert of["ensemble"] == accuracy(np.mean([one["test"] for one in sources], 0))
    assert of["best source by test"] == max(accuracy(one["test"]) for one in sources)
    chosen = max(range(3), key=lambda n: look.accuracy(sources[n], "validation"))
    assert of["best source"] == accuracy(sources[chosen]["test"])
    assert found["single"]["accuracy"]["mean"] == pytest.approx(np.mean([accuracy(one["test"]) for one in sources]))
    assert (found["chosen_on"], found["mu"], found["split"]) == ("validation", 1, "test")
    assert found["in_soup"][0] == chosen
    assert found["predictors"]["star"]["above_star_error"] == 0
    assert "nll" not in found["predictors"]["vote"]
    assert of["star"] == pytest.approx(float(run.star.metadata["test_accuracy"]))
    json.dumps(found, allow_nan=False)


def test_a_soup_of_copies_takes_them_all(data: Path, tmp_path: Path, run: FinishedRun) -> None:
    """The mean of a network and its copies is the network: no accuracy falls."""
    copies = tmp_path / "copies"
    copies.mkdir()
    for n in range(3):
        (copies / f"{n}.safetensors").write_bytes(run.session.run.model("source", 0).read_bytes())
    given = [f"sources.folder={copies}", "sources.number=3", "dataset.validation=0.2", "dataset.limit=null"]
    found = fuse(trained_run(data, tmp_path / "run", *given, "train.epochs=8", "sources.heldout=1"))
    of = {name: one["accuracy"] for name, one in found["predictors"].items()}
    assert sorted(found["in_soup"]) == [0, 1, 2]
    assert of["greedy soup"] == of["mean"] == of["ensemble"] == of["vote"] == of["best source"]


def test_the_command_prints_a_table(run: FinishedRun) -> None:
    done = fastar("fuse", run.session.run.path, "--quiet")
    assert done.code == 0, done.err
    assert "greedy soup" in done.out
    assert "chosen on validation samples" in done.out
    assert (run.session.run.path / "fusion.json").is_file()
