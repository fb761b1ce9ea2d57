"""Commands that show what is there: results, runs, what is damaged, shipped configurations, the installation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastar.cli.options import Given, run_folders, takes
from fastar.cli.output import print_json, print_lines, print_table
from fastar.errors import FastarError

if TYPE_CHECKING:
    from fastar.runs import RunFolder


def show_results(given: Given, results: dict[str, Any], run: RunFolder) -> None:
    """The results of a run, and where they and their picture are. A picture that is missing or older than they are is
    drawn: last, since it may not be writable."""
    from fastar.report.results import barrier_picture, results_table, speed_lines, statistics_lines

    if given.json:
        print_json(results)
    else:
        print_table(results_table(results))
        print_lines([*speed_lines(results), *statistics_lines(results)])
        print(f"results: {run.results}")
    if not run.is_drawn():
        barrier_picture(results, run.picture)
    if not given.json:
        print(f"picture: {run.picture}")


@takes("html", "json")
def report(
    given: Given,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder; with --html also a folder of runs.")],
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="With --html: the page. Default: DIR/report.html.", show_default=False),
    ] = None,
) -> None:
    """Show the results of a finished run again; or write all it holds as one HTML page.

    The picture is drawn where it is missing, or older than the results. The page (--html) needs no server and no
    network, and is of an unfinished run too. Of a folder of runs, it lists them.

    Examples:

        fastar report runs/digits-mlp-seed0

        fastar report runs/digits-mlp-seed0 --html
    """
    from fastar.report.results import check_results
    from fastar.runs import RunFolder

    run_folders.append(folder)
    say = given.progress().line
    if given["html"]:
        from fastar.report.page import write_page

        page = write_page(folder, file, say)
        if given.json:
            print_json({"page": str(page)})
        else:
            print(f"page: {page}")
        return
    if file is not None:
        raise FastarError(f"{file}: only a page is written to a file; give --html {file}")
    run = RunFolder(folder)
    said: list[str] = []
    results = run.read_results(said.append)
    check_results(results, run.results)
    for line in said:
        say(line)
    show_results(given, results, run)


@takes("json")
def runs(
    given: Given,
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to look for run folders.")] = Path("runs"),
) -> None:
    """List run folders: running, stopped (where) or finished, how long ago, and the figures so far.

    Example:

        fastar runs
    """
    from fastar.report.run_list import overview_table, runs_below

    found = runs_below(folder)
    if given.json:
        print_json([vars(run) for run in found])
    elif found:
        print_table(overview_table(found, folder))
    else:
        print(f"no run folders in {folder}")


@takes("json", "quiet")
def verify(
    given: Given,
    path: Annotated[Path, typer.Argument(metavar="DIR|DATA|MODEL", help="A folder of runs, a data set's, or a model.")],
) -> None:
    """Read all that is on disk of runs, a data set or a model again, and say what is damaged, a line for each thing.

    Models, permutations, results, settings, the log and images are compared with the digests that were written with
    them; what has none is named. Exit code 1 where something is damaged.

    Examples:

        fastar verify runs/digits-mlp-seed0

        fastar verify data/ffcv/digits
    """
    from fastar.experiments.files.verify_files import recheck

    progress = given.progress()
    found = recheck(path, progress)
    if given.json:
        print_json({"path": str(path), **vars(found)})
    else:
        for line in found.notes:
            progress.line(line)
        print_lines(found.damaged or [f"{path}: {found.kind}, all well"])
    if found.damaged:
        raise typer.Exit(1)


@takes("scale", "json")
def configs(
    given: Given,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print the settings of this one.", show_default=False)
    ] = None,
) -> None:
    """List the configurations that ship, with the paper's figures; or print one's settings as YAML.

    Each runs by its name: `fastar train-star --config NAME`, with `--scale smoke` or `--scale small` a smaller version.

    Examples:

        fastar configs

        fastar configs cifar10-vgg11 --scale small
    """
    if name is not None:
        from fastar.config import load_settings

        settings = load_settings(file=Path(name), scale=given["scale"])
        if given.json:
            print_json(settings.model_dump(mode="json"))
        else:
            print(settings.to_yaml().rstrip())
        return

    from fastar.report.recipe_list import catalogue, catalogue_table
    from fastar.runtime.standard_streams import plus_minus

    entries = catalogue(given["scale"])
    if given.json:
        for entry in entries:
            print_json(entry.as_dict())
        return
    print_table(catalogue_table(entries))
    print(
        f"Z sources, H heldouts. Barriers: the paper's, train set, mean {plus_minus()} standard deviation; empty: none."
    )
    print("Figures 1 and 3 have no numbers: theirs are from the result files of the paper's code.")


@takes("json")
def doctor(given: Given) -> None:
    """Say what is installed and what will be used: each line ok, or what to do.

    Exit code 1 where something that fastar needs does not work.

    Example:

        fastar doctor
    """
    from fastar.cli.doctor import examine

    checks = examine()
    if given.json:
        print_json([vars(check) for check in checks])
    else:
        print_lines(map(str, checks))
    if any(check.needed and not check.ok for check in checks):
        raise typer.Exit(1)
