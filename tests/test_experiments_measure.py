"""Which paths of a run are measured, on how many images, and how well batch-norm statistics are known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import fastar, refused, tiny
from run_cases import assert_same_models
from torch import Tensor
from torch.nn import functional as F

from fastar.config import load_settings
from fastar.evaluation import evaluate_rows
from fastar.experiments import train_star
from fastar.experiments.measure import choose, choose_pairs, endpoint, regular_pairs
from fastar.experiments.session import new_session
from fastar.experiments.shared_measuring import SharedMeasuring
from fastar.report.results import statistics_lines
from fastar.runs import RunFolder
from fastar.runs.model_files import Checkpoint
from fastar.runtime.seeds import derive_seed


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of a tiny network with batch-norm, measured on everything."""
    folder = tmp_path_factory.mktemp("run")
    outcome = fastar("train-star", *small(folder))
    assert outcome.code == 0, outcome.err
    assert "batch-norm:" not in outcome.out
    return folder


def small(folder: Path) -> list[object]:
    common = [argument for argument in tiny(folder / "data", sources=3) if argument != "--quiet"]
    return [*common, "--quiet", "--arch", "resnet8", "model.width=0.25", "train.epochs=1", "--out", folder / "run"]


def results(folder: Path) -> dict:
    return json.loads((folder / "run" / "results.json").read_text())


def test_less_can_be_measured_of_a_finished_run(run: Path) -> None:
    whole = results(run)
    assert whole["batch_norm_error"] is None
    assert [path["second"] for path in whole["paths"] if path["kind"] == "star_source"] == [
        "source 0",
        "source 1",
        "source 2",
    ]
    star = (run / "run" / "star.safetensors").read_bytes()
    outcome = fastar("train-star", *small(run), "--bn-batches", 1, "evaluation.star_sources=2", "evaluation.limit=100")
    assert outcome.code == 0, outcome.err
    assert (run / "run" / "star.safetensors").read_bytes() == star
    part = results(run)
    named = [path["second"] for path in part["paths"] if path["kind"] == "star_source"]
    assert len(set(named)) == 2
    assert named == sorted(named)
    error = part["batch_norm_error"]
    assert (error["batches"], error["against"]) == (1, 6)  # eight times as many are more than there are
    # One batch of 50 of 300 images is not the whole: statistics, and so losses, differ, but not wildly.
    assert 0 < abs(error["error"]) < 1
    assert statistics_lines(part)[0] in outcome.out
    same = next(path for path in whole["paths"] if path["kind"] == "star_heldout")
    other = next(path for path in part["paths"] if path["kind"] == "star_heldout")
    assert same["second"] == other["second"]
    assert same["test_loss"] != other["test_loss"]
    assert all(abs(a * 100 - round(a * 100)) < 1e-9 for a in other["train_accuracy"])  # hundredths: of 100 images


def test_barrier_says_how_well_statistics_are_known(run: Path) -> None:
    models = sorted((run / "run" / "sources").iterdir())
    where = f"dataset.directory={run / 'data'}"
    outcome = fastar("barrier", *models[:2], "--bn-batches", 2, "--points", 3, "--json", where)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["batch_norm_error"]
    assert (found["batches"], found["against"]) == (2, 6)
    shown = fastar("barrier", *models[:2], "--bn-batches", 2, "--points", 3, "--quiet", where)
    assert statistics_lines(json.loads(outcome.out))[0] in shown.out
    for count, known in ((5, True), (6, False), (100, False)):  # 300 images in batches of 50: six are all
        outcome = fastar("barrier", *models[:2], "--bn-batches", count, "--points", 2, "--json", where)
        assert (json.loads(outcome.out)["batch_norm_error"] is not None) == known
    assert "bn_batches" in refused("barrier", *models[:2], "--bn-batches", 0, where)


def test_barrier_finds_what_the_run_found(run: Path, tmp_path: Path) -> None:
    """Though its batches are not those of the recipe that ships: statistics are taken in the model's own."""
    copy = shutil.copytree(run, tmp_path / "copy")
    assert fastar("train-star", *small(copy)).code == 0  # measured as trained, whatever was asked for meanwhile
    wanted = next(path for path in results(copy)["paths"] if path["kind"] == "star_heldout")
    star, heldout = copy / "run" / "star.safetensors", copy / "run" / "heldout" / "seed-0000.safetensors"
    where = ("--points", 3, "--json", f"dataset.directory={run / 'data'}")
    (found,) = json.loads(fastar("barrier", star, heldout, *where).out)["paths"]
    (other,) = json.loads(fastar("barrier", star, heldout, *where, "train.batch_size=299").out)["paths"]
    for split in ("train", "test"):
        # The same batches and sums; matching may end in another order of equal units, which fp32 sums show.
        assert found[f"{split}_loss"] == pytest.approx(wanted[f"{split}_loss"], rel=1e-5)
        assert other[f"{split}_loss"] != pytest.approx(wanted[f"{split}_loss"], rel=1e-4)


def test_memory_that_runs_out_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = F.cross_entropy

    def full(logits: Tensor, targets: Tensor, **how: Any) -> Tensor:
        if len(targets) > 2:  # more than the samples that a run is tried with
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a capacity of 4")
        return taken(logits, targets, **how)

    monkeypatch.setattr(F, "cross_entropy", full)
    (run / "run" / "results.json").unlink()
    said = "measuring barriers: out of memory (CUDA out of memory); lower evaluation.batch_size"
    assert refused("train-star", *small(run)).startswith(said)
    models = sorted((run / "run" / "sources").iterdir())
    assert refused("barrier", *models[:2], "--quiet", f"dataset.directory={run / 'data'}").startswith(said)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ends_are_of_float32_whatever_their_file_holds(dtype: torch.dtype, tmp_path: Path) -> None:
    """The reference's way takes an end's own statistics, which layers in float32 cannot take in another precision."""
    settings = load_settings(
        dataset="digits",
        arch="resnet8",
        overrides=["model.width=0.25", "device=cpu", "evaluation.batch_norm=reference"],
    )
    session = new_session(settings, RunFolder(tmp_path))
    state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in session.network.build(seed=0).state_dict().items()
    }
    end = endpoint(session, "x", Checkpoint(state))
    assert end.row_on(session.device).dtype == torch.float32
    assert end.statistics is not None
    assert len(end.statistics) == 2 * 9
    assert {value.dtype for value in end.statistics.values()} == {torch.float32}
    images, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
    measured = evaluate_rows(
        session.network.build(seed=1),
        session.network.layout,
        end.row_on(session.device)[None],
        {"a": lambda: [(images, labels)]},
        statistics=[end.statistics],
        method="reference",
    )
    with torch.no_grad():
        wanted = F.cross_entropy(session.network.build(seed=0).eval()(images), labels)
    # What rounding the weights to the file's precision changes.
    assert float(measured["a"].loss[0]) == pytest.approx(float(wanted), rel=1e-2)


def test_chosen_models_are_some_of_all_in_order() -> None:
    assert choose(5, None, 0) == choose(5, 5, 0) == choose(5, 9, 0) == [0, 1, 2, 3, 4]
    drawn = {tuple(choose(30, 3, seed)) for seed in range(20)}
    assert all(len(set(three)) == 3 and list(three) == sorted(three) for three in drawn)
    assert len(drawn) > 15  # 4,060 are possible
    assert choose(30, 3, 7) == choose(30, 3, 7)


def test_pairs_are_drawn_or_of_sources_with_heldouts() -> None:
    def pairs(wanted: object, sources: int = 4, heldouts: int = 3) -> list[tuple[int, int]]:
        settings = load_settings(dataset="digits", values={"evaluation.regular_pairs": wanted, "seed": 5})
        return regular_pairs(settings, sources, heldouts)

    assert pairs(6) == choose_pairs(7, 6, derive_seed(5, "pairs"))  # as ever
    assert pairs("cross") == [(source, heldout) for source in range(4) for heldout in (4, 5, 6)]
    found = pairs("cross:3x2")
    sources, heldouts = ({pair[end] for pair in found} for end in (0, 1))
    assert found == [(source, heldout) for source in sorted(sources) for heldout in sorted(heldouts)]
    assert (len(sources), len(heldouts)) == (3, 2)
    assert sources < set(range(4))
    assert heldouts < {4, 5, 6}
    assert pairs("cross:30x2", 40, 2) != pairs("cross:30x2", 41, 2)[:60]  # drawn, not the first
    assert pairs("cross:9x9") == pairs("cross")


def test_pairs_of_a_run_are_of_sources_at_t_0_with_heldouts(tmp_path: Path) -> None:
    own = {**dict.fromkeys(("train.epochs", "model.depth"), 1), "dataset.limit": 200, "evaluation.points": 3}
    own |= {"sources.number": 3, "sources.heldout": 2, "evaluation.regular_pairs": "cross:3x1"}
    settings = load_settings(dataset="digits", values={**own, "dataset.directory": str(tmp_path), "device": "cpu"})
    found = train_star(settings, tmp_path / "run")
    pairs = [(path["first"], path["second"]) for path in found["paths"] if path["kind"] == "regular_regular"]
    (heldout,) = {second for _, second in pairs}
    assert pairs == [(f"source {index}", heldout) for index in range(3)]
    assert heldout in ("heldout 0", "heldout 1")
    assert found["train"]["regular_regular"]["n"] == found["train"]["regular_regular_unmatched"]["n"] == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("regular_pairs=0", "evaluation.regular_pairs=0: give a number of pairs from 1 on, cross, or cross:SOURCESx"),
        ("regular_pairs=true", "evaluation.regular_pairs=True: give a number of pairs"),
        ("regular_pairs=2.5", "evaluation.regular_pairs=2.5: give a number of pairs"),
        ("regular_pairs=cross:5", "evaluation.regular_pairs='cross:5': give a number of pairs"),
        ("regular_pairs=cross:0x2", "evaluation.regular_pairs='cross:0x2': give a number of pairs"),
    ],
)
def test_other_pairs_are_refused(given: str, said: str) -> None:
    assert said in refused("train-star", "--dataset", "digits", f"evaluation.{given}")


def test_pairs_with_heldouts_need_some(tmp_path: Path) -> None:
    said = refused("train-star", "--dataset", "digits", "--heldout", 0, "evaluation.regular_pairs=cross")
    assert "evaluation.regular_pairs=cross pairs sources with heldouts, and there are no heldouts; give some" in said
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{dataset: {name: digits}, model: {arch: mlp}, evaluation: {regular_pairs: cross}}")
    assert load_settings(file=recipe).evaluation.cross == (None, None)
    assert load_settings(file=recipe, scale="smoke").evaluation.regular_pairs == 1  # cut, as numbers are


@pytest.mark.parametrize(("processes", "parts"), [(1, [30]), (3, [4] * 7 + [2]), (40, [1] * 30)])
def test_points_are_shared_with_processes_that_come_later(tmp_path: Path, processes: int, parts: list[int]) -> None:
    settings = load_settings(dataset="digits", overrides=["device=cpu"])
    measured = list[range]()

    def measure(part: range) -> list[dict[str, dict[str, float]]]:
        measured.append(part)
        return [{"train": {"loss": number / 7}} for number in part]

    run = RunFolder(tmp_path / "run")
    with run.open(settings):
        share = SharedMeasuring(new_session(settings, run), "digest", processes)
        found = share(30, 30, measure)
        assert share(30, 30, measure) == found
    assert [len(part) for part in measured] == (parts if processes > 1 else parts * 2)  # files are there for all
    assert found == [{"train": {"loss": number / 7}} for number in range(30)]


def test_a_star_is_measured_by_other_processes(tmp_path: Path, data: Path, options: list[str], whole: Path) -> None:
    run = tmp_path / "run"
    command = ["train-star", *options, "--out", run, "--measured-by"]
    assert fastar(*command, 0).out == f"star: {run}/star.safetensors\n"
    assert json.loads(fastar(*command, 0, "--json").out) == {"star": f"{run}/star.safetensors"}
    assert not (run / "results.json").exists()
    assert fastar(*command, 2).code == 0
    assert_same_models(run, whole)
    results = [json.loads((folder / "results.json").read_text())["paths"] for folder in (run, whole)]
    assert results[0] == results[1]
    assert fastar(*command, 0).out == fastar(*command, 2).out  # all is there: it is shown
