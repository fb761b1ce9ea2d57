"""`fastar match` and `fastar barrier` on checkpoints, whoever saved them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from cli_cases import contents, fastar, refused, tiny
from safetensors.torch import load_file

from fastar.models import build_model
from fastar.runs.model_files import load_checkpoint

PLACE = "device=cpu"


@pytest.fixture(scope="module")
def pair(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two trained sources, in a folder with an equals sign and a space."""
    folder = tmp_path_factory.mktemp("runs") / "lr=0.1 ü"
    assert fastar("train-sources", *tiny(data, heldout=0), "--out", folder).code == 0
    return folder / "sources/seed-0000.safetensors", folder / "sources/seed-0001.safetensors"


def logits(path: Path) -> torch.Tensor:
    checkpoint = load_checkpoint(path)
    model = build_model("mlp", input_shape=(1, 8, 8), classes=10, seed=0, **checkpoint.metadata["model"])
    model.load_state_dict(checkpoint.state)
    with torch.no_grad():
        return model.eval()(torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


def test_match_writes_the_same_function_nearer_to_a(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    out = tmp_path / "new folder" / "b.safetensors"
    before = a.read_bytes(), b.read_bytes()
    outcome = fastar("match", a, b, "--out", out, PLACE)
    assert outcome.code == 0, outcome
    assert f"written:    {out}" in outcome.out
    assert (a.read_bytes(), b.read_bytes()) == before
    # A permutation reorders sums of fp32 numbers: equal to rounding.
    torch.testing.assert_close(logits(out), logits(b), rtol=1e-5, atol=1e-5)
    assert not torch.equal(load_file(out)["classifier.weight"], load_file(b)["classifier.weight"])
    found = json.loads(fastar("match", a, b, "--json", PLACE).out)
    assert found["objective"] > found["objective_start"]
    assert found["distance"] < found["distance_start"]
    distance = math.sqrt(
        sum(float((load_file(a)[k].double() - v.double()).square().sum()) for k, v in load_file(out).items())
    )
    assert found["distance"] == pytest.approx(distance, rel=1e-5)
    assert load_checkpoint(out).metadata["matched_to"] == a.name


def test_match_of_a_model_with_itself_moves_nothing(pair: tuple[Path, Path]) -> None:
    found = json.loads(fastar("match", pair[0], pair[0], "--json", PLACE).out)
    assert (found["moved"], found["distance"], found["distance_start"]) == (0, 0.0, 0.0)
    assert sum(found["groups"].values()) == found["units"] == 2 * load_checkpoint(pair[0]).metadata["model"]["width"]


def test_match_of_other_peoples_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name, path in zip("ab", pair, strict=True):
        torch.save({f"module.{k}": v for k, v in load_file(path).items()}, tmp_path / f"{name}.pt")
    theirs = (tmp_path / "a.pt", tmp_path / "b.pt")
    assert "give --dataset" in refused("match", *theirs, PLACE)
    assert "give --arch" in refused("match", *theirs, "--dataset", "digits", PLACE)
    options = ("--dataset", "digits", "--arch", "mlp", "--json", PLACE)
    width = f"model.width={load_checkpoint(pair[0]).metadata['model']['width']}"
    outcome = fastar("match", *theirs, *options, width)
    found, expected = json.loads(outcome.out), json.loads(fastar("match", *pair, "--json", PLACE).out)
    assert found.pop("file") == str(theirs[1])
    assert expected.pop("file") == str(pair[1])
    assert found == expected
    assert "of shape" in refused("match", *theirs, *options, "model.width=3")
    assert "lacks parameter 'conv1.weight'" in refused(
        "match", *theirs, "--dataset", "digits", "--arch", "resnet8", PLACE
    )


def test_match_of_several_writes_into_a_folder(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    torch.save(load_file(a), tmp_path / "c.pt")
    outcome = fastar("match", a, b, tmp_path / "c.pt", "--out", tmp_path / "matched", "matching.perturbations=2", PLACE)
    assert outcome.code == 0, outcome
    assert "matching files" in outcome.err  # progress, since there are several
    assert sorted(p.name for p in (tmp_path / "matched").iterdir()) == ["c.safetensors", b.name]
    torch.testing.assert_close(logits(tmp_path / "matched" / b.name), logits(b), rtol=1e-5, atol=1e-5)
    lines = fastar("match", a, b, tmp_path / "c.pt", "--json", PLACE).out.splitlines()
    alone = json.loads(fastar("match", a, b, "--json", PLACE).out)
    assert json.loads(lines[0]) == alone
    assert json.loads(lines[1])["moved"] == 0  # A itself
    assert "are written into a folder" in refused("match", a, b, b, "--out", tmp_path / "x.safetensors", PLACE)
    assert "several checkpoints would be written" in refused("match", a, b, b, "--out", tmp_path / "y", PLACE)
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--out", "b.pt"], ".safetensors"),
        (["matching.restart=2"], "did you mean matching.restarts?"),
        (["--dataset", "cifar10"], "does not fit"),
        (["--arch", "resnet8"], "arch is 'mlp' there"),
        (["--dataset", "nothing"], "unknown dataset 'nothing'"),
    ],
)
def test_match_refuses(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert part in refused("match", *pair, *arguments)
    assert contents(tmp_path) == {}


def barriers(data: Path, *arguments: object) -> list[dict]:
    outcome = fastar("barrier", *arguments, "--json", PLACE, f"dataset.directory={data}")
    assert outcome.code == 0, outcome
    found = json.loads(outcome.out)
    assert found["t"] == found["paths"][0]["t"]
    return found["paths"]


def test_barrier_of_a_model_with_itself_is_zero(pair: tuple[Path, Path], data: Path) -> None:
    (path,) = barriers(data, pair[0], pair[0])
    assert (path["train_barrier"], path["test_barrier"]) == (0.0, 0.0)
    assert len(path["t"]) == 11


def test_barrier_matched_unmatched_and_of_the_matched_file(pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    a, b = pair
    out = tmp_path / "b.safetensors"
    assert fastar("match", a, b, "--out", out, PLACE).code == 0
    matched, same = barriers(data, a, b, out)
    plain, again = barriers(data, a, b, out, "--no-match")
    assert (matched["second"], same["second"]) == (str(b), str(out))
    assert matched["train_loss"] != plain["train_loss"]
    # Summation order is all that differs between matching here and having matched before.
    assert again["train_loss"] == pytest.approx(matched["train_loss"], rel=1e-4)
    assert plain["train_loss"][-1] == pytest.approx(matched["train_loss"][-1], rel=1e-5)
    for path in (matched, plain):
        line = [(1 - t) * path["train_loss"][0] + t * path["train_loss"][-1] for t in path["t"]]
        gap = max(loss - straight for loss, straight in zip(path["train_loss"], line, strict=True))
        assert path["train_barrier"] == pytest.approx(gap, abs=1e-12)


def test_barrier_ends_are_the_losses_that_training_recorded(pair: tuple[Path, Path], data: Path) -> None:
    (path,) = barriers(data, *pair, "--points", "2")
    assert path["t"] == [0.0, 1.0]
    for end, file in ((0, pair[0]), (-1, pair[1])):
        for split in ("train", "test"):  # dataset.limit is taken from the checkpoint, else train would differ
            assert path[f"{split}_loss"][end] == pytest.approx(
                load_checkpoint(file).metadata[f"{split}_loss"], rel=1e-5
            )


def test_barrier_table_and_picture(pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    outcome = fastar(
        "barrier", *pair, "-q", "--picture", picture, "evaluation.points=3", f"dataset.directory={data}", PLACE
    )
    assert outcome.code == 0, outcome
    assert "Barriers from" in outcome.out
    assert f"picture: {picture}" in outcome.out
    assert outcome.err == ""
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--points", "1"], "evaluation.points=1"),
        (["--picture", "p.pdf"], "p.pdf"),
        (["evaluaton.points=3"], "evaluaton"),
        (["runs/lr=1/none.safetensors"], "runs/lr=1/none.safetensors: no such checkpoint"),
        (["letter.txt"], "letter.txt: not a checkpoint"),
        (["--dataset", "nothing"], "unknown dataset"),
    ],
)
def test_barrier_refuses(
    pair: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert part in refused("barrier", *pair, *arguments, f"dataset.directory={data}")
    assert contents(tmp_path) == {}


def test_barrier_needs_a_second_model(pair: tuple[Path, Path]) -> None:
    assert "second checkpoint" in refused("barrier", pair[0], "evaluation.points=3")
