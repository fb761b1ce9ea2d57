"""A run folder that fastar 0.1 wrote before its rooms and settings had their present names (tests/old_run)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_cases import fastar

OLD = Path(__file__).resolve().parent / "old_run"
# As it was made, in the words of that version.
COMMAND = [
    *("train-star", "--dataset", "digits", "--sources", 2, "--heldout", 2, "train.epochs=3", "model.width=8"),
    *("model.depth=1", "evaluation.points=3", "evaluation.regular_pairs=1", "matching.kicks=1"),
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def test_it_is_reported_listed_and_verified(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    report = fastar("report", run)
    assert report.code == 0, report
    assert "star model of 2 sources" in report.out
    listed = json.loads(fastar("runs", run.parent, "--json").out)
    assert [entry["state"] for entry in listed] == ["finished"]
    verified = fastar("verify", run, "--quiet")
    assert (verified.code, verified.err) == (0, "")
    assert results["sources"] == 2


def test_its_barriers_are_measured_again(run: Path, tmp_path: Path) -> None:
    (heldout, *_) = sorted((run / "heldout").iterdir())
    found = fastar("barrier", run / "star.safetensors", heldout, "--json", "--quiet", f"dataset.directory={tmp_path}")
    assert found.code == 0, found
    (path,) = json.loads(found.out)["paths"]
    kept = json.loads((run / "results.json").read_text())["paths"]
    wanted = next(one for one in kept if one["kind"] == "star_heldout")
    # The command measures 11 points, the run three: the ends are the same networks.
    assert path["train_loss"][0] == pytest.approx(wanted["train_loss"][0], rel=1e-5)
    assert path["train_loss"][-1] == pytest.approx(wanted["train_loss"][-1], rel=1e-5)


def test_the_same_command_finds_it_finished_or_measures_alone(run: Path, tmp_path: Path) -> None:
    """Its models are its own: nothing is trained again."""
    models = {path: path.read_bytes() for path in run.rglob("seed-*.safetensors")}
    again = fastar(*COMMAND, "--out", run, f"dataset.directory={tmp_path / 'data'}")
    assert again.code == 0, again
    assert "matching.kicks" in again.err
    assert "matching.perturbations" in again.err
    assert {path: path.read_bytes() for path in run.rglob("seed-*.safetensors")} == models
