"""Signals: the first saves at the end of a step, and the same command goes on; a second Ctrl-C stops at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_cases import fastar
from run_cases import SMALL, assert_log_is_whole, assert_same_models, at_call, small

from fastar.experiments import train_star
from fastar.runtime.signals import Stopped, deferred, requested, signals_stop
from fastar.training import RegularStep, StarStep

TERM, USR1, INT = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT


@pytest.fixture(autouse=True)
def handlers_are_put_back() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (TERM, USR1, INT)]
    yield
    assert [signal.getsignal(number) for number in (TERM, USR1, INT)] == before
    assert requested() is None


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(TERM, 75), (USR1, 75), (INT, 130)])
def test_at_once_where_nothing_is_in_training(number: int, code: int) -> None:
    with pytest.raises(Stopped) as caught, signals_stop():  # noqa: PT012 (what is not reached is the test)
        send(number)
        pytest.fail("went on")
    assert caught.value.code == code


@pytest.mark.parametrize("number", [TERM, USR1, INT])
def test_deferred_until_the_block_ends(number: int) -> None:
    done = []
    with pytest.raises(Stopped), signals_stop():  # noqa: PT012
        with deferred():
            assert requested() is None
            send(number)
            assert requested() is not None
            done.append(1)
        pytest.fail("went on")
    assert done == [1]


def test_a_second_ctrl_c_is_at_once_another_sigterm_is_not() -> None:
    done = []
    with pytest.raises(Stopped) as caught, signals_stop(), deferred():  # noqa: PT012
        for number in (TERM, TERM, USR1):  # some schedulers send several
            send(number)
            done.append(number)
        send(INT)
        pytest.fail("went on")
    assert done == [TERM, TERM, USR1]
    assert caught.value.code == 130


def test_the_third_ctrl_c_is_the_system_s_own() -> None:
    with pytest.raises(Stopped), signals_stop(), deferred():  # noqa: PT012
        send(INT)
        try:
            send(INT)
        finally:
            assert signal.getsignal(INT) is signal.SIG_DFL


def test_ignored_signals_stay_ignored() -> None:
    """`nohup` ignores some."""
    before = signal.signal(USR1, signal.SIG_IGN)
    try:
        with signals_stop():
            send(USR1)
    finally:
        signal.signal(USR1, before)


def test_a_forked_child_dies_of_it() -> None:
    with signals_stop():
        pid = os.fork()
        if pid == 0:
            try:
                send(TERM)
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == TERM


@pytest.fixture(scope="module")
def options(data: Path) -> list[str]:
    # Only the signal makes it save.
    return ["--dataset", "digits", "--quiet", f"dataset.directory={data}", *SMALL, "checkpoint.minutes=0"]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_star(small(data, "checkpoint.epochs=0", "checkpoint.minutes=0"), folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "number", "signal_number", "code", "where"),
    [
        (RegularStep, 5, TERM, 75, "epoch 2, step 3 of source 0"),
        (RegularStep, 3, USR1, 75, "epoch 1 of source 0, which is whole"),
        (StarStep, 2, INT, 130, "epoch 1, step 3 of star"),
        (StarStep, 21, TERM, 75, "epoch 7 of star, which is whole"),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(
    options: list[str],
    data: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type,
    number: int,
    signal_number: int,
    code: int,
    where: str,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, kind, number, lambda: send(signal_number))
        outcome = fastar("train-star", *options, "checkpoint.epochs=0", "--out", run)
    assert outcome.code == code
    reason = "interrupted" if code == 130 else f"stopped by {signal.Signals(signal_number).name}"
    assert outcome.err == f"fastar: {reason}; run it again to go on from {where}\n"
    assert len(list(run.glob("in-training/*/*"))) == 1
    assert not (run / "lock.json").exists()
    calls = at_call(monkeypatch, kind, -1, lambda: None)
    train_star(small(data, "checkpoint.epochs=0", "checkpoint.minutes=0"), run)
    assert len(calls) == (12 if kind is RegularStep else 21) - number  # no step was done again
    assert_same_models(run, whole)
    assert_log_is_whole(run, whole)


def test_a_second_ctrl_c_saves_nothing(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        send(INT)
        send(INT)

    at_call(monkeypatch, RegularStep, 2, twice)
    outcome = fastar("train-star", *options, "--out", tmp_path / "run")
    assert outcome.code == 130
    assert outcome.err == "fastar: interrupted; run it again to go on from what is finished\n"
    assert not (tmp_path / "run").exists()
