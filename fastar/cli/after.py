"""Commands that study a finished run: what its star model is good for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastar.cli.options import Given, run_folders, takes
from fastar.cli.output import print_json, print_lines, print_table
from fastar.errors import FastarError

if TYPE_CHECKING:
    from fastar.experiments.finished_run import FinishedRun

Finished = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")]


def opened(given: Given, folder: Path) -> FinishedRun:
    """The run in a folder, which is this process's until the command ends; the traceback of a defect is kept there."""
    from fastar.experiments.finished_run import finished_run
    from fastar.runs import RunFolder

    run_folders.append(folder)
    run = finished_run(RunFolder(folder), given.progress())
    given.ending.enter_context(run.session.run.held(given.progress()))
    return run


def show_study(
    given: Given, found: Mapping[str, Any], table: object, lines: Iterable[str], places: Iterable[Path]
) -> None:
    """Print results as they are wanted, a table or a list of them, and the files that were written."""
    if given.json:
        print_json(found)
        return
    for one in table if isinstance(table, list) else [table]:
        print_table(one)
    print_lines([*lines, *(f"written: {place}" for place in places)])


@takes("most", "repetitions", "radius", "swag", "corruptions", "ood", "json", "quiet")
def uncertainty(given: Given, folder: Finished) -> None:
    """Measure how good the uncertainty of averages around the star is: star domain, ensemble, and controls.

    Each average is of K = 1 .. --most networks. Written into the run folder: uncertainty.json, uncertainty.png over K,
    reliability.png; with --corruptions corruptions.png over severity.

    Examples:

        fastar uncertainty runs/digits-mlp-seed0

        fastar uncertainty runs/digits-mlp-seed0 --swag --corruptions --ood noise,blocks
    """
    from fastar.experiments.averages import uncertainty
    from fastar.report.average_panels import (
        reliability_picture,
        uncertainty_lines,
        uncertainty_picture,
        uncertainty_table,
    )
    from fastar.report.shift.corruption_panels import corruption_picture, corruption_tables
    from fastar.report.shift.other_images import other_tables
    from fastar.runs import write_json

    run = opened(given, folder)
    found = uncertainty(
        run,
        most=given["most"],
        repetitions=given["repetitions"],
        radius=given["radius"],
        swag=given["swag"],
        corruptions=given["corruptions"],
        ood=given["ood"].split(",") if given["ood"] else (),
    )
    places = [folder / name for name in ("uncertainty.json", "uncertainty.png", "reliability.png")]
    write_json(places[0], found)
    uncertainty_picture(found, places[1])
    reliability_picture(found, places[2])
    if "corruptions" in found:
        places.append(folder / "corruptions.png")
        corruption_picture(found, places[-1])
    tables = [uncertainty_table(found), *corruption_tables(found), *other_tables(found)]
    show_study(given, found, tables, uncertainty_lines(found), places)


@takes("radii", "draws", "by_filter", "json", "quiet")
def perturb(given: Given, folder: Finished) -> None:
    """Perturb the star at random, and measure its loss and the barriers from it to the heldouts, matched anew.

    Written into the run folder: perturb.json, perturb.png.

    Example:

        fastar perturb runs/digits-mlp-seed0 --radii 0.1,0.4
    """
    from fastar.experiments.perturbed import perturbed_stars
    from fastar.report.perturbed_stars import perturbed_lines, perturbed_picture, perturbed_table
    from fastar.runs import write_json

    try:
        radii = [float(one) for one in given["radii"].split(",")]
    except ValueError as error:
        raise FastarError(f"--radii {given['radii']}: write numbers joined by commas, such as 0.1,0.4") from error
    run = opened(given, folder)
    found = perturbed_stars(run, radii=radii, draws=given["draws"], by_filter=given["by_filter"])
    places = [folder / name for name in ("perturb.json", "perturb.png")]
    write_json(places[0], found)
    perturbed_picture(found, places[1])
    show_study(given, found, perturbed_table(found), perturbed_lines(found), places)


@takes("json", "quiet")
def distances(given: Given, folder: Finished) -> None:
    """Compare the parameters of a run's models: L2 distances, cosines and norms, without and with permutation.

    Of pairs of regular models, of the star and of the mean of the sources matched to it, with sources and heldouts. The
    figures of each pair and each parameter tensor are in RUN/distances.json.

    Example:

        fastar distances runs/digits-mlp-seed0
    """
    from fastar.experiments.distances import distances
    from fastar.report.distances_table import distances_table

    run = opened(given, folder)
    found = distances(run)
    show_study(given, found, distances_table(found), [], [run.session.run.distances])


@takes("student", "swag", "json", "quiet", swag="Add SWA, of one more training, which the run folder keeps.")
def fuse(given: Given, folder: Finished) -> None:
    """Compare ways to make one predictor of the sources: star, mean, greedy soup, ensemble, the best source.

    Written into the run folder: fusion.json. A star for this is trained with `star.mu=1`.

    Examples:

        fastar fuse runs/digits-mlp-seed0

        fastar fuse runs/digits-mlp-seed0 --student --swag
    """
    from fastar.experiments.fusion import fuse
    from fastar.report.fusion_table import fusion_lines, fusion_table
    from fastar.runs import write_json

    found = fuse(opened(given, folder), student=given["student"], swag=given["swag"])
    place = folder / "fusion.json"
    write_json(place, found)
    show_study(given, found, fusion_table(found), fusion_lines(found), [place])
