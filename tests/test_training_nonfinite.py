"""Losses that are not finite: what is left, where a training goes back to, and what to do afterwards."""

from __future__ import annotations

import doctest
import gc
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import fastar, refused
from run_cases import (
    Heard,
    Killed,
    around_calls,
    assert_same_models,
    at_call,
    kill,
    poison,
    small,
)

from fastar.errors import FastarError
from fastar.experiments import train_star
from fastar.runs import RunFolder
from fastar.runs.model_files import load_checkpoint
from fastar.training import RegularStep, SourcesStore, StarStep, epochs


def test_retry_goes_back_to_the_last_checkpoint_with_other_draws(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Heard()
    with monkeypatch.context() as patch:
        # Epochs of three steps; saved at their ends alone.
        calls = poison(patch, StarStep, lambda call: call == 11)
        settings = small(data, "checkpoint.minutes=0", "train.on_nonfinite=retry")
        train_star(settings, tmp_path / "run", heard)
    assert len(calls) == 21 + 3  # the fourth epoch twice
    (line,) = [line for line in heard.lines if "not finite" in line]
    assert line.startswith("training star: loss not finite at epoch 4, step 2 (source seed-")
    assert line.endswith("going back to epoch 4 with other draws")
    run, other = RunFolder(tmp_path / "run"), RunFolder(whole)
    losses = [[e["loss"] for e in r.log.read() if e["model"] == "star" and "epoch" in e] for r in (run, other)]
    assert losses[0][:3] == losses[1][:3]
    assert all(one != another for one, another in zip(losses[0][3:], losses[1][3:], strict=True))
    assert [(e["model"], e["attempt"]) for e in run.log.read() if e["kind"] == "retry"] == [("star", 1)]
    assert load_checkpoint(run.star).metadata["retries"] == 1
    assert load_checkpoint(other.star).metadata["retries"] == 0
    assert not (run.path / "last-good").exists()


def spoil(monkeypatch: pytest.MonkeyPatch, kind: type, when: int) -> list[int]:
    """An update, number `when`, that leaves theta infinite though its loss was finite."""

    def spoiled(call: Any, number: int, step: Any, *batch: torch.Tensor) -> Any:
        loss = call(step, *batch)
        if number == when:
            step.theta.mul_(float("inf"))
        return loss

    return around_calls(monkeypatch, kind, spoiled)


@pytest.mark.parametrize("when", [6, 21], ids=["an epoch", "the training"])
def test_theta_spoiled_by_the_last_step_of(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """No loss tells of it, and it is not for the next epoch's matching, or for measuring, to say."""
    epoch = when // 3
    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        spoil(patch, StarStep, when)
        with pytest.raises(FastarError) as caught:
            train_star(small(data, "checkpoint.minutes=0"), run.path)
    message = str(caught.value)
    assert message.startswith(f"training star: theta not finite at epoch {epoch}, step 3 (source seed-000")
    assert ", t=0." in message
    assert "; lower star.lr (it is " in message
    assert message.endswith(f"(the model after epoch {epoch - 1} is in {run.last_good('star', 0)})")
    assert load_checkpoint(run.last_good("star", 0)).metadata["epochs"] == epoch - 1
    with monkeypatch.context() as patch:
        calls = spoil(patch, StarStep, 3)  # the next epoch's last step again
        train_star(small(data, "checkpoint.minutes=0", "train.on_nonfinite=retry"), run.path)
    assert len(calls) == 21 - 3 * (epoch - 1) + 3  # one epoch was done twice
    assert load_checkpoint(run.star).metadata["retries"] == 1


@pytest.mark.parametrize("saved", [False, True])
def test_a_failure_in_the_first_epoch_says_what_there_is(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    poison(monkeypatch, RegularStep, lambda call: call == 2)
    with pytest.raises(FastarError) as caught:  # saved: after every step
        train_star(small(data, *([] if saved else ["checkpoint.minutes=0"])), tmp_path / "run")
    if saved:
        where = tmp_path / "run" / "last-good" / "source-0000.safetensors"
        assert str(caught.value).endswith(f"(the model after 1 step of the first epoch is in {where})")
    else:
        assert str(caught.value).endswith("(no epoch of it was whole, so nothing of it is saved)")


def test_retry_goes_further_back_and_gives_up(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    poison(monkeypatch, RegularStep, lambda call: call >= 5)
    settings = small(data, "checkpoint.minutes=0", "train.epochs=4", "train.on_nonfinite=retry")
    with pytest.raises(
        FastarError, match=r"loss not finite.* \(the model after epoch 1 is in .*, after going back 3 times\)$"
    ):
        train_star(settings, tmp_path / "run", heard)
    back = [line.rpartition("; ")[2] for line in heard.lines]
    assert back == [
        "going back to epoch 2 with other draws",
        "going back to the beginning with other draws",
        "going back to the beginning with other draws",
    ]
    left = RunFolder(tmp_path / "run").last_good("source", 0)  # the last two attempts came to less
    assert load_checkpoint(left).metadata["epochs"] == 1


@pytest.mark.parametrize("first_bad", [5, 11])  # in the second epoch, and in the fourth
def test_a_kill_after_a_retry_goes_on_with_its_draws(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_bad: int
) -> None:
    """Before the retry has saved anything: as if there had been no kill."""
    settings = small(data, "checkpoint.minutes=0", "train.on_nonfinite=retry")
    with monkeypatch.context() as patch:
        poison(patch, StarStep, lambda call: call in (first_bad, first_bad + 3))
        train_star(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        poison(patch, StarStep, lambda call: call == first_bad)
        at_call(patch, StarStep, first_bad + 2, kill)  # epochs are looked at when they are whole
        with pytest.raises(Killed):
            train_star(settings, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert (run.in_training("star", 0) / "retry.json").is_file()
    with monkeypatch.context() as patch:  # its second step is bad again: the checkpoint it went back to is dropped
        poison(patch, StarStep, lambda call: call == 2)
        train_star(settings, run.path)
    assert load_checkpoint(run.star).metadata["retries"] == 2
    assert_same_models(run.path, tmp_path / "whole")
    retries = [
        [(e["attempt"], e["back_to"]) for e in RunFolder(folder).log.read() if e["kind"] == "retry"]
        for folder in (run.path, tmp_path / "whole")
    ]
    assert retries[0] == retries[1]
    assert not (run.path / "in-training").exists()


def test_stop_is_the_default_and_keeps_the_checkpoints(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, StarStep, lambda call: call == 8)
        message = refused("train-star", *options, "--out", run)
    assert "training star: loss not finite at epoch 3, step 2 (source seed-" in message
    assert (
        f"(the model after epoch 2 and 1 step of the next is in {run / 'last-good' / 'star-0000.safetensors'})"
        in message
    )
    assert list(run.glob("in-training/star-0000/*"))
    with monkeypatch.context() as patch:  # the same trouble again, but now from a checkpoint
        calls = poison(patch, StarStep, lambda call: call == 1)
        outcome = fastar("train-star", *options, "--on-nonfinite", "retry", "--out", run)
    assert outcome.code == 0
    assert len(calls) < 21
    assert not (run / "last-good").exists()


def test_on_nonfinite_knows_two_answers(options: list[str], tmp_path: Path) -> None:
    message = refused("train-star", *options, "--on-nonfinite", "again", "--out", tmp_path / "run")
    assert "train.on_nonfinite='again'" in message
    assert "'stop' or 'retry'" in message


# Nothing is saved on the way, so that what was there before is all there is.
NO_CHECKPOINTS = ("checkpoint.epochs=0", "checkpoint.minutes=0")


def killed_within(data: Path, folder: Path, kind: type, number: int) -> Path:
    """A run that was killed in step number `number` of this kind; the checkpoint of the step before."""
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, kind, number, kill)
        with pytest.raises(Killed):
            train_star(small(data), folder)
    return max(folder.glob("in-training/*/epoch-*"))


@pytest.mark.parametrize(
    ("kind", "model", "number", "after", "bad"),
    [
        (StarStep, "star", 9, "after epoch 2 and 2 steps of the next", "epoch 3, step 3"),
        (RegularStep, "source-0000", 2, "after 1 step of the first epoch", "epoch 1, step 2"),
    ],
)
def test_a_training_that_goes_on_within_an_epoch_leaves_what_it_began_with(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    kind: type, model: str, number: int, after: str, bad: str,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    saved = load_checkpoint(killed_within(data, run, kind, number))
    poison(monkeypatch, kind, lambda call: call == 1)
    with pytest.raises(FastarError, match=f"loss not finite at {bad}") as caught:
        train_star(small(data, *NO_CHECKPOINTS), run)
    left = run / "last-good" / f"{model if '-' in model else 'star-0000'}.safetensors"
    assert f"(the model {after} is in {left})" in str(caught.value)
    found = load_checkpoint(left)
    assert (found.metadata["epochs"], found.metadata["steps"]) == (saved.metadata["epoch"], saved.metadata["step"])
    theta = saved.state["step/theta"]
    for value in found.state.values():  # each parameter's numbers, in their order, are somewhere in theta
        assert value.flatten()[0] in theta
        assert value.flatten()[-1] in theta


def test_retry_after_going_on_within_an_epoch(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the checkpoint that it went on from; and if it is no better from there, to the one before."""
    run, heard = RunFolder(tmp_path / "run"), Heard()
    killed_within(data, run.path, StarStep, 9)
    with monkeypatch.context() as patch:
        calls = poison(patch, StarStep, lambda call: call in (1, 2))
        train_star(small(data, *NO_CHECKPOINTS, "train.on_nonfinite=retry"), run.path, heard)
    assert [line.rpartition("; ")[2] for line in heard.lines if "not finite" in line] == [
        "going back to epoch 3, step 3 with other draws",
        "going back to epoch 3, step 2 with other draws",
    ]
    assert len(calls) == 1 + 1 + 2 + 4 * 3
    retried, other = (
        {e["epoch"]: e for e in RunFolder(folder).log.read() if e["model"] == "star" and "epoch" in e}
        for folder in (run.path, whole)
    )
    assert sorted(retried) == list(range(7))
    assert [retried[n]["loss"] == other[n]["loss"] for n in range(7)] == [True] * 2 + [False] * 5
    assert retried[2]["images"] == other[2]["images"]
    assert load_checkpoint(run.star).metadata["retries"] == 2
    assert not (run.path / "in-training").exists()


def test_what_a_lower_rate_needs_is_said_and_works(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source's: the finished ones are of the rate before, so another folder, which may take them over."""
    run, other = tmp_path / "run", tmp_path / "other"
    with monkeypatch.context() as patch:
        poison(patch, RegularStep, lambda call: call == 11)  # the second source's second epoch
        message = refused("train-star", *options, "--out", run)
    folder = shlex.quote(f"sources.folder={run}/sources")
    remedy = f"; as 1 source is finished, do so with another run folder (out): {folder} sources.number=1 "
    assert f"; lower train.lr (it is 0.1){remedy}takes it over, for a star of 1 instead of 2 (" in message
    assert "\n" not in message
    message = refused("train-star", *options, "train.lr=0.02", "--out", run)
    assert "train.lr was 0.1, now 0.02" in message
    assert message.endswith(
        f"choose another run folder (out) ({folder} sources.number=1 takes over the source that is finished) or the "
        "same settings"
    )
    said = [f"sources.folder={run}/sources", "sources.number=1", "train.lr=0.02"]
    outcome = fastar("train-star", *options, *said, "sources.heldout=1", "--out", other)
    assert outcome.code == 0, outcome.err
    assert load_checkpoint(other / "heldout" / "seed-0000.safetensors").metadata["recipe"]["train"]["lr"] == 0.02
    assert not (other / "sources").exists()


def test_a_star_s_lower_rate_needs_no_other_folder(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, StarStep, lambda call: call == 2)
        message = refused("train-star", *options, "--out", run)
    assert "; lower star.lr (it is 0.1) (the model after 1 step of the first epoch is in " in message
    outcome = fastar("train-star", *options, "star.lr=0.02", "--out", run)
    assert outcome.code == 0, outcome.err


def test_another_precision_needs_another_folder_and_the_sources_go_along(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A star in low precision: its rate is its own, the precision is its sources' too."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, StarStep, lambda call: call == 2)
        message = refused("train-star", *options, "train.precision=bf16", "--out", run)
    remedy = f"{shlex.quote(f'sources.folder={run}/sources')} sources.number=2 takes them over"
    assert "; lower star.lr (it is 0.1) or use train.precision=fp32; as 2 sources are finished, " in message
    assert f"change train settings with another run folder (out): {remedy} (" in message
    said = shlex.split(remedy.partition(" takes")[0])
    outcome = fastar("train-star", *options, *said, "train.precision=fp32", "--out", tmp_path / "other")
    assert outcome.code == 0, outcome.err


def test_a_training_that_went_on_after_its_failure_is_not_thrown_away(
    options: list[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the failure left does not allow another recipe any more."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        poison(patch, StarStep, lambda call: call == 5)
        refused("train-star", *options, "--out", run)
    killed_within(data, run, StarStep, 4)  # three steps on
    assert (run / "last-good" / "star-0000.safetensors").exists()
    before = sorted(run.glob("in-training/star-0000/*"))
    message = refused("train-star", *options, "star.lr=0.02", "--out", run)
    assert "in-training/star-0000: is the training of another model (star.lr was None, now 0.02)" in message
    assert sorted(run.glob("in-training/star-0000/*")) == before


def test_after_what_in_words() -> None:
    assert doctest.testmod(epochs).failed == 0
    assert doctest.testmod(epochs).attempted > 0


@pytest.mark.slow
def test_a_failed_attempt_is_gone_when_the_next_one_begins(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the sources, the optimizer and a graph: a GPU has no room for both."""
    alive: list[int] = []

    def bad(call: int) -> bool:
        alive.append(sum(type(one) in (SourcesStore, StarStep) for one in gc.get_objects()))
        return call in (5, 9)

    gc.collect()
    poison(monkeypatch, StarStep, bad)
    gc.disable()  # nothing is left to chance
    try:
        train_star(small(data, "train.on_nonfinite=retry"), tmp_path / "run")
    finally:
        gc.enable()
    assert set(alive) == {2}  # a step and its store alone
