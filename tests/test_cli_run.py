"""`fastar train-star` and what it writes: the exact results.json, reuse, growth, and refusal of other runs."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from cli_cases import contents, fastar, refused, tiny
from safetensors import safe_open

from fastar.errors import FastarError
from fastar.runs import RunFolder
from fastar.runs.model_files import load_checkpoint

SPREAD = {"mean", "std", "min", "max", "n"}
SHORT = {"mean", "std", "n"}
KINDS = {"regular_regular", "star_heldout", "star_source", "regular_regular_unmatched"}
BESIDE = {"largest_loss", "accuracy_barrier"}
SPLIT = {"regular_loss", "star_loss", *KINDS, *BESIDE}
PATH = {"kind", "first", "second", "t", "train_loss", "train_accuracy", "test_loss", "test_accuracy"}
TOP = {
    "matchings",
    *("dataset", "arch", "sources", "heldout", "t", "train", "test", "accuracy", "paths", "seconds", "versions"),
    *("device", "seed", "measured", "batch_norm_error", "speed", "peak_bytes"),
}


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed, in a folder with an awkward name."""
    folder = tmp_path_factory.mktemp("runs") / "a run=ü" / "digits"
    outcome = fastar("train-star", *tiny(data), "--out", folder)
    assert outcome.code == 0, outcome
    assert outcome.err == ""  # --quiet
    assert f"picture: {folder / 'barrier.png'}" in outcome.out
    assert "barrier, star to heldouts" in outcome.out
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def results_of(folder: Path) -> dict[str, Any]:
    return RunFolder(folder).read_results()


def models(folder: Path) -> dict[str, bytes]:
    """Models and the star's permutations; the others' belong to the results."""
    tensors = {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}
    return {name: data for name, data in tensors.items() if name != "matchings.safetensors"}


@pytest.mark.quick
def test_run_folder_holds_what_it_says(run: Path) -> None:
    assert set(contents(run)) == {
        *("barrier.png", "config.yaml", "log.jsonl", "results.json"),
        *("star.safetensors", "permutations.safetensors", "matchings.safetensors"),
        *("heldout/seed-0000.safetensors", "sources/seed-0000.safetensors", "sources/seed-0001.safetensors"),
        *(
            f"tensorboard/{model}/events.out.tfevents.0000000000"
            for model in ("source-0000", "source-0001", "heldout-0000", "star-0000")
        ),
    }


def test_log_has_a_line_per_epoch_per_model(run: Path) -> None:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(e["model"], e["epoch"]) for e in entries] == [
        (model, epoch) for model in ("source 0", "source 1", "star", "heldout 0") for epoch in (0, 1)
    ]
    assert all(e["images"] == 300 for e in entries)


@pytest.mark.parametrize("name", ["sources/seed-0001", "heldout/seed-0000", "star"])
def test_models_say_what_they_are(run: Path, name: str) -> None:
    with safe_open(run / f"{name}.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["fastar"])
    kind = {"sources": "source", "heldout": "heldout", "star": "star"}[name.split("/")[0]]
    assert metadata["kind"] == kind
    assert metadata["arch"] == "mlp"
    assert {"width", "depth"} <= set(metadata["model"])
    assert len(metadata["dataset_digest"]) == 64
    assert metadata["dataset"] == "digits"
    assert metadata["seed"] == 0
    assert metadata["epochs"] == 2
    assert {"training_loss", "train_loss", "test_loss", "version", "commit"} <= set(metadata)


def test_results_have_exactly_the_agreed_names(run: Path) -> None:
    results = results_of(run)
    assert set(results) == TOP
    assert (results["dataset"], results["arch"], results["seed"], results["device"]) == ("digits", "mlp", 0, "cpu")
    assert (results["sources"], results["heldout"]) == (2, 1)
    assert results["t"] == [0.0, 0.5, 1.0]
    for split in ("train", "test"):
        assert set(results[split]) == SPLIT
        assert set(results[split]["regular_loss"]) == SHORT
        assert isinstance(results[split]["star_loss"], float)
        for kind in KINDS:
            assert set(results[split][kind]) == SPREAD
            of_kind = [path for path in results["paths"] if path["kind"] == kind]
            assert results[split]["largest_loss"][kind]["max"] == max(max(path[f"{split}_loss"]) for path in of_kind)
            assert results[split]["accuracy_barrier"][kind]["max"] <= 0
            assert set(results[split]["accuracy_barrier"][kind]) == SPREAD
        assert set(results["accuracy"][split]) == {"regular", "star"}
        assert set(results["accuracy"][split]["regular"]) == SHORT
        assert 0.1 < results["accuracy"][split]["star"] <= 1
    assert set(results["seconds"]) == {"regular_epoch", "star_epoch", "matching_per_epoch", "evaluation"}
    assert all(value > 0 for value in results["seconds"].values())
    assert {"fastar", "commit", "torch", "ffcv"} <= set(results["versions"])
    for kind, more in (("regular", set()), ("star", {"matching"})):
        parts = results["speed"][kind]["shares"]
        assert {"load", "forward", "backward", "update", "other"} | more <= set(parts)
        assert sum(parts.values()) == pytest.approx(1)
        assert all(share > 0 for share in parts.values())
        assert results["speed"][kind]["images_per_second"] > 0
    assert results["peak_bytes"] > 50e6  # torch alone takes more


def test_profile_of_a_run(data: Path, tmp_path: Path) -> None:
    tight = fastar("train-star", *tiny(data), "--out", tmp_path / "run", "--profile", 1000)
    assert tight.code == 2
    assert "profile=1000: this training (" in tight.err
    assert not (tmp_path / "run").exists()
    done = fastar("train-star", *tiny(data), "--out", tmp_path / "run", "--profile", 2)
    assert done.code == 0, done.err
    folder = tmp_path / "run" / "profile"
    assert {path.name for path in folder.iterdir()} == {"parts.txt", "operations.txt", "trace.json"}
    parts = (folder / "parts.txt").read_text()
    assert {"matching", "load", "forward", "backward", "update"} <= {line.split()[0] for line in parts.splitlines()}
    assert parts in done.out
    assert "aten::addmm" in (folder / "operations.txt").read_text()
    names = [event.get("name") for event in json.loads((folder / "trace.json").read_text())["traceEvents"]]
    assert names.count("update") == 2  # as many steps as were asked for
    late = fastar("train-star", *tiny(data), "--out", tmp_path / "run", "--profile", 2)
    assert (late.code, late.err.count("is trained already")) == (2, 1)


@pytest.mark.quick
def test_paths_are_complete(run: Path) -> None:
    results = results_of(run)
    for path in results["paths"]:
        assert set(path) == PATH
        assert all(len(path[key]) == 3 for key in PATH - {"kind", "first", "second"})
        assert path["t"] == results["t"]
    ends = {}
    for path in results["paths"]:
        ends.setdefault(path["kind"], []).append((path["first"], path["second"]))
    pairs = [("source 0", "source 1"), ("source 0", "heldout 0"), ("source 1", "heldout 0")]
    assert ends == {
        "star_heldout": [("star", "heldout 0")],
        "star_source": [("star", "source 0"), ("star", "source 1")],
        "regular_regular": pairs,
        "regular_regular_unmatched": pairs,
    }


def barrier(path: dict[str, Any], split: str) -> float:
    losses = path[f"{split}_loss"]
    return max(loss - (1 - t) * losses[0] - t * losses[-1] for t, loss in zip(path["t"], losses, strict=True))


@pytest.mark.quick
@pytest.mark.parametrize("split", ["train", "test"])
def test_barriers_and_losses_follow_from_the_paths(run: Path, split: str) -> None:
    """Unrounded: to 1e-12, which is rounding in double precision and no more."""
    results = results_of(run)
    for kind in ("star_heldout", "star_source", "regular_regular", "regular_regular_unmatched"):
        values = [barrier(path, split) for path in results["paths"] if path["kind"] == kind]
        found = results[split][kind]
        std = stdev(values) if len(values) > 1 else None
        wanted = {"mean": fmean(values), "std": std, "min": min(values), "max": max(values), "n": len(values)}
        assert found == pytest.approx(wanted, abs=1e-12)
    star = [path for path in results["paths"] if path["kind"].startswith("star")]
    assert results[split]["star_loss"] == star[0][f"{split}_loss"][0]
    ends = [path[f"{split}_loss"][-1] for path in star]
    assert results[split]["regular_loss"] == pytest.approx({"mean": fmean(ends), "std": stdev(ends), "n": 3}, abs=1e-12)
    accuracies = [path[f"{split}_accuracy"][-1] for path in star]
    assert results["accuracy"][split]["regular"]["mean"] == pytest.approx(fmean(accuracies), abs=1e-12)
    # Matching changes no function: the ends of matched and unmatched paths agree to fp32 rounding.
    for matched, plain in zip(
        [p for p in results["paths"] if p["kind"] == "regular_regular"],
        [p for p in results["paths"] if p["kind"] == "regular_regular_unmatched"],
        strict=True,
    ):
        assert matched[f"{split}_loss"][-1] == pytest.approx(plain[f"{split}_loss"][-1], rel=1e-5)
        assert matched[f"{split}_loss"][1] != plain[f"{split}_loss"][1]


def test_json_is_the_file_and_nothing_else(copied: Path, data: Path) -> None:
    arguments = [argument for argument in tiny(data) if argument != "--quiet"]
    outcome = fastar("train-star", *arguments, "--out", copied, "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out) == results_of(copied)
    assert outcome.out.count("\n") == 1


def test_a_second_run_trains_nothing_and_finds_the_same(copied: Path, data: Path) -> None:
    before, times = models(copied), {p: os.stat(copied / p).st_mtime_ns for p in models(copied)}
    log, old = (copied / "log.jsonl").read_bytes(), results_of(copied)
    assert fastar("train-star", *tiny(data), "--out", copied).code == 0
    assert models(copied) == before
    assert {p: os.stat(copied / p).st_mtime_ns for p in before} == times
    assert (copied / "log.jsonl").read_bytes() == log
    assert results_of(copied) == old  # seconds too: nothing was measured again


def test_a_finished_run_says_so_and_shows_its_results(copied: Path, data: Path) -> None:
    before = contents(copied)
    arguments = [argument for argument in tiny(data) if argument != "--quiet"]
    # How and where may differ, as long as nothing would be measured otherwise.
    outcome = fastar("train-star", *arguments, "--out", copied, "checkpoint.minutes=3", "workers=2")
    assert outcome.code == 0
    assert f"{copied}: finished already; these are its results" in outcome.err
    assert "barrier, star to heldouts" in outcome.out
    after = contents(copied)
    assert {name for name in before if after.get(name) != before[name]} <= {"config.yaml"}
    assert after.keys() == before.keys()
    assert "finished already" not in fastar("train-star", *arguments, "--out", copied, "evaluation.match=false").err


def test_a_finished_run_needs_neither_data_nor_memory_nor_tensors(copied: Path, data: Path, tmp_path: Path) -> None:
    """Nothing but digests is read, so that damaged tensors are not noticed, and the picture stays as it is."""
    for model in copied.rglob("*.safetensors"):
        whole = model.read_bytes()
        model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(FastarError, match="damaged"):
            load_checkpoint(model)
    (copied / "barrier.png").write_bytes(b"as it is")
    before = contents(copied)
    options = [*tiny(data), f"dataset.directory={tmp_path / 'gone'}", f"dataset.root={tmp_path / 'gone'}"]
    outcome = fastar("train-star", *options, "--out", copied)
    assert outcome.code == 0, outcome
    assert "barrier, star to heldouts" in outcome.out
    assert contents(copied) == before
    (copied / "barrier.png").unlink()
    assert fastar("train-star", *options, "--out", copied).code == 0
    assert contents(copied).keys() == before.keys()


@pytest.mark.parametrize("gone", ["results.json", "permutations.safetensors", "heldout/seed-0000.safetensors"])
def test_a_run_that_lacks_something_is_not_finished(
    copied: Path, data: Path, monkeypatch: pytest.MonkeyPatch, gone: str
) -> None:
    """It needs memory again, and there is none."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    assert fastar("train-star", *tiny(data), "--out", copied).code == 0
    (copied / gone).unlink()
    assert refused("train-star", *tiny(data), "--out", copied).startswith("this run does not fit: host: ")


def test_damaged_results_are_measured_again(copied: Path, data: Path) -> None:
    before = results_of(copied)
    (copied / "results.json").write_text("{")
    assert fastar("train-star", *tiny(data), "--out", copied).code == 0
    assert results_of(copied)["paths"] == before["paths"]


def test_a_finished_run_of_given_sources(run: Path, data: Path, tmp_path: Path) -> None:
    given = Path(shutil.copytree(run / "sources", tmp_path / "given"))
    options = [*[option for option in tiny(data) if option != "--quiet"], f"sources.folder={given}"]
    out = tmp_path / "run"
    assert "finished already" not in fastar("train-star", *options, "--out", out).err
    before = results_of(out)
    again = fastar("train-star", *options, f"dataset.directory={tmp_path / 'gone'}", "--out", out)
    assert (again.code, "finished already" in again.err) == (0, True)
    assert results_of(out) == before
    first, second = sorted(given.iterdir())
    shutil.copy(second, first)  # other sources than the star's
    assert "sources: 1 of 2 differ, the first is number 0" in refused("train-star", "--quiet", *options, "--out", out)


def test_heldouts_can_be_added(copied: Path, data: Path) -> None:
    before = models(copied)
    assert fastar("train-star", *tiny(data, heldout=2), "--out", copied).code == 0
    after = models(copied)
    assert set(after) - set(before) == {"heldout/seed-0001.safetensors"}
    assert {name: after[name] for name in before} == before
    assert after["heldout/seed-0001.safetensors"] != after["heldout/seed-0000.safetensors"]
    assert results_of(copied)["train"]["star_heldout"]["n"] == 2


def test_other_points_only_measure_again(copied: Path, data: Path) -> None:
    before = models(copied)
    assert fastar("train-star", *tiny(data), "evaluation.points=5", "--out", copied).code == 0
    assert models(copied) == before
    assert results_of(copied)["t"] == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("train.lr=0.2", "train.lr was 0.1, now 0.2"),
        ("model.width=3", "model.width was"),
        ("seed=7", "seed was 0, now 7"),
        ("star.t=beta", "star.t was 'uniform', now 'beta'"),
        ("sources.number=3", "sources.number was 2, now 3"),
    ],
)
def test_another_run_is_refused_and_nothing_is_touched(run: Path, data: Path, change: str, part: str) -> None:
    before = contents(run)
    assert part in refused("train-star", *tiny(data), change, "--out", run)
    assert contents(run) == before


def test_a_missing_source_is_trained_again_to_the_same_bits(copied: Path, data: Path) -> None:
    before = models(copied)
    (copied / "sources" / "seed-0000.safetensors").unlink()
    (copied / "permutations.safetensors").unlink()
    assert fastar("train-star", *tiny(data), "--out", copied).code == 0
    # The star's metadata names versions and commit, which may change under a developer's hands: compare tensors' bytes.
    assert models(copied).keys() == before.keys()
    for name, old in before.items():
        assert models(copied)[name][-1000:] == old[-1000:], name


@pytest.mark.parametrize("name", ["star", "permutations", "sources/seed-0001", "heldout/seed-0000"])
@pytest.mark.parametrize("keep", [0, 500, -7])
def test_truncated_models_are_refused_by_name(copied: Path, data: Path, name: str, keep: int) -> None:
    path = copied / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    before = contents(copied)
    assert f"{path}: not a readable safetensors file" in refused("train-star", *tiny(data), "--out", copied)
    assert {k: v for k, v in contents(copied).items() if k != "config.yaml"} == {
        k: v for k, v in before.items() if k != "config.yaml"
    }


def test_swapped_models_are_refused(copied: Path, data: Path) -> None:
    shutil.copy(copied / "sources" / "seed-0001.safetensors", copied / "sources" / "seed-0000.safetensors")
    assert "index was 1, now 0" in refused("train-star", *tiny(data), "--out", copied)


def test_foreign_permutations_are_refused(copied: Path, data: Path) -> None:
    shutil.copy(copied / "star.safetensors", copied / "permutations.safetensors")
    assert "holds no permutations" in refused("train-star", *tiny(data), "--out", copied)


def test_a_star_of_other_sources_is_refused(copied: Path, data: Path) -> None:
    other = copied.parent / "other"
    assert fastar("train-sources", *tiny(data, seed=1), "--out", other).code == 0
    assert "seed was 1, now 0" in refused(
        "train-star",
        *tiny(data),
        "--out",
        shutil.copytree(other / "sources", copied / "sources", dirs_exist_ok=True).parent,
    )


def test_without_heldouts_or_unmatched(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    outcome = fastar("train-star", *tiny(data, heldout=0), "--out", out, "star.match_every_epochs=0")
    assert outcome.code == 0
    # How the star was trained is one thing, how paths are measured another.
    assert results_of(out)["train"]["regular_regular"]["n"] == 1
    outcome = fastar(
        "train-star", *tiny(data, heldout=0), "--out", out, "star.match_every_epochs=0", "evaluation.match=false"
    )
    assert outcome.code == 0
    assert "star to heldouts" not in outcome.out
    results = results_of(out)
    assert set(results) == TOP
    nothing = {"mean": None, "std": None, "min": None, "max": None, "n": 0}
    for split in ("train", "test"):
        assert set(results[split]) == SPLIT
        assert results[split]["star_heldout"] == nothing
        assert results[split]["regular_regular"] == nothing
        assert results[split]["regular_regular_unmatched"]["n"] == 1
        assert results[split]["regular_regular_unmatched"]["std"] is None
        assert results[split]["regular_loss"]["n"] == 2
    assert fastar("report", out).code == 0


def test_train_sources_then_train_star(run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    outcome = fastar("train-sources", *tiny(data), "--out", out)
    assert outcome.code == 0
    paths = [out / "sources/seed-0000.safetensors", out / "sources/seed-0001.safetensors"]
    assert outcome.out.splitlines() == [str(p) for p in [*paths, out / "heldout/seed-0000.safetensors"]]
    assert not (out / "star.safetensors").exists()
    assert fastar("train-star", *tiny(data), "--out", out).code == 0
    whole, parts = results_of(run), results_of(out)
    assert parts["paths"] == whole["paths"]


def test_log_cut_in_the_middle_does_not_stop_the_run(copied: Path, data: Path) -> None:
    log = copied / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    assert fastar("train-star", *tiny(data, heldout=2), "--out", copied).code == 0
    assert results_of(copied)["seconds"]["star_epoch"] > 0


def test_progress_is_plain_lines_on_stderr(data: Path, tmp_path: Path) -> None:
    arguments = [argument for argument in tiny(data, heldout=0) if argument != "--quiet"]
    outcome = fastar("train-star", *arguments, "--out", tmp_path / "run")
    assert outcome.code == 0
    assert "source models: 2 models in " in outcome.err
    assert "training star: 2 epochs in " in outcome.err
    assert "models in" not in outcome.out
    assert "\x1b" not in outcome.err + outcome.out


def test_report_draws_again_what_is_there(copied: Path) -> None:
    (copied / "barrier.png").unlink()
    outcome = fastar("report", copied)
    assert outcome.code == 0
    assert "barrier, star to sources" in outcome.out
    assert (copied / "barrier.png").read_bytes().startswith(b"\x89PNG")
    (copied / "barrier.png").write_bytes(b"as it is")
    assert json.loads(fastar("report", copied, "--json").out) == results_of(copied)
    assert (copied / "barrier.png").read_bytes() == b"as it is"
    os.utime(copied / "barrier.png", (0, 0))  # older than the results
    assert fastar("report", copied).code == 0
    assert (copied / "barrier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_report_shows_results_where_the_picture_cannot_be_written(copied: Path, options: list[str]) -> None:
    (copied / "barrier.png").unlink()
    (copied / "barrier.png").mkdir()
    outcome = fastar("report", copied, *options)
    assert outcome.code == 2
    assert "barrier.png: cannot be written" in outcome.err
    assert "picture:" not in outcome.out
    if options:
        assert json.loads(outcome.out) == results_of(copied)
    else:
        assert "barrier, star to sources" in outcome.out


@pytest.mark.parametrize("content", [None, "", "{}", "[]", "3", '{"paths": []}'])
def test_report_without_results(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    message = refused("report", tmp_path)
    assert str(tmp_path / "results.json") in message
    assert "train-star" in message or "run its training again" in message
    assert not (tmp_path / "barrier.png").exists()


def test_training_sources_tells_speed_and_memory(data: Path, tmp_path: Path) -> None:
    options = [option for option in tiny(data, sources=1, heldout=1) if option != "--quiet"]
    outcome = fastar("train-sources", *options, "--out", tmp_path / "run")
    assert [Path(line).parent.name for line in outcome.out.splitlines()] == ["sources", "heldout"]  # paths alone
    said = outcome.err.splitlines()[-2:]
    assert re.fullmatch(r"training: [\d,]+ samples/s, (loader|compute)-limited", said[0])
    assert re.fullmatch(r"peak memory: [\d.]+ [MG]B \(cpu\)", said[1])
