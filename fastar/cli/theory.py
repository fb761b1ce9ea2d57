"""The command on the paper's theory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastar.cli.options import Given, Option, takes
from fastar.cli.output import print_json, print_lines, print_table
from fastar.errors import FastarError, did_you_mean

OF_CERTIFICATE = ("permutation", "of", "adversarial")


@takes(
    *("most", "draws", *OF_CERTIFICATE, "seed", "out", "picture", "json", "quiet"),
    most=Option(int, "M", "The largest width. Default: 128, of two-layer networks 32."),
    draws=Option(int, "N", "How many networks are drawn. Default: 100, at widths beyond 128 30."),
    out=Option(Path, "FILE", "Write the results to this JSON file."),
    picture="Write the heat map, or the curves, to this PNG.",
)
def theory(
    given: Given,
    what: Annotated[str, typer.Argument(metavar="certificate|linear|elu", help="What is computed.")],
) -> None:
    """Compute the paper's theory in numbers, in float64: figure 5 (`certificate`), table 3 (`linear`), table 4 (`elu`).

    `certificate`: networks phi and theta are drawn; Q(m, eps) is the share of phi that are nearly linearly connected to
    every theta drawn. `linear` and `elu`: two-layer networks are trained; how many are star models of all others?

    Examples:

        fastar theory certificate --picture certificate.png

        fastar theory linear --out linear.json --picture linear.png

        fastar theory certificate --most 64 --draws 30 --permutation sort --adversarial
    """
    if what not in ("certificate", "linear", "elu"):
        guess = did_you_mean(what, ("certificate", "linear", "elu"))
        raise FastarError(f"fastar theory {what}: {guess}choose one of certificate, linear, elu")
    own = {name: given[name] for name in OF_CERTIFICATE if given[name] not in (None, False)}
    if what != "certificate" and own:
        raise FastarError(f"--{next(iter(own))} belongs to `fastar theory certificate`: leave it out")

    from fastar.experiments.theory import run_certificate, run_two_layer
    from fastar.report.figures import check_picture
    from fastar.report.theory import theory_lines, theory_picture, theory_tables
    from fastar.runs import write_atomically

    out, picture = given["out"], given["picture"]
    if picture is not None:  # before the work
        check_picture(picture)
    if out is not None and out.is_dir():
        raise FastarError(f"--out {out}: is a folder; name a file, such as {out / 'theory.json'}")
    named = {name: given[name] for name in ("most", "draws") if given[name] is not None}
    shared = {**named, "seed": given["seed"], "progress": given.progress()}
    result = run_certificate(**own, **shared) if what == "certificate" else run_two_layer(what, **shared)
    if out is not None:
        write_atomically(out, json.dumps(result).encode())
    if picture is not None:
        theory_picture(result, picture)
    if given.json:
        print_json(result)
        return
    for table in theory_tables(result):
        print_table(table)
    print_lines(theory_lines(result))
    for name, file in (("results", out), ("picture", picture)):
        if file is not None:
            print(f"{name}: {file}")
