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
    given: Given,
    folder: Path,
    name: str,
    found: Mapping[str, Any],
    *,
    kept: bool = False,
    more: Iterable[Path] = (),
) -> None:
    """Write what was found, and its pictures, into a folder, and print it as is wanted.

    Args:
        name: of the JSON file, and of its forms (`fastar.report.study_forms`).
        kept: the JSON file is there.
        more: other files that were written.
    """
    from fastar.report.study_forms import FORMS
    from fastar.runs import write_json

    if not kept:
        write_json(folder / f"{name}.json", found)
    places = [folder / f"{name}.json", *FORMS[name].draw(found, folder), *more]
    if given.json:
        print_json(found)
        return
    for table in FORMS[name].tables(found):
        print_table(table)
    print_lines([*FORMS[name].lines(found), *(f"written: {place}" for place in places)])


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

    found = uncertainty(
        opened(given, folder),
        most=given["most"],
        repetitions=given["repetitions"],
        radius=given["radius"],
        swag=given["swag"],
        corruptions=given["corruptions"],
        ood=given["ood"].split(",") if given["ood"] else (),
    )
    show_study(given, folder, "uncertainty", found)


@takes("radii", "draws", "by_filter", "json", "quiet")
def perturb(given: Given, folder: Finished) -> None:
    """Perturb the star at random, and measure its loss and the barriers from it to the heldouts, matched anew.

    Written into the run folder: perturb.json, perturb.png.

    Example:

        fastar perturb runs/digits-mlp-seed0 --radii 0.1,0.4
    """
    from fastar.experiments.perturbed import perturbed_stars

    try:
        radii = [float(one) for one in given["radii"].split(",")]
    except ValueError as error:
        raise FastarError(f"--radii {given['radii']}: write numbers joined by commas, such as 0.1,0.4") from error
    run = opened(given, folder)
    found = perturbed_stars(run, radii=radii, draws=given["draws"], by_filter=given["by_filter"])
    show_study(given, folder, "perturb", found)


@takes("json", "quiet")
def distances(given: Given, folder: Finished) -> None:
    """Compare the parameters of a run's models: L2 distances, cosines and norms, without and with permutation.

    Of pairs of regular models, of the star and of the mean of the sources matched to it, with sources and heldouts. The
    figures of each pair and each parameter tensor are in RUN/distances.json.

    Example:

        fastar distances runs/digits-mlp-seed0
    """
    from fastar.experiments.distances import distances

    show_study(given, folder, "distances", distances(opened(given, folder)), kept=True)


@takes("student", "swag", "json", "quiet", swag="Add SWA, of one more training, which the run folder keeps.")
def fuse(given: Given, folder: Finished) -> None:
    """Compare ways to make one predictor of the sources: star, mean, greedy soup, ensemble, the best source.

    Written into the run folder: fusion.json. A star for this is trained with `star.mu=1`.

    Examples:

        fastar fuse runs/digits-mlp-seed0

        fastar fuse runs/digits-mlp-seed0 --student --swag
    """
    from fastar.experiments.fusion import fuse

    found = fuse(opened(given, folder), student=given["student"], swag=given["swag"])
    show_study(given, folder, "fusion", found)
