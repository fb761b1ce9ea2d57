"""A star's quality against its epochs and its CPU seconds, for several ways to train it: a JSON line for each star.

    python tools/bench_quality.py [--picture FILE.png]              # scikit-learn's digits
    python tools/bench_quality.py --arch resnet8 --directory DIR    # CIFAR-10; DIR holds its .beton files, or will

For each seed, sources and heldouts are trained by the recipe (kept in --folder, if it is given), then a star by each
way for each share of the recipe's epochs; the ways take turns within a seed, in one process. `largest_loss` is the
largest loss on the path from the star to heldouts, `star_loss` the star's own, both on the train set: the barrier alone
is small where a star is bad. `cpu_s` is all of the star's training: matching, steps, statistics, its own loss. After
the lines comes a table, mean ± standard deviation over seeds; --picture draws the two losses over epochs and seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import claim, where

from fastar.config import Settings, load_settings
from fastar.errors import FastarError
from fastar.experiments.measure import measure
from fastar.experiments.plan import prepare_data
from fastar.experiments.regular import models_of
from fastar.experiments.session import opened, threads
from fastar.experiments.star import star_model
from fastar.experiments.star_domain import prepare_session, train_sources
from fastar.report.figures import check_picture, figure_of, legend_below, plain

# What each network's runs are called with. Few images and sources: it is the order of the ways that counts.
CASES: dict[str, tuple[str, list[str]]] = {
    "mlp": ("digits", ["train.epochs=120"]),
    "resnet8": (
        "cifar10",
        [
            *("model.width=0.5", "dataset.limit=1000", "train.epochs=20", "train.batch_size=64", "train.lr=0.05"),
            *("sources.number=4", "sources.heldout=2", "evaluation.points=7", "evaluation.limit=500"),
            *("evaluation.test_limit=500", "evaluation.bn_batches=8"),
        ],
    ),
}
HALF = "half the rate"
WAYS: dict[str, list[str]] = {
    "random": [],
    "source": ["star.start=source", HALF],
    "mean": ["star.start=mean", HALF],
    "mean, matched every 3 epochs": ["star.start=mean", "star.match_every_epochs=3", HALF],
}
COLOURS = ("#000000", "#56B4E9", "#D55E00", "#009E73")
STYLE: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 2, "alpha": 0.8}
SHARES = (0.1, 0.25, 0.5, 1.0)
KEYS = ("largest_loss", "barrier", "star_loss", "largest_loss_sources", "largest_loss_test", "cpu_s")
TIMES = ("seconds", "cpu_s")
PANELS = {"largest_loss": "largest loss, star to heldouts", "star_loss": "loss, star"}


def settings_of(arch: str, seed: int, given: Sequence[str], directory: Path | None) -> Settings:
    """The recipe of a network's sources, and of the star as it is."""
    if arch not in CASES:
        raise FastarError(f"--arch {arch}: choose of {', '.join(CASES)}")
    dataset, overrides = CASES[arch]
    place = [] if directory is None else [f"dataset.directory={directory}"]
    fixed = ["evaluation.regular_pairs=1", "evaluation.star_sources=4", "logging.tensorboard=false", f"seed={seed}"]
    return load_settings(dataset=dataset, arch=arch, overrides=[*overrides, *fixed, *place, *given])


def way_of(way: str, settings: Settings, share: float) -> list[str]:
    """What a way sets, for a share of the recipe's epochs."""
    epochs = max(1, round(share * settings.train.epochs))
    rate = f"star.lr={settings.train.lr / 2:g}"
    return [f"star.epochs={epochs}", *(rate if one == HALF else one for one in WAYS[way])]


def record(settings: Settings, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Train a star of the sources that are given, and measure it: the content of a line."""
    session = prepare_session(settings, folder)
    prepare_data(session)
    _ = session.network.symmetry, session.data.train  # derived and read before the clock runs
    with opened(session) as session, threads(session):
        sources = list(models_of(session, "source"))
        wall, cpu = time.perf_counter(), time.process_time()
        star, found, permutations = star_model(session, sources)
        taken = {"cpu_s": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
        results, _ = measure(session, star, found, list(models_of(session, "heldout")), permutations)
    train, test = results["train"], results["test"]
    return {
        "bench": "quality",
        **facts,
        "largest_loss": train["largest_loss"]["star_heldout"]["mean"],
        "barrier": train["star_heldout"]["mean"],
        "star_loss": train["star_loss"],
        "largest_loss_sources": train["largest_loss"]["star_source"]["mean"],
        "largest_loss_test": test["largest_loss"]["star_heldout"]["mean"],
        "star_loss_test": test["star_loss"],
        "n": train["star_heldout"]["n"],
        **taken,
        **where(session.device),
    }


def over_seeds(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation of each figure over the seeds, for each way and its epochs."""
    found = []
    for case, epochs in dict.fromkeys((one["case"], one["epochs"]) for one in records):
        here = [one for one in records if (one["case"], one["epochs"]) == (case, epochs)]
        values = {key: [one[key] for one in here] for key in KEYS}
        spreads = {k: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for k, v in values.items()}
        found.append({"case": case, "epochs": epochs, "seeds": len(here), **spreads})
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| way | epochs | largest loss, star to heldouts | barrier | loss, star | largest loss, star to sources | "
        "largest loss, test | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        losses = [f"{one[key][0]:.3f} ± {one[key][1]:.3f}" for key in KEYS[:-1]]
        lines.append(f"| {' | '.join([one['case'], str(one['epochs']), *losses])} | {one['cpu_s'][0]:.1f} |")
    return "\n".join(lines)


def claims(records: Sequence[dict[str, Any]], arch: str) -> Iterator[str]:
    """A star of each way with the least epochs that reach the largest loss of a random start's with all of them, on the
    mean over seeds, beside that star."""
    kept = {key: records[0][key] for key in ("device", "kernels", "versions")}
    of_seeds: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for one in records:
        of_seeds.setdefault((one["case"], one["epochs"]), {})[one["seed"]] = one
    by = {key: list(some.values()) for key, some in of_seeds.items()}
    whole = max((key for key in by if key[0] == "random"), key=lambda key: key[1], default=None)
    if whole is None:
        return
    mean = {key: statistics.fmean(one["largest_loss"] for one in some) for key, some in by.items()}
    for way in dict.fromkeys(case for case, _ in by if case != "random"):
        enough = [key for key in by if key[0] == way and mean[key] <= mean[whole]]
        if not enough:
            continue
        least = min(enough, key=lambda key: key[1])
        losses = f"largest loss {mean[least]:.3g} against {mean[whole]:.3g}"
        text = f"a star that starts at the {way}, {least[1]} epochs, {losses} ({arch})"
        times = [
            {side: [one[key] for one in by[of]] for side, of in (("ours", least), ("peer", whole))} for key in TIMES
        ]
        yield claim("quality", text, f"fastar, random start, {whole[1]} epochs", *times, **kept)


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: each loss (a row) over epochs and over CPU seconds, a line for each way."""
    from matplotlib.ticker import LogLocator, NullFormatter

    with figure_of(path, (9.0, 6.4)) as figure:
        panels = figure.subplots(len(PANELS), 2, sharey="row")
        for (key, name), row in zip(PANELS.items(), panels, strict=True):
            for over, panel in zip(("epochs", "cpu_s"), row, strict=True):
                for way, colour in zip(WAYS, COLOURS, strict=True):
                    here = sorted((one for one in found if one["case"] == way), key=lambda one: int(one["epochs"]))
                    if not here:
                        continue
                    x = [one[over] if over == "epochs" else one[over][0] for one in here]
                    y, deviation = ([one[key][i] for one in here] for i in (0, 1))
                    panel.errorbar(x, y, deviation, color=colour, label=way, **STYLE)
                panel.set_xscale("log")
                panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                panel.xaxis.set_major_formatter("{x:g}")
                panel.xaxis.set_minor_formatter(NullFormatter())
                panel.set_xlabel("epochs of the star" if over == "epochs" else "CPU seconds of the star")
                plain(panel)
            row[0].set_ylabel(name)
            row[0].set_ylim(bottom=0)
        legend_below(figure, panels[0][0], ncols=len(WAYS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="changes of the recipe")
    parser.add_argument("--arch", default="mlp", help=f"of {', '.join(CASES)}")
    parser.add_argument("--directory", type=Path, help="folder of the .beton files (dataset.directory)")
    parser.add_argument("--seeds", type=int, default=3, help="each has its own sources, heldouts and stars")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), metavar="WAY", help=f"of {'; '.join(WAYS)}")
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="of the recipe's epochs")
    parser.add_argument("--folder", type=Path, help="keep sources and heldouts here, and take those that are there")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    unknown = [way for way in options.ways if way not in WAYS]
    if unknown:
        raise FastarError(f"--ways {unknown[0]!r}: choose of {'; '.join(WAYS)}")
    if options.seeds < 1 or not all(0 < share <= 1 for share in options.shares):
        raise FastarError("--seeds must be at least 1, --shares above 0 and at most 1")
    if options.picture is not None:
        check_picture(options.picture)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fastar-quality-") as temporary:
        for seed in range(options.seeds):
            recipe = settings_of(options.arch, seed, options.settings, options.directory)
            regular = (options.folder or Path(temporary)) / f"{options.arch}-seed{seed}"
            train_sources(recipe, regular)
            taken = [f"sources.folder={regular / 'sources'}", f"sources.heldout_folder={regular / 'heldout'}"]
            for share in options.shares:
                for way in options.ways:
                    more = [*options.settings, *taken, *way_of(way, recipe, share)]
                    settings = settings_of(options.arch, seed, more, options.directory)
                    facts = {"case": way, "arch": options.arch, "epochs": settings.star_epochs, "seed": seed}
                    stars = Path(temporary) / f"star-{len(records)}"
                    records.append(record(settings, stars, facts))
                    print(json.dumps(records[-1]), flush=True)
    found = over_seeds(records)
    print(table(found))
    for text in claims(records, options.arch):
        print(text, flush=True)
    if options.picture is not None:
        draw(found, options.picture)


if __name__ == "__main__":
    try:
        main()
    except FastarError as error:
        sys.exit(f"bench_quality: {error}")
