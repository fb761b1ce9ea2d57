"""Commands that train: a whole run, its sources alone, and what it will take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import typer

from fastar.cli.options import LAUNCH, RUN, Given, Overrides, takes
from fastar.cli.output import print_json, print_lines, print_table
from fastar.cli.show import show_results
from fastar.errors import FastarError
from fastar.runtime import ranks

if TYPE_CHECKING:
    from fastar.launch.jobs import Jobs, Launcher


@takes(*RUN, "measured_by", "profile", *LAUNCH, "json", "quiet")
def train_star(given: Given, overrides: Overrides = None) -> None:
    """Do it all: data, sources, star model, heldouts, barriers, report.

    Examples:

        fastar train-star --dataset digits

        fastar train-star --dataset cifar10 --arch resnet8 --data-root ~/cifar --out runs/small train.epochs=10

        fastar train-star --model mynets:build --model-args width=64 --data mydata:train_and_test --loss mse

        fastar train-star --dataset cifar10 --arch resnet18 --launcher slurm:8 --sbatch partition=gpu --dry-run
    """
    launcher, settings, by = given.launcher(), given.settings(overrides), given["measured_by"]
    if by is not None and (by < 0 or launcher is not None):
        why = "give 0 or more" if by < 0 else "a --launcher says that by itself; leave it out"
        raise FastarError(f"--measured-by {by}: {why}")

    from fastar.experiments import train_star
    from fastar.report.results import check_results
    from fastar.runs import RunFolder

    run, progress, profile = RunFolder(given.run_folder(settings)), given.progress(), given["profile"]
    with ExitStack() as jobs:
        if launcher is not None:
            from fastar.experiments.whole_run import check_whole, known_results
            from fastar.launch.jobs import run_jobs

            check_whole(settings, run)
            names = [name for name in RUN if name != "out"]
            own = given.arguments(names, ["--out", str(run.path), *(overrides or ())])
            more = given.arguments(["profile"], ())
            done = profile is None and not given["dry_run"] and known_results(settings, run) is not None
            if not done and not jobs.enter_context(begun(given, launcher, run_jobs(settings, run, own, more))):
                return
            profile = profile if launcher.name == "local" else None  # the last job's
        results = train_star(settings, run.path, progress, profile=profile, measured_by=by)
    if not ranks.is_first():
        return
    if results:
        check_results(results, run.results)
        show_results(given, results, run)
    elif given.json:
        print_json({"star": str(run.star)})
    else:
        print_lines([f"star: {run.star}"])
    if given["profile"] is not None and not given.json:
        print(run.profile("parts.txt").read_text(), end="")
        print(f"profile: {run.profile('')}")


@contextmanager
def begun(given: Given, launcher: Launcher, jobs: Jobs) -> Iterator[bool]:
    """Start the jobs, or print what would be started (--dry-run). Inside, their results are this process's to take,
    with what is left to do; False: there are none yet, and what was submitted has been printed."""
    from fastar.launch.jobs import planned_lines
    from fastar.launch.start import plan_jobs, spread

    if given["dry_run"]:
        plan = plan_jobs(launcher, jobs, given["sbatch"] or ())
        if given.json:
            print_json(plan)
        else:
            print_lines(planned_lines(plan))
        yield False
        return
    with spread(launcher, jobs, given["sbatch"] or (), given.progress()) as submitted:
        if submitted and given.json:
            print_json({"submitted": submitted})
        elif submitted:
            from fastar.launch.slurm import submitted_lines

            print_lines(submitted_lines(submitted))
        yield not submitted


@takes(*RUN, "images_per_second", "gpus", "nodes", "json", "quiet")
def plan(given: Given, overrides: Overrides = None) -> None:
    """Say what a run will take before anything runs: memory of the GPU and the host, disk, and hours.

    Bytes follow from the network, the recipe and the number of sources; seconds are measured on this machine, or
    follow from the speed that you state. With --gpus and --nodes sources, heldouts and what is measured are shared out,
    and one GPU trains the star. Exit code 1 where something does not fit; it says which setting makes it fit.

    Examples:

        fastar plan --dataset imagenet --sources 30 --gpu-memory 40GB --images-per-second 3000

        fastar plan --dataset cifar10 --sources 50

        fastar plan --config imagenet-resnet18-fast --sources 500 --gpus 8 --nodes 4 --gpu-memory 40GB
    """
    settings = given.settings(overrides)

    from fastar.experiments.plan import plan_run
    from fastar.report.results import plan_lines, plan_table

    folder = given.run_folder(settings)
    speed, gpus, nodes = given["images_per_second"], given["gpus"], given["nodes"]
    plan = plan_run(settings, folder, speed, given.progress(), gpus=gpus, nodes=nodes)
    if given.json:
        print_json(plan)
    else:
        print_table(plan_table(plan))
        print_lines(plan_lines(plan))
    if plan["problems"]:
        raise typer.Exit(1)


@takes(*RUN, "only", "quiet")
def train_sources(given: Given, overrides: Overrides = None) -> None:
    """Train the source and held-out models of a run that are missing; `train-star` goes on from there.

    Several processes may do so at once, on all machines that share the folder: each takes a model that nobody has.

    Examples:

        fastar train-sources --dataset digits --sources 5 --heldout 2 --out runs/five

        fastar train-sources --dataset digits --out runs/many --only 3-7
    """
    settings, only = given.settings(overrides), _numbers(given["only"])

    from fastar.experiments.star_domain import train_sources

    folder = given.run_folder(settings)
    paths = train_sources(settings, folder, given.progress(), only=only)
    print_lines(str(path) for path in paths if ranks.is_first())


def _numbers(text: str | None) -> range | None:
    """The numbers of --only: 3, or 3-7."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text)
    if found is None:
        raise FastarError(f"--only {text}: write a number or two joined by a dash, such as 3 or 3-7")
    return range(int(found[1]), int(found[2] or found[1]) + 1)
