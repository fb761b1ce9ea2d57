"""Stars perturbed at random, and `fastar perturb`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_cases import fastar
from run_cases import trained_run

from fastar import load_run
from fastar.errors import FastarError
from fastar.experiments.families import beside
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.perturbed import perturbed_stars
from fastar.runs import hold, is_held


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    folder = tmp_path_factory.mktemp("perturbed") / "run"
    return trained_run(data, folder, "sources.heldout=2")


def test_a_step_has_its_length_and_touches_parameters_alone(run: FinishedRun) -> None:
    layout = run.session.network.layout
    star = layout.flatten(run.star.state)
    moved = beside(star, layout, 3, 0.4)
    assert float((moved - star).double().norm() / star.double().norm()) == pytest.approx(0.4, rel=1e-6)
    padding = torch.ones_like(star)
    for view in layout.views(padding).values():
        view.zero_()
    assert padding.any()
    assert not (moved * padding).any()
    assert not torch.equal(moved, beside(star, layout, 4, 0.4))


def test_a_step_by_filters_has_each_filter_s_length(run: FinishedRun) -> None:
    layout = run.session.network.layout
    star = layout.flatten(run.star.state)
    before, after = layout.views(star), layout.views(beside(star, layout, 3, 0.5, by_filter=True))
    for name, own in before.items():
        if own.ndim == 1:
            assert torch.equal(own, after[name])
        else:
            assert torch.allclose((after[name] - own).norm(dim=1), 0.5 * own.norm(dim=1), rtol=1e-4)


def test_radius_0_is_the_star_itself(run: FinishedRun) -> None:
    found = perturbed_stars(run, radii=[0.05, 0.8], draws=2)
    results = run.session.run.read_results()
    for split in ("train", "test"):
        own = found["points"][0][split]
        assert own["star_loss"]["mean"] == pytest.approx(results[split]["star_loss"], abs=1e-12)
        assert own["barrier"] == results[split]["star_heldout"]
        assert found["regular"][split] == results[split]["regular_regular"]
    assert [point["train"]["barrier"]["n"] for point in found["points"]] == [2, 4, 4]
    assert [point["train"]["star_loss"]["n"] for point in found["points"]] == [1, 2, 2]
    near, far = (found["points"][i]["train"]["star_loss"]["mean"] for i in (1, 2))
    assert far > near
    json.dumps(found, allow_nan=False)


def test_from_python_the_same(run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_run(run.session.run.path).perturb(radii=[0.1], draws=1)
    assert found.value == found.results["points"][1]["train"]["barrier"]["mean"]
    assert repr(found).startswith("Perturbation(barrier to heldouts: ")
    assert len(found.plot().get_lines()) >= 3
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))
    assert found.to_frame()["split"] == ["train", "test"] * 2
    assert "of its norm" in found.table()


def test_a_folder_in_use_is_not_written_to(run: FinishedRun) -> None:
    with hold(run.session.run.path):
        done = fastar("perturb", run.session.run.path, "--radii", "0.1", "--draws", "1", "--quiet")
        with pytest.raises(FastarError, match="in use by another fastar"):
            load_run(run.session.run.path).perturb()
    assert (done.code, done.err.count("\n"), "in use by another fastar" in done.err) == (2, 1, True)
    assert not is_held(run.session.run.path)


def test_a_folder_that_cannot_be_written_to_is_not_held(run: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python nothing is written: a run on a read-only disk is studied as ever."""
    monkeypatch.setattr("fastar.runs.folder.os.access", lambda path, mode: False)
    monkeypatch.setattr("fastar.runs.folder.hold", lambda *arguments: pytest.fail("held"))
    assert load_run(run.session.run.path).perturb(radii=[0.1], draws=1).value >= 0


def test_the_command_writes_a_table_and_a_picture(run: FinishedRun) -> None:
    folder = run.session.run.path
    done = fastar("perturb", folder, "--radii", "0.1", "--draws", "1", "--by-filter", "--quiet")
    assert done.code == 0, done.err
    assert "barrier, regular to regular: " in done.out
    assert json.loads((folder / "perturb.json").read_text())["by_filter"]
    assert (folder / "perturb.png").read_bytes().startswith(b"\x89PNG")
    assert not is_held(folder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--radii", "a"], "--radii a: write numbers joined by commas"),
        (["--radii", "-1"], "radii -1, 3 draws: give positive ones"),
        (["--draws", "0"], "0 draws: give positive ones"),
    ],
)
def test_bad_input_is_one_line(run: FinishedRun, options: list[str], said: str) -> None:
    done = fastar("perturb", run.session.run.path, *options, "--quiet")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert said in done.err


def test_a_run_without_heldouts_says_so(whole: Path) -> None:
    done = fastar("perturb", whole, "--quiet")
    assert done.code == 2
    assert "has no heldouts" in done.err
