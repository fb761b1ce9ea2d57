"""`fastar distances`: distances, cosines and norms of a run's models, without and with permutation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import fastar, refused, tiny
from task_cases import Net, build, recipe, tensors
from torch import nn

import fastar as api
from fastar.errors import FastarError
from fastar.experiments import finished_run as module
from fastar.report.distances_table import ROWS
from fastar.runs.model_files import load_checkpoint
from fastar.runtime.json_files import read_object, unsealed

QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of digits, not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    assert fastar("train-star", *tiny(folder / "data", sources=3, heldout=2), "--out", folder / "run").code == 0
    return folder / "run"


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def found_in(run: Path) -> dict[str, Any]:
    outcome = fastar("distances", run, "--json")
    assert outcome.code == 0, outcome
    assert outcome.err == ""
    return dict(json.loads(outcome.out))


def test_the_squared_distance_is_that_of_norms_and_inner_product(copied: Path) -> None:
    found = found_in(copied)
    assert unsealed(read_object(copied / "distances.json")) == (found, True)
    for pair in found["pairs"]:
        for one in (pair, *pair["layers"].values()):
            first, second = one["norms"]
            for way in ("unmatched", "matched"):
                squared = first**2 + second**2 - 2 * one[way]["inner_product"]
                assert one[way]["distance"] ** 2 == pytest.approx(squared, abs=1e-9 * (first**2 + second**2))
                if one[way]["cosine"] is not None:
                    assert one[way]["cosine"] == pytest.approx(one[way]["inner_product"] / (first * second))
        for way in ("unmatched", "matched"):
            parts = [layer[way]["distance"] ** 2 for layer in pair["layers"].values()]
            assert pair[way]["distance"] ** 2 == pytest.approx(sum(parts))
        assert pair["matched"]["distance"] <= pair["unmatched"]["distance"] * (1 + 1e-9)


def test_every_pair_is_listed_and_figures_are_those_of_the_files(copied: Path) -> None:
    found = found_in(copied)
    pairs = [(pair["kind"], pair["first"], pair["second"]) for pair in found["pairs"]]
    assert len(set(pairs)) == len(pairs)
    assert [found[kind]["matched"]["distance"]["n"] for kind, _ in ROWS] == [10, 2, 3, 1, 2, 3]
    star, source = (
        load_checkpoint(copied / name).state for name in ("star.safetensors", "sources/seed-0001.safetensors")
    )
    pair = found["pairs"][pairs.index(("star_source", "star", "source 1"))]
    assert set(pair["layers"]) == set(star)  # a network without buffers
    for name, layer in pair["layers"].items():
        by_hand = float((star[name].double() - source[name].double()).norm())
        assert layer["unmatched"]["distance"] == pytest.approx(by_hand)
    norm = torch.cat([value.flatten().double() for value in star.values()]).norm()
    assert found["norms"]["star"] == pytest.approx(float(norm))
    table = fastar("distances", copied).out
    for word in ("star to heldouts", "mean of sources to sources", "norm, star", f"{norm:.2f}", "distances.json"):
        assert word in table
    assert max(map(len, table.splitlines()[:20])) <= 80


def test_kept_permutations_are_taken_and_others_are_found_anew(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matched: list[int] = []
    real = module.match_to

    def counted(session: Any, first: Any, others: Any, **more: Any) -> Any:
        matched.append(len(others))
        return real(session, first, others, **more)

    monkeypatch.setattr(module, "match_to", counted)
    found = found_in(copied)
    assert sum(matched) == 1 + 2 + 3, "only to the mean"
    (copied / "matchings.safetensors").unlink()
    again = found_in(copied)
    assert sum(matched) > 2 * (1 + 2 + 3)
    for one, other in zip(found["pairs"], again["pairs"], strict=True):
        assert one["matched"]["distance"] == pytest.approx(other["matched"]["distance"])


def test_a_permuted_copy_is_at_no_distance_once_matched(tmp_path: Path) -> None:
    """A user's own network, whose run is opened in Python."""
    torch.manual_seed(0)
    first, moved = Net(), Net()
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    with torch.no_grad():
        moved.hidden.weight.copy_(first.hidden.weight[order])
        moved.hidden.bias.copy_(first.hidden.bias[order])
        moved.out.weight.copy_(first.out.weight[:, order])
        moved.out.bias.copy_(first.out.bias)
    networks: list[nn.Module] = [first, moved]
    api.train_star(build, networks, tensors(), recipe(), out=tmp_path / "run", **QUIET)
    found = api.load_run(tmp_path / "run", build, tensors()).distances()
    (pair,) = (pair for pair in found["pairs"] if pair["kind"] == "regular_regular")
    assert pair["matched"]["distance"] == 0
    assert pair["matched"]["cosine"] == pytest.approx(1)
    assert pair["unmatched"]["distance"] > 0.1
    assert (tmp_path / "run" / "distances.json").is_file()
    with pytest.raises(FastarError, match=r"its python:data was given from Python.*fastar\.load_run"):
        api.load_run(tmp_path / "run").distances()
    assert "given from Python" in refused("distances", tmp_path / "run")


def test_a_run_of_named_parts_needs_nothing_more(copied: Path) -> None:
    assert api.load_run(copied).distances() == found_in(copied)


def test_damage_is_seen(copied: Path) -> None:
    found_in(copied)
    assert fastar("verify", copied).code == 0
    file = copied / "distances.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    outcome = fastar("verify", copied)
    assert (outcome.code, "distances.json: damaged" in outcome.out) == (1, True)


def test_bad_folders_are_one_line(copied: Path, tmp_path: Path) -> None:
    assert "is no run folder" in refused("distances", tmp_path / "none")
    (copied / "sources" / "seed-0001.safetensors").unlink()
    assert "seed-0001" in refused("distances", copied)
    (copied / "star.safetensors").unlink()
    assert "its star is not trained yet" in refused("distances", copied)
