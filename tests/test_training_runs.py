"""Whole runs: where the sources are kept changes no bit, and what is left of a training that became NaN."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import copied_parts, poison
from training_cases import dataset

from fastar.config import Settings, TrainSettings, load_settings
from fastar.data.in_memory import DeviceDataset
from fastar.errors import FastarError
from fastar.experiments import train_star
from fastar.models import build_model
from fastar.runs.model_files import load_checkpoint
from fastar.training import NonFiniteLoss, RegularStep, StarStep, fit


def settings(data: Path, *overrides: str) -> Settings:
    small = [
        f"dataset.directory={data}",
        "dataset.limit=300",
        "train.epochs=3",
        "train.batch_size=64",
        "star.epochs=3",
        "sources.number=3",
        "sources.heldout=0",
        "evaluation.points=3",
        "device=cpu",
        "workers=1",
    ]
    return load_settings(dataset="digits", overrides=[*small, *overrides])


def test_a_run_with_sources_in_a_file(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matched part by part, fetched row by row; the folder goes on under another `sources.store`."""
    wanted = train_star(settings(data), tmp_path / "auto")
    copied_parts(monkeypatch, 2)
    found = train_star(settings(data, "sources.store=file"), tmp_path / "file")
    for path in ("star", "permutations", "sources/seed-0002"):
        one, other = (load_checkpoint(tmp_path / run / f"{path}.safetensors").state for run in ("auto", "file"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert found["train"] == wanted["train"]
    again = train_star(settings(data, "sources.store=host", "train.compile=true"), tmp_path / "file")
    assert again["train"] == wanted["train"]


class Poisoned:
    """A step that is shown images that are not numbers in call number `when`."""

    def __init__(self, step: Any, when: int):
        self.step, self.when, self.calls = step, when, 0
        self.theta_before: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.step, name)

    def begin_epoch(self, epoch: int, steps: int) -> dict[str, float]:
        self.theta_before.append(self.step.theta.clone())
        return dict(self.step.begin_epoch(epoch, steps))

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss: torch.Tensor = self.step(images * (float("nan") if self.calls == self.when else 1.0), labels, lr)
        return loss


@pytest.mark.parametrize(
    ("when", "epochs"),
    [(2, 0), (7, 1), (15, 2), (12, 1)],
    ids=["first epoch", "second", "third", "the second's last step"],
)
def test_the_error_carries_the_state_after_the_last_good_epoch(when: int, epochs: int) -> None:
    recipe = TrainSettings(epochs=4, batch_size=16, precision="fp32")
    model = build_model("resnet8", input_shape=(3, 8, 8), classes=4, seed=0, width=0.25)
    step = Poisoned(RegularStep(model, recipe), when)  # six steps an epoch
    with pytest.raises(NonFiniteLoss, match=f"at epoch {(when - 1) // 6 + 1}, step {(when - 1) % 6 + 1}") as caught:
        fit(step, dataset(), recipe, name="x", seed=0)
    left = caught.value.left
    if epochs == 0:
        assert left is None
        return
    assert left is not None
    assert (left.epochs, left.steps) == (epochs, 0)
    assert torch.equal(step.layout.flatten(left.state), step.theta_before[epochs])


class Spoiled(Poisoned):
    """A step whose update number `when` leaves `what` infinite, though its loss was finite."""

    def __init__(self, step: Any, when: int, what: str):
        super().__init__(step, when)
        self.what = what

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss: torch.Tensor = self.step(images, labels, lr)
        if self.calls == self.when:
            self.step.save()[self.what].view(-1)[-1] = float("inf")
        return loss


@pytest.mark.parametrize(
    ("when", "epochs", "what", "said"),
    [
        (6, 0, "theta", "theta"),
        (12, 1, "theta", "theta"),
        (24, 3, "theta", "theta"),
        (12, 1, "optimizer.0", "the optimizer's moments"),
        (24, 3, "buffer.bn1.running_var", "bn1.running_var"),
    ],
    ids=["first epoch", "second", "the last of all", "moments", "statistics"],
)
def test_what_an_epochs_last_update_spoils_is_told_at_its_end(when: int, epochs: int, what: str, said: str) -> None:
    """No loss of that epoch tells of it."""
    recipe = TrainSettings(epochs=4, batch_size=16, precision="fp32")
    model = build_model("resnet8", input_shape=(3, 8, 8), classes=4, seed=0, width=0.25)
    step = Spoiled(RegularStep(model, recipe), when, what)
    wanted = rf"^training x: {said} not finite at epoch {epochs + 1}, step 6; lower train\.lr \(it is 0\.1\)$"
    with pytest.raises(NonFiniteLoss, match=wanted) as caught:
        fit(step, dataset(), recipe, name="x", seed=0)
    left = caught.value.left
    assert (left is None) == (epochs == 0)
    if left is not None:
        assert (left.epochs, left.steps) == (epochs, 0)
        assert torch.equal(step.layout.flatten(left.state), step.theta_before[epochs])


@pytest.mark.parametrize(("precision", "rate"), [("bf16", "star.lr"), ("fp32", "train.lr")])
def test_the_advice_is_of_the_precision_and_the_rate_in_use(precision: Any, rate: str) -> None:
    recipe = TrainSettings(epochs=1, batch_size=16, precision=precision)
    model = build_model("resnet8", input_shape=(3, 8, 8), classes=4, seed=0, width=0.25)
    with pytest.raises(NonFiniteLoss) as caught:
        fit(Poisoned(RegularStep(model, recipe), 1), dataset(), recipe, name="x", seed=0, lr=0.05, rate=rate)
    also = " or use train.precision=fp32" if precision == "bf16" else ""
    assert str(caught.value).endswith(f"; lower {rate} (it is 0.05){also}")


def test_a_star_that_becomes_nan_leaves_its_last_good_state(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(data)
    poison(monkeypatch, StarStep, lambda call: call == 10)  # epochs of four steps
    file = tmp_path / "last-good" / "star-0000.safetensors"
    wanted = r"^training star: loss not finite at epoch 3, step 2 \(source seed-.*, t=.*\).* after epoch 2 is in "
    with pytest.raises(FastarError, match=wanted) as caught:
        train_star(chosen, tmp_path)
    assert str(caught.value).endswith(f"{file})")
    assert "\n" not in str(caught.value)
    left = load_checkpoint(file)  # which refuses what is not finite
    assert (left.metadata["kind"], left.metadata["epochs"]) == ("star", 2)
    assert not (tmp_path / "star.safetensors").exists()
    monkeypatch.undo()
    train_star(chosen, tmp_path)
    assert (tmp_path / "star.safetensors").exists()
    assert not file.parent.exists()


def test_a_source_that_becomes_nan_does_not_bind_the_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the error says: the learning rate is lowered, and the same folder used."""
    poison(monkeypatch, RegularStep, lambda call: call == 6)
    with pytest.raises(FastarError, match=r"training source 0: .*last-good.source-0000\.safetensors"):
        train_star(settings(data), tmp_path)
    monkeypatch.undo()
    train_star(settings(data, "train.lr=0.02"), tmp_path)
    assert not (tmp_path / "last-good").exists()


def test_a_step_that_fails_ends_what_reads_ahead() -> None:
    """Though the error, and with it the loop's frame, is kept: a loader's threads would go on decoding."""
    ended: list[bool] = []

    class Reading(DeviceDataset):
        def batches(self, *arguments: Any, **more: Any) -> Iterator[Any]:
            try:
                yield from super().batches(*arguments, **more)
            finally:
                ended.append(True)

    images = dataset()
    images.__class__ = Reading
    recipe = TrainSettings(epochs=1, batch_size=16, precision="fp32")
    model = build_model("resnet8", input_shape=(3, 8, 8), classes=4, seed=0, width=0.25)
    step = RegularStep(model, recipe)

    class Failing(Poisoned):
        def __call__(self, *arguments: Any) -> torch.Tensor:
            raise FastarError("no")

    with pytest.raises(FastarError, match="no") as kept:
        fit(Failing(step, 0), images, recipe, name="x", seed=0)
    assert ended == [True]
    assert kept.value.__traceback__ is not None
