"""The loss between networks of a finished run: `fastar plane`, `fastar curve`, `fastar graph`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_cases import fastar, refused
from matplotlib.figure import Figure
from run_cases import SMALL
from scipy.integrate import trapezoid
from task_cases import build, recipe, tensors, weighted

import fastar as api
from fastar.config import load_settings
from fastar.errors import FastarError
from fastar.evaluation.paths import barrier
from fastar.experiments import train_star
from fastar.experiments.files.verify_files import recheck
from fastar.experiments.finished_run import FinishedRun, finished_run
from fastar.experiments.landscape.barrier_graph import barrier_graph
from fastar.experiments.landscape.connecting_curves import _bezier, _chain, connecting_curves
from fastar.experiments.landscape.loss_plane import loss_plane
from fastar.report.landscape.plane_picture import loss_levels
from fastar.runs import RunFolder


@pytest.fixture(scope="module", params=["mlp", "resnet8"])
def run(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A small finished run without batch-norm and with it."""
    options = ["sources.heldout=2", "dataset.limit=150", "evaluation.test_limit=60"]
    options += ["checkpoint.minutes=0", "checkpoint.seconds=10"]
    options += ["model.width=0.25", "dataset.limit=100", "train.epochs=1"] if request.param == "resnet8" else []
    options += ["star.epochs=2", f"dataset.directory={data}"]
    settings = load_settings(dataset="digits", arch=request.param, overrides=[*SMALL, *options])
    folder = tmp_path_factory.mktemp("plane") / "run"
    train_star(settings, folder)
    return finished_run(RunFolder(folder))


ONE_NETWORK = pytest.mark.parametrize("run", ["mlp"], indirect=True)
"""Of tests that are as good without batch-norm."""


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


@ONE_NETWORK
def test_one_split_alone_can_be_measured(run: FinishedRun) -> None:
    found = loss_plane(run, ["mean", "source:0", "star"], points=2, split="test")
    assert list(found["splits"]) == ["test"]
    assert np.shape(found["splits"]["test"]["accuracy"]) == (2, 2)
    assert set(found["networks"][0]) == {"name", "x", "y", "test"}


@ONE_NETWORK
def test_the_command_writes_a_picture(run: FinishedRun) -> None:
    folder = run.session.run.path
    done = fastar("plane", folder, "heldout:1", "star", "source:1", "--points", "3", "--quiet")
    assert done.code == 0, done.err
    found = json.loads((folder / "plane.json").read_text())
    assert [one["name"] for one in found["networks"]] == ["heldout:1", "star", "source:1"]
    assert (folder / "plane.png").read_bytes().startswith(b"\x89PNG")
    assert "test loss on the grid: " in done.out


@ONE_NETWORK
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


def test_curves_end_in_the_networks(run: FinishedRun) -> None:
    """Each curve has the networks' own losses at its ends; the star's own in the middle, where it passes it."""
    found, own = connecting_curves(run, epochs=1), own_losses(run)
    assert list(found["curves"]) == ["straight", "star", "chain", "bezier"]
    assert found["t"] == [0, 0.25, 0.5, 0.75, 1]
    for of in found["curves"].values():
        for split in ("train", "test"):
            loss = of[split]["loss"]
            assert loss[0] == pytest.approx(own[split]["heldout:0"], rel=1e-4)
            assert loss[-1] == pytest.approx(own[split]["heldout:1"], rel=1e-4)
            assert of[split]["largest_loss"] == max(loss)
            assert of[split]["mean_loss"] == pytest.approx(trapezoid(loss, found["t"]))
    assert found["curves"]["star"]["train"]["loss"][2] == pytest.approx(own["train"]["star"], rel=1e-5)


@ONE_NETWORK
def test_bends_are_used_again(run: FinishedRun) -> None:
    found = connecting_curves(run, epochs=2)
    bends = [run.session.run.path / one for one in found["bends"].values()]
    before = [one.read_bytes() for one in bends]
    times = [one.stat().st_mtime_ns for one in bends]
    assert connecting_curves(run, epochs=2) == found
    assert [one.stat().st_mtime_ns for one in bends] == times
    for one in bends:
        one.unlink()
    assert connecting_curves(run, epochs=2) == found
    assert [one.read_bytes() for one in bends] == before
    connecting_curves(run, epochs=1)
    assert [one.read_bytes() for one in bends] != before
    assert recheck(bends[0]).damaged == []


def test_a_curve_with_its_bend_half_way_is_the_straight_one() -> None:
    a, b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    c = torch.randn(50, generator=torch.Generator().manual_seed(1))
    for t in (0.0, 0.3, 0.5, 0.8, 1.0):
        assert torch.allclose(_bezier((a, b), (a + b) / 2, t), torch.lerp(a, b, t), atol=1e-6)
        assert torch.allclose(_chain((a, b), (a + b) / 2, t), torch.lerp(a, b, t), atol=1e-6)
        assert torch.allclose(_bezier((a, b), c, t), (1 - t) ** 2 * a + 2 * t * (1 - t) * c + t**2 * b, atol=1e-6)
    assert torch.equal(_chain((a, b), c, 0.5), c)


@ONE_NETWORK
def test_the_curve_command_leaves_the_star_out_where_it_is_an_end(run: FinishedRun) -> None:
    folder = run.session.run.path
    done = fastar("curve", folder, "star", "source:1", "--epochs", "1", "--quiet")
    assert done.code == 0, done.err
    assert list(json.loads((folder / "curve.json").read_text())["curves"]) == ["straight", "chain", "bezier"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "star_source-1_bezier.safetensors" in done.out


@ONE_NETWORK
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["star", "star"], "a curve joins two networks, not star star: name two"),
        (["star"], "a curve joins two networks, not star: name two"),
        (["star", "heldout:7"], "heldout:7: no network of"),
        (["--epochs", "0"], "epochs=0: give at least 1"),
    ],
)
def test_bad_curves_are_one_line(run: FinishedRun, arguments: list[str], said: str) -> None:
    assert said in refused("curve", run.session.run.path, *arguments, "--quiet")


def test_a_graph_has_the_run_s_own_barriers(run: FinishedRun) -> None:
    found, results = barrier_graph(run), run.session.run.read_results()
    names = found["names"]
    assert names == ["source:0", "source:1", "heldout:0", "heldout:1", "star", "mean"]
    for split in ("train", "test"):
        of, own = found["splits"][split], own_losses(run)[split]
        barriers = of["barrier"]
        assert [row[i] for i, row in enumerate(barriers)] == [None] * 6
        assert barriers == [list(column) for column in zip(*barriers, strict=True)]
        assert {name: of["loss"][names.index(name)] for name in own} == pytest.approx(own, rel=1e-4)
        for path in results["paths"]:
            if path["kind"] != "regular_regular_unmatched":
                first, second = (names.index(path[key].replace(" ", ":")) for key in ("first", "second"))
                loss = path[f"{split}_loss"]
                assert barriers[first][second] == pytest.approx(barrier(path["t"], loss), abs=1e-5)
                assert of["largest_loss"][first][second] == pytest.approx(max(loss), rel=1e-4)
        assert found["hubs"]["star"][split]["heldouts"]["barrier"]["mean"] == pytest.approx(
            results[split]["star_heldout"]["mean"], abs=1e-5
        )
    json.dumps(found, allow_nan=False)


@ONE_NETWORK
def test_hubs_and_shares_are_those_of_the_matrix(run: FinishedRun) -> None:
    found = barrier_graph(run)
    names, train = found["names"], found["splits"]["train"]
    matrix = np.array([[0 if value is None else value for value in row] for row in train["barrier"]])
    medoid, best = (found["hubs"][hub]["network"] for hub in ("medoid", "best source"))
    assert medoid == names[int(matrix[:4, :4].sum(1).argmin())]
    assert best == names[int(np.argmin(train["loss"][:2]))]
    assert found["hubs"]["mean"]["train"]["sources"]["barrier"]["max"] == max(matrix[5, :2])
    assert found["hubs"]["best source"]["train"]["sources"]["largest_loss"]["n"] == 1
    below = found["below"]["train"]
    pairs, most = matrix[:4, :4][np.triu_indices(4, 1)], matrix[:4, :4].max(1)
    for eps, regular, star, stars in zip(below["eps"], below["regular"], below["star"], below["stars"], strict=True):
        assert regular == pytest.approx((pairs < eps).mean())
        assert star == (matrix[4, :4] < eps).mean()
        assert stars == (most < eps).mean()


@ONE_NETWORK
def test_a_star_of_one_is_a_run_like_any_other_and_trained_once(run: FinishedRun) -> None:
    folder = run.session.run.path
    done = fastar("graph", folder, "--models", "1", "--star-of-one", "--quiet")
    assert done.code == 0, done.err
    assert "1 of 2 sources and 1 of 2 heldouts (--models)" in done.out
    found = json.loads((folder / "graph.json").read_text())
    assert len(found["names"]) == 4
    assert (folder / "graph.png").read_bytes().startswith(b"\x89PNG")
    one = json.loads((folder / "star-of-one" / "results.json").read_text())
    assert one["sources"] == 1
    assert found["hubs"]["star of one"]["train"]["loss"] == pytest.approx(one["train"]["star_loss"], rel=1e-4)
    assert found["hubs"]["star of one"]["train"]["heldouts"]["barrier"]["n"] == 1
    before = (folder / "star-of-one" / "star.safetensors").stat().st_mtime_ns
    assert fastar("graph", folder, "--models", "1", "--star-of-one", "--json").code == 0
    assert (folder / "star-of-one" / "star.safetensors").stat().st_mtime_ns == before
    assert recheck(folder / "star-of-one").damaged == []
    assert recheck(folder).damaged == []


def test_a_run_without_heldouts(whole: Path) -> None:
    found = barrier_graph(finished_run(RunFolder(whole)))
    assert found["names"] == ["source:0", "source:1", "star", "mean"]
    assert found["hubs"]["star"]["train"]["heldouts"]["barrier"]["n"] == 0
    assert fastar("graph", whole, "--quiet", "--models", "1").code == 0
    assert "has no heldouts" in refused("graph", whole, "--star-of-one", "--quiet")
    assert "models=0: give at least 1" in refused("graph", whole, "--models", "0", "--quiet")
    assert "it has star, mean, source:0 .. source:1" in refused("plane", whole, "--quiet")


def test_a_run_of_a_network_data_and_loss_of_its_own(tmp_path: Path) -> None:
    """From Python, in float64 by default, with a loss that is no cross-entropy and no metric, and no test data."""
    task: dict[str, Any] = {"loss": weighted, "metrics": [], "out": tmp_path / "run", "progress": False}
    sources = api.train_sources(build, tensors(), recipe(), number=2, **task)
    api.train_sources(build, tensors(), recipe(), number=2, kind="heldout", **task)
    api.train_star(build, sources, tensors(), recipe(), **task)
    run = api.load_run(tmp_path / "run", build, tensors(), loss=weighted)
    found = run.plane("mean", "star", "heldout:1", points=3), run.curve(epochs=1), run.graph(star_of_one=True)
    bends = [one.read_bytes() for one in sorted((tmp_path / "run" / "curves").iterdir())]
    torch.set_default_dtype(torch.float64)
    try:
        again = run.plane("mean", "star", "heldout:1", points=3), run.curve(epochs=1), run.graph(star_of_one=True)
        for one in (tmp_path / "run" / "curves").iterdir():
            one.unlink()
        run.curve(epochs=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert bends == [one.read_bytes() for one in sorted((tmp_path / "run" / "curves").iterdir())]
    for one, other in zip(found, again, strict=True):
        assert one.results == other.results
        assert str(one) == str(other)
        assert one.plot(Figure().subplots()).get_title() != "" or isinstance(one, api.Curve)
    assert list(found[0].results["splits"]) == ["train"]
    assert list(found[0].results["splits"]["train"]) == ["loss"]
    with pytest.raises(FastarError, match=r"given from Python.*fastar\.load_run"):
        api.load_run(tmp_path / "run").plane()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(data: Path, tmp_path: Path) -> None:
    """Bends are the same whether they were just trained or lay in their files."""
    options = [one for one in SMALL if one != "device=cpu"]
    options += ["sources.heldout=2", "dataset.limit=150", "evaluation.test_limit=60", f"dataset.directory={data}"]
    options += ["train.precision=bf16", "train.graph=true", "device=cuda", "checkpoint.minutes=0"]
    train_star(load_settings(dataset="digits", overrides=options), tmp_path / "run")
    run = finished_run(RunFolder(tmp_path / "run"))
    found = connecting_curves(run, epochs=2)
    assert connecting_curves(run, epochs=2)["curves"] == found["curves"]
    own = own_losses(run)["train"]
    for one in loss_plane(run, points=3)["networks"]:
        assert one["train"]["loss"] == pytest.approx(own[one["name"]], rel=1e-4)
    assert barrier_graph(run)["hubs"]["star"]["train"]["loss"] == pytest.approx(own["star"], rel=1e-4)
