"""The whole job (sources, heldouts, star, matching, barriers) by fastar, beside a star trainer in plain PyTorch.

    python tools/bench_reference.py [--arch resnet8] [--sources 10] [--epochs 8] [--star-set KEY=VALUE ... ]

The plain trainer (tools/bench/plain_star.py) is one as a user writes it from the paper, in its best setting; it matches
by PyPI's rebasin 0.0.47. Both have the same data, network, numbers, epochs and recipe, in float32, each its own random
draws. In each round of one process both do the whole job, in turns: fastar as `fastar train-star` does, in a new run
folder; a small job of each goes before. Parts: `sources` (heldouts among them; fastar's include the losses of each
network alone), `steps` and `matching` of the star, `barriers` (matching of the ends included), `rest` (data read, the
star measured alone, files).

One more star of the same sources for each --star-set, such as `--star-set star.start=mean star.epochs=2`. The
claim `to equal largest loss` is of the fastest of them whose largest loss on the paths to the heldouts is at most the
plain trainer's star's, and of its steps and matching.

Both stars are of fastar's sources, so that they can be compared; those of the plain trainer are timed and left. Stars
are measured by one ruler: fastar.match, fastar.apply and fastar.barrier, float32, train images, from the star to the
heldouts; it is not timed. `told` is the mean barrier that each side's own results say.

One JSON line for each side, then one for each claim (tools/bench_all.py makes a table of those). Without --directory,
the images are made, and can be learnt. rebasin is no dependency: `pip install fastar[bench]`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from bench import plain_star as plain
from bench import quantiles, where
from bench.fake_images import make_small_images
from bench.lines import claim
from bench.spent import PARTS, Spent, Tasks
from torch import nn

import fastar
from fastar.config import Settings, dataset_spec, load_settings
from fastar.data.convert import prepare
from fastar.errors import FastarError
from fastar.experiments.session import Session
from fastar.experiments.star_domain import prepare_session
from fastar.experiments.whole_run import train_star
from fastar.runtime.device import resolve_device
from fastar.runtime.seeds import derive_seed

PLAIN, FASTAR = "plain PyTorch", "fastar"


@dataclass
class Side:
    """What one side spent and found, one entry for each round."""

    parts: dict[str, list[Spent]] = field(default_factory=dict)
    barrier: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)
    star_loss: list[float] = field(default_factory=list)
    heldout_loss: list[float] = field(default_factory=list)
    told: list[float] = field(default_factory=list)

    def add(self, parts: dict[str, Spent]) -> None:
        for name, spent in parts.items():
            self.parts.setdefault(name, []).append(spent)
        for name, members in {"star": ("steps", "matching"), "whole": PARTS}.items():
            some = [parts[member] for member in members if member in parts]
            self.parts.setdefault(name, []).append(sum(some, Spent()))

    def measured(self, paths: Sequence[Any]) -> None:
        """Add a round's paths from the star to the heldouts, by the one ruler."""
        self.barrier += [path.value for path in paths]
        self.largest += [path.largest_loss for path in paths]
        self.star_loss.append(paths[0].loss[0])
        self.heldout_loss += [path.loss[-1] for path in paths]

    def figures(self) -> dict[str, list[float]]:
        return {
            "barrier": self.barrier,
            "largest_loss": self.largest,
            "star_loss": self.star_loss,
            "heldout_loss": self.heldout_loss,
            **({"told": self.told} if self.told else {}),
        }

    def line(self) -> dict[str, Any]:
        return {
            "s": {name: quantiles([one.wall for one in spent]) for name, spent in self.parts.items()},
            "cpu_s": {name: quantiles([one.cpu for one in spent]) for name, spent in self.parts.items()},
            **{name: quantiles(found) for name, found in self.figures().items()},
            "n": len(self.star_loss),
            "paths": len(self.barrier),
        }


class Job:
    """The job that both sides do.

    Args:
        settings: of fastar's run; the plain trainer follows them.
        folder: for run folders.
    """

    def __init__(self, settings: Settings, folder: Path):
        self.settings, self.folder = settings, folder
        self.session: Session = prepare_session(settings, folder / "data alone")
        data, spec, train = self.session.data, settings.dataset.spec, settings.train
        splits = {}
        for name, batches in data.splits().items():
            images, labels = (torch.cat(parts) for parts in zip(*batches(), strict=True))
            black = None if spec.mean is None or spec.std is None else -torch.tensor(spec.mean) / torch.tensor(spec.std)
            more = {"pad": spec.augmentation.pad, "flip": spec.augmentation.flip, "black": black}
            splits[name] = plain.Images(images, labels, **(more if name == "train" else {}))
        self.train, self.splits = splits["train"], list(splits.values())
        self.recipe = plain.Training(train.epochs, train.batch_size, train.lr, train.momentum, train.weight_decay)
        self.example = self.train.images[:2]

    def network(self, *names: object) -> nn.Module:
        return self.session.network.build(seed=derive_seed(self.settings.seed, *names), device="cpu")

    def by_fastar(self, round_number: int, side: Side) -> Path:
        """The whole run; its folder."""
        out, whole, tasks = self.folder / f"run-{round_number}", Spent(), Tasks()
        settings = self.settings.model_copy(update={"seed": self.settings.seed + round_number})
        with whole.counted():
            results = train_star(settings, out, tasks)
        side.add(tasks.parts(whole))
        side.told.append(results["train"]["star_heldout"]["mean"])
        side.measured(self.ruled(*self.models(out)))
        return out

    def another_star(self, sources: Path, changes: Sequence[str], round_number: int, name: str, side: Side) -> None:
        """A star of the same sources with other settings; only its steps and matching are counted."""
        out, tasks = self.folder / f"{name}-{round_number}", Tasks()
        given = {"folder": sources / "sources", "heldout_folder": sources / "heldout"}
        content = self.settings.model_dump()
        content["seed"] += round_number
        content["sources"] |= given
        content["evaluation"] |= {"points": 2, "regular_pairs": 1, "star_sources": 1}  # the ruler measures it
        (self.folder / "another.yaml").write_text(Settings.model_validate(content).to_yaml(), encoding="utf-8")
        settings = load_settings(file=self.folder / "another.yaml", overrides=changes)
        train_star(settings, out, tasks)
        found = tasks.parts(Spent())
        side.add({part: found[part] for part in ("steps", "matching")})
        side.measured(self.ruled(*self.models(out, sources)))

    def plain_sources(self, round_number: int) -> Spent:
        """The time of the plain trainer's sources and heldouts."""
        spent, numbers = Spent(), self.settings.sources
        with spent.counted():
            for n in range(numbers.number + numbers.heldout):
                network = self.network("plain", round_number, n)
                plain.train(network, self.train, self.recipe, self.seed(round_number, n))
        return spent

    def plain_star(self, round_number: int, run: Path, sources_spent: Spent, side: Side) -> None:
        """The plain trainer's star of the sources of fastar's run, and barriers."""
        evaluation = self.settings.evaluation
        spent = {"sources": sources_spent, **{name: Spent() for name in ("steps", "matching", "barriers")}}
        found = fastar.load_run(run)
        sources, heldouts = ([self.loaded(one.state) for one in some] for some in (found.sources, found.heldouts))
        regular = [*(copy.deepcopy(one) for one in sources), *heldouts]
        star, seed = self.network("plain", round_number, "star"), self.seed(round_number, "star")
        training = plain.StarTraining(star, sources, self.train, self.recipe, self.example, seed)
        for _ in range(self.recipe.epochs):
            with spent["matching"].counted():
                training.match()
            with spent["steps"].counted():
                training.epoch()
        pairs = [(regular[2 * n], regular[2 * n + 1]) for n in range(int(evaluation.regular_pairs))]
        along: list[list[list[float]]] = []
        with spent["barriers"].counted():
            training.match()  # to the star as it is now
            paths = [(star, plain.matched(star, one, self.example)) for one in heldouts]
            paths += [(star, one) for one in sources[: evaluation.star_sources]]
            paths += [(a, plain.matched(a, b, self.example)) for a, b in pairs] + pairs
            size = self.recipe.batch_size
            for a, b in paths:
                along.append(plain.losses_along(a, b, evaluation.points, self.train, self.splits, size, seed))
        side.add(spent)
        side.told.append(fmean(plain.barrier(losses[0]) for losses in along[: len(heldouts)]))
        side.measured(self.ruled(star, heldouts))

    def seed(self, round_number: int, *names: object) -> int:
        return derive_seed(self.settings.seed + round_number, "plain", *names)

    def loaded(self, state: Mapping[str, torch.Tensor]) -> nn.Module:
        """A network that holds a state."""
        network = self.network("to load into")
        network.load_state_dict(dict(state))
        return network

    def models(self, run: Path, sources: Path | None = None) -> tuple[nn.Module, list[nn.Module]]:
        """The star of a run, and the heldouts (of the run `sources`, where they were given)."""
        found = fastar.load_run(run)
        heldouts = (found if sources is None else fastar.load_run(sources)).heldouts
        assert found.star is not None
        return self.loaded(found.star.state), [self.loaded(one.state) for one in heldouts]

    def ruled(self, star: nn.Module, heldouts: Sequence[nn.Module]) -> list[Any]:
        """The paths from a star to its heldouts, by the one ruler."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        data = [(self.train.images[some], self.train.labels[some]) for some in order.split(plain.EVALUATED)]
        found = []
        for one in heldouts:
            nearer = fastar.apply(fastar.match(star, one, example_inputs=self.example), one)
            found.append(fastar.barrier(star, nearer, data, points=self.settings.evaluation.points))
        return found


def settings_of(arguments: argparse.Namespace, directory: Path) -> Settings:
    """The run that the options describe."""
    overrides = [
        f"train.epochs={arguments.epochs}",
        f"train.batch_size={arguments.batch}",
        f"train.lr={arguments.lr}",
        f"sources.number={arguments.sources}",
        f"sources.heldout={arguments.heldouts}",
        f"evaluation.points={arguments.points}",
        f"evaluation.regular_pairs={arguments.pairs}",
        f"evaluation.star_sources={min(arguments.paths, arguments.sources)}",
        f"evaluation.test_limit={max(10, arguments.images // 2)}",
        f"dataset.limit={arguments.images}",
        f"seed={arguments.seed}",
        f"workers={arguments.threads}",
        "train.precision=fp32",
        *([] if arguments.width is None else [f"model.width={arguments.width:g}"]),
    ]
    return load_settings(
        dataset=arguments.dataset,
        arch=arguments.arch,
        values={"dataset.directory": directory, "device": "cpu"},
        overrides=overrides,
    )


def make_data(arguments: argparse.Namespace, folder: Path) -> None:
    """The data set's files in `folder`: made images, or scikit-learn's digits."""
    raw = None
    if arguments.dataset != "digits":
        spec, raw = dataset_spec(arguments.dataset), folder / "raw"
        make_small_images(
            raw,
            spec.classes[:10],
            (spec.height, spec.width),
            {"train": arguments.images, "test": arguments.images // 2},
        )
    prepare(arguments.dataset, raw=raw, directory=folder)


def claims(sides: dict[str, Side], facts: dict[str, Any]) -> Iterator[str]:
    """The lines of the claims."""
    mine, theirs = sides[FASTAR], sides[PLAIN]
    told = {
        "whole": "the whole job",
        "sources": "training of sources and heldouts",
        "steps": "the star's steps",
        "matching": "matching, every epoch",
        "star": "the star: steps and matching",
        "barriers": "barriers",
    }
    network = f"{facts['arch']}, N={facts['sources']}"

    def line(text: str, part: str, ours: Side) -> str:
        pairs = {"ours": ours.parts[part], "peer": theirs.parts[part]}
        wall = {side: [one.wall for one in spent] for side, spent in pairs.items()}
        cpu = {side: [one.cpu for one in spent] for side, spent in pairs.items()}
        return claim("reference", f"{text} ({network})", PLAIN, wall, cpu, **facts)

    for part, text in told.items():
        yield line(text, part, mine)
    faster = {name: side for name, side in sides.items() if name not in (FASTAR, PLAIN)}
    reached = {name: side for name, side in faster.items() if fmean(side.largest) <= fmean(theirs.largest)}
    if reached:
        name = min(reached, key=lambda name: fmean(one.cpu for one in reached[name].parts["star"]))
        losses = [f"{fmean(side.largest):.3g}" for side in (reached[name], theirs)]
        text = f"the star, to equal largest loss on paths to heldouts ({' against '.join(losses)}), {name}"
        yield line(text, "star", reached[name])


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10", help="of images of one size")
    parser.add_argument("--directory", type=Path, help="folder of the data set's files; default: images are made")
    parser.add_argument("--arch", default="resnet8")
    parser.add_argument("--width", type=float, help="the architecture's width setting (0.5 for resnet8)")
    parser.add_argument("--sources", type=int, default=10)
    parser.add_argument("--heldouts", type=int, default=3)
    parser.add_argument("--images", type=int, default=512, help="train images; half as many test images at most")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--points", type=int, default=7, help="of a path")
    parser.add_argument("--paths", type=int, default=3, help="paths from the star to sources")
    parser.add_argument("--pairs", type=int, default=2, help="pairs of regular models, each with and without matching")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--star-set", nargs="+", action="append", default=[], metavar="KEY=VALUE", help="settings of one more star"
    )
    arguments = parser.parse_args()
    if min(arguments.rounds, arguments.threads, arguments.epochs, arguments.pairs, arguments.heldouts) < 1:
        parser.error("--rounds, --threads, --epochs, --pairs and --heldouts must be at least 1")
    if arguments.sources + arguments.heldouts < 2 * arguments.pairs:
        parser.error(f"--pairs {arguments.pairs} needs twice as many sources and heldouts")
    if arguments.arch == "resnet8" and arguments.width is None:
        arguments.width = 0.5
    return arguments


def warm_up(settings: Settings, folder: Path) -> None:
    """The job in small, by both: what is compiled, imported and kept the first time is counted for neither."""
    sources = settings.sources.model_copy(update={"number": 1, "heldout": 1})
    evaluation = settings.evaluation.model_copy(update={"points": 2, "regular_pairs": 1, "star_sources": 1})
    train = settings.train.model_copy(update={"epochs": 1})
    small = settings.model_copy(update={"sources": sources, "evaluation": evaluation, "train": train})
    job = Job(small, folder)
    job.plain_star(0, job.by_fastar(0, Side()), job.plain_sources(0), Side())


def main() -> None:
    arguments = options()
    if util.find_spec("rebasin") is None:
        raise FastarError("the plain trainer matches by rebasin: pip install fastar[bench], or put it on PYTHONPATH")
    torch.set_num_threads(arguments.threads)
    others = {", ".join(changes): changes for changes in arguments.star_set}
    sides = {name: Side() for name in (FASTAR, PLAIN, *others)}
    with tempfile.TemporaryDirectory(prefix="fastar-reference-") as temporary:
        folder = Path(temporary)
        if arguments.directory is None:
            make_data(arguments, folder)
        settings = settings_of(arguments, arguments.directory or folder)
        for changes in others.values():
            load_settings(dataset=arguments.dataset, arch=arguments.arch, overrides=changes)  # refused now, not later
        warm_up(settings, folder / "small")
        job = Job(settings, folder)

        for number in range(arguments.rounds):
            first = job.plain_sources(number) if number % 2 else None  # every second round the plain trainer begins
            run = job.by_fastar(number, sides[FASTAR])
            job.plain_star(number, run, first or job.plain_sources(number), sides[PLAIN])
            for index, (name, changes) in enumerate(others.items()):
                job.another_star(run, changes, number, f"star-{index}", sides[name])
            print(f"bench_reference: round {number + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
        made = arguments.directory is None and arguments.dataset != "digits"
        facts = {
            **{key: getattr(arguments, key) for key in ("arch", "sources", "heldouts", "images", "epochs", "batch")},
            "data": f"{arguments.dataset}, made images" if made else arguments.dataset,
            "parameters": sum(value.numel() for value in job.network("counted").parameters()),
            "threads": arguments.threads,
            **where(resolve_device("cpu")),
        }
    for name, side in sides.items():
        print(json.dumps({"bench": "reference", "case": name, **side.line(), **facts}), flush=True)
    for text in claims(sides, facts):
        print(text, flush=True)


if __name__ == "__main__":
    try:
        main()
    except FastarError as error:
        sys.exit(f"bench_reference: {error}")
