"""`fastar runs`: where each run stands, from its files alone."""

from __future__ import annotations

import doctest
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_cases import contents, fastar, refused
from rich.console import Console
from run_cases import at_call, small

from fastar.experiments import train_star
from fastar.report import run_list as overview_module
from fastar.report.run_list import RunOverview, overview, overview_table, runs_below
from fastar.runs import RunFolder, hold
from fastar.training import RegularStep, StarStep


class Killed(BaseException):
    """As a signal: nothing catches it."""


def cut(folder: Path, data: Path, kind: type, step: int, *overrides: str) -> None:
    """A run that was killed in step number `step` (from 1) of this kind."""

    def kill() -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, kind, step, kill)
        with pytest.raises(Killed):
            train_star(small(data, *overrides), folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in all states, the finished one deeper down; not to be changed."""
    folder, data = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("data")
    train_star(small(data, "sources.heldout=1"), folder / "old" / "finished")
    cut(folder / "star", data, StarStep, 5)
    cut(folder / "source", data, RegularStep, 10)
    cut(folder / "nothing saved", data, RegularStep, 7, "checkpoint.epochs=0", "checkpoint.minutes=0")
    (folder / "no run").mkdir()
    (folder / "no run" / "config.yaml").write_text("a: 1\n")
    return folder


@pytest.mark.parametrize("width", [72, 80, 200])
def test_names_give_way_and_figures_do_not(width: int) -> None:
    found = [
        RunOverview(
            run="experiments/" + "long-" * 20 + str(n),
            state="stopped",
            where="heldout 4, epoch 3, step 1001 of 200",
            age=59.0 + n,
            sources="30/30",
            heldout="5/5",
            loss=12.3456,
            barrier=0.8754,
            star_accuracy=0.9375,
        )
        for n in range(2)
    ]
    console = Console(file=io.StringIO(), width=width)
    console.print(overview_table(found, Path(".")))
    text = str(console.file.getvalue())  # type: ignore[attr-defined]
    for word in ("accuracy", "barrier"):
        assert word in text.split()
    for figure in ("12.346", "0.875", "0.938", "30/30 + 5/5"):
        assert text.count(figure) == 2
    assert "59 s" in text
    assert "1 min" in text


def test_a_pipe_is_as_wide_as_what_goes_into_it(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    deep = tmp_path / ("a" * 60)
    deep.symlink_to(runs / "old")
    (line,) = (line for line in fastar("runs", deep).out.splitlines() if "finished" in line)
    run = overview(deep / "finished")
    assert run.loss is not None
    assert line.split()[-3] == f"{run.loss:.3f}"
    path = str(deep.parent / ("a" * 60) / "finished")
    assert fastar("runs", path).out.count(path) == 1  # on one line


def test_every_state_is_told(runs: Path) -> None:
    found = {Path(run.run).name: run for run in runs_below(runs)}
    assert set(found) == {"finished", "star", "source", "nothing saved"}
    states = {name: (run.state, run.where, run.sources, run.heldout) for name, run in found.items()}
    assert states == {
        "finished": ("finished", "", "2/2", "1/1"),
        "star": ("stopped", "star, epoch 2, step 2 of 7", "2/2", "0/0"),
        "source": ("stopped", "source 1, epoch 2 of 2", "1/2", "0/0"),
        "nothing saved": ("stopped", "source 1", "1/2", "0/0"),
    }
    assert all(run.age >= 0 for run in found.values())


def test_figures_are_those_of_the_run(runs: Path) -> None:
    run = RunFolder(runs / "old" / "finished")
    found, results = overview(run.path), run.read_results()
    assert found.barrier == results["train"]["star_heldout"]["mean"]
    assert found.star_accuracy == results["accuracy"]["test"]["star"]
    assert found.loss == run.log.read()[-1]["loss"]
    stopped = overview(runs / "star")
    assert (stopped.barrier, stopped.star_accuracy) == (None, None)
    assert stopped.loss == RunFolder(runs / "star").log.read()[-1]["loss"]


def test_a_running_one_is_told_by_its_lock(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "star", tmp_path / "run"))
    with hold(folder):
        found = overview(folder)
    # By the log, which is newer than the last checkpoint.
    assert (found.state, found.where) == ("running", "star, epoch 2 of 7")
    assert overview(folder).state == "stopped"


def test_results_of_fewer_models_than_are_asked_for_are_not_the_end(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs / "old" / "finished", tmp_path / "run"))
    run = RunFolder(folder)
    run.config.write_text(run.config.read_text().replace("heldout: 1", "heldout: 2"))
    found = overview(folder)
    assert (found.state, found.where, found.heldout) == ("stopped", "heldout 1", "1/2")


def test_the_last_written_comes_first(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs, tmp_path / "runs"))
    for path in (folder / "source").rglob("*"):
        os.utime(path, (2e9, 2e9))
    assert Path(runs_below(folder)[0].run).name == "source"


def test_the_command_shows_them_and_changes_nothing(runs: Path) -> None:
    before = contents(runs)
    outcome = fastar("runs", runs, "--json")
    assert outcome.code == 0
    listed = json.loads(outcome.out)
    assert len(listed) == 4
    assert {"run", "state", "where", "age", "loss", "barrier"} <= listed[0].keys()
    lines = [line.strip() + " " for line in fastar("runs", runs).out.splitlines()]
    assert any(line.startswith("old/finished ") and " finished " in line and " 2/2 + 1/1 " in line for line in lines)
    assert any(line.startswith("source ") and " stopped at source" in line for line in lines)
    assert contents(runs) == before


def test_where_there_are_none(tmp_path: Path) -> None:
    assert fastar("runs", tmp_path).out == f"no run folders in {tmp_path}\n"
    assert "no such folder" in refused("runs", tmp_path / "nowhere")


def test_damaged_files_do_not_hide_the_others(runs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(runs, tmp_path / "runs"))
    (folder / "star" / "config.yaml").write_text("a: [")
    (folder / "source" / "log.jsonl").write_bytes(b"\xff{")
    (folder / "old" / "finished" / "results.json").write_text("{")
    found = {Path(run.run).name: run for run in runs_below(folder)}
    assert set(found) == {"finished", "star", "source", "nothing saved"}
    assert found["source"].loss is None
    assert found["finished"].state == found["star"].state == "damaged"
    assert found["finished"].where.startswith("results.json: holds no results (not valid JSON")
    assert found["star"].where.startswith("config.yaml: not valid YAML")


@pytest.mark.parametrize(
    "code",
    [
        "from fastar.cli.main import main; main(['runs', str(folder)])",
        "from fastar.cli.main import main; main(['report', str(folder)])",
        "from fastar.experiments import train_star; from fastar.config import load_settings; "
        "assert train_star(load_settings(file=folder / 'config.yaml'), folder)",
    ],
    ids=["runs", "report", "finished"],
)
def test_what_is_there_is_told_without_torch(runs: Path, tmp_path: Path, code: str) -> None:
    folder = shutil.copytree(runs / "old" / "finished", tmp_path / "run")
    (folder / "barrier.png").touch()
    heavy = "{'torch', 'numba', 'numpy', 'matplotlib', 'filelock'}"
    check = f"import atexit, sys; atexit.register(lambda: print({heavy} & {{*sys.modules}})); "
    code = f"{check} from pathlib import Path; folder = Path(sys.argv[1]); {code}"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_examples_of_figures() -> None:
    assert doctest.testmod(overview_module).failed == 0
