"""Jobs under Slurm, by submitit: an array of them, and the last one after it."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastar.errors import FastarError
from fastar.launch.jobs import Job, Jobs
from fastar.launch.shared_folder import left_handshake, not_shared, say_if_without_locks
from fastar.runs import remove_if_empty
from fastar.runtime.progress import Progress, count_text
from fastar.runtime.signals import EXIT_CONTINUE

if TYPE_CHECKING:
    from submitit import Job as Submitted

# Options of a job, where --sbatch says nothing. A job whose time ends saves and is put into the queue again.
MINUTES = 240
# Before the end of a job's time it is told to save.
SIGNAL_SECONDS = 120
# Options that ask for GPUs by themselves.
GPU_OPTIONS = ("gpus", "gpus-per-node", "gpus-per-task", "gres")


class Worker:
    """A call of the command as submitit's: it saves, and goes into the queue again, when it is preempted.

    submitit takes the signal that Slurm sends before a job's time ends (SIGUSR2) for itself; the command knows SIGUSR1.

    Args:
        command: of the whole job.
        folder: the current one, there and here.
    """

    def __init__(self, command: Sequence[str], folder: str):
        self.command, self.folder = list(command), folder
        self._process = 0

    def __call__(self) -> None:
        self._process = subprocess.Popen(
            self.command, cwd=self.folder, stdin=subprocess.DEVNULL, preexec_fn=_ignore_submitits
        ).pid
        for number in (signal.SIGTERM, signal.SIGUSR1):  # Slurm may have told this process alone
            signal.signal(number, self._pass_on)
        code = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        if code == EXIT_CONTINUE and _is_running():
            subprocess.check_call(["scontrol", "requeue", _job()])
        if code:
            sys.exit(code if code > 0 else 128 - code)

    def checkpoint(self) -> Any:
        """Let the command save and end; what is submitted again (submitit's protocol)."""
        from submitit.helpers import DelayedSubmission

        self._pass_on(signal.SIGUSR1)
        with suppress(ChildProcessError):  # it has ended
            os.waitpid(self._process, 0)
        return DelayedSubmission(Worker(self.command, self.folder))

    def _pass_on(self, number: int, frame: FrameType | None = None) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._process, number)


def _ignore_submitits() -> None:
    """Slurm sends it to all processes of a job."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _job() -> str:
    """The id of this job, or of this part of an array."""
    array, part = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{part}" if array else os.environ["SLURM_JOB_ID"]


def _is_running() -> bool:
    """Tell whether this is a job of Slurm's that was not cancelled: one that is preempted is running to its end."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    found = subprocess.run(["squeue", "-h", "-o", "%T", "-j", _job()], capture_output=True, text=True)
    return found.stdout.strip() == "RUNNING"


def sbatch_options(device: str, given: Sequence[str]) -> dict[str, str]:
    """Options of sbatch: those of --sbatch (`key=value`), and a time and a GPU where they do not say them.

    Raises:
        FastarError: one that is not `key=value`.
    """
    found = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals or not key.strip("-"):
            raise FastarError(f"--sbatch {one}: write key=value, such as partition=gpu")
        found[key.strip("-").replace("_", "-")] = value
    if device != "cpu" and not any(key in found for key in GPU_OPTIONS):
        found["gpus-per-node"] = "1"
    found.setdefault("time", str(MINUTES))
    return found


def resources(options: dict[str, str]) -> str:
    """Options of sbatch as they are printed."""
    return " ".join(f"--{key}={value}" for key, value in options.items())


def submit(
    jobs: Jobs, at_once: int | None, given: Sequence[str], progress: Progress, cluster: str = "slurm"
) -> list[Submitted[None]]:
    """Submit the jobs, each stage of which begins when those of the one before have ended.

    Args:
        given: options of sbatch, `key=value`.
        cluster: submitit's name of the executor.

    Raises:
        FastarError: submitit or Slurm is not there, or does not take them.
    """
    submitit = _submitit()
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise FastarError(
            "--launcher slurm: there is no sbatch here; run it on a machine from which jobs are submitted"
        )
    new, found, after = not jobs.logs.exists(), list[Any](), dict[str, str]()
    handshake = left_handshake(jobs.logs)
    say_if_without_locks(jobs.logs, progress)
    options = sbatch_options(jobs.device, given)
    refused = f"echo {shlex.quote('fastar: ')}{shlex.quote(not_shared(handshake, '$(hostname)'))} >&2"
    refused = refused.replace("$(hostname)", "'$(hostname)'")
    # Since Slurm 22.05 a step does not get the CPUs of its job by itself.
    cpus = '[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK'
    setup = [cpus, f"test -f {shlex.quote(str(handshake))} || {{ {refused}; exit 2; }}"]

    def submitted(some: Sequence[Job]) -> list[Submitted[None]]:
        executor = submitit.AutoExecutor(folder=jobs.logs, cluster=cluster, slurm_max_num_timeout=1_000_000)
        executor.update_parameters(
            name=f"{jobs.out.name}-{'parts' if some is jobs.parts else some[0].name.partition('-')[0]}",
            timeout_min=MINUTES,
            slurm_array_parallelism=at_once or len(some),
            slurm_additional_parameters={"requeue": True, **options, **after},
            slurm_setup=setup,
            slurm_signal_delay_s=SIGNAL_SECONDS,
            local_setup=setup,
        )
        with executor.batch():
            return [executor.submit(Worker(job.command(), os.getcwd())) for job in some]

    try:
        with redirect_stderr(io.StringIO()):  # sbatch's, which the error has
            for some in filter(None, jobs.stages(at_once)):
                found += submitted(some)
                job = found[-1].job_id.partition("_")[0]
                if some is jobs.parts:
                    after = {"dependency": f"afterany:{job}"}
                else:  # there is nothing to measure where the star has failed
                    after = {"dependency": f"afterok:{job}", "kill-on-invalid-dep": "yes"}
        return found
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        if new and not found:  # leave no trace
            shutil.rmtree(jobs.logs)
            remove_if_empty(jobs.out)
        lines = [line for line in str(error).splitlines() if "error" in line.lower()]
        raise FastarError(
            f"--launcher slurm: sbatch does not take it ({' '.join(lines[-1:]).strip()}); change --sbatch, or set "
            "device=cpu where there are no GPUs"
        ) from error


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise FastarError("--launcher slurm: submitit is missing; run `pip install 'fastar[slurm]'`") from error
    return submitit


def submitted_lines(submitted: dict[str, Any]) -> list[str]:
    """Lines that are printed of jobs that were submitted."""
    numbers = Counter(job.partition("_")[0] for job in submitted["jobs"])
    stages = ", then ".join(f"{count_text(number, 'job')} ({of})" for of, number in numbers.items())
    return [
        f"submitted: {stages}",
        f"logs: {submitted['logs']}",
        f"`fastar runs {submitted['out']}` shows how far they are",
    ]
