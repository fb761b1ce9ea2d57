"""Commands of several runs: those that differ in one setting, and the paper's tables and figures."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from fastar.cli.after import show_study
from fastar.cli.options import LAUNCH, RUN, Given, Option, Overrides, takes
from fastar.cli.output import print_json, print_lines, print_table
from fastar.cli.train import begun
from fastar.errors import FastarError

Kind = Annotated[str, typer.Argument(metavar="KIND", help="sources, width, depth, t, mu, or a setting's name.")]
Values = Annotated[str, typer.Argument(metavar="VALUES", help="Its values, joined by commas.")]

FOLDER = "Folder of the sweep. Default: runs/DATASET-ARCH-seedSEED-KIND."


@takes(*RUN, "seeds", "plan", "images_per_second", *LAUNCH, "json", "quiet", out=FOLDER)
def sweep(given: Given, kind: Kind, values: Values, overrides: Overrides = None) -> None:
    """Train and measure a star for each value of a setting; sources and heldouts that do not change are trained once.

    Each point is a run folder, OUT/points/KIND=VALUE. Written beside them: sweep.json, sweep.png. The same command goes
    on where it was stopped; with more values it adds points.

    Examples:

        fastar sweep sources 2,5,10,20 --dataset digits --seeds 3 --heldout 10

        fastar sweep width 4,8,16,32 --dataset digits --sources 5 --heldout 5

        fastar sweep matching.sinkhorn.lr 0.1,1,10 --dataset digits matching.method=sinkhorn
    """
    launcher, settings = given.launcher(), given.settings(overrides)

    from fastar.experiments.sweeps import plan_sweep, sweep
    from fastar.experiments.sweeps.points import points_of, read_values

    wanted, folder = read_values(values), given.run_folder(settings)
    if given["out"] is None:
        folder = folder.with_name(f"{folder.name}-{kind}")
    if given["plan"]:
        from fastar.report.results import plan_lines, plan_table

        speed = given["images_per_second"]
        plan = plan_sweep(settings, kind, wanted, folder, speed, given.progress(), seeds=given["seeds"])
        if given.json:
            print_json(plan)
        else:
            print_table(plan_table(plan))
            numbers = f"{plan['trainings']['regular']} sources and heldouts and {plan['trainings']['star']} stars"
            print_lines([*plan_lines(plan), f"this is {plan['point']}; the sweep trains {numbers} in all"])
        if plan["problems"]:
            raise typer.Exit(1)
        return

    with ExitStack() as jobs:
        if launcher is not None:
            from fastar.launch.jobs import sweep_jobs

            points = points_of(settings, kind, wanted, folder, given["seeds"])
            names = [*(name for name in RUN if name != "out"), "seeds"]
            own = given.arguments(names, ["--out", str(folder), *(overrides or ())])
            wholes = sweep_jobs(settings, folder, [point.run for point in points], [kind, values, *own])
            if not jobs.enter_context(begun(given, launcher, wholes)):
                return
        found = sweep(settings, kind, wanted, folder, given.progress(), seeds=given["seeds"])
    show_study(given, folder, "sweep", found, kept=True)


@takes(
    *("scale", "out", "list", "json", "quiet"),
    out=Option(Path, "DIR", "Folder of all tables and figures. Default: runs/paper-SCALE."),
    list=Option(bool, None, "List them: what each shows and trains, and what is done."),
)
def reproduce(
    given: Given,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID|all] [KEY=VALUE]...", help="table1, figure4, ..., and settings of all runs."),
    ] = None,
) -> None:
    """Run a table or figure of the paper, and print ours beside the paper's: `all`, or --list for what there is.

    Runs what is missing; models of equal recipes are trained once for all of them. At --scale small many use
    scikit-learn's digits, and compare orders, not numbers. Written into --out: ID.json, ID.md, ID.png. Exit code 2
    where one of several could not be run: the others are.

    Examples:

        fastar reproduce --list --scale small

        fastar reproduce figure4 --scale small
    """
    ids = [word for word in words or () if "=" not in word]
    overrides = [word for word in words or () if "=" in word]
    scale = given["scale"]
    out = given["out"] or Path("runs") / f"paper-{scale}"

    from fastar.config.paper import check_id, paper

    for name in ids:
        if name != "all":
            check_id(name)
    if given["list"]:
        from fastar.experiments.reproduce import listed
        from fastar.report.reproduction import list_table

        entries = listed(out, scale=scale, overrides=overrides)
        if given.json:
            print_json(entries)
        else:
            print_table(list_table(entries, scale))
        return
    if not ids:
        raise FastarError("no table or figure: name some, such as table1, or all; --list lists them")
    wanted = list(paper()) if "all" in ids else list(dict.fromkeys(ids))
    failed = [name for name in wanted if not _done(given, name, out, overrides, alone=len(wanted) == 1)]
    if failed:
        raise FastarError(f"not all could be run: {', '.join(failed)} (said above); the others are in {out}")


def _done(given: Given, name: str, out: Path, overrides: list[str], *, alone: bool) -> bool:
    """Run one and show it; False where it, or a row of it, could not be run, which is said (`alone`: raised)."""
    from fastar.experiments.reproduce import reproduce
    from fastar.report.reproduction import (
        markdown,
        reproduction_lines,
        reproduction_pictures,
        reproduction_tables,
    )
    from fastar.runs import write_atomically

    try:
        found: dict[str, Any] = reproduce(
            name, out, scale=given["scale"], overrides=overrides, progress=given.progress()
        )
    except FastarError as error:
        if alone:
            raise
        print(f"fastar: {name}: {error}", file=sys.stderr)
        return False
    scale = "" if given["scale"] == "full" else f" --scale {given['scale']}"
    command = " ".join([f"fastar reproduce {name}{scale}", *overrides])
    pictures = reproduction_pictures(found, out)
    write_atomically(out / f"{name}.md", markdown(found, command).encode())
    whole = not any(part["failed"] for part in found["parts"])
    if given.json:
        print_json(found)
        return whole
    for table in reproduction_tables(found):
        print_table(table)
    print_lines(reproduction_lines(found))
    print_lines(f"written: {place}" for place in (out / f"{name}.json", out / f"{name}.md", *pictures))
    return whole
