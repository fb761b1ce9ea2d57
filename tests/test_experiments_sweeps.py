"""`fastar sweep`: stars over one set of sources; points share what they can, go on, grow, and are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import contents, fastar, refused
from PIL import Image
from run_cases import Killed, around_calls, at_call, kill, tensors

from fastar.config import Settings, load_settings
from fastar.errors import FastarError
from fastar.experiments import train_star
from fastar.experiments.files.verify_files import recheck
from fastar.experiments.sweeps import plan_sweep, sweep
from fastar.experiments.sweeps.points import points_of, read_values, take_over, trainings
from fastar.report.sweep_panels import sweep_lines, sweep_picture, sweep_table
from fastar.runs import RunLog
from fastar.runs.claims import Processes
from fastar.runtime.progress import SILENT
from fastar.training import RegularStep, StarStep

OPTIONS = {
    "train.epochs": 1,
    "train.batch_size": 100,
    "dataset.limit": 200,
    "model.depth": 1,
    "evaluation.points": 3,
    "sources.number": 2,
    "sources.heldout": 2,
    "logging.tensorboard": False,
    "device": "cpu",
    "workers": 1,
}
SOURCES = [1, 2, 4]
Swept = tuple[Path, dict[str, Any]]


def kept(folder: Path) -> dict[str, Any]:
    """What `sweep.json` holds, without its seal."""
    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return {key: value for key, value in found.items() if key not in ("format", "digest")}


def settings_of(data: Path, **overrides: Any) -> Settings:
    """Settings of a run of digits that takes a moment; overrides by keys with __ for the dot."""
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_settings(dataset="digits", values={**OPTIONS, "dataset.directory": str(data), **changes})


def unmatched(data: Path, **overrides: Any) -> Settings:
    """The same without matching: no symmetry is derived."""
    return settings_of(data, matching__method="none", **overrides)


def results_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


def the_same_file(*paths: Path) -> bool:
    return len({(path.stat().st_dev, path.stat().st_ino) for path in paths}) == 1


def assert_same(found: Path, wanted: Path) -> None:
    """All models of all points, bit for bit, and sweep.json."""
    one, other = tensors(found), tensors(wanted)
    assert one.keys() == other.keys()
    for file, state in other.items():
        assert all(torch.equal(value, one[file][name]) for name, value in state.items()), file
    assert (found / "sweep.json").read_bytes() == (wanted / "sweep.json").read_bytes()


@pytest.fixture(scope="module")
def swept(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A sweep of sources, two stars each, not to be changed."""
    folder = tmp_path_factory.mktemp("sweep") / "sources"
    return folder, sweep(settings_of(data), "sources", SOURCES, folder, seeds=2)


def test_a_star_of_the_first_sources_is_that_of_a_run_that_has_these_alone(
    swept: Swept, data: Path, tmp_path: Path
) -> None:
    point, alone = swept[0] / "points" / "sources=2", tmp_path / "alone"
    train_star(settings_of(data), alone)
    found, wanted = tensors(point), tensors(alone)
    assert found.keys() == wanted.keys()
    for file, state in wanted.items():
        assert all(torch.equal(value, found[file][name]) for name, value in state.items()), file
    assert results_of(point)["paths"] == results_of(alone)["paths"]


def test_regular_models_are_trained_once_and_stars_of_other_seeds_are_others(swept: Swept) -> None:
    points = swept[0] / "points"
    every = [points / f"sources={n}{seed}" for n in SOURCES for seed in ("", ",seed=1")]
    assert sorted(points.iterdir()) == sorted(every)
    assert the_same_file(*(point / "sources" / "seed-0000.safetensors" for point in every))
    assert the_same_file(*(point / "heldout" / "seed-0001.safetensors" for point in every))
    assert [len(list((point / "sources").iterdir())) for point in every] == [1, 1, 2, 2, 4, 4]
    stars = [tensors(point)["star.safetensors"] for point in every[:2]]
    assert not any(torch.equal(value, stars[1][name]) for name, value in stars[0].items() if value.ndim > 1)


def test_points_are_well_and_their_logs_have_the_models_that_were_taken(swept: Swept) -> None:
    assert recheck(swept[0]).damaged == []
    epochs = [{entry["model"] for entry in RunLog(run / "log.jsonl").read()} for run in (swept[0] / "points").iterdir()]
    assert all({"source 0", "heldout 0", "heldout 1", "star"} <= models for models in epochs)


def test_figures_are_those_of_the_runs(swept: Swept) -> None:
    folder, found = swept
    assert kept(folder) == json.loads(json.dumps(found, allow_nan=False))
    assert [point["value"] for point in found["points"]] == SOURCES
    for point in found["points"]:
        assert point["seeds"] == [0, 1]
        assert point["overrides"] == {"sources.number": point["value"]}
        runs = [results_of(folder / place) for place in point["folders"]]
        for split in ("train", "test"):
            of_split, (first, second) = point[split], (run[split] for run in runs)
            assert of_split["regular_regular"]["mean"] == first["regular_regular"]["mean"]
            for kind in ("star_heldout", "star_source"):
                assert of_split[kind]["n"] == 2 * first[kind]["n"]
                assert of_split[kind]["mean"] == pytest.approx((first[kind]["mean"] + second[kind]["mean"]) / 2)
            assert of_split["star_loss"]["mean"] == pytest.approx((first["star_loss"] + second["star_loss"]) / 2)
            assert of_split["regular_loss"]["mean"] == pytest.approx(first["regular_loss"]["mean"])
            largest = [run["largest_loss"]["star_heldout"]["mean"] for run in (first, second)]
            assert of_split["largest_loss"]["star_heldout"]["mean"] == pytest.approx(sum(largest) / 2)
            accuracies = [run["accuracy"][split]["star"] for run in runs]
            assert of_split["metrics"]["accuracy"]["star"]["mean"] == pytest.approx(sum(accuracies) / 2)
            low, high = of_split["star_heldout"]["interval"]
            assert low <= of_split["star_heldout"]["mean"] <= high
    assert found["fits"]["train"]["line"]["reason"] == "the points share their regular models"
    assert found["fits"]["train"]["power_law"]["reason"] == "needs 4 points, there are 3"


def test_a_sweep_that_is_killed_goes_on_to_the_same(
    swept: Swept, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "again"
    for kind, call in ((RegularStep, 5), (StarStep, 6)):  # in heldout 1 and star 3
        with monkeypatch.context() as patch:
            at_call(patch, kind, call, kill)
            with pytest.raises(Killed):
                sweep(settings_of(data), "sources", SOURCES, folder, seeds=2)
        assert not (folder / "sweep.json").exists()
    (folder / "processes" / "killed-7-0").mkdir(parents=True)  # its seat, without a lock file yet
    assert sweep(settings_of(data), "sources", SOURCES, folder, seeds=2) == swept[1]
    assert_same(folder, swept[0])
    assert not (folder / "processes").exists()


def test_more_values_and_more_stars_are_added_and_nothing_is_done_twice(
    swept: Swept, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "grown"
    steps = [around_calls(monkeypatch, kind, lambda call, _, *given: call(*given)) for kind in (RegularStep, StarStep)]
    settings = settings_of(data, sources__number=7)  # what is swept is no setting of the sweep
    sweep(settings, "sources", [4], folder)
    before = contents(folder / "points")
    assert [len(one) for one in steps] == [2 * (4 + 2), 2]
    found = sweep(settings, "sources", [1], folder, seeds=2)
    assert [(point["value"], point["seeds"]) for point in found["points"]] == [(1, [0, 1]), (4, [0])]
    assert [len(one) for one in steps] == [2 * (4 + 2), 6]
    assert before.items() <= contents(folder / "points").items()
    sweep(settings, "sources", SOURCES, folder, seeds=2)
    assert [len(one) for one in steps] == [2 * (4 + 2), 12]
    assert_same(folder, swept[0])
    at = {path: path.stat().st_mtime_ns for path in (folder / "points").rglob("*") if path.is_file()}
    sweep(settings, "sources", [2], folder)
    assert at == {path: path.stat().st_mtime_ns for path in (folder / "points").rglob("*") if path.is_file()}
    assert_same(folder, swept[0])


def test_more_heldouts_are_measured_at_all_points(data: Path, tmp_path: Path) -> None:
    sweep(unmatched(data), "mu", [0, 1], tmp_path / "sweep")
    found = sweep(unmatched(data, sources__heldout=3), "mu", [0], tmp_path / "sweep")
    assert [point["train"]["star_heldout"]["n"] for point in found["points"]] == [3, 3]


def test_a_star_that_does_not_change_is_trained_once(data: Path, tmp_path: Path) -> None:
    found = sweep(unmatched(data), "evaluation.points", [3, 5], tmp_path)
    places = [tmp_path / point["folders"][0] for point in found["points"]]
    for name in ("star.safetensors", "permutations.safetensors"):
        assert the_same_file(*(place / name for place in places))
    barriers = [point["train"]["star_heldout"]["mean"] for point in found["points"]]
    assert barriers[0] <= barriers[1]  # the finer grid contains the coarser


def test_where_there_are_no_links_models_are_copied(
    swept: Swept, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*paths: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_link)
    there = points_of(settings_of(data), "sources", SOURCES, swept[0], 1)
    (new,) = points_of(settings_of(data), "sources", [3], tmp_path, 1)
    take_over(new, there, SILENT)
    for index in range(3):
        own, other = (point.run.model("source", index) for point in (new, there[-1]))
        assert own.read_bytes() == other.read_bytes()
        assert not the_same_file(own, other)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sources", "1,2", "train.lr=0.2"], "holds another sweep (train.lr was 0.1, now 0.2); choose another folder"),
        (["sources", "1,2", "sources.heldout=1"], "holds another sweep (sources.heldout was 2, now 1)"),
        (["t", "uniform,beta"], "holds another sweep (kind was 'sources', now 't')"),
    ],
)
def test_a_folder_of_another_sweep_is_refused_by_name(
    swept: Swept, data: Path, arguments: list[str], said: str
) -> None:
    options = [f"{key}={json.dumps(value)}" for key, value in {**OPTIONS, "dataset.directory": str(data)}.items()]
    before = contents(swept[0])
    assert said in refused("sweep", *arguments[:2], "--dataset", "digits", *options, *arguments[2:], "--out", swept[0])
    assert contents(swept[0]) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sources", "1,0"], "sources.number=0: input should be greater than or equal to 1"),
        (["source", "1,2"], "unknown key source: did you mean sources?"),
        (["width", "4,wide"], "model.width='wide' of mlp must be a whole number"),
        (["width", "4,4"], "width: 4 is given twice"),
        (["width", ""], "no values: write some joined by commas"),
        (["width", "[4"], "write values joined by commas, such as 2,5,10"),
        (["depth", "1,2", "--arch", "resnet8"], "unknown architecture 'resnet1'"),
        (["mu", "0,1", "--seeds", "0"], "--seeds 0: give the number of stars of each point, 1 or more"),
        (["mu", "0,1,1.0"], "mu: 1.0 is another spelling of a value before it; leave one out"),
        (["star.seed", "0,1", "--seeds", "2"], "the sweep is one of star.seed itself; leave --seeds out"),
        (["sources", "1,2", "--heldout", "0"], "a barrier between regular models needs two of them"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    out = tmp_path / "sweep"
    assert said in refused("sweep", *arguments[:2], "--dataset", "digits", *arguments[2:], "--out", out, "--quiet")
    assert not out.exists()


def test_folders_that_hold_something_else_are_refused(swept: Swept, data: Path, tmp_path: Path) -> None:
    run = swept[0] / "points" / "sources=1"
    with pytest.raises(FastarError, match=r"holds config\.yaml but no sweep\.yaml: no sweep; choose another"):
        sweep(settings_of(data), "sources", [1], run)
    (tmp_path / "file").write_text("")
    with pytest.raises(FastarError, match="cannot be used as the folder of a sweep"):
        sweep(settings_of(data), "sources", [1], tmp_path / "file")
    damaged = Path(shutil.copytree(swept[0], tmp_path / "damaged"))
    (damaged / "sweep.yaml").write_text("kind: [")
    with pytest.raises(FastarError, match="damaged; restore it"):
        sweep(settings_of(data), "sources", [1], damaged)


def test_two_of_other_values_at_once_are_refused(data: Path, tmp_path: Path) -> None:
    with Processes(tmp_path).joined(), pytest.raises(FastarError, match="in use by another fastar"):
        sweep(unmatched(data), "sources", [1], tmp_path)


def test_two_of_the_same_values_share_it_before_a_point_is_begun(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as begun:
        begun.setattr("fastar.experiments.sweeps.whole_sweep._trained", lambda *_: kill())
        with pytest.raises(Killed):
            sweep(unmatched(data), "sources", [1], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]
    with Processes(tmp_path).joined():
        with pytest.raises(FastarError, match="holds another sweep"):
            sweep(unmatched(data, train__epochs=2), "sources", [1], tmp_path)
        sweep(unmatched(data), "sources", [1], tmp_path)
    assert (tmp_path / "sweep.json").is_file()


def test_values_are_read_as_settings_are() -> None:
    assert read_values("1,2.5,1e-3,uniform,true,null,[1, 2]") == [1, 2.5, 0.001, "uniform", True, None, [1, 2]]


def test_depth_is_a_setting_or_in_the_name(data: Path, tmp_path: Path) -> None:
    def overrides(settings: Settings, values: Sequence[int]) -> list[dict[str, Any]]:
        return [point.overrides for point in points_of(settings, "depth", values, tmp_path, 1)]

    assert overrides(settings_of(data), [1, 2]) == [{"model.depth": 1}, {"model.depth": 2}]
    wide = load_settings(file=Path("cifar10-wrn22"))
    assert overrides(wide, [28, 40]) == [{"model.arch": "wrn28"}, {"model.arch": "wrn40"}]


def test_the_plan_counts_what_is_shared_once(data: Path, tmp_path: Path) -> None:
    settings = unmatched(data)

    def planned(kind: str, values: list[Any], seeds: int = 1) -> dict[str, Any]:
        return plan_sweep(settings, kind, values, tmp_path / "sweep", 1000.0, seeds=seeds)

    plan = planned("sources", [2, 5, 3], 2)
    assert (plan["point"], plan["trainings"]) == ("sources=5", {"regular": 5 + 2, "star": 6})
    assert planned("width", [4, 8])["trainings"] == {"regular": 2 * 4, "star": 2}
    assert planned("t", ["uniform", "constant"], 3)["trainings"] == {"regular": 4, "star": 6}
    assert trainings(points_of(settings, "sources", [2, 10**9], tmp_path, 1)) == (10**9 + 2, 2)  # not one by one
    assert planned("evaluation.points", [3, 11])["trainings"] == {"regular": 4, "star": 1}
    small = ["matching.method=none", "device=cpu", "--heldout", 2, "--images-per-second", 1000]
    outcome = fastar("sweep", "sources", "2,5", "--dataset", "digits", *small, "--plan", "--out", tmp_path / "sweep")
    assert outcome.out.endswith("this is sources=5; the sweep trains 7 sources and heldouts and 2 stars in all\n")
    assert not (tmp_path / "sweep").exists()


def test_a_users_task_is_swept_from_the_command_line(tmp_path: Path) -> None:
    """A loss that is no cross-entropy, no heldouts; the same command again does nothing but show it."""
    cases = Path(__file__).with_name("task_cases.py")
    task = ["--model", f"{cases}:Net", "--data", f"{cases}:tensors_twice", "--loss", f"{cases}:weighted"]
    small = [
        "train.epochs=1",
        "train.batch_size=16",
        "evaluation.points=3",
        "matching.method=none",
        "logging.tensorboard=false",
        "device=cpu",
    ]
    command = ["sweep", "width", "4,6", *task, *small, "--sources", 3, "--heldout", 0, "--out", tmp_path / "sweep"]
    outcome = fastar(*command, "--quiet")
    assert outcome.code == 0, outcome
    assert "sweep of width, train set" in outcome.out
    assert "line of star to heldouts over regular to regular: none (needs 3 points, there are 0)" in outcome.out
    with Image.open(tmp_path / "sweep" / "sweep.png") as picture:
        assert picture.width > 1000
    at = contents(tmp_path / "sweep" / "points")
    assert json.loads(fastar(*command, "--json").out) == kept(tmp_path / "sweep")
    assert contents(tmp_path / "sweep" / "points") == at


def test_tables_and_pictures_of_fits(swept: Swept, tmp_path: Path) -> None:
    """The line and the law that are in the file are said and drawn, whatever the points are."""
    found = json.loads(json.dumps(swept[1]))
    assert sweep_table(found).row_count == 3
    line = {"slope": 0.3125, "intercept": -0.0625, "r2": 0.875, "slope_interval": [0.25, 0.5], "reason": None}
    law = {
        "a": 0.5,
        "b": 0.25,
        "c": 0.125,
        "r2": 1.0,
        "b_interval": [0.125, 1],
        "c_interval": [0, 0.25],
        "reason": None,
    }
    found["fits"]["train"] = {"line": line, "power_law": law}
    assert sweep_lines(found) == [
        "line: star to heldouts = 0.312 x regular to regular - 0.062, R2 0.88, slope 95 % in [0.250, 0.500]",
        "power law: star to heldouts = 0.500 n^-0.25 + 0.125, b 95 % in [0.125, 1.000], c 95 % in [0.000, 0.250]",
    ]
    sweep_picture(found, tmp_path / "fits.png")
    sweep_picture(swept[1], tmp_path / "none.png")
    widths = []
    for name in ("fits", "none"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            widths.append(picture.width)
    assert widths[1] == 1.5 * widths[0]  # two panels, three
