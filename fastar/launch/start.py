"""A run or a sweep spread by a launcher: planned, or started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastar.launch.jobs import Jobs, Launcher, planned
from fastar.runtime.progress import Progress


def plan_jobs(launcher: Launcher, jobs: Jobs, sbatch: Sequence[str]) -> dict[str, Any]:
    """The plan of what would be started (`planned`); nothing is."""
    if launcher.name == "local":
        from fastar.launch.local import Places

        places = Places(jobs.device, launcher.at_once, len(jobs.parts))
        workers = [jobs.worker] * (places.number if jobs.parts else 0)
        return planned(jobs, [workers, [jobs.last]], places.number, str(places))
    at_once, stages = launcher.at_once, jobs.stages(launcher.at_once)
    if launcher.name == "ray":
        from fastar.launch.ray_cluster import planned_resources

        return planned(jobs, stages, at_once, planned_resources(jobs.device))
    from fastar.launch.slurm import resources, sbatch_options

    return planned(jobs, stages, at_once, resources(sbatch_options(jobs.device, sbatch)))


@contextmanager
def spread(launcher: Launcher, jobs: Jobs, sbatch: Sequence[str], progress: Progress) -> Iterator[dict[str, Any]]:
    """Start the jobs. Inside, their parts are done, and what is left is this process's: the last job, or to show what
    it has found; or what was submitted is given.

    Raises:
        FastarError: they cannot be started, or something is missing in the end.
    """
    if launcher.name == "slurm":
        from fastar.launch.slurm import submit

        ids = [job.job_id for job in submit(jobs, launcher.at_once, sbatch, progress)]
        yield {"jobs": ids, "logs": str(jobs.logs), "out": str(jobs.out)}
    elif launcher.name == "ray":
        from fastar.launch.ray_cluster import run_ray

        run_ray(jobs, launcher.at_once, progress)
        yield {}
    else:
        from fastar.launch.local import Places, companions, work

        places = Places(jobs.device, launcher.at_once, len(jobs.parts))
        work(jobs, places, progress)
        with companions(jobs, places, progress):
            yield {}
