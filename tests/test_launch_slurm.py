"""Runs under Slurm: by submitit's own executor, by commands that stand in for Slurm's, and in a Slurm of one node."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_cases import fastar, refused
from run_cases import Heard, assert_log_is_whole, assert_same_models, small
from slurm_cases import Slurm, one_node

from fastar.config import load_settings
from fastar.launch.jobs import run_jobs
from fastar.launch.slurm import sbatch_options, submit
from fastar.runs import RunFolder

SECONDS = 240  # for a machine with everything else to do; nothing is asserted on time


def test_options_of_sbatch() -> None:
    assert sbatch_options("auto", []) == {"gpus-per-node": "1", "time": "240"}
    assert sbatch_options("cpu", ["partition=a", "cpus_per_task=4"]) == {
        "partition": "a",
        "cpus-per-task": "4",
        "time": "240",
    }
    assert sbatch_options("cuda", ["--gres=gpu:a100:1", "time=8:00:00"]) == {"gres": "gpu:a100:1", "time": "8:00:00"}


def test_paths_are_measured_by_as_many_jobs_as_are_at_work_at_once(tmp_path: Path, data: Path) -> None:
    nine = small(data, "sources.number=7", "sources.heldout=2")
    jobs = run_jobs(nine, RunFolder(tmp_path), ["a=1"], ["--profile", "3"])
    parts, star, measure = jobs.stages(None)
    assert parts == jobs.parts
    assert [job.arguments for job in star] == [("train-star", "a=1", "--profile", "3", "--measured-by", "0")]
    assert [job.arguments for job in measure] == [("train-star", "a=1", "--measured-by", "8")] * 8
    assert len({job.name for job in (*star, *measure)}) == 9  # each with a log of its own
    assert [len(stage) for stage in jobs.stages(3)] == [9, 1, 3]
    assert [len(stage) for stage in jobs.stages(1000)] == [9, 1, 9]  # a path each
    assert jobs.stages(1) == [jobs.parts, (jobs.last,)]


def test_jobs_of_submitit_end_in_the_bits_of_one_process(
    tmp_path: Path, data: Path, options: list[str], whole: Path
) -> None:
    """Submitit's executor of this machine, which runs its jobs as those of Slurm."""
    run = RunFolder(tmp_path / "run")
    run.model("source", 0).parent.mkdir(parents=True)
    run.model("source", 0).write_bytes((whole / "sources" / "seed-0000.safetensors").read_bytes())
    (run.path / "config.yaml").write_bytes((whole / "config.yaml").read_bytes())
    jobs = run_jobs(small(data), run, [*options, "checkpoint.minutes=0", "--out", str(run.path)])
    assert [job.name for job in jobs.parts] == ["source-1"]
    submitted = submit(jobs, None, [], Heard(), cluster="local")
    for job in submitted:
        job.result()
    assert_same_models(run.path, whole)
    results = [json.loads((folder / "results.json").read_text())["paths"] for folder in (run.path, whole)]
    assert results[0] == results[1]
    assert f"results: {run.results}" in (run.path / "jobs" / f"{submitted[-1].job_id}_0_log.out").read_text()


def test_a_job_that_is_preempted_saves_before_it_is_submitted_again(tmp_path: Path) -> None:
    """The signal that submitit takes for itself reaches the command as the one that it knows."""
    command = (
        "import signal, sys, time\n"
        "def save(number, frame): print('saved', flush=True); sys.exit(75)\n"
        "signal.signal(signal.SIGUSR1, save)\n"
        "print('begun', flush=True)\n"
        "time.sleep(600)\n"
    )
    submitits = (
        "import signal, sys\n"
        "from fastar.launch.slurm import Worker\n"
        f"worker = Worker([sys.executable, '-c', {command!r}], {str(tmp_path)!r})\n"
        "def preempted(number, frame):\n"
        "    again = worker.checkpoint().function\n"
        "    print(type(again).__name__, again.command == worker.command, flush=True)\n"
        "    sys.exit()\n"
        "signal.signal(signal.SIGUSR2, preempted)\n"
        "worker()\n"
    )
    job = subprocess.Popen([sys.executable, "-c", submitits], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert job.stdout is not None
    assert job.stdout.readline() == "begun\n"
    os.killpg(job.pid, signal.SIGUSR2)  # to all processes, as Slurm does
    out, _ = job.communicate(timeout=SECONDS)
    assert (job.returncode, out) == (0, "saved\nWorker True\n")


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands that are found first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def stand_in(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_what_is_submitted(tmp_path: Path, commands: Path, options: list[str]) -> None:
    stand_in(commands / "srun", "exit 1")
    stand_in(commands / "sbatch", f'cp "$1" {tmp_path}/$$.sh; echo Submitted batch job $$')
    run = tmp_path / "run"
    outcome = fastar(
        *("train-star", *options, "sources.number=3", "--out", run, "--launcher", "slurm:2"),
        *("--sbatch", "partition=a b", "--sbatch", "mem=4G"),
    )
    assert outcome.code == 0, outcome.err
    said = r"submitted: 3 jobs \((\d+)\), then 1 job \((\d+)\), then 2 jobs \((\d+)\)\nlogs: .*\n.*\n"
    found = re.fullmatch(said, outcome.out)
    assert found is not None, outcome.out
    parts, star, measure = ((tmp_path / f"{found[number]}.sh").read_text() for number in (1, 2, 3))
    assert "#SBATCH --array=0-2%2" in parts
    assert f"#SBATCH --dependency=afterany:{found[1]}" in star
    assert f"#SBATCH --dependency=afterok:{found[2]}" in measure
    assert "#SBATCH --array=0-1%2" in measure
    for script in (parts, star, measure):
        lines = {"--partition='a b'", "--mem=4G", "--time=240", "--signal=USR2@120", "--requeue"}
        assert lines <= {line.removeprefix("#SBATCH ") for line in script.splitlines()}
        assert f"{run}/jobs" in script
        (check,) = (line for line in script.splitlines() if line.startswith("test -f"))
        here = subprocess.run(["sh", "-c", f"{check}; echo here"], capture_output=True, text=True)
        assert (here.stdout, here.stderr) == ("here\n", "")
    for handshake in (run / "jobs").glob("handshake-*"):
        handshake.unlink()
    elsewhere = subprocess.run(["sh", "-c", f"{check}; echo here"], capture_output=True, text=True)
    assert (elsewhere.returncode, elsewhere.stdout) == (2, "")
    assert re.fullmatch(rf"fastar: {run}: on \S+ this is not the folder .* that all nodes share\n", elsewhere.stderr)


def test_what_sbatch_refuses_is_one_line_and_leaves_nothing(
    tmp_path: Path, commands: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train-star", *options, "--out", tmp_path / "run", "--launcher", "slurm"]
    with monkeypatch.context() as none:
        none.setenv("PATH", str(commands))
        assert "no sbatch here" in refused(*command)
    stand_in(commands / "srun", "exit 1")
    stand_in(commands / "sbatch", "echo sbatch: error: invalid partition specified: x >&2; exit 1")
    line = refused(*command, "--sbatch", "partition=x")
    assert "invalid partition specified: x" in line
    assert "--sbatch" in line
    assert not (tmp_path / "run").exists()


def test_without_submitit_it_says_what_to_install(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    line = refused("train-star", *options, "--out", tmp_path / "run", "--launcher", "slurm")
    assert "pip install 'fastar[slurm]'" in line
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with one_node(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.mark.slow
def test_a_run_under_slurm_ends_in_the_bits_of_one_process(
    tmp_path: Path, slurm: Slurm, options: list[str], whole: Path
) -> None:
    run = tmp_path / "run"
    outcome = fastar("train-star", *options, "checkpoint.minutes=0", "--out", run, "--launcher", "slurm:2")
    assert outcome.code == 0, outcome.err
    slurm.wait(lambda: (run / "results.json").is_file() and not slurm.queue())
    assert_same_models(run, whole)
    assert_log_is_whole(run, whole)


@pytest.mark.slow
def test_where_the_star_fails_nothing_is_measured(tmp_path: Path, slurm: Slurm, options: list[str]) -> None:
    run = tmp_path / "run"
    outcome = fastar("train-star", *options, "star.lr=1e30", "--out", run, "--launcher", "slurm:2")
    assert re.search(r", then 1 job \(\d+\), then 2 jobs ", outcome.out), (outcome.out, outcome.err)
    slurm.wait(lambda: not slurm.queue())
    said = [path.read_text() for path in (run / "jobs").glob("*_log.err")]
    assert sum("fastar: training star" in text for text in said) == 1, said
    assert len(said) == 3  # of two sources, and of the star


def test_the_array_of_the_readme_has_a_part_for_each_model() -> None:
    options, (array, _) = readme()[1:]
    numbers = re.search(r"--array=0-([0-9]+) ", array)
    command = re.fullmatch(r"--dataset (\S+) --arch (\S+) --sources ([0-9]+) --out \S+", options)
    assert numbers is not None
    assert command is not None, options
    settings = load_settings(dataset=command[1], arch=command[2], values={"sources.number": int(command[3])})
    assert int(numbers[1]) + 1 == sum(settings.sources.trained().values())


def readme() -> tuple[str, str, list[str]]:
    """README's star.sh, the options of fastar in it, and the commands that submit it."""
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```sh\n(#!/bin/bash\n#SBATCH .*?)```", text, re.DOTALL)
    (options,) = re.findall(r"(--dataset .*)", script)
    return script, options, re.findall(r"`(sbatch [^`]*star\.sh)`", text)


@pytest.mark.slow
def test_the_lines_of_the_readme(
    tmp_path: Path, slurm: Slurm, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they stand there, of a smaller run: stopped as before their time ends, preempted, and submitted again."""
    script, known, (array, star) = readme()
    own = [*options, "checkpoint.minutes=0", "train.epochs=150", "train.batch_size=10"]
    assert fastar("train-star", *own, "--out", tmp_path / "one").code == 0
    assert script.count(known) == 1
    (tmp_path / "star.sh").write_text(script.replace(known, shlex.join([*own, "--out", "run"])))
    array, run = re.sub(r"--array=\S+", "--array=0-1", array), tmp_path / "run"
    (tmp_path / "bin").mkdir()
    stand_in(tmp_path / "bin" / "fastar", f'exec {sys.executable} -m fastar "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def begun(model: str) -> bool:
        log = run / "log.jsonl"
        return log.is_file() and log.read_text().count(f'"model": "{model}"') > 2

    def submitted(command: str) -> str:
        return slurm.call(*shlex.split(command)).split()[-1]

    job = submitted(array)
    slurm.wait(lambda: begun("source 0") and begun("source 1"))
    slurm.call("scancel", "--batch", "--signal=USR1", f"{job}_0")
    slurm.call("scontrol", "requeue", f"{job}_1")
    slurm.wait(lambda: slurm.call("squeue", "-h", "-r", "-o", "%i %T").split() == [f"{job}_1", "PENDING"])
    slurm.call("scontrol", "update", f"JobId={job}_1", "StartTime=now")  # Slurm lets it wait two minutes
    again = submitted(array)
    slurm.wait(lambda: not slurm.queue())
    submitted(star)
    slurm.wait(lambda: not slurm.queue())
    said = {path.name: path.read_text() for path in tmp_path.glob("slurm-*.out")}
    assert "fastar: stopped by SIGUSR1;" in said[f"slurm-{job}_0.out"]
    assert "fastar: stopped by SIGTERM;" in said[f"slurm-{job}_1.out"]
    assert "Error" not in said[f"slurm-{again}_0.out"], said
    assert_same_models(run, tmp_path / "one")
    assert_log_is_whole(run, tmp_path / "one")
    assert (run / "results.json").is_file(), said


@pytest.mark.slow
def test_jobs_that_are_preempted_or_killed_go_on_and_cancelled_ones_do_not(
    tmp_path: Path, slurm: Slurm, options: list[str]
) -> None:
    command = [*options, "checkpoint.minutes=0", "train.epochs=150", "train.batch_size=10", "sources.number=3"]
    one, run = tmp_path / "one", tmp_path / "run"
    assert fastar("train-star", *command, "--out", one).code == 0
    outcome = fastar("train-star", *command, "--out", run, "--launcher", "slurm:1")
    found = re.search(r"\((\d+)\), then 1 job", outcome.out)
    assert found is not None, outcome.out

    def begun(model: str) -> bool:
        log = run / "log.jsonl"
        return log.is_file() and log.read_text().count(f'"model": "{model}"') > 2

    def restarts(part: int) -> str:
        return slurm.call("scontrol", "show", "job", f"{found[1]}_{part}").partition("Restarts=")[2].split()[0]

    slurm.wait(lambda: begun("source 0"))
    # As before its time ends. scancel tries again for a minute, when the job is being put into the queue by then.
    signalled = subprocess.Popen(["scancel", "--signal=USR2", f"{found[1]}_0"], stderr=subprocess.DEVNULL)
    slurm.wait(lambda: begun("source 1"))
    signalled.terminate()
    signalled.wait()
    assert restarts(0) == "1"
    slurm.call("scontrol", "requeue", f"{found[1]}_1")  # as Slurm does where others go first
    slurm.wait(lambda: begun("source 2"))
    assert restarts(1) == "1"
    slurm.call("scancel", f"{found[1]}_2")
    slurm.wait(lambda: f"{found[1]}_2" not in slurm.queue())
    time.sleep(3)
    assert f"{found[1]}_2" not in slurm.queue()  # does not come back: the last job trains its model
    said = "\n".join(path.read_text() for path in (run / "jobs").glob("*_log.err"))
    assert {"SIGUSR1", "SIGTERM"} <= set(re.findall(r"fastar: stopped by (\w+);", said))
    for part in (0, 1):  # Slurm lets them wait two minutes
        slurm.call("scontrol", "update", f"JobId={found[1]}_{part}", "StartTime=now")
    slurm.wait(lambda: (run / "results.json").is_file() and not slurm.queue())
    assert_same_models(run, one)
    assert_log_is_whole(run, one)
