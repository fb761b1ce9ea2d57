"""Star models of several architectures at a small scale, on real images: are barriers ordered as in the paper?

    python tools/star_runs.py --data-root cifar10 [--case NAME ...] [--folder DIR] [--write docs/star-models.md]

Each case is one `fastar train-star ... --scale small`: sources, heldouts and a star model are trained, matched, and the
train barriers (eq. 10) measured from the star to its sources, from the star to heldouts, and between regular models.
Runs are kept in --folder and go on where they were. Prints one JSON line a case, then the table; --write puts the table
and the commands into a file, between its two marks. Exit code 1 where a case's barriers are not ordered star-source <
star-heldout < regular-regular.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import where

from fastar.cli.main import main as fastar
from fastar.errors import FastarError
from fastar.runs import write_atomically
from fastar.runtime.device import resolve_device

# What each run is called with; all at `--scale small`, the deeper ones on half of its images, for the time they take.
CASES: dict[str, list[str]] = {
    "MLP": ["--dataset", "fashion-mnist", "--arch", "mlp"],
    "VGG-11, batch-norm": ["--dataset", "cifar10", "--arch", "vgg11_bn", "model.dropout=0"],
    "ResNet-8": ["--dataset", "cifar10", "--arch", "resnet8", "model.width=1"],
    "WideResNet-22": ["--config", "cifar10-wrn22", "dataset.limit=2500"],
    "ResNet-18": ["--config", "cifar10-resnet18", "dataset.limit=2500", "evaluation.limit=500", "evaluation.points=5"],
    "ViT, unmatched": ["--config", "mnist-vit", "--dataset", "fashion-mnist", "dataset.limit=2500"],
    "DenseNet-40-BC": ["--dataset", "cifar10", "--arch", "densenet40_bc", "dataset.limit=2500"],
}
ORDER = ("star_source", "star_heldout", "regular_regular")  # the last unmatched where nothing is matched
BEGIN, END = "<!-- table: tools/star_runs.py -->", "<!-- end of table -->"


def command(name: str, data_root: Path | None) -> list[str]:
    """The arguments of one case's `fastar`; CIFAR's images are where `data_root` says."""
    arguments = ["train-star", *CASES[name]]
    at = next((i for i, word in enumerate(arguments) if "=" in word), len(arguments))
    root = [] if data_root is None or "fashion-mnist" in arguments else ["--data-root", str(data_root)]
    return [*arguments[:at], "--scale", "small", *root, *arguments[at:]]


def run(name: str, data_root: Path | None, folder: Path) -> dict[str, Any]:
    """One case's results.

    Raises:
        FastarError: the run ended with an error, whose line it is.
    """
    out, err = io.StringIO(), io.StringIO()
    place = folder / "".join(c if c.isalnum() or c == "-" else "_" for c in name.lower())
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            fastar([*command(name, data_root), "--out", str(place), "--json"])
        except SystemExit as stop:
            code = stop.code
    if code:
        raise FastarError(f"{name}: {err.getvalue().strip() or f'exit code {code}'}")
    results: dict[str, Any] = json.loads(out.getvalue())
    return results


def record(name: str, results: dict[str, Any], data_root: Path | None) -> dict[str, Any]:
    """What the table says of a case."""
    train = dict(results["train"])
    train.setdefault("regular_regular", train["regular_regular_unmatched"])
    means = [train[kind]["mean"] for kind in ORDER]
    return {
        "bench": "star_runs",
        "case": name,
        "command": shlex.join(["fastar", *command(name, data_root and Path("CIFAR"))]),
        "dataset": results["dataset"],
        "sources": results["sources"],
        "heldouts": results["heldout"],
        "regular_loss": train["regular_loss"]["mean"],
        "star_loss": train["star_loss"],
        **{kind: {key: train[kind][key] for key in ("mean", "std", "n")} for kind in ORDER},
        "ordered": means == sorted(means) and len(set(means)) == len(means),
        **where(resolve_device("auto")),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| network | images | loss, regular | loss, star | barrier, star to sources | star to heldouts | regular to "
        "regular | ordered |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in records:
        barriers = [f"{one[k]['mean']:.3f} ± {one[k]['std'] or 0:.3f} ({one[k]['n']})" for k in ORDER]
        cells = [one["case"], one["dataset"], f"{one['regular_loss']:.3f}", f"{one['star_loss']:.3f}", *barriers]
        lines.append(f"| {' | '.join(cells)} | {'yes' if one['ordered'] else 'no'} |")
    return "\n".join(lines)


def write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Put the table, its commands and its date between the marks in `path`.

    Raises:
        FastarError: no such file, or no marks in it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FastarError(f"{path}: cannot be read ({error.strerror})") from error
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise FastarError(f"{path}: has no {BEGIN} and {END} for the table to go between")
    first = records[0]
    made = f"{datetime.date.today()}, {first['device']}, torch {first['versions']['torch']}"
    commands = "\n".join(one["command"] for one in records)
    middle = f"{BEGIN}\n{table(records)}\n\nMade {made}, by\n\n```sh\n{commands}\n```\n"
    write_atomically(path, (text[:begin] + middle + text[end:]).encode())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="folder of CIFAR-10's images")
    parser.add_argument("--case", nargs="+", default=list(CASES), metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--folder", type=Path, default=Path("runs/star-runs"))
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    unknown = [name for name in options.case if name not in CASES]
    if unknown:
        raise FastarError(f"--case {unknown[0]}: choose of {', '.join(CASES)}")
    records = []
    for name in options.case:
        records.append(record(name, run(name, options.data_root, options.folder), options.data_root))
        print(json.dumps(records[-1]), flush=True)
    print(table(records))
    if options.write is not None:
        write(options.write, records)
    return 0 if all(one["ordered"] for one in records) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FastarError as error:
        sys.exit(f"star_runs: {error}")
