"""The command for several runs that differ in one setting."""

from __future__ import annotations

from typing import Annotated

import typer

from fastar.cli.options import RUN, Given, Overrides, takes
from fastar.cli.output import print_json, print_lines, print_table

Kind = Annotated[str, typer.Argument(metavar="KIND", help="sources, width, depth, t, mu, or a setting's name.")]
Values = Annotated[str, typer.Argument(metavar="VALUES", help="Its values, joined by commas.")]

FOLDER = "Folder of the sweep. Default: runs/DATASET-ARCH-seedSEED-KIND."


@takes(*RUN, "seeds", "plan", "images_per_second", "json", "quiet", out=FOLDER)
def sweep(given: Given, kind: Kind, values: Values, overrides: Overrides = None) -> None:
    """Train and measure a star for each value of a setting; sources and heldouts that do not change are trained once.

    Each point is a run folder, OUT/points/KIND=VALUE. Written beside them: sweep.json, sweep.png. The same command goes
    on where it was stopped; with more values it adds points.

    Examples:

        fastar sweep sources 2,5,10,20 --dataset digits --seeds 3 --heldout 10

        fastar sweep width 4,8,16,32 --dataset digits --sources 5 --heldout 5

        fastar sweep matching.sinkhorn.lr 0.1,1,10 --dataset digits matching.method=sinkhorn
    """
    settings = given.settings(overrides)

    from fastar.experiments.sweeps import plan_sweep, sweep
    from fastar.experiments.sweeps.points import read_values

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

    from fastar.report.sweep_panels import sweep_lines, sweep_picture, sweep_table

    found = sweep(settings, kind, wanted, folder, given.progress(), seeds=given["seeds"])
    sweep_picture(found, folder / "sweep.png")
    if given.json:
        print_json(found)
        return
    print_table(sweep_table(found))
    print_lines([*sweep_lines(found), *(f"written: {folder / name}" for name in ("sweep.json", "sweep.png"))])
