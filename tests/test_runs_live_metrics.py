"""Live figures: event files that TensorBoard reads, whatever was cut off, and Weights & Biases where asked for."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from cli_cases import refused, tiny
from run_cases import small

from fastar.config import LoggingSettings
from fastar.errors import FastarError
from fastar.experiments import train_star
from fastar.runs import RunFolder
from fastar.runs.live_metrics import EventFile, LiveMetrics

events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="reads event files")


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) as TensorBoard shows them."""
    found = events.EventAccumulator(str(folder))
    found.Reload()
    return {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    file = EventFile(tmp_path / "model")
    assert not (tmp_path / "model").exists()  # nothing before the first point
    for step in (1, 2, 300):
        file.add(step, {"loss": 1 / step, "images_per_second": 1e6 * step})
    # Read while it is open: each point is there as soon as it is written. Values are stored as float32.
    assert points(tmp_path / "model") == {
        "loss": [(step, pytest.approx(1 / step, rel=1e-7)) for step in (1, 2, 300)],
        "images_per_second": [(step, pytest.approx(1e6 * step, rel=1e-7)) for step in (1, 2, 300)],
    }
    file.close()


def test_a_later_attempt_makes_void_what_it_does_again(tmp_path: Path) -> None:
    for first, value in ((1, 10.0), (3, 20.0), (2, 30.0)):
        file = EventFile(tmp_path)
        for step in range(first, 5):
            file.add(step, {"loss": value + step})
        file.close()
    assert points(tmp_path)["loss"] == [(1, 11.0), (2, 32.0), (3, 33.0), (4, 34.0)]


@pytest.mark.parametrize("cut", [1, 5, 20, 40])
def test_a_point_that_a_kill_cut_is_left_out(tmp_path: Path, cut: int) -> None:
    file = EventFile(tmp_path)
    for step in (1, 2, 3):
        file.add(step, {"loss": float(step)})
    file.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    again = EventFile(tmp_path)
    again.add(3, {"loss": 33.0})
    again.close()
    assert points(tmp_path)["loss"] == [(1, 1.0), (2, 2.0), (3, 33.0)]


def test_a_wrong_byte_is_noticed_by_tensorboard(tmp_path: Path) -> None:
    """That is, the checksums mean something."""
    file = EventFile(tmp_path)
    file.add(1, {"loss": 1.0})
    file.close()
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    assert points(tmp_path) == {}


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FastarError, match=r"metrics cannot be written.*logging\.tensorboard=false"):
        EventFile(tmp_path / "file" / "model").add(1, {"loss": 1.0})


def test_a_run_shows_every_epoch_of_every_model(tmp_path: Path) -> None:
    settings = small(tmp_path / "data", "sources.heldout=1", "star.epochs=4")
    train_star(settings, tmp_path / "run")
    shown = {path.name: points(path) for path in (tmp_path / "run" / "tensorboard").iterdir()}
    assert set(shown) == {"source-0000", "source-0001", "heldout-0000", "star-0000"}
    log = RunFolder(tmp_path / "run").log.read()
    for name, tags in shown.items():
        model = "star" if name.startswith("star") else name.replace("-000", " ")
        losses = [
            (entry["epoch"] + 1, pytest.approx(entry["loss"], rel=1e-6)) for entry in log if entry["model"] == model
        ]
        assert tags["loss"] == losses
        assert {"lr", "images_per_second", "load_share", "peak_megabytes"} <= tags.keys()
    matched = [1, 4]  # star.match_every_epochs=3
    for tag in ("matching_seconds", "matching_objective", "matching_objective_weights", "matching_changed"):
        assert [step for step, _ in shown["star-0000"][tag]] == matched
        assert tag not in shown["source-0000"]
    changed = [value for _, value in shown["star-0000"]["matching_changed"]]
    assert 0 < changed[0] <= 1  # the first matching moves nearly all units
    objective = [value for _, value in shown["star-0000"]["matching_objective"]]
    logged = [entry["figures"]["matching_objective"] for entry in log if entry.get("figures")]
    assert objective == pytest.approx(logged, rel=1e-6)
    weights = [value for _, value in shown["star-0000"]["matching_objective_weights"]]
    assert all(one != whole for one, whole in zip(weights, objective, strict=True))  # biases count in one alone


def test_tensorboard_can_be_left_out(tmp_path: Path) -> None:
    settings = small(tmp_path / "data", "sources.number=1", "sources.heldout=1", "logging.tensorboard=false")
    train_star(settings, tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()


class FakeWandb(types.ModuleType):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.finished = 0
        self.id = "x1"

    def init(self, **arguments: Any) -> FakeWandb:
        self.begun.append(arguments)
        return self

    def log(self, figures: dict[str, float]) -> None:
        self.logged.append(figures)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_goes_on_with_its_run_and_sends_no_epoch_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = LoggingSettings(tensorboard=False, wandb="stars")
    for first in (1, 2):
        figures = LiveMetrics(tmp_path, settings, {"seed": 3})
        for step in range(first, 4):
            figures.add([("source", 1, step, {"loss": step / 2})])
        figures.close()
    assert [(b["project"], b["id"], b["resume"], b["config"]) for b in wandb.begun] == [
        ("stars", None, "allow", {"seed": 3}),
        ("stars", "x1", "allow", {"seed": 3}),
    ]
    assert wandb.logged == [{"source-0001/epoch": k, "source-0001/loss": k / 2} for k in (1, 2, 3)]
    assert wandb.finished == 2
    figures = LiveMetrics(tmp_path, settings, {})
    figures.forget("source", 1, 2)  # a retry: these will be others
    figures.add([("source", 1, 2, {"loss": 9.0})])
    figures.add([("source", 1, 3, {"loss": 9.0})])
    assert [entry["source-0001/epoch"] for entry in wandb.logged[3:]] == [3]
    assert json.loads((tmp_path / "wandb.json").read_text())["sent"] == {"source-0001": 3}


def test_processes_at_once_have_a_run_each_at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = LoggingSettings(tensorboard=False, wandb="stars")
    first, second = (LiveMetrics(tmp_path, settings, {}) for _ in range(2))
    first.add([("source", 1, 1, {"loss": 0.5})])
    second.add([("source", 2, 1, {"loss": 0.5})])
    first.close()
    second.close()
    assert [(b["name"], b["group"]) for b in wandb.begun] == [
        (tmp_path.name, tmp_path.name),
        (f"{tmp_path.name} 2", tmp_path.name),
    ]
    sent = [json.loads((tmp_path / name).read_text())["sent"] for name in ("wandb.json", "wandb-1.json")]
    assert sent == [{"source-0001": 1}, {"source-0002": 1}]
    assert not (tmp_path / "in-training").exists()


def test_wandb_that_does_not_begin_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setattr(wandb, "init", lambda **arguments: (_ for _ in ()).throw(RuntimeError("no\nlogin")))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(FastarError, match=r"logging\.wandb=stars: no login; set logging\.wandb=null"):
        LiveMetrics(tmp_path, LoggingSettings(wandb="stars"), {})


def test_wandb_that_is_not_installed_is_said_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = refused("train-star", *tiny(tmp_path / "data"), "logging.wandb=stars", "--out", tmp_path / "run")
    assert message.startswith("logging.wandb=stars: the package wandb is not installed; pip install wandb")
    assert list(tmp_path.iterdir()) == []
