"""A run that was cut off and started again gives the same bits as one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import Killed, at_call, kill
from safetensors.torch import load_file

from fastar.config import Settings, load_settings
from fastar.experiments import train_star
from fastar.training import RegularStep, StarStep

SOURCES = ["sources/seed-0000.safetensors", "sources/seed-0001.safetensors"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return load_settings(
        dataset="digits",
        overrides=[
            f"dataset.directory={tmp_path_factory.mktemp('data')}",
            "dataset.limit=300",
            "train.epochs=3",
            "sources.number=2",
            "sources.heldout=1",
            "evaluation.points=3",
            "device=cpu",
            "workers=1",
        ],
    )


@pytest.fixture(scope="module")
def whole(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train_star(settings, folder), folder


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("kind", "step", "there"),
    [
        (RegularStep, 11, SOURCES[:1]),  # of six for each model
        (StarStep, 3, SOURCES),
        (StarStep, 6, SOURCES),
        (RegularStep, 17, ["permutations.safetensors", *SOURCES, "star.safetensors"]),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    settings: Settings,
    whole: tuple[dict[str, Any], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type,
    step: int,
    there: list[str],
) -> None:
    wanted, folder = whole
    with monkeypatch.context() as patch:
        at_call(patch, kind, step, kill)
        with pytest.raises(Killed):
            train_star(settings, tmp_path / "run")
    assert sorted(tensors(tmp_path / "run")) == there
    stamps = {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in there}

    results = train_star(settings, tmp_path / "run")
    for name, stamp in stamps.items():  # what was finished was not made again
        assert (tmp_path / "run" / name).stat().st_mtime_ns == stamp
    found, expected = tensors(tmp_path / "run"), tensors(folder)
    assert found.keys() == expected.keys()
    assert "star.safetensors" in found
    for file, state in expected.items():
        assert found[file].keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(found[file][name], value), (file, name)
    for split in ("train", "test"):
        assert results[split] == wanted[split]
    assert results["paths"] == wanted["paths"]


def test_another_seed_gives_other_models(
    settings: Settings, whole: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    train_star(settings.model_copy(update={"seed": 1}), tmp_path / "run")
    found, expected = tensors(tmp_path / "run"), tensors(whole[1])
    weights = "hidden.0.weight"
    models = [file for file in expected if weights in expected[file]]
    assert len(models) == 4
    every = [states[file][weights] for states in (found, expected) for file in models]
    for i, one in enumerate(every):
        assert not any(torch.equal(one, other) for other in every[:i])
