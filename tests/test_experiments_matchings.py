"""The permutations that barriers were measured with: kept by a run, and enough to measure the same barriers again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import fastar, refused, tiny
from safetensors.torch import load_file

from fastar.runs import read_metadata, stored_digest
from fastar.runs.model_files import load_checkpoint, save_checkpoint

OPTIONS = {"mlp": ["--arch", "mlp"], "resnet8": ["--arch", "resnet8", "model.width=0.25", "train.epochs=1"]}


def command(folder: Path, arch: str) -> list[object]:
    return ["train-star", *tiny(folder / "data", sources=2, heldout=1), *OPTIONS[arch], "--out", folder / "run"]


@pytest.fixture(scope="module", params=sorted(OPTIONS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    outcome = fastar(*command(folder, request.param))
    assert outcome.code == 0, outcome.err
    return folder / "run"


def file_of(run: Path, name: str) -> Path:
    kind, _, number = name.partition(" ")
    folder = {"source": "sources", "heldout": "heldout"}.get(kind)
    return run / "star.safetensors" if folder is None else run / folder / f"seed-{int(number):04d}.safetensors"


def again(run: Path, first: str, seconds: list[str], *options: object) -> list[dict[str, Any]]:
    points = len(json.loads((run / "results.json").read_text())["t"])
    files = [file_of(run, name) for name in (first, *seconds)]
    where = ("--points", points, "--json", f"dataset.directory={run.parent / 'data'}", "device=cpu")
    outcome = fastar("barrier", *files, *where, "--permutations", run / "matchings.safetensors", *options)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out)["paths"]


def test_every_matched_path_is_measured_again_bit_by_bit(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    reported = [path for path in results["paths"] if path["kind"] != "regular_regular_unmatched"]
    assert len(reported) == 2 + 1 + 3
    for first in {path["first"] for path in reported}:
        paths = [path for path in reported if path["first"] == first]
        for path, found in zip(paths, again(run, first, [path["second"] for path in paths]), strict=True):
            for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
                assert found[name] == path[name], (first, path["second"], name)


def test_results_name_the_file_by_its_digest(run: Path) -> None:
    named = json.loads((run / "results.json").read_text())["matchings"]
    assert named == {"file": "matchings.safetensors", "digest": stored_digest(run / "matchings.safetensors", own=True)}
    pairs = read_metadata(run / "matchings.safetensors", own=True)["pairs"]
    assert len({tuple(pair) for pair in pairs}) == len(pairs) == 6
    stored = load_file(run / "matchings.safetensors").values()
    assert {(len(index), index.dtype) for index in stored} == {(6, torch.int32)}


def test_permutations_are_bound_to_their_models(run: Path, tmp_path: Path) -> None:
    star, heldout, file = file_of(run, "star"), file_of(run, "heldout 0"), run / "matchings.safetensors"
    where = ("--permutations", file, "--quiet", f"dataset.directory={run.parent / 'data'}", "device=cpu")
    assert "the other way round: swap the two" in refused("barrier", heldout, star, *where)
    changed = load_checkpoint(heldout)
    name = next(name for name in changed.state if name.endswith("weight"))
    save_checkpoint(tmp_path / "b.safetensors", {**changed.state, name: changed.state[name] * 2}, changed.metadata)
    said = refused("barrier", star, tmp_path / "b.safetensors", *where)
    assert said == (
        f"{file}: holds no permutations of {tmp_path / 'b.safetensors'} to {star}, as these files are now; leave out "
        "--permutations to match them"
    )
    assert "--permutations and --no-match" in refused("barrier", star, heldout, *where, "--no-match")
    given = ("barrier", star, heldout, "--permutations", run / "permutations.safetensors")
    assert "holds no matchings; give the matchings.safetensors of a run" in refused(*given)


@pytest.mark.parametrize("how", ["gone", "others"])
def test_a_run_without_them_is_checked_and_measured_again(run: Path, tmp_path: Path, how: str) -> None:
    if "mlp" not in str(run):
        pytest.skip("one network is enough")
    copy = shutil.copytree(run.parent, tmp_path / "mlp")
    file, before = copy / "run" / "matchings.safetensors", (run / "results.json").read_bytes()
    assert fastar("verify", copy / "run").code == 0
    stored = load_checkpoint(file)
    if how == "gone":
        file.unlink()
    else:
        save_checkpoint(file, {name: index.flip(0) for name, index in stored.state.items()}, stored.metadata)
    verified = fastar("verify", copy / "run")
    assert verified.code == 1
    assert ("missing, and results.json is of it" if how == "gone" else "is not what results.json was") in verified.out
    if how == "gone":
        assert fastar(*command(copy, "mlp")).code == 0
        assert load_file(file).keys() == stored.state.keys()
        assert json.loads((copy / "run" / "results.json").read_text())["paths"] == json.loads(before)["paths"]
