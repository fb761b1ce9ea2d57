"""The command line: parses, calls, prints. Everything else is imported when a command needs it."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastar._version import __version__
from fastar.errors import FastarError, OldName
from fastar.runtime.failure import failure
from fastar.runtime.signals import EXIT_INTERRUPTED, Stopped, signals_stop
from fastar.runtime.standard_streams import say, streams

if TYPE_CHECKING:
    from fastar.config import Settings
    from fastar.runtime.progress import Progress

WIDE = 1000
SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
# Folders of the run that this command is about: a defect's traceback is kept there.
_folders: list[Path] = []

app = typer.Typer(
    name="fastar",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""
Find **star models** of neural networks and measure linear mode connectivity.

A star model is linearly connected, at low loss, to every one of N independently trained source networks, and to
networks it has never seen, once their hidden units are permuted to match. (Do Deep Neural Network Solutions Form a
Star Domain?, ICLR 2025.)

Start with

    fastar train-star --dataset digits

which trains 30 sources, 5 heldouts and a star model in about a minute, measures the barriers between them, and prints a
table and the path of a picture. It needs no data from anywhere.

Every setting of a run is a key of its YAML configuration (`configs/`); give any of them as `key=value` after the
options, such as `train.epochs=30 model.width=32 star.t=beta`. What is already in the run folder and matches is reused:
the same command goes on where it was stopped.

Bad input ends with one line on stderr and exit code 2, as does output that cannot be written; a defect of fastar with
one line that says where its traceback is, and exit code 70. Ctrl-C, SIGTERM and SIGUSR1 save what is being trained and
end with a code that says so: 130 for Ctrl-C (a second one stops at once), 75 for the signals of batch schedulers. After
either, and after a crash, the same command goes on to the same result. `fastar runs` lists runs and where they stand.
""",
)

Dataset = Annotated[
    str | None,
    typer.Option("--dataset", help="digits, fashion-mnist, mnist, cifar10, cifar100, imagenet or imagefolder."),
]
Name = Annotated[
    str | None,
    typer.Option("--name", help="What your --dataset imagefolder is called (dataset.own_name).", show_default=False),
]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch", help="Architecture, such as mlp, resnet18, vgg11_bn or wrn22 (a wrong name lists them all)."
    ),
]
Sources = Annotated[int | None, typer.Option("--sources", help="Number of source models (sources.number).")]
Heldout = Annotated[int | None, typer.Option("--heldout", help="Number of held-out models (sources.heldout).")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Run folder. Default: runs/DATASET-ARCH-seedSEED.", show_default=False)
]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of settings, or the name of a shipped one.")]
ScaleOption = Annotated[
    str,
    typer.Option("--scale", metavar="smoke|small|full", help="Run a smaller version: seconds, or minutes on a CPU."),
]
DataRoot = Annotated[Path | None, typer.Option("--data-root", help="Folder of the raw data (dataset.root).")]
ValShare = Annotated[
    float | None,
    typer.Option(
        "--val-share",
        metavar="SHARE",
        help="Of --dataset imagefolder: DATA_ROOT holds class folders alone, of which this share is for testing, such "
        "as 0.1 (dataset.val_share).",
        show_default=False,
    ),
]
Validation = Annotated[
    float | None,
    typer.Option(
        "--validation",
        metavar="SHARE",
        help="Keep this share of the training images, such as 0.1, out of training, and measure on them too "
        "(dataset.validation).",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.", show_default=False)
]
OnNonfinite = Annotated[
    str | None,
    typer.Option(
        "--on-nonfinite",
        metavar="stop|retry",
        help="When a loss is not finite: stop, or go back to the last checkpoint with other draws "
        "(train.on_nonfinite).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print results as JSON on stdout, and nothing else there.")]
BnBatches = Annotated[
    int | None,
    typer.Option(
        "--bn-batches",
        metavar="N",
        help="Batch-norm statistics from N training batches instead of all (evaluation.bn_batches).",
        show_default=False,
    ),
]
GpuMemory = Annotated[
    str | None,
    typer.Option(
        "--gpu-memory",
        metavar="SIZE",
        help="Take at most so much of the GPU, such as 40GB (gpu_memory).",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


def _settings(
    dataset: str | None,
    arch: str | None,
    config: Path | None,
    overrides: list[str] | None,
    *,
    sources: int | None = None,
    heldout: int | None = None,
    data_root: Path | None = None,
    name: str | None = None,
    val_share: float | None = None,
    validation: float | None = None,
    on_nonfinite: str | None = None,
    bn_batches: int | None = None,
    gpu_memory: str | None = None,
    scale: str = "full",
) -> Settings:
    from fastar.config import as_override, dataset_spec, load_settings
    from fastar.config.scales import require_scale

    require_scale(scale)

    if dataset is not None:
        dataset_spec(dataset)
    named: dict[str, object] = {
        "sources.number": sources,
        "sources.heldout": heldout,
        "dataset.root": data_root,
        "train.on_nonfinite": on_nonfinite,
        "dataset.own_name": name,
        "dataset.val_share": val_share,
        "dataset.validation": validation,
        "evaluation.bn_batches": bn_batches,
        "gpu_memory": gpu_memory,
    }
    options = [as_override(key, value) for key, value in named.items() if value is not None]
    return load_settings(dataset=dataset, arch=arch, file=config, scale=scale, overrides=[*options, *(overrides or [])])


def _run_folder(
    out: Path | None, settings: Settings, dataset: str | None, arch: str | None, config: Path | None, scale: str
) -> Path:
    """Where a run goes: what was named on the command line names it."""
    from fastar.runs import default_run_folder

    if out is None:
        named = [None if dataset is None else settings.dataset.label, arch]
        parts = [] if config is None else [config.stem, *(part for part in named if part)]
        out = default_run_folder(settings, recipe="-".join(parts) or None, scale=scale)
    _folders.append(out)
    return out


def _named(name: str | None) -> list[str]:
    from fastar.config import as_override

    return [] if name is None else [as_override("dataset.own_name", name)]


def _progress(quiet: bool) -> Progress:
    from fastar.runtime.progress import SILENT, TerminalProgress

    return SILENT if quiet else TerminalProgress()


def _print_table(table: object) -> None:
    from rich.console import Console

    # A file or a pipe has no width: rich would take 80 columns, and fold and cut what is wider.
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    # Names are printed as they are, whatever brackets and colons are in them.
    Console(width=WIDE if piped else None, markup=False, emoji=False).print(table)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


@app.command("train-star")
def train_star_command(
    overrides: Overrides = None,
    dataset: Dataset = None,
    name: Name = None,
    arch: Arch = None,
    sources: Sources = None,
    heldout: Heldout = None,
    out: Out = None,
    config: Config = None,
    scale: ScaleOption = "full",
    data_root: DataRoot = None,
    val_share: ValShare = None,
    validation: Validation = None,
    on_nonfinite: OnNonfinite = None,
    bn_batches: BnBatches = None,
    gpu_memory: GpuMemory = None,
    profile: Annotated[
        int | None,
        typer.Option(
            "--profile",
            metavar="N",
            help="Look at N steps of the star's training: its parts, the top operations, and a Chrome trace, in "
            "OUT/profile.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Do it all: data, sources, heldouts, star model, barriers, report.

    Examples:

        fastar train-star --dataset digits

        fastar train-star --dataset cifar10 --arch resnet8 --data-root ~/cifar --out runs/small train.epochs=10
    """
    settings = _settings(
        dataset,
        arch,
        config,
        overrides,
        sources=sources,
        heldout=heldout,
        data_root=data_root,
        name=name,
        val_share=val_share,
        validation=validation,
        on_nonfinite=on_nonfinite,
        bn_batches=bn_batches,
        gpu_memory=gpu_memory,
        scale=scale,
    )

    from fastar.experiments import train_star
    from fastar.report.results import barrier_picture, check_results, results_table, speed_lines, statistics_lines
    from fastar.runs import RunFolder

    run, progress = RunFolder(_run_folder(out, settings, dataset, arch, config, scale)), _progress(quiet or as_json)
    results = train_star(settings, run.path, progress, profile=profile)
    check_results(results, run.results)
    if not run.is_drawn():
        barrier_picture(results, run.picture)
    if as_json:
        print(json.dumps(results))
        return
    _print_table(results_table(results))
    _print_lines([*speed_lines(results), *statistics_lines(results)])
    print(f"results: {run.results}")
    print(f"picture: {run.picture}")
    if profile is not None:
        print(run.profile("parts.txt").read_text(), end="")
        print(f"profile: {run.profile('')}")


@app.command("plan")
def plan_command(
    overrides: Overrides = None,
    dataset: Dataset = None,
    name: Name = None,
    arch: Arch = None,
    sources: Sources = None,
    heldout: Heldout = None,
    out: Out = None,
    config: Config = None,
    scale: ScaleOption = "full",
    validation: Validation = None,
    bn_batches: BnBatches = None,
    gpu_memory: GpuMemory = None,
    rate: Annotated[
        float | None,
        typer.Option(
            "--images-per-second", help="Speed of training, instead of measuring it here.", show_default=False
        ),
    ] = None,
    loader: Annotated[
        float | None,
        typer.Option("--loader-images-per-second", help="Speed of loading, where it may limit.", show_default=False),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a run will take before anything runs: memory of the GPU and the host, disk, and hours.

    Bytes follow from the network, the recipe and the number of sources; seconds are measured on this machine, or
    follow from the speeds that you state. Exit code 1 where something does not fit; it says which setting makes it fit.

    Examples:

        fastar plan --dataset imagenet --sources 30 --gpu-memory 40GB --images-per-second 3000

        fastar plan --dataset cifar10 --sources 50
    """
    settings = _settings(
        dataset,
        arch,
        config,
        overrides,
        sources=sources,
        heldout=heldout,
        name=name,
        validation=validation,
        bn_batches=bn_batches,
        gpu_memory=gpu_memory,
        scale=scale,
    )

    from fastar.experiments.plan import plan_run
    from fastar.report.results import plan_lines, plan_table

    folder = _run_folder(out, settings, dataset, arch, config, scale)
    plan = plan_run(settings, folder, rate, loader, _progress(quiet or as_json)).as_dict()
    if as_json:
        print(json.dumps(plan))
    else:
        _print_table(plan_table(plan))
        _print_lines(plan_lines(plan))
    if plan["problems"]:
        raise typer.Exit(1)


@app.command("train-sources")
def train_sources_command(
    overrides: Overrides = None,
    dataset: Dataset = None,
    name: Name = None,
    arch: Arch = None,
    sources: Sources = None,
    heldout: Heldout = None,
    out: Out = None,
    config: Config = None,
    scale: ScaleOption = "full",
    data_root: DataRoot = None,
    val_share: ValShare = None,
    validation: Validation = None,
    on_nonfinite: OnNonfinite = None,
    quiet: Quiet = False,
) -> None:
    """Train the source and held-out models of a run that are missing; `train-star` goes on from there.

    Example:

        fastar train-sources --dataset digits --sources 5 --heldout 2 --out runs/five
    """
    settings = _settings(
        dataset,
        arch,
        config,
        overrides,
        sources=sources,
        heldout=heldout,
        data_root=data_root,
        name=name,
        val_share=val_share,
        validation=validation,
        on_nonfinite=on_nonfinite,
        scale=scale,
    )

    from fastar.experiments.star_domain import train_sources

    folder = _run_folder(out, settings, dataset, arch, config, scale)
    for path in train_sources(settings, folder, _progress(quiet)):
        print(path)


UnsaidDataset = Annotated[str | None, typer.Option("--dataset", help="For checkpoints that do not say it.")]
UnsaidArch = Annotated[str | None, typer.Option("--arch", help="For checkpoints that do not say it.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FUNCTION",
        help="For checkpoints of a network of your own: a function without arguments that returns it, or "
        "(network, example inputs); MODULE may be a file, mynets.py.",
        show_default=False,
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option("--input-shape", metavar="2x3x32x32", help="Of --model: what its forward takes.", show_default=False),
]
AllowPartial = Annotated[
    bool, typer.Option("--allow-partial", help="Of --model: leave in place what cannot be proven to move, and say it.")
]


@app.command("match")
def match_command(
    first: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint to match to.")],
    others: Annotated[
        list[str], typer.Argument(metavar="B [...] [KEY=VALUE]...", help="Checkpoints whose hidden units are permuted.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write permuted B here (.safetensors); several B: into this folder.")
    ] = None,
    dataset: UnsaidDataset = None,
    name: Name = None,
    arch: UnsaidArch = None,
    model: Model = None,
    input_shape: InputShape = None,
    allow_partial: AllowPartial = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Permute each B's hidden units so that it lies as close to A as they allow; its function does not change.

    Examples:

        fastar match runs/five/sources/seed-0000.safetensors runs/five/sources/seed-0001.safetensors --out b.safetensors

        fastar match a.pt b.pt c.pt --dataset cifar10 --arch resnet18 --out matched matching.perturbations=5

        fastar match a.pt b.pt --model mynets:build --input-shape 2x3x224x224 --out b.safetensors
    """
    from fastar.experiments.match_files import Named, match_files

    paths, overrides = _paths_and_settings(others)
    named = Named(dataset, arch, model, input_shape, allow_partial, [*_named(name), *overrides])
    progress = _progress(quiet or as_json)
    results = match_files(first, paths, out=out, named=named, progress=progress)
    for result in results:
        if as_json:
            print(json.dumps(result))
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


@app.command("match-many")
def match_many_command(
    files: Annotated[
        list[str], typer.Argument(metavar="A B [...] [KEY=VALUE]...", help="Checkpoints of one architecture.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="mean|star|pairwise",
            help="To each other through their mean (the default), to --centre, or each to each.",
            show_default=False,
        ),
    ] = None,
    centre: Annotated[
        Path | None,
        typer.Option("--centre", help="The checkpoint that all are matched to, such as a star.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the permuted checkpoints into this folder.", show_default=False)
    ] = None,
    average: Annotated[
        Path | None,
        typer.Option(
            "--average", help="Write the average of the permuted ones here (.safetensors).", show_default=False
        ),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Of mean: passes over all, at most.")] = 20,
    dataset: UnsaidDataset = None,
    name: Name = None,
    arch: UnsaidArch = None,
    model: Model = None,
    input_shape: InputShape = None,
    allow_partial: AllowPartial = False,
    as_json: Json = False,
    quiet: Quiet = False,
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
    from fastar.experiments.match_files import Named, match_many_files

    paths, overrides = _paths_and_settings(files)
    named = Named(dataset, arch, model, input_shape, allow_partial, [*_named(name), *overrides])
    result = match_many_files(
        paths,
        to=to or ("mean" if centre is None else "star"),
        centre=centre,
        out=out,
        average=average,
        rounds=rounds,
        named=named,
        progress=_progress(quiet or as_json),
    )
    if as_json:
        print(json.dumps(result))
        return

    from fastar.report.results import many_table

    _print_table(many_table(result))
    if not result["groups"]:
        print("groups: none: no hidden units are permuted")
    _print_lines(f"left: {line}" for line in result["left"])
    if result["to"] == "mean":
        print(f"rounds:  {result['rounds']}{'' if result['converged'] else ', and the last still changed something'}")
        print(f"inner product of two: {result['history'][0]:.6g} at first, {result['history'][-1]:.6g} in the end")
    if result["average"] is not None:
        print(f"average: {result['average']}")


def _paths_and_settings(words: list[str]) -> tuple[list[Path], list[str]]:
    """Files, and `key=value` settings, which a file that is there is not."""
    settings = [word for word in words if SETTING.match(word) and not Path(word).exists()]
    return [Path(word) for word in words if word not in settings], settings


@app.command("barrier")
def barrier_command(
    first: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint at t = 0.")],
    others: Annotated[list[str], typer.Argument(metavar="B [...] [KEY=VALUE]...", help="Checkpoints at t = 1.")],
    dataset: Annotated[str | None, typer.Option("--dataset", help="Default: the one A was trained on.")] = None,
    name: Name = None,
    arch: UnsaidArch = None,
    matching: Annotated[bool, typer.Option("--match/--no-match", help="Permute each B to match A first.")] = True,
    points: Annotated[int, typer.Option("--points", help="Equispaced values of t, ends included.")] = 11,
    data_root: DataRoot = None,
    bn_batches: BnBatches = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Write the curves to this PNG.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the loss barrier from A to each B on train and test images, and on those A kept for validation.

    Examples:

        fastar barrier runs/five/star.safetensors runs/five/heldout/*.safetensors

        fastar barrier a.pt b.pt --dataset cifar10 --arch resnet18 --no-match --points 21
    """
    from fastar.experiments.barrier_files import barriers_of_files
    from fastar.report.results import barrier_picture, barriers_table, check_picture, statistics_lines

    if picture is not None:  # before the work
        check_picture(picture)
    paths, overrides = _paths_and_settings(others)
    statistics = [] if bn_batches is None else [f"evaluation.bn_batches={bn_batches}"]
    result = barriers_of_files(
        first,
        paths,
        dataset=dataset,
        arch=arch,
        matching=matching,
        data_root=data_root,
        overrides=[f"evaluation.points={points}", *statistics, *_named(name), *overrides],
        progress=_progress(quiet or as_json),
    )
    if picture is not None:
        barrier_picture(result, picture)
    if as_json:
        print(json.dumps(result))
        return
    _print_table(barriers_table(result["paths"]))
    _print_lines(statistics_lines(result))
    if picture is not None:
        print(f"picture: {picture}")


@app.command("report")
def report_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    as_json: Json = False,
) -> None:
    """Show the results of a finished run again, and draw its picture anew.

    Example:

        fastar report runs/digits-mlp-seed0
    """
    from fastar.report.results import barrier_picture, check_results, results_table, speed_lines, statistics_lines
    from fastar.runs import RunFolder

    _folders.append(folder)
    run = RunFolder(folder)
    said: list[str] = []
    results = run.read_results(said.append)
    check_results(results, run.results)
    for line in said:
        _progress(as_json).line(line)
    barrier_picture(results, run.picture)
    if as_json:
        print(json.dumps(results))
        return
    _print_table(results_table(results))
    _print_lines([*speed_lines(results), *statistics_lines(results)])
    print(f"picture: {run.picture}")


@app.command("runs")
def runs_command(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to look for run folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List run folders: running, stopped (where) or finished, how long ago, and the figures so far.

    Example:

        fastar runs
    """
    from fastar.report.run_list import overview_table, runs_below

    found = runs_below(folder)
    if as_json:
        print(json.dumps([vars(run) for run in found]))
    elif found:
        _print_table(overview_table(found, folder))
    else:
        print(f"no run folders in {folder}")


@app.command("verify")
def verify_command(
    path: Annotated[Path, typer.Argument(metavar="RUN|DATA|MODEL", help="A run folder, a data set's, or a model.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read all that is on disk of a run, a data set or a model again, and say what is damaged, a line for each thing.

    Models, permutations, results, settings, the log and images are compared with the digests that were written with
    them; what has none is named. Exit code 1 where something is damaged.

    Examples:

        fastar verify runs/digits-mlp-seed0

        fastar verify data/ffcv/digits
    """
    from fastar.experiments.verify_files import recheck

    progress = _progress(quiet or as_json)
    found = recheck(path, progress)
    if as_json:
        print(json.dumps({"path": str(path), **vars(found)}))
    else:
        for line in found.notes:
            progress.line(line)
        _print_lines(found.damaged or [f"{path}: {found.kind}, all well"])
    if found.damaged:
        raise typer.Exit(1)


@app.command("configs")
def configs_command(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Print the settings of this one.", show_default=False)
    ] = None,
    scale: ScaleOption = "full",
    as_json: Json = False,
) -> None:
    """List the configurations that ship, with the paper's figures; or print one's settings as YAML.

    Each runs by its name: `fastar train-star --config NAME`, with `--scale smoke` or `--scale small` a smaller version.

    Examples:

        fastar configs

        fastar configs cifar10-vgg11 --scale small
    """
    if name is not None:
        settings = _settings(None, None, Path(name), None, scale=scale)
        print(json.dumps(settings.model_dump(mode="json")) if as_json else settings.to_yaml().rstrip())
        return

    from fastar.config.scales import require_scale
    from fastar.report.recipe_list import catalogue, catalogue_table

    require_scale(scale)
    entries = catalogue(scale)
    if as_json:
        _print_lines(json.dumps(entry.as_dict()) for entry in entries)
        return
    _print_table(catalogue_table(entries))
    print(
        "Z sources, H heldouts. Barriers: the paper's, train set, mean ± standard deviation; empty where it has none "
        "(figure 3 has no numbers: wrn22's are from its code's result files, wrn22-width8's are what its text says)."
    )


@app.command("doctor")
def doctor_command(as_json: Json = False) -> None:
    """Say what is installed and what will be used: each line ok, or what to do.

    Exit code 1 where something that fastar needs does not work.

    Example:

        fastar doctor
    """
    from fastar.cli.doctor import examine

    checks = examine()
    if as_json:
        print(json.dumps([vars(check) for check in checks]))
    else:
        for check in checks:
            print(f"{'ok  ' if check.ok else 'FAIL' if check.needed else 'note'} {check.name}: {check.text}")
    if any(check.needed and not check.ok for check in checks):
        raise typer.Exit(1)


def _version(value: bool) -> None:
    if value:
        print(f"fastar {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Errors meant for users become one line on stderr and exit code 2; defects one that says
    where the traceback is, and exit code 70."""
    with streams():
        sys.exit(_outcome(arguments))


@contextmanager
def _old_names_said() -> Iterator[None]:
    """Inside, an old name of a setting is one line on stderr; other warnings are shown as ever."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, OldName):
            say(f"fastar: {message}")
        else:
            shown(message, category, *rest)

    with warnings.catch_warnings():
        warnings.simplefilter("always", OldName)
        warnings.showwarning = show  # type: ignore[assignment]  # of its arguments, all are passed on
        yield


def _outcome(arguments: list[str] | None) -> int:
    """The exit code of the command that `arguments` call."""
    _folders.clear()
    try:
        with signals_stop(), _old_names_said():
            result: Any = app(args=arguments, standalone_mode=False)
            sys.stdout.flush()  # what cannot be written is an error of this command
    except Stopped as stopped:
        say(f"fastar: {stopped}")
        return stopped.code
    except (KeyboardInterrupt, typer.Abort):
        result = EXIT_INTERRUPTED
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001  # the last to see it; panics of libraries in Rust are no Exception
        if hasattr(error, "format_message"):  # typer's own complaints about options
            message = error.format_message()
            if not message:  # `fastar` alone: the help has been printed
                return 0
            error = FastarError(f"{message} (see `fastar --help`)")
        line, code = failure(error, next((run for run in _folders if os.path.isfile(run / "config.yaml")), None))
        say(f"fastar: {line}")
        return code
    if result == EXIT_INTERRUPTED:  # typer makes this of Ctrl-C, older ones an Abort
        say("fastar: interrupted; the same command goes on from what is finished")
    return result if isinstance(result, int) else 0
