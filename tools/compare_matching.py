"""What a better matching is worth: barriers, objective and seconds, one way of matching beside the other.

    pip install fastar[bench]
    python tools/compare_matching.py --data-root cifar10
    python tools/compare_matching.py --data-root cifar10 --arch resnet8 --star

Trains small networks on CIFAR-10 images (or takes them from --cache): an MLP, a VGG without and with batch-norm, a
residual network and a DenseNet, or those that --arch names. For each, and each way of matching (none; by weights; the
same with perturbations; by activations; by Sinkhorn; PyPI's rebasin 0.0.47), it measures on pairs of
regular models the objective <theta, pi(theta_n)>, seconds of matching per pair, and the barrier. With --star also a
star model trained with this matching at the start of every epoch: seconds of matching in all, the barrier from it to
heldouts that it was never shown, matched to it in the same way.

Barriers (eq. 10) are on training images, with re-estimated batch-norm statistics at every point, evaluated by fastar
for all ways alike. All star models begin at the same theta and see the same batches, sources and t. Prints one JSON
line per network and way, then a table of medians. What has been trained is kept in --cache and reused where its recipe
is the same. Where rebasin cannot match a network, its line says why.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import torch
from bench import where
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastar.config import MatchingSettings, Settings, load_settings
from fastar.errors import FastarError
from fastar.evaluation import PathLosses, Segment, evaluate_paths
from fastar.experiments.measure import endpoint, regular_pairs
from fastar.experiments.regular import regular_models
from fastar.experiments.session import Session, threads
from fastar.experiments.star_domain import prepare_session
from fastar.experiments.statistics_batches import examples, statistics_batches
from fastar.matching import ActivationCache, SourceActivations, UnitActivations, match
from fastar.runs.model_files import Checkpoint
from fastar.runtime.progress import SILENT, Progress, TerminalProgress
from fastar.runtime.seeds import derive_seed
from fastar.training import SourcesStore, StarStep, fit

State = dict[str, Tensor]
Match = Callable[[State, list[State], bool], list[State]]
"""(theta, sources, whether they are permuted already) -> the sources, permuted."""


@dataclass
class Way:
    """One way of matching, and the seconds that it took, call by call."""

    name: str
    match: Match
    seconds: list[float] = field(default_factory=list)

    def __call__(self, theta: State, sources: list[State], warm: bool) -> list[State]:
        begin = time.perf_counter()
        matched = self.match(theta, sources, warm)
        self.seconds.append(time.perf_counter() - begin)
        return matched


# Small networks of the kinds that the paper has, wide enough to be trained in a minute or so.
NETWORKS: dict[str, dict[str, float]] = {
    "mlp": {"width": 128, "depth": 3},
    "vgg11": {"width": 0.25, "dropout": 0.0},
    "vgg11_bn": {"width": 0.25, "dropout": 0.0},
    "resnet8": {"width": 1.0},
    "densenet40_bc": {"growth": 6},
}


WAYS = ("unmatched", "weight", "activation", "sinkhorn", "rebasin")  # weight: with perturbations too


class CannotMatch(Exception):
    """A way of matching does not take this network; the text says why."""


def ways(session: Session) -> list[Way]:
    """The ways that can be had here; a further one is one more entry."""
    perturbations = session.settings.matching.perturbations
    found = [
        Way("unmatched", lambda theta, sources, warm: sources),
        Way("weight", _fastar(session, MatchingSettings())),
        Way("activation", _fastar(session, MatchingSettings(method="activation"))),
        Way("sinkhorn", _fastar(session, MatchingSettings(method="sinkhorn"))),
    ]
    if perturbations:
        found.insert(
            2,
            Way(
                f"weight, {perturbations} perturbations",
                _fastar(session, MatchingSettings(perturbations=perturbations)),
            ),
        )
    if util.find_spec("rebasin") is None:
        print("rebasin is left out: pip install fastar[bench]", file=sys.stderr)
    else:
        found.append(Way("rebasin", _rebasin(session)))
    return found


def _fastar(session: Session, settings: MatchingSettings) -> Match:
    symmetry = session.network.symmetry
    known: list[SourceActivations] = []

    def permuted(theta: State, sources: list[State], warm: bool) -> list[State]:
        if settings.by_activations and not warm:  # as a run does: looked at once, then followed
            given = examples(session)
            look = UnitActivations(given.model, symmetry, given.inputs, session.device)
            kept = ActivationCache(look, sources, [f"source {n}" for n in range(len(sources))])
            known[:] = [kept.permuted(symmetry.identity(len(sources)))]
        activations = known[0] if known else None
        stacked = {name: torch.stack([source[name] for source in sources]) for name in symmetry.parameters}
        start = symmetry.identity() if warm else None
        threads = session.settings.workers
        result = match(
            settings,
            symmetry,
            theta,
            stacked,
            start=start,
            examples=partial(examples, session),
            threads=threads,
            activations=activations,
        )
        if activations is not None:
            known[:] = [activations.then(result.permutations.to("cpu"))]
        return [symmetry.apply(result.permutations.select(n).to("cpu"), source) for n, source in enumerate(sources)]

    return permuted


def _rebasin(session: Session) -> Match:
    from rebasin import PermutationCoordinateDescent

    calls = iter(range(1_000_000))

    def match(theta: State, sources: list[State], warm: bool) -> list[State]:
        models = [session.network.build(seed=0) for _ in range(1 + len(sources))]
        for model, state in zip(models, [theta, *sources], strict=True):
            model.load_state_dict(state)
            model.eval()
        example = next(session.data.splits()["train"]())[0][:2]
        for model in models[1:]:
            torch.manual_seed(
                derive_seed(0, "rebasin", next(calls)) % 2**31
            )  # it draws orders from the global generator
            try:
                PermutationCoordinateDescent(models[0], model, example, device_b=session.device).rebasin()
            except Exception as error:
                # It refuses by whatever its tracing of the network runs into.
                raise CannotMatch(" ".join(f"{type(error).__name__}: {error}".split())[:160]) from error
        return [{name: value.clone() for name, value in model.state_dict().items()} for model in models[1:]]

    return match


def barriers(session: Session, pairs: Sequence[tuple[State, State]]) -> list[float]:
    """Of each path between two models, ends as they are, on the train set."""
    ends = {id(state): endpoint(session, str(id(state)), Checkpoint(state)) for pair in pairs for state in pair}
    measured: list[PathLosses] = evaluate_paths(
        session.network.build(seed=0),
        session.network.layout,
        [Segment("path", ends[id(a)], ends[id(b)]) for a, b in pairs],
        {"train": session.data.splits()["train"]},
        points=session.settings.evaluation.points,
        statistics_batches=partial(statistics_batches, session),
        progress=session.progress,
    )
    return [path.barrier("train") for path in measured]


def objective(session: Session, theta: State, state: State) -> tuple[float, float]:
    """<theta, state> over the parameters in float64, and the same without 1-D parameters."""
    values = {n: float((theta[n].double() * state[n].double()).sum()) for n in session.network.symmetry.parameters}
    return sum(values.values()), sum(v for n, v in values.items() if theta[n].ndim > 1)


def star(session: Session, way: Way, sources: Sequence[State]) -> tuple[State, list[State]]:
    """A star model of `sources`, which are matched to it `way` at the start of every epoch; they as permuted last."""
    settings = session.settings
    seed = derive_seed(settings.seed, "star", 0)
    store = SourcesStore(session.network.layout, sources, [str(n) for n in range(len(sources))], session.device)
    whole = list(sources)  # as permuted last, with their buffers

    def match(theta: Tensor, store: SourcesStore, epoch: int) -> None:
        centre = {**whole[0], **{k: v.contiguous() for k, v in session.network.layout.views(theta).items()}}
        whole[:] = way(centre, whole, epoch > 0)
        for row, state in zip(store.rows, whole, strict=True):
            session.network.layout.flatten(state, out=row)

    model = session.network.build(seed=seed)
    step = StarStep(model, settings.train, settings.star, store, seed=derive_seed(seed, "star"), match=match)
    fit(
        step,
        session.data.train,
        settings.train,
        name=f"star, {way.name}",
        seed=derive_seed(seed, "data"),
        epochs=settings.star.epochs,
        progress=session.progress,
    )
    return step.state(), whole


def compare(session: Session, chosen_ways: Sequence[str] | None, *, with_star: bool) -> Iterator[dict[str, Any]]:
    """One record for each way of matching, or for each of those chosen."""
    settings, device = session.settings, session.device
    with session.run.open(settings), threads(session):
        models = [
            *regular_models(session, "source", settings.sources.number),
            *regular_models(session, "heldout", settings.sources.heldout),
        ]
        everything = [{name: value.to(device) for name, value in one.state.items()} for one in models]
        sources, heldouts = everything[: settings.sources.number], everything[settings.sources.number :]
        chosen = regular_pairs(settings, settings.sources.number, settings.sources.heldout)
        for way in ways(session):
            if chosen_ways is not None and way.name.partition(",")[0] not in chosen_ways:
                continue
            record: dict[str, Any] = {
                "bench": "compare_matching",
                "case": way.name,
                "arch": settings.model.arch,
                "options": settings.model.options,
                "dataset": settings.dataset.name,
                "images": settings.dataset.limit,
                "epochs": settings.train.epochs,
                "pairs": len(chosen),
                "sources": len(sources),
                "heldouts": len(heldouts),
                "loss": [one.metadata["train_loss"] for one in models],
            }
            try:
                pairs = [(everything[a], way(everything[a], [everything[b]], False)[0]) for a, b in chosen]
            except CannotMatch as why:
                yield {**record, "refused": str(why), **where(device)}
                continue
            objectives = [objective(session, a, b) for a, b in pairs]
            record |= {
                "objective": [total for total, _ in objectives],
                "objective_weights": [weights for _, weights in objectives],
                "seconds_per_pair": list(way.seconds),
                "barrier_regular": barriers(session, pairs),
            }
            way.seconds.clear()
            if with_star:
                centre, permuted = star(session, way, sources)
                record["seconds_in_star"] = sum(way.seconds)
                ends = [(centre, s) for s in way(centre, permuted, True)]  # goes on from the last epoch
                record["barrier_star_source"] = barriers(session, ends)
                ends = [(centre, way(centre, [h], False)[0]) for h in heldouts]
                record["barrier_star_heldout"] = barriers(session, ends)
            yield {**record, **where(device)}


COLUMNS = {
    "objective": "objective",
    "objective_weights": "without 1-D",
    "seconds_per_pair": "s a pair",
    "barrier_regular": "barrier, regular",
    "seconds_in_star": "s in a star run",
    "barrier_star_heldout": "star to heldout",
    "barrier_star_source": "star to source",
}


def table(records: Sequence[dict[str, Any]]) -> Table:
    """Medians of every way."""
    first = records[0]
    models = f"{first['pairs']} pairs of {first['sources'] + first['heldouts']} models"
    out = Table(title=f"{first['dataset']}, {first['images']} images, {first['epochs']} epochs; medians of {models}")
    columns = {key: title for key, title in COLUMNS.items() if any(key in record for record in records)}
    out.add_column("network")
    out.add_column("matching")
    for title in columns.values():
        out.add_column(title, justify="right")
    before = ""
    for record in records:
        cells = []
        for key in columns:
            if key not in record:
                cells.append("refused" if key == "barrier_regular" else "")
                continue
            values = record[key] if isinstance(record[key], list) else [record[key]]
            nothing_done = key.startswith("seconds") and max(values) < 1e-3
            cells.append("-" if nothing_done else f"{statistics.median(values):.3g}")
        if before and before != record["arch"]:
            out.add_section()
        out.add_row("" if record["arch"] == before else record["arch"], record["case"], *cells)
        before = record["arch"]
    return out


def settings_of(args: argparse.Namespace, arch: str) -> Settings:
    """A run's settings from the options.

    Raises:
        FastarError: one is out of range.
    """
    given = {
        "dataset.limit": args.images,
        "dataset.root": args.data_root,
        "train.epochs": args.epochs,
        "train.batch_size": args.batch,
        "star.epochs": args.star_epochs,
        "sources.number": args.sources,
        "sources.heldout": args.heldout if args.star else 0,
        "evaluation.regular_pairs": args.pairs,
        "evaluation.points": args.points,
        "evaluation.limit": min(args.measure, args.images),
        "evaluation.bn_batches": max(1, args.measure // args.batch),
        "matching.perturbations": args.perturbations,
        "seed": args.seed,
        "device": args.device,
        **{f"model.{key}": value for key, value in NETWORKS.get(arch, {}).items()},
        **({} if args.width is None else {"model.width": args.width}),
    }
    given = {key: value for key, value in given.items() if value is not None}
    return load_settings(dataset=args.dataset, arch=arch, scale="small", values=given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-root", type=Path, help="folder of the images")
    parser.add_argument("--cache", type=Path, default=Path("runs/compare-matching"), help="folder of trained models")
    parser.add_argument("--arch", nargs="+", default=list(NETWORKS), help=f"default: {' '.join(NETWORKS)}")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="default: all that can be had here")
    parser.add_argument("--star", action="store_true", help="also train a star model with each way of matching")
    parser.add_argument("--width", type=float, help="width setting of the architectures")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--star-epochs", type=int, help="default: as --epochs")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sources", type=int, default=3)
    parser.add_argument("--heldout", type=int, default=3, help="with --star")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--points", type=int, default=7)
    parser.add_argument("--measure", type=int, default=1000, help="images for losses, and for batch-norm statistics")
    parser.add_argument("--perturbations", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args()
    progress: Progress = SILENT if args.quiet else TerminalProgress()
    try:
        sessions = [prepare_session(settings_of(args, arch), args.cache / arch, progress) for arch in args.arch]
        for session in sessions:
            session.run.check(session.settings)
        records = []
        for session in sessions:
            for record in compare(session, args.ways, with_star=args.star):
                print(json.dumps(record), flush=True)
                records.append(record)
    except FastarError as error:
        raise SystemExit(f"compare_matching: {error}") from error
    Console(width=140).print(table(records))
    for record in records:
        if "refused" in record:
            print(f"{record['arch']}, {record['case']}: {record['refused']}")


if __name__ == "__main__":
    main()
