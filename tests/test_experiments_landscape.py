"""The loss between networks of a finished run: `fastar plane`, `fastar curve`, `fastar graph`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from cli_cases import fastar, refused
from run_cases import SMALL

from fastar.config import load_settings
from fastar.experiments import train_star
from fastar.experiments.finished_run import FinishedRun, finished_run
from fastar.experiments.landscape.loss_plane import loss_plane
from fastar.report.plane_picture import loss_levels
from fastar.runs import RunFolder


@pytest.fixture(scope="module", params=["mlp", "resnet8"])
def run(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A small finished run without batch-norm and with it."""
    options = ["sources.heldout=2", "dataset.limit=150", "evaluation.test_limit=60", "checkpoint.minutes=0"]
    options += ["model.width=0.25"] if request.param == "resnet8" else []
    options += ["star.epochs=2", f"dataset.directory={data}"]
    settings = load_settings(dataset="digits", arch=request.param, overrides=[*SMALL, *options])
    folder = tmp_path_factory.mktemp("plane") / "run"
    train_star(settings, folder)
    return finished_run(RunFolder(folder))


def own_losses(run: FinishedRun) -> dict[str, dict[str, float]]:
    """The losses of the star and the heldouts at the ends of the run's own paths: split -> name -> loss."""
    results = run.session.run.read_results()
    paths = [path for path in results["paths"] if path["kind"] == "star_heldout"]
    return {
        split: {"star": paths[0][f"{split}_loss"][0]}
        | {path["second"].replace(" ", ":"): path[f"{split}_loss"][-1] for path in paths}
        for split in ("train", "test")
    }


def test_losses_at_the_corners_are_the_networks_own(run: FinishedRun) -> None:
    found, own = loss_plane(run, points=3, margin=0.5), own_losses(run)
    assert [one["name"] for one in found["networks"]] == ["star", "heldout:0", "heldout:1"]
    for one in found["networks"]:
        for split in ("train", "test"):
            assert one[split]["loss"] == pytest.approx(own[split][one["name"]], rel=1e-5)
    json.dumps(found, allow_nan=False)


def test_a_grid_through_the_corners_has_their_losses_and_the_path_between(run: FinishedRun) -> None:
    """Without a margin, the first row of a grid begins in A and ends in B, and is the path between them."""
    found, own = loss_plane(run, points=3, margin=0), own_losses(run)
    a, b, c = found["networks"]
    assert (a["x"], a["y"], b["y"]) == (0, 0, 0)
    assert c["y"] > 0
    assert np.ptp(found["x"]) == pytest.approx(max(b["x"], c["x"]) - min(0, c["x"]))
    if 0 <= c["x"] <= b["x"]:
        row = found["splits"]["train"]["loss"][0]
        paths = run.session.run.read_results()["paths"]
        (path,) = (path for path in paths if (path["first"], path["second"]) == ("star", "heldout 0"))
        assert row == pytest.approx(path["train_loss"], rel=1e-4)
        assert row[0] == pytest.approx(own["train"]["star"], rel=1e-5)


def test_one_split_alone_can_be_measured(run: FinishedRun) -> None:
    found = loss_plane(run, ["mean", "source:0", "star"], points=2, split="test")
    assert list(found["splits"]) == ["test"]
    assert np.shape(found["splits"]["test"]["accuracy"]) == (2, 2)
    assert set(found["networks"][0]) == {"name", "x", "y", "test"}


def test_the_command_writes_a_picture(run: FinishedRun) -> None:
    folder = run.session.run.path
    done = fastar("plane", folder, "heldout:1", "star", "source:1", "--points", "3", "--quiet")
    assert done.code == 0, done.err
    found = json.loads((folder / "plane.json").read_text())
    assert [one["name"] for one in found["networks"]] == ["heldout:1", "star", "source:1"]
    assert (folder / "plane.png").read_bytes().startswith(b"\x89PNG")
    assert "test loss on the grid: " in done.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["star", "star", "heldout:0"], "star, star, heldout:0: lie on one line once they are matched"),
        (["star", "heldout:0", "heldout:0"], "lie on one line once they are matched"),
        (["star", "heldout:0", "heldout:2"], "heldout:2: no network of"),
        (["star", "source:0"], "a plane goes through three networks, not 2"),
        (["--points", "1"], "points=1, margin=0.2: give at least 2 points"),
        (["--margin", "-1"], "margin=-1: give at least 2 points and no negative margin"),
        (["--split", "dev"], "split=dev: this run has train, test"),
    ],
)
def test_bad_input_is_one_line(run: FinishedRun, arguments: list[str], said: str) -> None:
    assert said in refused("plane", run.session.run.path, *arguments, "--quiet")


@pytest.mark.parametrize("low_high", [(0.002, 14.0), (0.18, 14.0), (0.4, 0.6), (0.0, 3.0), (-1.0, 2.0), (1.0, 1.0)])
def test_levels_rise_within_the_values(low_high: tuple[float, float]) -> None:
    levels = loss_levels(low_high)
    assert levels == sorted(set(levels))
    assert len(levels) >= 6
    assert low_high[0] <= levels[0]
    assert levels[-1] <= low_high[1] or low_high[0] == low_high[1]
