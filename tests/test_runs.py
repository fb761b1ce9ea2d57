"""Run folders: one run each, one writer at a time, nothing half-written."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastar.config import Settings, load_settings
from fastar.errors import FastarError
from fastar.runs import RunFolder, commit, hold, versions
from fastar.runs.model_files import save_checkpoint
from fastar.runtime.progress import SilentProgress


class Said(SilentProgress):
    """Gives lines to a function."""

    def __init__(self, line: Callable[[str], object]):
        self.line = line  # type: ignore[method-assign,assignment]


def settings(*overrides: str) -> Settings:
    return load_settings(dataset="digits", overrides=overrides)


def finish_source(run: RunFolder, kind: str = "source") -> None:
    save_checkpoint(run.model(kind, 0), {"w": torch.ones(1)}, {})


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with one source and no star."""
    run = RunFolder(tmp_path / "run")
    with run.open(settings()):
        finish_source(run)
    return run


def refusal(run: RunFolder, wanted: Settings) -> str:
    with pytest.raises(FastarError) as caught, run.open(wanted):
        pytest.fail("opened")
    assert "\n" not in str(caught.value)
    assert str(run.path) in str(caught.value)
    return str(caught.value)


def test_names_of_what_is_in_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.model("source", 0) == tmp_path / "sources" / "seed-0000.safetensors"
    assert run.model("heldout", 12) == tmp_path / "heldout" / "seed-0012.safetensors"
    assert [p.name for p in (run.star, run.results, run.picture, run.log.path, run.config)] == [
        "star.safetensors",
        "results.json",
        "barrier.png",
        "log.jsonl",
        "config.yaml",
    ]


def test_config_is_the_resolved_settings(run: RunFolder) -> None:
    assert load_settings(file=run.config) == settings()
    assert run.saved_settings() == settings().model_dump(mode="json")


def test_goes_on_with_the_same_settings(run: RunFolder) -> None:
    with run.open(settings()):
        pass


@pytest.mark.parametrize(
    "change",
    [
        "train.lr=0.2",
        "train.epochs=3",
        "model.width=77",
        "seed=1",
        "dataset.limit=100",
    ],
)
def test_another_run_is_refused_and_the_difference_named(run: RunFolder, change: str) -> None:
    before = run.config.read_bytes()
    message = refusal(run, settings(change))
    key, _, value = change.partition("=")
    assert f"{key} was " in message
    assert f"now {value}" in message
    assert run.config.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    ["dataset.root=/elsewhere", "dataset.directory=/elsewhere", "workers=1", "device=cpu", "evaluation.points=3"],
)
def test_where_and_how_it_is_measured_may_change(run: RunFolder, change: str) -> None:
    save_checkpoint(run.star, {"w": torch.ones(1)}, {})
    with run.open(settings(change)):
        pass
    assert run.saved_settings() == settings(change).model_dump(mode="json")


def test_heldouts_may_be_added_but_not_taken_away(run: RunFolder) -> None:
    save_checkpoint(run.star, {"w": torch.ones(1)}, {})
    with run.open(settings("sources.heldout=9")):
        pass
    assert "sources.heldout was 9, now 8" in refusal(run, settings("sources.heldout=8"))


@pytest.mark.parametrize("change", ["sources.number=77", "star.t=beta", "matching.restarts=2"])
def test_the_star_s_settings_may_change_until_there_is_a_star(run: RunFolder, change: str) -> None:
    with run.open(settings(change)):
        pass
    save_checkpoint(run.star, {"w": torch.ones(1)}, {})
    assert change.partition("=")[0] in refusal(run, settings())


def test_a_run_that_finished_nothing_may_become_another(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with run.open(settings("train.lr=1000")):
        run.log.append(kind="source", model="source 0", loss=1e9)
    with run.open(settings("train.lr=0.1")):
        finish_source(run)
    assert run.saved_settings()["train"]["lr"] == 0.1


@pytest.mark.parametrize("error", [FastarError, KeyboardInterrupt, RuntimeError])
def test_a_failure_before_anything_was_done_leaves_no_trace(tmp_path: Path, error: type[BaseException]) -> None:
    run = RunFolder(tmp_path / "a" / "run")
    with pytest.raises(error), run.open(settings()):
        raise error("x")
    assert not run.path.exists()
    run.path.mkdir()
    with pytest.raises(error), run.open(settings()):
        raise error("x")
    assert list(run.path.iterdir()) == []  # the user's own folder stays


def test_a_failure_after_something_was_done_keeps_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), run.open(settings()):  # noqa: PT012 (what is done inside matters)
        finish_source(run)
        raise KeyboardInterrupt
    assert run.config.is_file()
    assert run.model("source", 0).is_file()


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"", "no settings"), (b"- 1\n", "no settings"), (b"a: [", "YAML"), (b"\xff\xfe\x00", "YAML")],
)
def test_damaged_config_is_refused(run: RunFolder, content: bytes, part: str) -> None:
    run.config.write_bytes(content)
    assert part in refusal(run, settings())
    assert run.config.read_bytes() == content


def test_config_with_an_odd_value_is_a_difference(run: RunFolder) -> None:
    content = yaml.safe_load(run.config.read_text())
    content["sources"]["heldout"] = None
    run.config.write_text(yaml.safe_dump(content))
    assert "sources.heldout was None" in refusal(run, settings())


def test_deleted_config_is_refused(run: RunFolder) -> None:
    run.config.unlink()
    assert "no config.yaml" in refusal(run, settings())


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert "letter.txt" in refusal(RunFolder(tmp_path), settings())
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("below", ["", "sub/run"])
def test_a_file_in_the_way(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FastarError, match="is a file; choose another"):
        RunFolder(tmp_path / "file" / below).check(settings())


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(FastarError, match="File name too long"):
        RunFolder(tmp_path / ("x" * 300)).check(settings())
    if Path("/proc/self").exists():
        with pytest.raises(FastarError, match="cannot be used"), RunFolder(Path("/proc/fastar-run")).open(settings()):
            pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FastarError, match="Permission denied"), RunFolder(tmp_path / "run").open(settings()):
        pass


def test_two_processes_share_it(run: RunFolder) -> None:
    """As two `RunFolder`s do."""
    other = RunFolder(run.path)
    with run.open(settings()), other.open(settings()):
        assert [str(one) for one in run.processes.others()] == [f"process {os.getpid()} on {socket.gethostname()}"]
        with run.claim("source", 5) as first, other.claim("source", 5) as second, other.claim("source", 6) as third:
            assert (first, second, third) == (True, False, True)
        with pytest.raises(FastarError, match="in use by another fastar"), RunFolder(run.path).held():
            pytest.fail("held")
        assert "with other settings (sources.number is 30 there, 7 here)" in refusal(
            other, settings("sources.number=7")
        )
        with RunFolder(run.path).open(settings("evaluation.points=3")):  # not what models depend on
            pass
    assert run.processes.others() == []
    assert not (run.path / "processes").exists()


def test_it_is_waited_for_while_a_command_on_finished_runs_holds_it(run: RunFolder) -> None:
    code = (
        "import fcntl, os, sys\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    said: list[str] = []
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        stdin = other.stdin
        with run.open(settings(), Said(lambda line: (said.append(line), stdin.close()))):
            pass
    assert said == [f"waiting: {run.path}: in use by another fastar"]


def test_the_folder_is_held_by_nobody_inside_and_after_an_error(run: RunFolder) -> None:
    with pytest.raises(RuntimeError), run.open(settings()):  # noqa: PT012 (what holds inside is the test)
        with hold(run.path):
            pass
        raise RuntimeError
    with hold(run.path):
        pass


def test_debris_of_a_killed_process_is_removed(run: RunFolder) -> None:
    debris = [run.path / ".star.safetensors.123.tmp", run.path / "sources" / ".seed-0001.safetensors.123.tmp"]
    for path in debris:
        path.write_bytes(b"half")
    with run.open(settings()):
        assert not any(path.exists() for path in debris)
        assert run.model("source", 0).is_file()
        debris[0].write_bytes(b"half")
        with RunFolder(run.path).open(settings()):  # another's, which is writing
            assert debris[0].exists()


def test_a_process_killed_before_its_config_was_written_blocks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.123.tmp").write_text("half")
    with RunFolder(tmp_path).open(settings()):
        assert {p.name for p in tmp_path.iterdir()} == {"config.yaml", "processes"}


def test_log_is_a_line_per_entry_unrounded(run: RunFolder) -> None:
    entries = [{"kind": "source", "loss": 0.1 + 0.2}, {"kind": "star", "model": "ü"}]
    for entry in entries:
        run.log.append(**entry)
    lines = [json.loads(line) for line in run.log.path.read_text().splitlines()]
    assert [{key: line[key] for key in line if key != "checksum"} for line in lines] == entries
    assert run.log.read() == entries


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_log_cut_anywhere_loses_one_line_and_goes_on(run: RunFolder, cut: int) -> None:
    for loss in (1, 2, 3):
        run.log.append(loss=loss, more={"x": 1})
    data = run.log.path.read_bytes()
    run.log.path.write_bytes(data[:-cut])
    run.log.append(loss=4)
    losses = [entry["loss"] for entry in run.log.read()]
    assert losses == ([1, 2, 3, 4] if cut == 1 else [1, 2, 4])


def epochs(*pairs: tuple[str, int], loss: float = 1.0) -> list[dict[str, Any]]:
    return [{"kind": "source", "model": model, "epoch": epoch, "loss": loss} for model, epoch in pairs]


def test_a_log_is_brought_back_to_where_its_model_goes_on(run: RunFolder) -> None:
    first = epochs(("source 0", 0), ("source 0", 1), ("source 1", 0), ("source 1", 1), ("source 1", 2))
    for entry in first:
        run.log.append(**entry)
    run.log.repair({"source 1": epochs(("source 1", 0), ("source 1", 1), loss=9.0)})
    assert run.log.read() == first[:4]  # what was done after the checkpoint goes; what is there stays as it is
    data = run.log.path.read_bytes()
    run.log.path.write_bytes(data[: data.rindex(b'{"kind"')])  # a power cut
    run.log.repair({"source 1": epochs(("source 1", 0), ("source 1", 1), loss=9.0)})
    assert run.log.read() == [*first[:3], *epochs(("source 1", 1), loss=9.0)]
    run.log.repair({"source 1": []})
    assert run.log.read() == first[:2]


def test_a_log_that_says_the_same_is_not_written_again(run: RunFolder) -> None:
    for entry in epochs(("source 0", 0), ("source 0", 1)):
        run.log.append(**entry)
    before = run.log.path.stat()
    run.log.repair({"source 0": epochs(("source 0", 0), ("source 0", 1))})
    run.log.repair({"source 1": []})
    assert run.log.path.stat().st_ino == before.st_ino
    run.log.append(**epochs(("source 0", 1))[0])  # twice, as an interrupted attempt of old left it
    run.log.repair({"source 0": epochs(("source 0", 0), ("source 0", 1))})
    assert [entry["epoch"] for entry in run.log.read()] == [0, 1]


def test_foreign_lines_in_the_log_are_left_out(run: RunFolder) -> None:
    run.log.path.write_bytes(b'\xff\xfe}\n[1]\n"x}"\n\n{"a": 1}\n{}}\n')
    assert run.log.read() == [{"a": 1}]


def test_a_full_disk_while_logging(run: RunFolder) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    run.log.path.symlink_to("/dev/full")
    with pytest.raises(FastarError, match="No space left on device"):
        run.log.append(loss=1)


def test_results_are_written_unrounded_and_read_back(run: RunFolder) -> None:
    results = {"x": 0.1 + 0.2, "none": None, "paths": [{"t": [0.0, 1.0]}]}
    run.write_results(results)
    written = json.loads(run.results.read_text())
    assert {key: written[key] for key in results} == results == run.read_results()


@pytest.mark.parametrize(("content", "part"), [(None, "train-star"), ("", "JSON"), ("{", "JSON"), ("[]", "no results")])
def test_missing_and_damaged_results(run: RunFolder, content: str | None, part: str) -> None:
    if content is not None:
        run.results.write_text(content)
    with pytest.raises(FastarError, match=part) as caught:
        run.read_results()
    assert "\n" not in str(caught.value)


def test_versions_name_what_results_depend_on() -> None:
    found: dict[str, Any] = versions()
    assert {"fastar", "commit", "python", "torch", "numpy", "scipy", "ffcv", "lapjv", "triton", "numba"} == set(found)
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_commit_is_the_checkout_s() -> None:
    here = Path(__file__).resolve().parent
    head = subprocess.run(["git", "-C", here, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        assert commit.__wrapped__() == (os.environ.get("FASTAR_COMMIT") or "unknown")
    else:  # asked anew: there may have been one since a test asked first
        assert commit.__wrapped__().removesuffix("+changes") == head.stdout.strip()


@pytest.mark.parametrize(("told", "wanted"), [("0123456789ab", "0123456789ab"), ("", "unknown"), (None, "unknown")])
def test_a_copy_without_git_is_told_its_commit(monkeypatch: pytest.MonkeyPatch, told: str | None, wanted: str) -> None:
    monkeypatch.setenv("PATH", "")  # no git to be found
    if told is None:
        monkeypatch.delenv("FASTAR_COMMIT", raising=False)
    else:
        monkeypatch.setenv("FASTAR_COMMIT", told)
    assert commit.__wrapped__() == wanted
