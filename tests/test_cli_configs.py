"""`fastar configs` and `--scale`: what ships, with the paper's figures, and smaller versions that run."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import yaml
from cli_cases import fastar, refused

from fastar.config import load_settings
from fastar.config.recipes import names
from fastar.report.recipe_list import catalogue, catalogue_table


def test_the_list_has_every_configuration_and_the_papers_figures() -> None:
    outcome = fastar("configs")
    assert outcome.code == 0, outcome
    for name in names():
        assert name in outcome.out
    row = next(line for line in outcome.out.splitlines() if " cifar10-vgg11 " in line)
    assert "table 1" in row
    assert "0.515 ±0.034" in row
    assert "0.131 ±0.005" in row
    records = [json.loads(line) for line in fastar("configs", "--json").out.splitlines()]
    assert sorted(record["config"] for record in records) == names()
    vit = next(record for record in records if record["config"] == "mnist-vit")
    assert vit["paper"]["regular_regular"] == [5.687, 1.167]
    assert vit["settings"]["train"]["optimizer"] == "adamw"


def test_a_terminal_without_plus_minus_gets_ascii() -> None:
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as out, contextlib.redirect_stdout(out):
        assert "+/-" in next(iter(catalogue_table(catalogue("full")).columns[3].cells))


def test_one_configuration_as_settings() -> None:
    text = fastar("configs", "cifar10-vgg11", "--scale", "small").out
    assert yaml.safe_load(text) == load_settings(file=Path("cifar10-vgg11"), scale="small").model_dump(mode="json")
    assert json.loads(fastar("configs", "digits-mlp", "--json").out)["model"]["width"] == 8


def test_unknown_ones_are_refused() -> None:
    assert "did you mean cifar10-vgg1" in refused("configs", "cifar10-vgg")
    assert "did you mean cifar10-densenet40" in refused("train-star", "--config", "cifar10-densnet40")
    for command in (("train-star",), ("train-sources",), ("plan",)):
        assert "choose smoke, small or full" in refused(*command, "--dataset", "digits", "--scale", "tiny")
    assert "choose smoke, small or full" in refused("configs", "--scale", "tiny")


def test_a_run_is_called_after_its_configuration_and_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--quiet", f"dataset.directory={tmp_path / 'data'}", "device=cpu", "workers=1")
    monkeypatch.chdir(tmp_path)
    outcome = fastar("train-sources", "--config", "digits-mlp", "--scale", "smoke", *options)
    assert outcome.code == 0, outcome
    run = tmp_path / "runs" / "digits-mlp-smoke-seed0"
    assert len(list((run / "sources").glob("*.safetensors"))) == 2
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["epochs"] == 1
