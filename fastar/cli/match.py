"""Commands on checkpoints: matching, and barriers between them; and on what is matched, the groups of a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastar.cli.options import CHECKPOINTS, Given, Overrides, paths_and_settings, takes
from fastar.cli.output import print_json, print_lines, print_table

if TYPE_CHECKING:
    from fastar.experiments.files.given_files import Named

UNSAID = "For checkpoints that do not say it."
PERMUTED = "Write permuted B here (.safetensors); several B: into this folder."


@takes("out", *CHECKPOINTS, "json", "quiet", out=PERMUTED, dataset=UNSAID, arch=UNSAID)
def match(
    given: Given,
    first: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint to match to.")],
    others: Annotated[
        list[str], typer.Argument(metavar="B [...] [KEY=VALUE]...", help="Checkpoints whose hidden units are permuted.")
    ],
) -> None:
    """Permute each B's hidden units so that it lies as close to A as they allow; its function does not change.

    Examples:

        fastar match runs/five/sources/seed-0000.safetensors runs/five/sources/seed-0001.safetensors --out b.safetensors

        fastar match a.pt b.pt c.pt --dataset cifar10 --arch resnet18 --out matched matching.perturbations=5

        fastar match a.pt b.pt --model mynets:build --input-shape 2x3x224x224 --out b.safetensors
    """
    from fastar.experiments.files.match_files import match_files

    paths, overrides = paths_and_settings(others)
    results = match_files(first, paths, out=given["out"], named=_named(given, overrides), progress=given.progress())
    for result in results:
        if given.json:
            print_json(result)
            continue
        if len(results) > 1:
            print(f"{result['file']}")
        groups = ", ".join(f"{name} ({size})" for name, size in result["groups"].items())
        print(f"groups:     {groups or 'none: no hidden units are permuted'}")
        print(f"objective:  {result['objective_start']:.6g} before, {result['objective']:.6g} matched")
        print(f"  weights:  {result['objective_weights']:.6g} without 1-D parameters")
        print(f"distance:   {result['distance_start']:.6g} before, {result['distance']:.6g} matched (L2)")
        print(f"moved:      {result['moved']} of {result['units']} hidden units, {result['sweeps']} sweeps")
        for line in result["left"]:
            print(f"left:       {line}")
        if result["written"] is not None:
            print(f"written:    {result['written']}")


@takes(
    *("to", "centre", "out", "average", "rounds", *CHECKPOINTS, "json", "quiet"),
    out="Write the permuted checkpoints into this folder.",
    dataset=UNSAID,
    arch=UNSAID,
)
def match_many(
    given: Given,
    files: Annotated[
        list[str], typer.Argument(metavar="A B [...] [KEY=VALUE]...", help="Checkpoints of one architecture.")
    ],
) -> None:
    """Match a whole set of checkpoints and average them, for merging: functions do not change by matching.

    To the mean, each is matched to the average of the others in turns until nothing changes; there is one permutation
    for each checkpoint, so that all ways round agree. `fastar barrier` measures what the average is worth (it takes
    batch-norm statistics anew).

    Examples:

        fastar match-many runs/five/sources/*.safetensors --out matched --average mean.safetensors

        fastar match-many runs/five/heldout/*.safetensors --centre runs/five/star.safetensors --out matched

        fastar match-many a.pt b.pt c.pt --to pairwise --model mynets:build --input-shape 2x3x32x32 --json
    """
    from fastar.experiments.files.match_files import match_many_files

    paths, overrides = paths_and_settings(files)
    result = match_many_files(
        paths,
        to=given["to"] or ("mean" if given["centre"] is None else "star"),
        **{name: given[name] for name in ("centre", "out", "average", "rounds")},
        named=_named(given, overrides),
        progress=given.progress(),
    )
    if given.json:
        print_json(result)
        return

    from fastar.report.results import many_table

    print_table(many_table(result))
    if not result["groups"]:
        print("groups: none: no hidden units are permuted")
    print_lines(f"left: {line}" for line in result["left"])
    if result["to"] == "mean":
        print(f"rounds:  {result['rounds']}{'' if result['converged'] else ', and the last still changed something'}")
        print(f"inner product of two: {result['history'][0]:.6g} at first, {result['history'][-1]:.6g} in the end")
    if result["average"] is not None:
        print(f"average: {result['average']}")


@takes(
    *(*CHECKPOINTS, "permutations", "points", "data_root", "bn_batches", "picture", "json", "quiet"),
    dataset="Default: the one A was trained on.",
    arch=UNSAID,
)
def barrier(
    given: Given,
    first: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint at t = 0.")],
    others: Annotated[list[str], typer.Argument(metavar="B [...] [KEY=VALUE]...", help="Checkpoints at t = 1.")],
    matching: Annotated[bool, typer.Option("--match/--no-match", help="Permute each B to match A first.")] = True,
) -> None:
    """Measure the loss barrier from A to each B on train and test images, and on those A kept for validation.

    Examples:

        fastar barrier runs/five/star.safetensors runs/five/heldout/*.safetensors

        fastar barrier a.pt b.pt --dataset cifar10 --arch resnet18 --no-match --points 21

        fastar barrier star.safetensors heldout/*.safetensors --permutations matchings.safetensors
    """
    from fastar.experiments.files.barrier_files import barriers_of_files
    from fastar.report.figures import check_picture
    from fastar.report.results import barrier_picture, barriers_table, statistics_lines

    picture = given["picture"]
    if picture is not None:  # before the work
        check_picture(picture)
    paths, overrides = paths_and_settings(others)
    result = barriers_of_files(
        first,
        paths,
        named=_named(given, overrides),
        matching=matching,
        permutations=given["permutations"],
        progress=given.progress(),
    )
    if picture is not None:
        barrier_picture(result, picture)
    if given.json:
        print_json(result)
        return
    print_table(barriers_table(result["paths"]))
    print_lines(statistics_lines(result))
    if picture is not None:
        print(f"picture: {picture}")


@takes(
    *("dataset", "name", "model_args", "input_shape", "allow_partial", "certify", "json", "quiet"),
    dataset="The images that a registered architecture is for.",
    input_shape="With MODULE:FUNCTION: the shape of its input, where it returns none.",
)
def symmetry(
    given: Given,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="An architecture, such as resnet18, or your own MODULE:FUNCTION.")
    ],
    overrides: Overrides = None,
) -> None:
    """Show the hidden units of a network that can be permuted: groups, their axes, and what holds the rest.

    With --certify, two positions of each axis that stays are exchanged in float64, at weights where moves of all other
    axes do nothing: the outputs have to change. Freedom that is in no group is a line `missed freedom`; the exit code
    is 0 then too. It takes at most three times as long as deriving and proving the groups; what it had no time for is
    said.

    Examples:

        fastar symmetry resnet18 --dataset cifar10

        fastar symmetry mynets:build --input-shape 2x3x224x224 --certify
    """
    from fastar.experiments.files.given_files import Named
    from fastar.experiments.files.show_symmetry import show_symmetry

    named = Named(dataset=given["dataset"], input_shape=given["input_shape"], changes=given.changes(overrides or ()))
    result = show_symmetry(model, named, certified=given["certify"], progress=given.progress())
    lines = result.pop("lines", [])
    if given.json:
        print_json(result)
        return
    print(f"groups: {len(result['groups'])}, units: {sum(group['units'] for group in result['groups'])}")
    for group in result["groups"]:
        blocks = "" if group["blocks"] is None else f" in blocks that {group['blocks']} moves"
        print(
            f"group:  {group['name']}, {group['units']} units{blocks}: {', '.join(group['axes']) or 'of blocks alone'}"
        )
    print_lines(f"left:   {line}" for line in result["left"])
    print_lines(f"held:   {line}" if not line.startswith(("missed", "complete")) else line for line in lines)


def _named(given: Given, overrides: list[str]) -> Named:
    """The command line's words on what the checkpoints are of."""
    from fastar.experiments.files.given_files import Named

    known = {name: given[name] for name in ("dataset", "arch", "model", "data", "input_shape")}
    return Named(**known, changes=given.changes(overrides))
