"""A run that keeps training images for validation: what it measures, what it says of itself, what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cli_cases import contents, fastar, refused, tiny
from PIL import Image

from fastar.config import load_settings
from fastar.experiments.plan.planning import work_of
from fastar.experiments.session import Session, new_session
from fastar.experiments.statistics_batches import statistics_batches
from fastar.runs import RunFolder, read_metadata

SHARE = ("--validation", 0.2)
KEPT = 287  # of 1,437 images of digits
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    outcome = fastar("train-star", *tiny(data), *SHARE, "--out", folder)
    assert outcome.code == 0, outcome.err
    header = next(line for line in outcome.out.splitlines() if "train" in line and "test" in line)
    assert [word.strip() for word in header.split("┃")[3:6]] == list(SPLITS)
    assert all(len(line.split("│")) == 7 for line in outcome.out.splitlines() if line.startswith("│"))
    return folder


def models(run: Path) -> list[Path]:
    return [*sorted(run.glob("sources/*")), *sorted(run.glob("heldout/*")), run / "star.safetensors"]


def whole_number(value: float) -> bool:
    return abs(value - round(value)) < 1e-9


# What is measured


def test_all_that_is_measured_on_test_is_measured_on_validation(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    assert results["validation"].keys() == results["test"].keys()
    assert results["accuracy"]["validation"].keys() == results["accuracy"]["test"].keys()
    for path in results["paths"]:
        assert len({tuple(path[f"{split}_loss"]) for split in SPLITS}) == 3  # other images, other losses
        assert all(whole_number(KEPT * accuracy) for accuracy in path["validation_accuracy"])  # each counts once
        assert all(whole_number(300 * accuracy) for accuracy in path["train_accuracy"])
    measured = [p for p in results["paths"] if p["kind"] == "star_heldout"]
    losses = measured[0]["validation_loss"]
    assert results["validation"]["star_heldout"]["mean"] == max(losses[1] - (losses[0] + losses[2]) / 2, 0.0)
    assert results["validation"]["star_loss"] == losses[0]


def test_models_say_what_they_were_not_trained_on(run: Path) -> None:
    for path in models(run):
        metadata = read_metadata(path)
        assert metadata["validation"] == metadata["recipe"]["validation"] == 0.2
        assert whole_number(KEPT * metadata["validation_accuracy"])
        assert math.isfinite(metadata["validation_loss"])
    assert yaml.safe_load((run / "config.yaml").read_text())["dataset"]["validation"] == 0.2


def test_barrier_knows_the_split_from_the_model(run: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # a narrower terminal folds the heading
    *_, heldout, star = models(run)
    where = ("device=cpu", f"dataset.directory={data}", "--points", 3)
    (path,) = json.loads(fastar("barrier", star, heldout, "--json", *where).out)["paths"]
    for split in SPLITS:
        losses = path[f"{split}_loss"]
        assert losses[0] == pytest.approx(read_metadata(star)[f"{split}_loss"], rel=1e-5)  # fp32, summed otherwise
        assert losses[2] == pytest.approx(read_metadata(heldout)[f"{split}_loss"], rel=1e-5)
        assert path[f"{split}_barrier"] == pytest.approx(max(losses[1] - (losses[0] + losses[2]) / 2, 0), abs=1e-12)
    shown = fastar("barrier", star, heldout, "--quiet", *where).out
    figures = [f"{path[f'{split}_barrier']:.4f}" for split in SPLITS]
    row = next(line for line in shown.splitlines() if line.startswith("│"))
    assert [cell.strip() for cell in row.split("│")[2:5]] == figures
    assert "validation" in shown


def test_a_report_shows_the_column_again_and_misses_it_where_it_is_damaged(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    assert "validation" in fastar("report", copy).out
    results = RunFolder(copy).read_results()  # without a digest, as older versions wrote them
    del results["validation"]["star_loss"]
    (copy / "results.json").write_text(json.dumps(results))
    assert "not the results of a run" in refused("report", copy)


def settings(data: Path, *overrides: str) -> Any:
    return load_settings(dataset="digits", overrides=[f"dataset.directory={data}", "device=cpu", *overrides])


def session_of(data: Path, *overrides: str) -> Session:
    return new_session(settings(data, *overrides), RunFolder(data / "none"))


def test_statistics_come_from_what_is_trained_on(run: Path, data: Path) -> None:
    one = session_of(data, "dataset.validation=0.2")
    train, kept = one.data.train, one.data.measured_validation
    assert (len(train), len(kept)) == (1437 - KEPT, KEPT)
    shown = torch.cat([images for images, _ in statistics_batches(one)]).flatten(1).unique(dim=0)
    of_train, of_kept = (next(iter(d.sequential(1437)))[0].flatten(1).unique(dim=0) for d in (train, kept))
    assert torch.equal(shown, of_train)
    assert list(one.data.splits()) == list(SPLITS)
    assert torch.equal(torch.cat([x for x, _ in one.data.splits()["validation"]()]).flatten(1).unique(dim=0), of_kept)


def test_seeds_and_limits_share_the_split(run: Path, data: Path) -> None:
    kept = [
        session_of(data, "dataset.validation=0.2", *more).data.measured_validation.index.tolist()  # type: ignore[attr-defined]
        for more in ([], ["seed=7"], ["dataset.limit=300"])
    ]
    assert kept[0] == kept[1] == kept[2]
    some = session_of(data, "dataset.validation=0.2", "evaluation.limit=100").data.measured_validation
    assert torch.bincount(some.labels).tolist() == [10] * 10  # type: ignore[attr-defined]
    assert set(some.index.tolist()) < set(kept[0])  # type: ignore[attr-defined]
    assert len(session_of(data, "dataset.validation=0.2", "evaluation.limit=1000").data.measured_validation) == KEPT


def test_images_of_any_size(tmp_path: Path) -> None:
    """They stream; nothing is written but train.beton and test.beton."""
    for number in range(48):
        path = tmp_path / "raw" / ("train" if number < 40 else "val") / f"c{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 9 + number % 4, 3), 5 * number, np.uint8)).save(path)
    options = [
        *("--dataset", "imagefolder", "--name", "mine", "--arch", "mlp", "--quiet", "--sources", "2", "--heldout", "0"),
        *("--data-root", tmp_path / "raw", "--out", tmp_path / "run", f"dataset.directory={tmp_path / 'betons'}"),
        *("dataset.resolution=8", "model.width=4", "train.epochs=1", "train.batch_size=6", "evaluation.points=2"),
        *("device=cpu", "workers=1", "--validation", "0.25"),
    ]
    assert "more than the 30 train images of mine that validation=0.25 leaves" in refused(
        "train-star", *options, "dataset.limit=31"
    )
    assert not (tmp_path / "betons").exists()  # known by the names of the images
    done = fastar("train-star", *options)
    assert done.code == 0, done.err
    assert all(entry["images"] == 30 for entry in RunFolder(tmp_path / "run").log.read())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert all(whole_number(10 * p) for path in results["paths"] for p in path["validation_accuracy"])
    assert sorted(path.name for path in (tmp_path / "betons" / "mine").glob("*.beton")) == ["test.beton", "train.beton"]
    star = tmp_path / "run" / "star.safetensors"
    (path,) = json.loads(fastar("barrier", star, star, "--json", f"dataset.directory={tmp_path / 'betons'}").out)[
        "paths"
    ]
    assert path["validation_barrier"] == 0


# The plan


def test_a_plan_counts_what_is_kept(run: Path, data: Path) -> None:
    def work(*more: str) -> list[float | None]:
        one = session_of(data, "train.epochs=1", *more)
        counts = one.data.counts()
        assert counts is not None
        return [part["seconds"] for part in work_of(one, counts, 1000, 0)]

    counts = session_of(data, "dataset.validation=0.2").data.counts()
    assert counts is not None
    assert (counts.train, counts.validation, counts.test) == (1437 - KEPT, KEPT, 360)
    whole, split = work(), work("dataset.validation=0.2")
    assert (whole[0], split[0]) == pytest.approx((1.437, 1.437 - KEPT / 1000))
    assert whole[-1] == pytest.approx(split[-1])  # all images are measured
    assert work("dataset.validation=0.2", "evaluation.limit=100")[-1] == pytest.approx(0.1 + 0.1 + 0.36)


def test_planned_data_are_those_that_are_held(run: Path, data: Path) -> None:
    """Bytes, and normalised floats beside them, of each data set that a run loads."""
    for more in ([], ["evaluation.limit=100"]):
        one = session_of(data, "dataset.validation=0.2", *more)
        sets = {
            id(d): d for d in (one.data.train, one.data.test, one.data.measured_train, one.data.measured_validation)
        }.values()
        counts = one.data.counts()
        assert counts is not None
        assert counts.held == sum(len(d) * (64 * 5 + 16) for d in sets)


# What does not go together


def test_a_run_with_another_split_is_another_run(run: Path, data: Path) -> None:
    before = contents(run)
    for share, now in ((["--validation", "0.1"], "0.1"), ([], "0.0")):
        said = refused("train-star", *tiny(data), *share, "--out", run)
        assert f"holds another run (dataset.validation was 0.2, now {now})" in said
    assert contents(run) == before


def test_sources_of_another_split_are_refused(run: Path, data: Path, tmp_path: Path) -> None:
    given = [*tiny(data, heldout=0), f"sources.folder={run / 'sources'}", "--out", tmp_path / "run"]
    for share, now in ((["--validation", "0.25"], "0.25"), ([], "0.0")):
        said = refused("train-star", *given, *share)
        assert said.endswith(f"seed-0000.safetensors: does not fit this run (validation is 0.2 there, {now} here)")
    done = fastar("train-star", *given, *SHARE)
    assert done.code == 0, done.err


def test_models_of_two_splits_have_no_barrier(run: Path, data: Path, tmp_path: Path) -> None:
    other = ["train-sources", *tiny(data, sources=1, heldout=0), "--out", tmp_path / "run"]
    assert fastar(*other).code == 0
    (seen,) = (tmp_path / "run" / "sources").iterdir()
    assert "validation" not in read_metadata(seen)  # as it was before there was such a setting
    where = f"dataset.directory={data}"
    star = run / "star.safetensors"
    for first, second, there, here in ((star, seen, "0.0", "0.2"), (seen, star, "0.2", "0.0")):
        said = refused("barrier", first, second, "--quiet", where)
        assert said == f"{second}: does not fit this run (validation is {there} there, {here} here)"
    # Their average has seen all that either has.
    assert fastar("match-many", star, seen, "--average", tmp_path / "mean.safetensors", "device=cpu").code == 0
    metadata = read_metadata(tmp_path / "mean.safetensors")
    assert "validation" not in metadata
    assert metadata["dataset_digest"] == read_metadata(star)["dataset_digest"]
    average = fastar("match-many", *models(run)[:2], "--average", tmp_path / "same.safetensors", "device=cpu")
    assert average.code == 0
    assert read_metadata(tmp_path / "same.safetensors")["validation"] == 0.2


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("-0.1", "dataset.validation=-0.1: input should be greater than or equal to 0"),
        ("1", "dataset.validation=1: input should be less than 1"),
        ("nan", "dataset.validation=nan"),
        ("1e-4", "validation=0.0001 of the 1437 training samples of digits is not one sample; raise it"),
        ("0.9999", "validation=0.9999 leaves none of the 1437 training samples of digits; lower it"),
        ("0.998", "leaves no training image of class"),
    ],
)
def test_wrong_shares(value: str, said: str, data: Path, tmp_path: Path) -> None:
    value = ".nan" if value == "nan" else value
    options = [option for option in tiny(data) if option != "dataset.limit=300"]
    out = tmp_path / "run"
    assert said in refused("train-star", *options, "train.batch_size=1", f"dataset.validation={value}", "--out", out)
    assert not out.exists()


def test_a_limit_beyond_the_rest_is_refused(run: Path, data: Path, tmp_path: Path) -> None:
    said = refused("train-star", *tiny(data), *SHARE, "dataset.limit=1151", "--out", tmp_path / "run")
    assert said == "limit=1151 is more than the 1150 train images of digits that validation=0.2 leaves; lower it"


def test_help_names_it_where_models_are_trained() -> None:
    for command in ("train-star", "train-sources", "plan"):
        assert "--validation" in fastar(command, "--help").out
