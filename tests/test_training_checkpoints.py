"""Checkpoints of a training: when they are written, which are kept, and what is done about damaged ones."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_runs_model_files import files_at_most
from torch import Tensor
from training_cases import CPU, PlainConvNet, dataset, network, store

from fastar.config import CheckpointSettings, StarSettings, TrainSettings
from fastar.errors import FastarError
from fastar.flat import FlatLayout
from fastar.runs import remove_checkpoints
from fastar.runs.model_files import load_checkpoint, save_checkpoint
from fastar.training import RegularStep, SourcesStore, StarStep, fit, loop
from fastar.training import resume as module
from fastar.training.resume import Saved, TrainingCheckpoints

SETTINGS = TrainSettings(epochs=3, batch_size=16, lr=0.05, precision="fp32")  # six steps an epoch
ALWAYS = CheckpointSettings(epochs=1, seconds=0, minutes=1e-9)


class Thing:
    """Something with a state."""

    def __init__(self, *values: float):
        self.values = torch.tensor(values)

    def save(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.values = state["values"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def checkpoints(folder: Path, settings: CheckpointSettings = ALWAYS, **more: Any) -> TrainingCheckpoints:
    return TrainingCheckpoints(folder / "star-0000", {"kind": "star"}, settings, **more)


def save(kept: TrainingCheckpoints, epoch: int, steps: int = 0, **more: Any) -> bool:
    values = {"loss": 1.0, "losses": torch.ones(steps), **more}
    history = [{"epoch": done} for done in range(epoch)]
    return kept.save({"step": Thing(1, 2)}, CPU, epoch=epoch, steps=steps, history=history, so_far={}, **values)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "star-0000").iterdir())


def name(epoch: int, step: int = 0) -> str:
    return f"epoch-{epoch:05d}-step-{step:08d}.safetensors"


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    for epoch, loss in enumerate((0.9, 0.3, 0.5, 0.4, 0.6), 1):
        assert save(kept, epoch, loss=loss)
    save(kept, 5, steps=3, loss=float("inf"))
    assert names(tmp_path) == [name(2), name(5), name(5, 3)]
    kept = checkpoints(tmp_path)  # another process
    save(kept, 6, loss=0.35)
    assert names(tmp_path) == [name(2), name(5, 3), name(6)]
    save(kept, 7, loss=0.2)
    assert names(tmp_path) == [name(6), name(7)]
    remove_checkpoints(kept.folder)
    assert not (tmp_path / "star-0000").exists()


def test_checkpoints_within_epochs_are_not_the_best(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    for step in (1, 2, 3, 4):
        save(kept, 0, steps=step, loss=float("inf"))
    assert names(tmp_path) == [name(0, 3), name(0, 4)]


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "another format", "step", "epoch", "attempt"])
def test_a_damaged_newest_one_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    said: list[str] = []
    kept = checkpoints(tmp_path, say=said.append)
    save(kept, 1)
    save(kept, 2, steps=4)
    path = tmp_path / "star-0000" / name(2, 4)
    data = bytearray(path.read_bytes())
    if damage == "empty":
        data = bytearray()
    elif damage == "cut":
        del data[-3:]
    elif damage == "flipped":
        data[-1] ^= 1  # a bit of a tensor: the file is well-formed
    else:  # a digit by hand, in a file that is well-formed
        key, value = {"another format": ("format", 1), "step": ("step", 4), "epoch": ("epoch", 2)}.get(
            damage, (damage, 0)
        )
        was, now = (f'\\"{key}\\": {number}'.encode() for number in (value, value + 1))
        assert bytes(data).count(was) >= 1
        data = bytearray(bytes(data).replace(was, now))
    path.write_bytes(data)
    found = kept.newest()
    assert found is not None
    assert (found.epoch, found.step) == (1, 0)
    assert len(said) == 1
    assert str(path) in said[0]
    assert said[0].endswith("going on from the one before")
    assert names(tmp_path) == [name(1)]


@pytest.mark.parametrize(("history", "losses"), [([{}], 4), ([{}, {}, {}], 4), ([{}, {}], 3), ([{}, {}], 0)])
def test_one_that_contradicts_itself_is_passed_over(tmp_path: Path, history: list[dict[str, Any]], losses: int) -> None:
    """Its digests are right: what was saved makes no sense."""
    said: list[str] = []
    kept = checkpoints(tmp_path, say=said.append)
    save(kept, 1)
    kept.save({"step": Thing(1, 2)}, CPU, epoch=2, steps=4, history=history, so_far={}, losses=torch.ones(losses))
    found = kept.newest()
    assert found is not None
    assert (found.epoch, found.step) == (1, 0)
    (line,) = said
    assert name(2, 4) in line
    assert line.endswith("going on from the one before")


def test_what_is_written_down_of_retries_is_recalled(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    kept.recall(None)
    assert (kept.attempt, kept.back_to) == (0, None)
    save(kept, 1)
    kept.attempt, kept.back_to = 2, name(1)
    kept.remember()
    again = checkpoints(tmp_path)  # another process
    again.recall(again.newest())
    assert (again.attempt, again.back_to) == (2, name(1))
    kept.attempt = 3
    save(kept, 2)
    again.recall(again.newest())
    assert (again.attempt, again.back_to) == (3, None)  # the checkpoint is later than what was written down
    other = TrainingCheckpoints(tmp_path / "star-0000", {"kind": "another"}, ALWAYS)
    other.recall(None)
    assert other.attempt == 0
    remove_checkpoints(kept.folder)
    assert not (tmp_path / "star-0000").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"attempt": "x", "back_to": null, "recipe": {}}'])
def test_damaged_notes_of_retries_are_passed_over(tmp_path: Path, content: str) -> None:
    said: list[str] = []
    kept = checkpoints(tmp_path, say=said.append)
    save(kept, 1)
    (tmp_path / "star-0000" / "retry.json").write_text(content)
    kept.recall(kept.newest())
    assert kept.attempt == 0
    assert len(said) == 1


def test_none_where_all_are_damaged(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    assert kept.newest() is None
    for epoch in (1, 2):
        save(kept, epoch)
    for path in kept.paths():
        path.write_bytes(b"x")
    assert kept.newest() is None


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    assert save(kept, 1)
    bad = Thing(1, float("nan"))
    assert not kept.save({"step": bad}, CPU, epoch=2, steps=0, history=[], so_far={}, losses=torch.ones(0))
    assert names(tmp_path) == [name(1)]


def test_when_it_is_time(tmp_path: Path) -> None:
    clock = Clock()
    kept = checkpoints(tmp_path, CheckpointSettings(epochs=2, seconds=10, minutes=1), clock=clock)
    assert not kept.due_after(2)
    clock.now = 10
    assert kept.due_after(2)
    assert not kept.due_after(3)
    assert not kept.due_within()
    clock.now = 60
    assert kept.due_within()
    save(kept, 2)
    assert not kept.due_within()
    assert not kept.due_after(4)
    never = checkpoints(tmp_path, CheckpointSettings(epochs=0, minutes=0), clock=clock)
    clock.now = 1e9
    assert not never.due_after(2)
    assert not never.due_within()


def test_a_full_disk_ends_in_one_line_and_keeps_what_is_there(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    save(kept, 1)
    with files_at_most(500), pytest.raises(FastarError, match=r"cannot be written.*free space") as caught:
        save(kept, 2)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == [name(1)]
    found = kept.newest()
    assert found is not None
    assert found.epoch == 1


class Cut(BaseException):
    pass


def cut_at(folder: Path, step: int, epoch: int) -> TrainingCheckpoints:
    """Checkpoints of a training that ends right after this one was written."""
    kept = checkpoints(folder)
    write = kept.save

    def saving(*arguments: Any, **more: Any) -> bool:
        written = write(*arguments, **more)
        if (more["epoch"], more["steps"]) == (epoch, step):
            raise Cut
        return written

    kept.save = saving  # type: ignore[method-assign]
    return kept


def regular(optimizer: str = "sgd") -> RegularStep:
    settings = SETTINGS.model_copy(update={"optimizer": optimizer})
    return RegularStep(network(PlainConvNet, 0), settings)


def star(fetched: bool = False) -> StarStep:
    model = network(PlainConvNet, 0)
    z = store([network(PlainConvNet, seed) for seed in (1, 2, 3)], FlatLayout.from_module(model))
    if fetched:
        z.store = "file"  # rows are brought two steps ahead
    return StarStep(model, SETTINGS, StarSettings(), z, seed=4)


@pytest.mark.quick
@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (0, 5), (1, 0), (1, 3), (2, 5), (3, 0)])
@pytest.mark.parametrize("kind", ["sgd", "adam", "star", "star, fetched"])
def test_a_training_goes_on_to_the_same_bits(tmp_path: Path, kind: str, epoch: int, step: int) -> None:
    """Parameters, batch-norm statistics, losses and counts, from any step on."""

    def make() -> Any:
        return star(kind.endswith("fetched")) if kind.startswith("star") else regular(kind)

    whole = make()
    wanted = fit(whole, dataset(), SETTINGS, name="x", seed=0)
    with pytest.raises(Cut):
        fit(make(), dataset(), SETTINGS, name="x", seed=0, checkpoints=cut_at(tmp_path, step, epoch))
    again, kept = make(), checkpoints(tmp_path)
    saved = kept.newest()
    assert isinstance(saved, Saved)
    assert (saved.epoch, saved.step) == (epoch, step)
    found = fit(again, dataset(), SETTINGS, name="x", seed=0, checkpoints=kept, saved=saved)
    for state, other in ((again.state(), whole.state()), (again.save(), whole.save())):
        assert state.keys() == other.keys()
        assert all(torch.equal(state[key], other[key]) for key in other)
    for one, other in zip(found, wanted, strict=True):
        assert (one.epoch, one.loss, one.lr, one.images) == (other.epoch, other.loss, other.lr, other.images)
        assert one.seconds > 0


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adam", "star"])
def test_a_training_goes_on_on_a_gpu(tmp_path: Path, kind: str, graph: bool) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    images = dataset(device=device)
    settings = SETTINGS.model_copy(update={"graph": graph, "optimizer": "adam" if kind == "adam" else "sgd"})

    def make() -> Any:
        model = network(PlainConvNet, 0).to(device)
        if kind != "star":
            return RegularStep(model, settings)
        layout = FlatLayout.from_module(model)
        states = [network(PlainConvNet, seed).state_dict() for seed in (1, 2, 3)]
        z = SourcesStore(layout, states, ["a", "b", "c"], device, store="host")
        return StarStep(model, settings, StarSettings(), z, seed=4)

    whole = make()
    fit(whole, images, settings, name="x", seed=0)
    with pytest.raises(Cut):
        fit(make(), images, settings, name="x", seed=0, checkpoints=cut_at(tmp_path, 3, 1))
    again, kept = make(), checkpoints(tmp_path)
    fit(again, images, settings, name="x", seed=0, checkpoints=kept, saved=kept.newest())
    # cuDNN's weight gradients add in an order of their own; nine steps carry such roundings on.
    torch.testing.assert_close(again.theta, whole.theta, rtol=0, atol=1e-4)


def test_torch_s_generators_go_on(tmp_path: Path) -> None:
    """Dropout draws from them."""
    kept = checkpoints(tmp_path)
    torch.manual_seed(5)
    save(kept, 1)
    wanted = torch.rand(3)
    torch.manual_seed(6)
    saved = kept.newest()
    assert saved is not None
    kept.restore(saved, {"step": Thing(0)}, CPU)
    assert torch.equal(torch.rand(3), wanted)


def test_another_network_s_checkpoint_is_refused(tmp_path: Path) -> None:
    kept = checkpoints(tmp_path)
    step = regular()
    kept.save(step.parts(), CPU, epoch=1, steps=0, history=[{}], so_far={}, losses=torch.ones(0))
    saved = kept.newest()
    assert saved is not None
    with pytest.raises(FastarError, match="does not fit"):
        kept.restore(saved, regular("adam").parts(), CPU)


def test_saving_changes_nothing(tmp_path: Path) -> None:
    plain, saving = regular(), regular()
    fit(plain, dataset(), SETTINGS, name="x", seed=0)
    fit(saving, dataset(), SETTINGS, name="x", seed=0, checkpoints=checkpoints(tmp_path))
    assert torch.equal(plain.theta, saving.theta)
    assert len(list((tmp_path / "star-0000").iterdir())) in (2, 3)


def test_what_was_saved_does_not_move_with_the_training(tmp_path: Path) -> None:
    step = regular()
    before = copy.deepcopy(step.save())
    kept = checkpoints(tmp_path)
    kept.save(step.parts(), CPU, epoch=0, steps=1, history=[], so_far={}, losses=torch.ones(1))
    fit(step, dataset(), SETTINGS, name="x", seed=0, epochs=1)
    saved = kept.newest()
    assert saved is not None
    assert not torch.equal(step.theta, before["theta"])
    assert torch.equal(saved.of("step")["theta"], before["theta"])


@pytest.mark.parametrize("trouble", ["another version", "unreadable"])
def test_what_may_be_whole_is_not_deleted(tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be days of work: another fastar, or the same one when the disk answers again, goes on from it."""
    kept = checkpoints(tmp_path)
    save(kept, 1)
    if trouble == "another version":
        save(kept, 2)
        path = tmp_path / "star-0000" / name(2)
        found = load_checkpoint(path)
        save_checkpoint(path, found.state, {**found.metadata, "format": module.FORMAT + 1})
        said = rf"{name(2)}: saved by another version of fastar; go on with that one, or delete the file to go on from"
    else:
        save(kept, 2)
        opened = Path.open

        def failing(self: Path, *arguments: Any, **more: Any) -> Any:
            if self.name == name(2):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return opened(self, *arguments, **more)

        monkeypatch.setattr(Path, "open", failing)
        said = (
            rf"{name(2)}: cannot be read \(Input/output error\); make it readable, or delete it to go on from the one"
        )
    with pytest.raises(FastarError, match=said):
        checkpoints(tmp_path).newest()
    assert names(tmp_path) == [name(1), name(2)]


@pytest.mark.parametrize(("epoch", "step"), [(4, 0), (0, 6)])
def test_one_of_a_longer_training_is_refused(tmp_path: Path, epoch: int, step: int) -> None:
    kept = checkpoints(tmp_path)
    history = [vars(one) for one in fit(regular(), dataset(), SETTINGS, name="x", seed=0)]
    kept.save(
        regular().parts(),
        CPU,
        epoch=epoch,
        steps=step,
        history=(history + history)[:epoch],
        so_far={},
        losses=torch.ones(step),
    )
    with pytest.raises(FastarError, match=rf"{name(epoch, step)}: of a training of other length"):
        fit(regular(), dataset(), SETTINGS, name="x", seed=0, checkpoints=kept, saved=kept.newest())


def test_steps_that_the_device_has_not_done_yet_are_not_the_checkpoint_s_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which is waited for: a wait of 100 s belongs to the steps."""
    clock = Clock()
    waits: list[bool] = []

    def waiting(device: torch.device) -> None:
        if waits:  # the first is before the steps
            clock.now += 100
        waits.append(True)

    monkeypatch.setattr(loop, "synchronize", waiting)
    kept = cut_at(tmp_path, 3, 0)
    with pytest.raises(Cut):
        fit(regular(), dataset(), SETTINGS, name="x", seed=0, checkpoints=kept, clock=clock)
    saved = checkpoints(tmp_path).newest()
    assert saved is not None
    assert (saved.step, saved.so_far["seconds"]) == (3, 300)
