"""What can go wrong in days of training: each ends in one clear line, with nothing lost, or is survived."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import contents, fastar, refused
from ffcv.fields.ndarray import NDArrayDecoder
from run_cases import (
    Heard,
    Killed,
    assert_log_is_whole,
    assert_same_models,
    at_call,
    copied_parts,
    kill,
    poison,
    small,
)
from test_runs_model_files import files_at_most

from fastar.errors import FastarError
from fastar.experiments import train_star
from fastar.runs import model_files as files
from fastar.runs.model_files import load_checkpoint, save_checkpoint
from fastar.training import RegularStep, StarStep


def half_done(data: Path, folder: Path, *overrides: str) -> None:
    """A run that was killed in the second epoch of its star."""
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, StarStep, 6, kill)
        with pytest.raises(Killed):
            train_star(small(data, *overrides), folder)


def before_fsync(patch: pytest.MonkeyPatch, act: Callable[[str], None]) -> None:
    """`act(path)` before a file, under its temporary name, reaches the disk."""
    fsync = os.fsync

    def acting(handle: int) -> None:
        act(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    patch.setattr(os, "fsync", acting)


def test_a_disk_that_fills_during_a_checkpoint(
    options: list[str], data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def full(path: str) -> None:
        if "in-training/star" in path and len(list(run.glob("in-training/*/e*"))) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        before_fsync(patch, full)
        message = refused("train-star", *options, "--out", run)
    assert f"{run}/in-training/star-0000/epoch-" in message
    assert message.endswith("cannot be written (No space left on device); free space or choose another folder")
    assert len(list(run.glob("in-training/star-0000/*"))) == 2
    assert not list(run.rglob(".*"))
    train_star(small(data), run)
    assert_same_models(run, whole)
    assert_log_is_whole(run, whole)


def test_a_disk_that_takes_no_more_bytes(options: list[str], data: Path, whole: Path, tmp_path: Path) -> None:
    """The kernel's own refusal."""
    run = tmp_path / "run"
    with files_at_most(6000):
        message = refused("train-star", *options, "--out", run)
    assert "cannot be written (File too large); free space" in message
    train_star(small(data), run)
    assert_same_models(run, whole)


def test_a_folder_that_becomes_read_only(
    options: list[str], data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's answer is made, since root may write into read-only folders."""
    run = tmp_path / "run"
    half_done(data, run)
    before = contents(run)
    opened = Path.open

    def refuse(self: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if run in self.parents and mode not in ("r", "rb"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(self, mode, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        assert "(Read-only file system); free space or choose another" in refused("train-star", *options, "--out", run)
    assert {name: data for name, data in contents(run).items() if name != "lock.json"} == {
        name: data for name, data in before.items() if name != "lock.json"
    }
    train_star(small(data), run)
    assert_same_models(run, whole)


@pytest.mark.parametrize("change", ["cut", "replaced"])
def test_a_beton_file_that_changes_under_the_run(
    options: list[str], data: Path, whole: Path, tmp_path: Path, change: str
) -> None:
    mine = tmp_path / "data"
    shutil.copytree(data, mine)
    run = tmp_path / "run"
    half_done(mine, run)
    (train,) = mine.rglob("train.beton")
    content = train.read_bytes()
    if change == "cut":
        train.write_bytes(content[: len(content) // 2])
    else:
        train.write_bytes(content[:-100] + bytes(100))
    options = [*options, f"dataset.directory={mine}"]
    before = {name: data for name, data in contents(run).items() if "in-training" in name or "sources" in name}
    message = refused("train-star", *options, "--out", run)
    assert str(train) in message
    after = contents(run)
    assert {name: after[name] for name in before} == before
    train.write_bytes(content)
    train_star(small(mine), run)
    assert_same_models(run, whole)


def test_other_data_under_a_training_are_told_apart(data: Path, tmp_path: Path) -> None:
    """Whole files, but other ones: the training that goes on would be of neither."""
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, RegularStep, 3, kill)
        with pytest.raises(Killed):
            train_star(small(data), run)
    (path, *_) = sorted(run.glob("in-training/source-0000/*"))
    for path in run.glob("in-training/source-0000/*"):
        found = load_checkpoint(path)
        metadata = dict(found.metadata)
        metadata["recipe"] = {**metadata["recipe"], "dataset_digest": "0" * 64}
        save_checkpoint(path, found.state, metadata)
    with pytest.raises(FastarError, match=r"source-0000: is the training of another model \(dataset_digest was '0000"):
        train_star(small(data), run)
    assert path.exists()


def test_a_source_s_file_that_is_damaged(options: list[str], data: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    half_done(data, run)
    source = run / "sources" / "seed-0001.safetensors"
    good = source.read_bytes()
    source.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))  # one bit of a weight
    message = refused("train-star", *options, "--out", run)
    assert message.startswith(f"{source}: its values are not those that were saved (damaged)")
    source.write_bytes(good)
    train_star(small(data), run)
    assert_same_models(run, whole)


def test_a_source_that_is_replaced_is_named(options: list[str], data: Path, tmp_path: Path) -> None:
    """A whole file, but not the source that the star in training has been trained with."""
    run = tmp_path / "run"
    half_done(data, run)
    source = run / "sources" / "seed-0001.safetensors"
    found = load_checkpoint(source)
    save_checkpoint(source, {name: value + 1 for name, value in found.state.items()}, found.metadata)
    message = refused("train-star", *options, "--out", run)
    assert "star-0000: is the training of another model (sources: 1 of 2 differ, the first is number 1)" in message
    assert list(run.glob("in-training/star-0000/*"))


def test_a_loader_s_thread_that_dies(
    options: list[str], data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    half_done(data, run)

    def die(decoder: NDArrayDecoder) -> None:
        raise MemoryError("no memory in the thread")

    with monkeypatch.context() as patch:
        patch.setattr(NDArrayDecoder, "generate_code", die)
        message = refused("train-star", *options, "--out", run)
    assert "FFCV's loader failed (MemoryError: no memory in the thread)" in message
    train_star(small(data), run)
    assert_same_models(run, whole)


@pytest.mark.parametrize(("kind", "part"), [(RegularStep, "source 0"), (StarStep, "star")])
def test_a_gpu_without_memory_says_what_to_lower(
    options: list[str], data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, part: str
) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, kind, 2, full)
        message = refused("train-star", *options, "--out", run)
    assert message.startswith(f"training {part}: out of GPU memory at train.batch_size=100; lower it or use train.")
    assert ("sources.store=host" in message) == (kind is StarStep)
    train_star(small(data), run)
    assert_same_models(run, whole)


def test_a_star_without_its_permutations_is_trained_again_and_may_be_stopped(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "permutations.safetensors").unlink()
    heard = Heard()
    for _ in range(2):  # killed in its sixth step, and in the sixth after that
        with monkeypatch.context() as patch:
            at_call(patch, StarStep, 6, kill)
            with pytest.raises(Killed):
                train_star(small(data), run, heard)
    calls = poison(monkeypatch, StarStep, lambda call: False)
    train_star(small(data), run, heard)
    assert len(calls) == 21 - 5 - 5  # saved after every step: none was done again
    assert len([line for line in heard.lines if "permutations.safetensors: missing, and the star" in line]) == 3
    assert_same_models(run, whole)


@pytest.mark.parametrize("store", ["host", "file"])
def test_the_sources_may_be_kept_elsewhere_by_every_attempt(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    """They are permuted anew from their files, some at a time where they do not live on the device."""
    run = tmp_path / "run"
    half_done(data, run)
    copied_parts(monkeypatch, 1)
    train_star(small(data, f"sources.store={store}"), run)
    assert_same_models(run, whole)


def test_a_star_in_training_is_not_profiled(options: list[str], data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    half_done(data, run)
    assert "is in training already" in refused("train-star", *options, "--profile", 2, "--out", run)


def test_a_training_with_other_settings_is_not_mixed_in(options: list[str], data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    half_done(data, run)
    message = refused("train-star", *options, "star.t=beta", "--out", run)
    assert "in-training/star-0000: is the training of another model (star.t was 'uniform', now 'beta')" in message
    shutil.rmtree(run / "in-training")
    assert fastar("train-star", *options, "star.t=beta", "--out", run).code == 0


def test_checkpoints_may_be_written_otherwise_by_every_attempt(
    options: list[str], data: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    half_done(data, run, "checkpoint.minutes=0")
    again = fastar("train-star", *options, "checkpoint.epochs=0", "logging.tensorboard=false", "--out", run)
    assert again.code == 0
    assert_same_models(run, whole)


def test_what_a_kill_left_of_a_finished_model_goes(data: Path, whole: Path, tmp_path: Path) -> None:
    """Killed between the model's file and the end of its checkpoints."""
    run = tmp_path / "run"
    half_done(data, run)
    for name in ("star.safetensors", "permutations.safetensors"):
        shutil.copy(whole / name, run / name)
    train_star(small(data), run)
    assert not (run / "in-training").exists()
    assert_same_models(run, whole)


def test_every_model_s_file_has_a_digest(whole: Path) -> None:
    for path in whole.rglob("*.safetensors"):
        state = load_checkpoint(path).state
        assert files.tensors_digest(state) in path.read_bytes().decode("latin-1"), path


def test_a_star_that_is_trained_again_is_never_mixed_with_the_one_before(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its two files: on a GPU the star before is not of the same bits as its new permutations' star."""
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "permutations.safetensors").unlink()
    found = load_checkpoint(run / "star.safetensors")
    save_checkpoint(run / "star.safetensors", {k: v * 1.001 for k, v in found.state.items()}, found.metadata)
    with monkeypatch.context() as patch:
        before_fsync(patch, lambda path: kill() if f"{run}/.star" in path else None)
        with pytest.raises(Killed):
            train_star(small(data), run)
    assert (run / "permutations.safetensors").exists()
    train_star(small(data), run)
    assert_same_models(run, whole)
