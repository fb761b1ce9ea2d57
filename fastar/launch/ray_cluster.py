"""Jobs as tasks of a Ray cluster, which this process waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from fastar.errors import FastarError
from fastar.launch.jobs import Job, Jobs, check_done
from fastar.launch.shared_folder import check_handshake, left_handshake, say_if_without_locks
from fastar.runtime.progress import Progress
from fastar.runtime.signals import EXIT_CONTINUE, deferred, requested

# Variables that jobs on other nodes have as this process has them.
PASSED_ON = ("FASTAR_", "PYTHONPATH")
# Between two looks: of a job at its process, and of the launcher at its jobs.
LOOK_SECONDS = 0.5
# The most that a launcher which is stopped waits for its jobs to save.
SAVE_SECONDS = 60.0


def run_ray(jobs: Jobs, at_once: int | None, progress: Progress) -> None:
    """Do all jobs on the cluster that RAY_ADDRESS names, or that this machine belongs to; so many at once.

    Raises:
        FastarError: Ray or a cluster is not there, or something is missing in the end.
    """
    ray, going, failed, stages = _ray(), dict[Any, Job](), dict[Job, str](), jobs.stages(at_once)
    with deferred(), _connected(ray), ExitStack() as ending:  # within Ray's own code a request to stop would be lost
        each = _resources(ray, jobs.device)
        ending.enter_context(jobs.logged())
        handshake = left_handshake(jobs.logs)
        try:
            say_if_without_locks(jobs.logs, progress)
            with progress.task("jobs of Ray", total=sum(map(len, stages)), unit="jobs") as advance:
                for some in stages:
                    for job, code, line in _ended(ray, some, at_once or len(some), each, handshake, going):
                        if code:
                            failed[job] = line or f"ended with {code}; see {_log(jobs.logs, job)}"
                            progress.line(f"[{job.name}] {failed[job]}")
                        advance(1)
                    check_done(jobs, list(failed.values()))
                    if some is not jobs.parts and all(job in failed for job in some):
                        raise FastarError(failed[some[0]].removeprefix("fastar: "))
        finally:
            handshake.unlink(missing_ok=True)  # what is still going saves and ends
            if going:
                ray.wait(list(going), num_returns=len(going), timeout=SAVE_SECONDS)


def planned_resources(device: str) -> str:
    """Resources of each job, as they are printed."""
    return "1 CPU" if device == "cpu" else "1 GPU and its share of its node's CPUs, or 1 CPU where there are no GPUs"


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions  # what a folder called ray has not
    except ImportError as error:
        raise FastarError("--launcher ray: Ray is missing; run `pip install 'fastar[ray]'`") from error
    return ray


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Inside, this process belongs to the cluster."""
    address = os.environ.get("RAY_ADDRESS", "auto")
    more = {"include_dashboard": False} if address == "local" else {}
    stop = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **more)
        with suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, stop)  # Ray has put its own in its place
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise FastarError(
            f"--launcher ray: no Ray cluster found (RAY_ADDRESS={address}): start one with `ray start --head`, or set "
            "RAY_ADDRESS to host:6379, or to local for this machine alone"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _resources(ray: Any, device: str) -> dict[str, int]:
    """Resources that a job takes of a node: a GPU, and its share of the CPUs beside it; or one CPU."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    shares = [max(1, int(node.get("CPU", 1) // node["GPU"])) for node in nodes if node.get("GPU")]
    if device == "cpu" or (device == "auto" and not shares):
        return {"num_cpus": 1, "num_gpus": 0}
    if not shares:
        raise FastarError(f"--launcher ray: device={device}, and the Ray cluster has no GPU; set device=cpu")
    return {"num_cpus": min(shares), "num_gpus": 1}


def _ended(
    ray: Any, jobs: Sequence[Job], at_once: int, each: dict[str, int], handshake: Path, going: dict[Any, Job]
) -> Iterator[tuple[Job, int, str]]:
    """Jobs in the order in which they end, each with its exit code and, where that is not 0, its last line. One that
    was told to stop is done again; so is one whose node is lost, by Ray. `going` has those that are not ended."""
    do = ray.remote(max_retries=-1, **each)(_do)
    environment = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON)}
    environment["OMP_NUM_THREADS"] = str(each["num_cpus"])
    left = list(jobs)
    while left or going:
        while left and len(going) < at_once:
            job = left.pop(0)
            log = _log(handshake.parent, job)
            going[do.remote(job.arguments, os.getcwd(), environment, str(log), str(handshake))] = job
        ended, _ = ray.wait(list(going), timeout=LOOK_SECONDS)
        stop = requested()
        if stop is not None:
            raise stop
        for one in ended:
            job = going.pop(one)
            try:
                code, line = ray.get(one)
            except ray.exceptions.RayError as error:
                code, line = 1, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if code == EXIT_CONTINUE:
                left.append(job)
            else:
                yield job, code, line


def _log(logs: Path, job: Job) -> Path:
    return logs / f"ray-{job.name}.log"


def _do(
    arguments: Sequence[str], folder: str, environment: dict[str, str], log: str, handshake: str
) -> tuple[int, str]:
    """Call the command on a node; its exit code and, where that is not 0, the last line that it said."""
    try:
        check_handshake(Path(handshake))
    except FastarError as error:
        return 2, f"fastar: {error}"
    if not Path(folder).is_dir():
        return 2, f"fastar: {folder}: no such folder on this node; run it from a folder that all nodes share"
    with open(log, "ab") as file:
        begin = file.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            Job("", tuple(arguments)).command(),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        while process.poll() is None:
            time.sleep(LOOK_SECONDS)
            if not os.path.isfile(handshake):  # the launcher has taken it away: it is being stopped
                process.terminate()
                process.wait()
    with open(log, "rb") as written:
        written.seek(begin)
        lines = written.read().decode(errors="backslashreplace").splitlines()
    return process.returncode, lines[-1] if process.returncode and lines else ""
