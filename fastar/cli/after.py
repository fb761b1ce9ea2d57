"""Commands that study a finished run: what its star model is good for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastar.cli.options import Given, run_folders, takes
from fastar.cli.output import print_json, print_lines, print_table
from fastar.errors import FastarError

Finished = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")]


@takes("most", "repetitions", "radius", "json", "quiet")
def uncertainty(given: Given, folder: Finished) -> None:
    """Measure how good the uncertainty of averages around the star is: star domain, ensemble, and controls.

    Each average is of K = 1 .. --most networks. Written into the run folder: uncertainty.json, uncertainty.png over K,
    reliability.png.

    Example:

        fastar uncertainty runs/digits-mlp-seed0
    """
    from fastar.experiments.averages import uncertainty
    from fastar.experiments.finished_run import finished_run
    from fastar.report.average_panels import (
        reliability_picture,
        uncertainty_lines,
        uncertainty_picture,
        uncertainty_table,
    )
    from fastar.runs import RunFolder, write_atomically

    run_folders.append(folder)
    run = RunFolder(folder)
    opened = finished_run(run, given.progress())
    found = uncertainty(opened, most=given["most"], repetitions=given["repetitions"], radius=given["radius"])
    places = [run.path / name for name in ("uncertainty.json", "uncertainty.png", "reliability.png")]
    write_atomically(places[0], (json.dumps(found, indent=1) + "\n").encode())
    uncertainty_picture(found, places[1])
    reliability_picture(found, places[2])
    if given.json:
        print_json(found)
        return
    print_table(uncertainty_table(found))
    print_lines([*uncertainty_lines(found), *(f"written: {place}" for place in places)])


@takes("radii", "draws", "by_filter", "json", "quiet")
def perturb(given: Given, folder: Finished) -> None:
    """Perturb the star at random, and measure its loss and the barriers from it to the heldouts, matched anew.

    Written into the run folder: perturb.json, perturb.png.

    Example:

        fastar perturb runs/digits-mlp-seed0 --radii 0.1,0.4
    """
    from fastar.experiments.finished_run import finished_run
    from fastar.experiments.perturbed import perturbed_stars
    from fastar.report.perturbed_stars import perturbed_lines, perturbed_picture, perturbed_table
    from fastar.runs import RunFolder, write_atomically

    try:
        radii = [float(one) for one in given["radii"].split(",")]
    except ValueError as error:
        raise FastarError(f"--radii {given['radii']}: write numbers joined by commas, such as 0.1,0.4") from error
    run_folders.append(folder)
    run = RunFolder(folder)
    opened = finished_run(run, given.progress())
    found = perturbed_stars(opened, radii=radii, draws=given["draws"], by_filter=given["by_filter"])
    places = [run.path / name for name in ("perturb.json", "perturb.png")]
    write_atomically(places[0], (json.dumps(found, indent=1) + "\n").encode())
    perturbed_picture(found, places[1])
    if given.json:
        print_json(found)
        return
    print_table(perturbed_table(found))
    print_lines([*perturbed_lines(found), *(f"written: {place}" for place in places)])


@takes("json", "quiet")
def distances(given: Given, folder: Finished) -> None:
    """Compare the parameters of a run's models: L2 distances, cosines and norms, without and with permutation.

    Of pairs of regular models, of the star and of the mean of the sources matched to it, with sources and heldouts. The
    figures of each pair and each parameter tensor are in RUN/distances.json.

    Example:

        fastar distances runs/digits-mlp-seed0
    """
    from fastar.experiments.distances import distances
    from fastar.experiments.finished_run import finished_run
    from fastar.report.distances_table import distances_table
    from fastar.runs import RunFolder

    run_folders.append(folder)
    run = RunFolder(folder)
    found = distances(finished_run(run, given.progress()))
    if given.json:
        print_json(found)
        return
    print_table(distances_table(found))
    print(f"written: {run.distances}")


@takes("json", "quiet")
def fuse(given: Given, folder: Finished) -> None:
    """Compare ways to make one predictor of the sources: star, mean, greedy soup, ensemble, the best source.

    Written into the run folder: fusion.json. A star for this is trained with `star.mu=1`.

    Example:

        fastar fuse runs/digits-mlp-seed0
    """
    from fastar.experiments.finished_run import finished_run
    from fastar.experiments.fusion import fuse
    from fastar.report.fusion_table import fusion_lines, fusion_table
    from fastar.runs import RunFolder, write_atomically

    run_folders.append(folder)
    run = RunFolder(folder)
    found = fuse(finished_run(run, given.progress()))
    place = run.path / "fusion.json"
    write_atomically(place, (json.dumps(found, indent=1) + "\n").encode())
    if given.json:
        print_json(found)
        return
    print_table(fusion_table(found))
    print_lines([*fusion_lines(found), f"written: {place}"])
