"""Runs that a launcher spreads: what is started, by whom, and what is said; on this machine."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from cli_cases import contents, fastar, refused
from launch_cases import scripts
from run_cases import Heard, assert_log_is_whole, assert_same_models, small

from fastar.errors import FastarError
from fastar.launch import local
from fastar.launch.jobs import Launcher, run_jobs
from fastar.launch.local import Places, companions, work, workers
from fastar.launch.shared_folder import check_handshake, left_handshake, say_if_without_locks
from fastar.report.run_list import overview
from fastar.runs import RunFolder


@pytest.fixture(scope="module")
def results(whole: Path) -> list[object]:
    return json.loads((whole / "results.json").read_text())["paths"]


def test_two_workers_end_in_the_bits_of_one_process(
    tmp_path: Path, options: list[str], whole: Path, results: list[object]
) -> None:
    run = tmp_path / "run"
    command = [*options, "checkpoint.minutes=0", "--out", run]
    outcome = fastar("train-star", *command, "--launcher", "local:2")
    assert outcome.code == 0, outcome.err
    assert f"results: {run}/results.json" in outcome.out
    assert_same_models(run, whole)
    assert_log_is_whole(run, whole)
    assert json.loads((run / "results.json").read_text())["paths"] == results
    assert {path.name for path in (run / "jobs").iterdir()} == {"local-worker-1.log", "local-worker-2.log"}
    # Where all is finished nothing is started, whoever would.
    before = contents(run)
    for launcher in ("local:2", "slurm", "ray"):
        assert fastar("train-star", *command, "--launcher", launcher).code == 0
    assert contents(run) == before


@pytest.mark.parametrize("launcher", ["local:2", "slurm:2", "ray:2"])
def test_a_dry_run_lists_the_jobs_and_starts_none(tmp_path: Path, options: list[str], launcher: str) -> None:
    out = tmp_path / "run"
    plan = [*options, "sources.number=3", "--out", out, "--launcher", launcher, "--dry-run"]
    found = json.loads(fastar("train-star", *plan, "--json").out)
    lines = fastar("train-star", *plan).out.splitlines()
    assert not out.exists()
    assert found["at_once"] == 2
    assert len(found["jobs"]) == (2 if launcher == "local:2" else 3)
    assert lines[0] == f"{len(found['jobs'])} jobs, 2 at once:"
    for line in found["jobs"]:
        name, command, *arguments = shlex.split(line)
        assert (name, command) == ("fastar", "train-sources")
        assert arguments[arguments.index("--out") + 1] == str(out)
        assert "sources.number=3" in arguments
    assert [shlex.split(line)[-2:] for line in found["jobs"]] == (
        [["workers=1", "sources.number=3"]] * 2
        if launcher == "local:2"
        else [["--only", str(number)] for number in range(3)]
    )
    after = [[shlex.split(line) for line in stage] for stage in found["then"]]
    assert all(line[:2] == ["fastar", "train-star"] for stage in after for line in stage)
    by = [[line[-2:] for line in stage] for stage in after]
    assert by == (
        [[["workers=1", "sources.number=3"]]]
        if launcher == "local:2"
        else [[["--measured-by", "0"]], [["--measured-by", "2"]] * 2]
    )
    assert [line for line in lines if line.startswith("then")] == [
        f"then {len(stage)} job{'s' * (len(stage) > 1)}:" for stage in after
    ]
    wanted = {"local:2": "thread", "slurm:2": "--time=240", "ray:2": "1 CPU"}[launcher]
    assert wanted in found["resources"]
    assert wanted in lines[-1]


def test_jobs_get_the_options_of_the_user(tmp_path: Path) -> None:
    given = ["--model", "mynets:build", "--model-args", "width=4", "--model-args", "name='a b'", "--allow-partial"]
    rest = ["--data", "mydata.py:both", "--scale", "small", "train.epochs=3", "device=cpu"]
    found = fastar(
        "sweep", "mu", "0.1,0.2", *given, *rest, "--seeds", 2, "--out", tmp_path, "--launcher", "ray", "--dry-run"
    )
    commands = [shlex.split(line) for line in found.out.splitlines() if line.startswith("  ")]
    assert len(commands) == 5  # a job for each point, and the last
    for command in commands:
        assert command[:4] == ["fastar", "sweep", "mu", "0.1,0.2"]
        assert "train.epochs=3" in command
        given_again = [(one, other) for one, other in itertools.pairwise(command) if one.startswith("--")]
        pairs = list(zip(given[0:6:2], given[1:6:2], strict=True))
        assert set(pairs) <= set(given_again)
        assert {("--data", "mydata.py:both"), ("--scale", "small"), ("--seeds", "2")} <= set(given_again)
        assert "--allow-partial" in command


def test_only_what_is_missing_is_a_job(tmp_path: Path, data: Path) -> None:
    settings, run = small(data, "sources.number=3", "sources.heldout=1"), RunFolder(tmp_path)
    run.model("source", 1).parent.mkdir()
    run.model("source", 1).touch()
    jobs = run_jobs(settings, run, [])
    assert [(job.name, job.arguments[-1]) for job in jobs.parts] == [
        ("source-0", "0"),
        ("source-2", "2"),
        ("heldout-0", "3"),
    ]
    assert jobs.missing() == ["source 0", "source 2", "heldout 0"]
    others = tmp_path / "others"
    others.mkdir()
    for number in range(9):
        (others / f"{number}.safetensors").touch()
    given = run_jobs(small(data, "sources.heldout=1", f"sources.folder={others}"), run, [])
    assert [(job.name, job.arguments[-1]) for job in given.parts] == [("heldout-0", "0")]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--launcher", "lokal"], ["--launcher lokal", "local, slurm, ray"]),
        (["--launcher", "local:two"], ["--launcher local:two", "local:4"]),
        (["--launcher", "local:0"], ["--launcher local:0", "local:2"]),
        (["--launcher", "ray:-1"], ["--launcher ray:-1", "ray:2"]),
        (["--dry-run"], ["--dry-run", "--launcher"]),
        (["--launcher", "ray", "--sbatch", "time=5"], ["--sbatch", "slurm"]),
        (["--launcher", "ray", "--measured-by", "4"], ["--measured-by 4", "leave it out"]),
        (["--measured-by", "-1"], ["--measured-by -1", "0 or more"]),
        (["--launcher", "slurm", "--dry-run", "--sbatch", "time"], ["--sbatch time", "key=value"]),
        (["--launcher", "local:2", "--sources-from", "nix/*.safetensors"], ["nix/*.safetensors", "checkpoint"]),
        (["--launcher", "local:2", "sources.number=1000000000"], ["1,000,000,000 models", "100,000 jobs"]),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(
    tmp_path: Path, options: list[str], arguments: list[str], parts: list[str]
) -> None:
    line = refused("train-star", *options, "--out", tmp_path / "run", *arguments)
    assert [part for part in parts if part not in line] == []
    assert not (tmp_path / "run").exists()


def test_workers_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastar.runtime.device.cpus", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    on_cpu = Places("cpu", 3, 99)
    assert (on_cpu.number, on_cpu.environment(2)) == (3, {"OMP_NUM_THREADS": "2"})
    assert Places("cpu", None, 99).number == 8
    assert Places("cpu", None, 2).threads == 4  # there are two models
    monkeypatch.setattr(local, "visible_gpus", lambda device: ["2", "5"])
    on_gpus = Places("auto", None, 99)
    assert [on_gpus.environment(k)["CUDA_VISIBLE_DEVICES"] for k in range(on_gpus.number)] == ["2", "5"]
    assert [Places("auto", 3, 99).environment(k)["CUDA_VISIBLE_DEVICES"] for k in range(3)] == ["2", "5", "2"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert on_gpus.environment(0)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(local, "visible_gpus", lambda device: ["0"])
    assert "CUDA_VISIBLE_DEVICES" not in Places("auto", None, 99).environment(0)


def test_processes_on_other_gpus_measure_with_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are several; nothing else was missing."""
    code = f"import os; open({str(tmp_path)!r} + '/on-' + os.environ['CUDA_VISIBLE_DEVICES'], 'x').close()"
    for gpus, wanted in (["4"], []), (["4", "5", "6"], ["on-5", "on-6"]):
        monkeypatch.setattr(local, "visible_gpus", lambda device, gpus=gpus: gpus)
        jobs = scripts(tmp_path / "run", "pass", makes=[], last=code)
        with companions(jobs, Places("auto", None, 0), Heard()):
            pass
        assert sorted(path.name for path in tmp_path.glob("on-*")) == wanted


def test_gpus_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [local.visible_gpus(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == [
        ["0", "1"],
        ["0", "1"],
        ["1"],
        [],
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    assert local.visible_gpus("auto") == ["3", "7"]


def test_a_failed_workers_line_is_shown_once_and_others_go_on(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\n"
        "sys.stderr.write('fastar: no such thing\\n'); sys.stderr.flush()\n"
        f"try: open({str(tmp_path / 'first')!r}, 'x')\n"
        "except FileExistsError: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(2)\n"
    )
    heard = Heard()
    with pytest.raises(FastarError, match=r"second could not be made \(1 in all\): no such thing$"):
        work(scripts(tmp_path, code, makes=["first", "second"]), Places("cpu", 2, 2), heard)
    assert sorted(line[3:] for line in heard.lines) == [
        " fastar: no such thing",
        " killed by SIGKILL; what it left is there for others to go on with",
    ]
    logs = [path.read_text() for path in sorted((tmp_path / "jobs").iterdir())]
    assert logs == ["fastar: no such thing\n"] * 2


def test_what_all_workers_refuse_leaves_nothing(tmp_path: Path, options: list[str]) -> None:
    command = ["train-star", *options, "dataset.name=mnist", f"dataset.root={tmp_path}", "--out", tmp_path / "run"]
    line = refused(*command, "--launcher", "local:2")
    assert "mnist" in line
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_is_killed_costs_nothing_where_another_does_its_work(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        f"try: open({str(tmp_path / 'first')!r}, 'x')\n"
        "except FileExistsError: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    heard = Heard()
    work(scripts(tmp_path, code, makes=["first"]), Places("cpu", 2, 2), heard)
    assert [line[3:] for line in heard.lines] == [" killed by SIGKILL; what it left is there for others to go on with"]


def test_workers_that_are_all_killed_are_the_reason(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(FastarError, match=r"first could not be made \(1 in all\): worker 1 was killed by SIGKILL; run"):
        work(scripts(tmp_path, code, makes=["first"]), Places("cpu", 2, 2), Heard())


def test_a_worker_that_is_killed_is_said_while_others_work(tmp_path: Path) -> None:
    """The other ends once it was said."""
    code = (
        "import os, signal, time\n"
        f"try: open({str(tmp_path / 'first')!r}, 'x')\n"
        "except FileExistsError: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"while not os.path.exists({str(tmp_path / 'said')!r}): time.sleep(0.01)\n"
    )

    class Answering(Heard):
        def line(self, text: str) -> None:
            super().line(text)
            if "SIGKILL" in text:
                (tmp_path / "said").touch()

    heard = Answering()
    work(scripts(tmp_path, code, makes=["first", "said"]), Places("cpu", 2, 2), heard)
    assert len(heard.lines) == 1


def test_a_second_interruption_kills_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[subprocess.Popen[bytes]]()

    def interrupted(process: subprocess.Popen[bytes]) -> int:
        started.append(process)
        raise KeyboardInterrupt

    def stopped() -> None:
        with workers(scripts(tmp_path, "import time; time.sleep(600)", makes=[]).worker, [{}], tmp_path, Heard()):
            monkeypatch.setattr(subprocess.Popen, "terminate", lambda process: None)
            monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    monkeypatch.undo()
    assert started[0].wait() == -signal.SIGKILL


def test_workers_save_when_the_launcher_is_stopped(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\n"
        f"here = os.path.join({str(tmp_path)!r}, str(os.getpid()))\n"
        "def save(number, frame): open(here + '.saved', 'x').close(); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "open(here + '.begun', 'x').close()\n"
        "time.sleep(600)\n"
    )

    class Stop(BaseException):
        pass

    def stopped_when_both_have_begun() -> None:
        with workers(scripts(tmp_path, code, makes=[]).worker, [{}, {}], tmp_path, Heard()):
            while len(list(tmp_path.glob("*.begun"))) < 2:
                time.sleep(0.01)
            raise Stop

    with pytest.raises(Stop):
        stopped_when_both_have_begun()
    assert len(list(tmp_path.glob("*.saved"))) == 2


def test_a_launcher_that_is_stopped_early_leaves_nothing(tmp_path: Path) -> None:
    """Where workers have begun something, their logs stay."""

    class Stopped(Heard):
        def line(self, text: str) -> None:
            raise KeyboardInterrupt

    for code, left in (
        ("", []),
        (f"open({str(tmp_path / 'run' / 'config.yaml')!r}, 'x').close()\n", ["config.yaml", "jobs"]),
    ):
        said = f"{code}import sys, time; print('begun', file=sys.stderr, flush=True); time.sleep(600)"
        with pytest.raises(KeyboardInterrupt):
            work(scripts(tmp_path / "run", said, makes=["first"]), Places("cpu", 1, 1), Stopped())
        assert sorted(path.name for path in (tmp_path / "run").glob("*")) == left
        assert (tmp_path / "run").exists() == bool(left)


def test_a_folder_that_a_host_does_not_share_is_said(tmp_path: Path) -> None:
    path = left_handshake(tmp_path / "run" / "jobs")
    check_handshake(path)
    path.unlink()
    with pytest.raises(FastarError, match=r"run: on \S+ this is not the folder .* that all nodes share"):
        check_handshake(path)


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    say_if_without_locks(tmp_path, heard)
    assert heard.lines == []

    def none(*_: object, **__: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock, "lock_descriptor", none)
    say_if_without_locks(tmp_path, heard)
    (line,) = heard.lines
    assert "no locks" in line
    assert "lock.json" in line
    assert list(tmp_path.iterdir()) == []


def test_the_list_of_runs_says_how_many_models_are_in_training(tmp_path: Path, data: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with (
        run.open(small(data, "sources.number=3")),
        run.claim("source", 0),
        run.claim("source", 1),
        run.claim("source", 2),
    ):
        run.log.append(model="source 1", kind="source", epoch=0, loss=0.5)
        found = overview(run.path)
    assert (found.state, found.where) == ("running", "source 1, epoch 2 of 2 and 2 more")


def test_the_launcher_of_a_text() -> None:
    assert Launcher.read("local") == Launcher("local", None)
    assert Launcher.read("slurm:35") == Launcher("slurm", 35)


@pytest.mark.slow
def test_workers_find_the_users_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the current folder, and a network that is not trained together with others."""
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build(width=4):\n"
        "    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), "
        "nn.Linear(36 * width, 3))\n"
        "def both():\n"
        "    g = torch.Generator().manual_seed(0)\n"
        "    x, y = torch.randn(90, 1, 8, 8, generator=g), torch.randint(3, (90,), generator=g)\n"
        "    return (x[:60], y[:60]), (x[60:], y[60:])\n"
    )
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("mine", None)
    options = [
        *("--model", "mine:build", "--model-args", "width=3", "--data", "mine:both", "--sources", 3, "--heldout", 1),
        *("train.epochs=2", "train.batch_size=20", "evaluation.points=3", "device=cpu", "workers=1", "--quiet"),
    ]
    assert fastar("train-star", *options, "--out", "one").code == 0
    outcome = fastar("train-star", *options, "--out", "two", "--launcher", "local:2")
    assert outcome.code == 0, outcome.err
    assert_same_models(tmp_path / "two", tmp_path / "one")
    found = [json.loads((tmp_path / name / "results.json").read_text())["paths"] for name in ("one", "two")]
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_sweep_of_two_workers_is_that_of_one_process(tmp_path: Path, options: list[str]) -> None:
    sweep = ["sweep", "mu", "0.1,0.3", *options, "checkpoint.minutes=0"]
    assert fastar(*sweep, "--out", tmp_path / "one").code == 0
    outcome = fastar(*sweep, "--out", tmp_path / "two", "--launcher", "local:2")
    assert outcome.code == 0, outcome.err
    for point in ("mu=0.1", "mu=0.3"):
        assert_same_models(tmp_path / "two" / "points" / point, tmp_path / "one" / "points" / point)
    assert os.path.isfile(tmp_path / "two" / "sweep.json")
