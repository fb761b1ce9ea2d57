"""Run folders in earnest: taken over by another host, moved, damaged, with things that people leave in them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_cases import contents, fastar, refused
from run_cases import Heard, at_call, small

from fastar.config import load_settings
from fastar.errors import FastarError
from fastar.experiments import train_star
from fastar.experiments.epoch_times import epoch_seconds, speed
from fastar.experiments.reuse import finished_results
from fastar.report.results import check_results
from fastar.report.run_list import overview, runs_below
from fastar.runs import (
    IN_TRAINING,
    RETRY,
    RunFolder,
    delete,
    hold,
    is_held,
    lock,
    read_holder,
    remove_checkpoints,
    write_atomically,
)
from fastar.runs.live_metrics import EventFile
from fastar.runs.model_files import load_checkpoint, save_checkpoint
from fastar.runtime.json_files import parse_object, read_object, sealed, unsealed
from fastar.training import RegularStep, StarStep
from fastar.training.resume import TrainingCheckpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A small finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train_star(small(data), folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(finished, tmp_path / "run")))


# A3: two hosts


def taken_over(folder: Path, host: str = "elsewhere") -> None:
    """As another host does that takes this one for dead."""
    path = folder / lock.NAME
    path.unlink(missing_ok=True)
    path.write_text(json.dumps({"host": host, "pid": 7, "started": 0, "since": 1.0}))


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def replaced(folder: Path) -> None:
    moved(folder)
    shutil.copytree(folder.with_name("elsewhere"), folder)


def locks_of(folder: Path) -> list[Path]:
    """The lock files of the process that works on a run, and of what it works on."""
    found = [path for name in ("processes", "in-training") for path in folder.glob(f"{name}/*/{lock.NAME}")]
    assert len(found) == 2
    return found


def all_taken_over(folder: Path) -> None:
    for path in locks_of(folder):
        taken_over(path.parent)


def finished_by_another(folder: Path) -> None:
    for path in locks_of(folder):
        path.unlink()


LOSSES: dict[str, Callable[[Path], None]] = {
    "taken over": all_taken_over,
    "finished by another": finished_by_another,
    "moved": moved,
    "deleted": shutil.rmtree,
    "replaced": replaced,
}


@pytest.mark.parametrize(("how", "kind"), [*((how, RegularStep) for how in LOSSES), ("taken over", StarStep)])
def test_a_run_that_lost_its_folder_writes_nothing_more(tmp_path: Path, data: Path, how: str, kind: type) -> None:
    folder, after = tmp_path / "run", {}

    def lose() -> None:
        LOSSES[how](folder)
        after.update(contents(tmp_path))

    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, kind, 5, lose)
        with pytest.raises(FastarError) as caught:
            train_star(small(data), folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    assert {"taken over": "process 7 on elsewhere", "finished by another": "is gone"}.get(how, "moved") in message
    assert contents(tmp_path) == after
    assert folder.exists() == (how not in ("moved", "deleted"))


def test_a_holder_that_woke_up_leaves_the_other_s_lock_alone(tmp_path: Path) -> None:
    """Host B takes over from A, which stands still; A writes, deletes, touches nothing when it goes on."""
    mine = tmp_path / "mine"
    with pytest.raises(FastarError, match="process 7 on elsewhere"), hold(tmp_path):  # noqa: PT012 (what follows)
        write_atomically(mine, b"held")
        taken_over(tmp_path)
        os.utime(tmp_path / lock.NAME, (1, 1))
        for attempt in (lambda: write_atomically(mine, b"lost"), lambda: delete(mine)):
            with pytest.raises(FastarError, match="writes nothing more"):
                attempt()
        assert mine.read_bytes() == b"held"
        RunFolder(tmp_path).log.append(kind="source")
    assert (tmp_path / lock.NAME).stat().st_mtime == 1
    assert read_holder(tmp_path) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [lock.NAME, "mine"]
    write_atomically(mine, b"free")  # nobody's any more, as far as this process is concerned


def test_a_lock_that_was_lost_is_not_touched(tmp_path: Path) -> None:
    file = tmp_path / lock.NAME
    with hold(tmp_path, touch_seconds=0.001):
        os.utime(file, (1, 1))
        end = time.monotonic() + 60
        while file.stat().st_mtime == 1:
            assert time.monotonic() < end, "a lock that is held is not touched"
            time.sleep(0.001)
        taken_over(tmp_path)
        os.utime(file, (1, 1))
        time.sleep(0.1)
        assert file.stat().st_mtime == 1


def test_a_run_that_another_one_began_is_not_cleaned_up(tmp_path: Path) -> None:
    """A run that failed before anything was done leaves no trace, unless the folder is another's by then."""
    folder, settings = RunFolder(tmp_path / "run"), load_settings(dataset="digits")
    with pytest.raises(RuntimeError), folder.open(settings):  # noqa: PT012 (what is done inside matters)
        taken_over(folder.path)
        raise RuntimeError
    assert folder.config.is_file()


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts that do not share the kernel's locks."""

    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.usefixtures("hosts")
def test_two_hosts_and_one_that_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold(tmp_path, touch_seconds=3600):
        monkeypatch.setattr(socket, "gethostname", lambda: "second")
        second = hold(tmp_path, dead_seconds=0.3)
        second.__enter__()
        write_atomically(tmp_path / "by the second", b"")
        assert is_held(tmp_path)
        second.__exit__(None, None, None)
        with pytest.raises(FastarError, match="is gone: taken over"):
            write_atomically(tmp_path / "by the first", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["by the second"]


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
@pytest.mark.parametrize("alive", [True, False])
def test_clocks_that_differ(tmp_path: Path, ahead: float, alive: bool) -> None:
    """Hosts' clocks an hour apart: one that touches its lock is alive, whatever its stamps say."""
    taken_over(tmp_path)
    stamp = time.time() + ahead
    os.utime(tmp_path / lock.NAME, (stamp, stamp))
    said, dead = list[str](), 10 if alive else 0.3
    touch = threading.Timer(0.5, os.utime, (tmp_path / lock.NAME, (stamp + 1, stamp + 1)))  # the other host's thread
    if alive:
        touch.start()
        with pytest.raises(FastarError, match="in use by another fastar"):
            hold(tmp_path, said.append, dead_seconds=dead).__enter__()
    else:
        with hold(tmp_path, said.append, dead_seconds=dead):
            assert read_holder(tmp_path) == lock._leases[-1].holder
        assert said[1] == f"{tmp_path}: process 7 on elsewhere held it and is gone; going on"
    assert said[0] == f"{tmp_path}: watching for {dead:.0f} s whether process 7 on elsewhere is still there"


# A10: what belongs together


def test_the_permutations_say_which_star_and_sources_they_belong_to(run: RunFolder, data: Path) -> None:
    star, permutations = load_checkpoint(run.star), load_checkpoint(run.permutations)
    assert permutations.metadata["sources"] == star.metadata["recipe"]["sources"]
    other = dict(star.state)
    other["1.weight" if "1.weight" in other else next(iter(other))] *= 2
    save_checkpoint(run.star, other, star.metadata)
    before = contents(run.path)
    for attempt in (lambda: finished_results(small(data), run), lambda: train_star(small(data), run.path)):
        with pytest.raises(FastarError, match=r"permutations\.safetensors: belongs to another star"):
            attempt()
    assert {**before, "config.yaml": b""} == {**contents(run.path), "config.yaml": b""}


def test_a_number_that_was_changed_is_no_result(run: RunFolder, data: Path) -> None:
    whole = run.read_results()
    text = run.results.read_text()
    digit = text.index('"mean": 0.') + len('"mean": 0.')
    run.results.write_text(f"{text[:digit]}{'1' if text[digit] != '1' else '2'}{text[digit + 1 :]}")
    assert "results.json: holds no results (its content is not what was written)" in refused("report", run.path)
    assert finished_results(small(data), run) is None
    assert [one.state for one in runs_below(run.path)] == ["damaged"]
    assert train_star(small(data), run.path)["paths"] == whole["paths"]
    assert run.read_results()["paths"] == whole["paths"]


@pytest.mark.parametrize("key", ["digest", "format"])
def test_results_whose_digest_was_lost_are_damaged(run: RunFolder, key: str) -> None:
    run.results.write_text(run.results.read_text().replace(f'"{key}"', '"other"'))
    with pytest.raises(FastarError, match="not what was written"):
        run.read_results()


def test_a_run_of_an_older_version_is_taken_as_it_is(run: RunFolder, data: Path) -> None:
    """Its results and permutations say less of themselves: nothing is measured again, and one line says so."""
    permutations = load_checkpoint(run.permutations)
    save_checkpoint(run.permutations, permutations.state, {"kind": "matching"})
    heard = Heard()
    results = train_star(small(data), run.path)  # the permutations are another file now: measured again
    run.results.write_text(json.dumps(results, indent=1))
    run.config.write_text(small(data).to_yaml())
    assert finished_results(small(data), run, heard) == results
    assert [line for line in heard.lines if "without a digest" in line] == [heard.lines[0]]
    outcome = fastar("report", run.path)
    assert (outcome.code, outcome.err.count("without a digest")) == (0, 1)
    assert overview(run.path).state == "finished"


# B13: JSON

BAD: dict[str, bytes] = {
    "nothing": b"",
    "half": b'{"a": ',
    "a list": b"[]",
    "a number": b"3",
    "NaN": b'{"a": [NaN]}',
    "infinite": b'{"a": {"b": 1e999}}',
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "many digits": b'{"a": ' + b"9" * 4000 + b"}",
    "deep": b'{"a": ' * 100_000,
    "deep and whole": b'{"a": ' * 300 + b"1" + b"}" * 300,
    "brackets": b"[" * 100_000,
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "zeros": bytes(100),
}
WRONG: dict[str, bytes] = {
    **BAD,
    "types": json.dumps(
        {"host": 3, "pid": "x", "id": [], "sent": 3, "attempt": "x", "back_to": 3, "recipe": 3, "train": [], "t": {}}
    ).encode(),
}


@pytest.mark.parametrize("content", BAD.values(), ids=list(BAD))
def test_json_that_is_no_object_of_numbers(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_object(content)
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_object(tmp_path / "file")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "results.json")
    with pytest.raises(FastarError, match=r"results\.json: no results \(not a file\)"):
        RunFolder(tmp_path).read_results()


def test_a_seal_goes_and_comes_back() -> None:
    content = {"x": 0.1 + 0.2, "y": {"10": 1, "9": None}, "z": (1, 2)}
    assert unsealed(json.loads(json.dumps(sealed(content)))) == ({**content, "z": [1, 2]}, True)
    assert unsealed({"x": 1}) == ({"x": 1}, False)


@pytest.mark.parametrize("content", WRONG.values(), ids=list(WRONG))
def test_damaged_json_ends_in_one_line(run: RunFolder, content: bytes) -> None:
    run.results.write_bytes(content)
    assert str(run.results) in refused("report", run.path)
    (run.path / lock.NAME).write_bytes(content)
    assert read_holder(run.path) is None
    assert not is_held(run.path)
    good = run.log.read()
    run.log.path.write_bytes(run.log.path.read_bytes() + content + b"\n")
    known = len(run.log.read())
    assert run.log.read()[: len(good)] == good
    assert known <= len(good) + 1
    assert (speed(run.log.read()), epoch_seconds(run.log.read())) == (speed(good), epoch_seconds(good))
    folder = run.in_training("source", 0)
    folder.mkdir(parents=True)
    (folder / RETRY).write_bytes(content)
    said: list[str] = []
    checkpoints = TrainingCheckpoints(folder, {}, load_settings(dataset="digits").checkpoint, say=said.append)
    checkpoints.recall(None)
    assert (checkpoints.attempt, checkpoints.back_to, len(said)) == (0, None, 1)
    for other in ("one", "two"):
        shutil.copytree(run.path, run.path.parent / other)
    shutil.rmtree(run.path)
    (run.path.parent / "two" / "results.json").unlink()
    outcome = fastar("runs", run.path.parent, "--json")
    assert (outcome.code, len(json.loads(outcome.out))) == (0, 2)


TYPES = [None, True, -1, 10**200, 1.5, "x", "[/red]", [], [[]], {}, {"a": []}]


@pytest.mark.parametrize("value", TYPES, ids=repr)
def test_values_of_other_types_in_a_log(run: RunFolder, value: object) -> None:
    whole = {"kind": "star", "model": "star", **vars_of_an_epoch()}
    run.log.path.write_text("".join(json.dumps({**whole, key: value}) + "\n" for key in whole))
    log = run.log.read()
    assert speed(log).keys() == {"regular", "star"}
    assert epoch_seconds(log).keys() == {"regular_epoch", "star_epoch", "matching_per_epoch"}
    assert overview(run.path).state == "finished"


def vars_of_an_epoch() -> dict[str, Any]:
    return {
        **{"epoch": 0, "loss": 1.0, "lr": 0.1, "images": 10, "seconds": 1.0, "begin_seconds": 0.1},
        **{"parts": {"load": 0.5, "forward": 0.5}, "peak_bytes": 10, "figures": {}},
    }


@pytest.mark.parametrize("value", TYPES, ids=repr)
def test_values_of_other_types_in_results(finished: Path, value: object) -> None:
    """One line, or a table and a picture that can be drawn; whichever place in it has another value."""
    whole = RunFolder(finished).read_results()

    def places(inner: Any, *keys: Any) -> list[tuple[Any, ...]]:
        items = list(inner.items() if isinstance(inner, dict) else enumerate(inner))[:12]
        found = [(*keys, key) for key, _ in items]
        inner = [(key, one) for key, one in items if isinstance(one, dict | list)]
        return found + [place for key, one in inner for place in places(one, *keys, key)]

    for place in places(whole):
        broken = json.loads(json.dumps(whole))
        inner = broken
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        try:
            check_results(broken, Path("results.json"))
        except FastarError:
            continue


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  number: 2", "  number: two"),
        ("  number: 2", "  number: [2]"),
        ("  heldout: 0", "  heldout: {}"),
        ("epochs: 2", "epochs: 1.5"),
        ("epochs: 7", "epochs: many"),
    ],
)
def test_one_damaged_folder_is_a_row(run: RunFolder, finished: Path, old: str, new: str) -> None:
    shutil.copytree(finished, run.path.parent / "whole")
    assert old in run.config.read_text()
    run.config.write_text(run.config.read_text().replace(old, new))
    found = {Path(one.run).name: one for one in runs_below(run.path.parent)}
    assert {name: one.state for name, one in found.items()} == {"run": "damaged", "whole": "finished"}
    assert found["run"].where.startswith("config.yaml: ")
    lines = fastar("runs", run.path.parent).out.splitlines()
    assert any(line.strip().startswith("run ") and "damaged: config.yaml: " in line for line in lines)


def test_an_unreadable_folder_is_a_row(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that fails (root may read everything, so the system's answer is made)."""

    def refuse(self: Path) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    (found,) = runs_below(run.path)
    assert (found.state, "Input/output error" in found.where) == ("damaged", True)


# B15: what people leave in run folders


def test_what_people_leave_in_a_training_is_theirs(run: RunFolder, data: Path) -> None:
    """Copies, notes and folders beside checkpoints: nothing ends in a traceback, nothing of theirs is deleted."""
    run.star.unlink()
    train = run.path / IN_TRAINING
    left = [
        train / "source-0000.bak" / "epoch-00001-step-00000000.safetensors",
        train / "source-0001" / "notes.txt",
        train / "source-0001" / "kept" / "epoch-00001-step-00000000.safetensors",
        train / "star-0000" / "epoch-00001-step-00000000.safetensors.bak",
        train / "star-0000" / "epoch-99999-copy.safetensors",
        train / "star-0000 (copy)" / "x",
        train / "source-",
        run.path / "tensorboard" / "star-0000" / "events.out.tfevents.1700000000.host.1.0",
        run.path / "sources" / "seed-0000.safetensors.bak",
        run.path / ".mine.tmp" / "x",
        run.path / ".swp.tmp",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    assert overview(run.path).where == "star"
    train_star(small(data), run.path)
    assert [path for path in left if not path.is_file() or path.read_text() != "mine"] == []
    assert overview(run.path).state == "finished"


@pytest.mark.parametrize(
    "name",
    [
        "star.safetensors",
        "permutations.safetensors",
        "matchings.safetensors",
        "results.json",
        "barrier.png",
        "log.jsonl",
    ],
)
def test_a_folder_with_the_name_of_a_file_is_refused_at_once(run: RunFolder, data: Path, name: str) -> None:
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).mkdir()
    before = contents(run.path)
    with pytest.raises(FastarError, match=rf"{name}: is not a file, and the run has one of this name; move it away"):
        train_star(small(data), run.path)
    assert contents(run.path) == before
    assert len(runs_below(run.path)) == 1


@pytest.mark.parametrize("name", ["in-training", "last-good", "tensorboard"])
def test_a_file_with_the_name_of_a_folder_is_refused_at_once(run: RunFolder, data: Path, name: str) -> None:
    shutil.rmtree(run.path / name, ignore_errors=True)
    (run.path / name).write_text("x")
    with pytest.raises(FastarError, match=rf"{name}: is not a folder"):
        train_star(small(data, "sources.heldout=1"), run.path)


def test_a_folder_among_given_sources_is_no_source(run: RunFolder, data: Path, tmp_path: Path) -> None:
    given = run.path / "sources"
    (given / "a.safetensors").mkdir()
    results = train_star(small(data, f"sources.folder={given}", "star.epochs=1"), tmp_path / "other")
    assert results["sources"] == 2


def test_a_pipe_named_as_a_checkpoint_is_not_waited_for(run: RunFolder, data: Path) -> None:
    run.star.unlink()
    run.in_training("star", 0).mkdir(parents=True)
    os.mkfifo(run.in_training("star", 0) / "epoch-00001-step-00000000.safetensors")
    with pytest.raises(FastarError, match="is not a file, and has the name of a checkpoint"):
        train_star(small(data), run.path)


def test_checkpoints_go_and_the_rest_stays(tmp_path: Path) -> None:
    folder = tmp_path / IN_TRAINING / "source-0000"
    folder.mkdir(parents=True)
    own = [folder / "epoch-00001-step-00000002.safetensors", folder / RETRY]
    for path in [*own, folder / "mine"]:
        path.write_text("x")
    remove_checkpoints(folder)
    assert [path.name for path in folder.iterdir()] == ["mine"]
    (folder / "mine").unlink()
    remove_checkpoints(folder)
    assert list(tmp_path.iterdir()) == []


def test_event_files_of_others_are_left_out(tmp_path: Path) -> None:
    for name in ("events.out.tfevents.x", "events.out.tfevents.1700000000.host", "events.out.tfevents."):
        (tmp_path / name).write_text("theirs")
    (tmp_path / "events.out.tfevents.0000000003").write_text("ours")
    file = EventFile(tmp_path)
    file.add(1, {"loss": 1.0})
    file.close()
    assert (tmp_path / "events.out.tfevents.0000000004").stat().st_size > 0


def test_a_file_far_too_large_is_not_read(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "log.jsonl"):
        with (run / name).open("wb") as file:
            file.truncate(1 << 40)  # a hole: it takes no space
    assert "larger than" in refused("train-star", "--dataset", "digits", "--out", run)
    (run / "config.yaml").unlink()
    assert "longer than" in refused("train-star", "--config", run / "log.jsonl")
    with pytest.raises(FastarError, match="larger than"):
        RunFolder(run).log.read()
