"""Trainings from Python that are stopped by Ctrl-C: what is in training is saved, and the same call goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import Streamed
from run_cases import Heard, assert_same_models, at_call
from task_cases import Dropping, Noisy, recipe, tensors, weighted
from torch.utils.data import DataLoader

import fastar
from fastar.training import RegularStep, StarStep

SAVED = {"seconds": 0}


def whole_run(data: Any, folder: Path, heard: Heard) -> fastar.Star:
    task: dict[str, Any] = {"loss": weighted, "out": folder, "progress": heard}
    small = recipe(checkpoint=SAVED)
    sources = fastar.train_sources(Dropping, data, small, number=2, **task)
    return fastar.train_star(Dropping, sources, data, small, **task)


def streamed() -> Any:
    """Batches that are drawn as they come."""
    return DataLoader(Streamed(36), 12)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (tensors, StarStep),
        (Noisy, RegularStep),
        (streamed, StarStep),
        pytest.param(tensors, RegularStep, marks=pytest.mark.slow),
        pytest.param(Noisy, StarStep, marks=pytest.mark.slow),
        pytest.param(streamed, RegularStep, marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_saves_and_the_same_call_goes_on_to_the_same_bits(
    make: Any, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch; of an iterable from its beginning."""
    whole_run(make(), tmp_path / "whole", Heard())
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        at_call(patched, kind, 5, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match=r"interrupted; run it again to go on from "):
            whole_run(make(), tmp_path / "cut", Heard())
    assert signal.getsignal(signal.SIGINT) is before
    assert list((tmp_path / "cut" / "in-training").rglob("*.safetensors"))
    heard = Heard()
    whole_run(make(), tmp_path / "cut", heard)
    name = "star" if kind is StarStep else "source 0"
    place = "epoch 2" if make is streamed else "epoch 2, step 3"
    assert any(line.startswith(f"training {name}: going on from {place}") for line in heard.lines), heard.lines
    assert_same_models(tmp_path / "cut", tmp_path / "whole")


def test_a_model_is_not_half_there_after_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_call(monkeypatch, RegularStep, 8, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        fastar.train_sources(Dropping, tensors(), recipe(), number=3, out=tmp_path, progress=False)
    run = fastar.load_run(tmp_path)
    assert [model.name for model in run.sources] == ["source 0"]
    assert run.star is None
    assert repr(run) == f"Run({tmp_path}: 1 sources, 0 heldouts, no star)"
    with pytest.raises(fastar.FastarError, match="nothing is measured yet; train its star"):
        _ = run.value


def test_without_a_folder_ctrl_c_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    at_call(monkeypatch, RegularStep, 2, lambda: signal.raise_signal(signal.SIGINT))
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        fastar.train_sources(Dropping, tensors(), recipe(), number=1, progress=False)
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), state)


RUN = """
import sys
import fastar
from task_cases import Dropping, Noisy, recipe

small = recipe(epochs=int(sys.argv[2]), checkpoint={"seconds": 0})
data = fastar.Data(Noisy(), workers=2)
fastar.train_sources(Dropping, data, small, number=1, out=sys.argv[1], progress=False)
"""


@pytest.mark.slow
def test_workers_of_a_dataset_let_the_training_save(tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of a terminal."""
    command = [sys.executable, "-c", RUN, str(tmp_path / "run"), "100000"]
    places = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(tmp_path.rglob("in-training/*/*.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=100)
    assert "KeyboardInterrupt: " in error.splitlines()[-1], error
    assert re.search(r"go on from epoch \d+(, step \d+)? of source 0", error.splitlines()[-1]), error
