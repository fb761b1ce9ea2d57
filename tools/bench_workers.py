"""Sources of a run trained by several processes and by one: wall time, with the start of the processes; a JSON line.

    python tools/bench_workers.py [--workers 2] [--sources 8] [--epochs 40] [--rounds 3]

Each process is a `fastar train-sources` with one thread; those of one run share its folder. The two ways take turns;
`ratio` is of several over one, round by round. It needs a core for each worker that nothing else uses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench import quantiles, where


def seconds(command: list[str], number: int) -> float:
    """Wall time until all of so many processes that do the same have ended well."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for _ in range(number)]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"bench_workers: {' '.join(command)} ended with {max(codes)}")
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes that share the work")
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--arch", default="resnet8", help="one that is not trained together with others")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way")
    arguments = parser.parse_args()
    case = f"{arguments.sources} x {arguments.arch}, {arguments.epochs} epochs of digits"
    found: dict[int, list[float]] = {1: [], arguments.workers: []}
    with tempfile.TemporaryDirectory(prefix="fastar-bench-") as name:
        folder = Path(name)
        command = [
            *(
                sys.executable,
                "-m",
                "fastar",
                "train-sources",
                "--dataset",
                "digits",
                "--arch",
                arguments.arch,
                "--quiet",
            ),
            *("--sources", str(arguments.sources), "--heldout", "0", f"dataset.directory={folder / 'data'}"),
            *(f"model.width={arguments.width}", "device=cpu", "workers=1", f"seed={os.getpid()}"),
        ]
        # The data are written, and what is proven of the network is kept, before anything is timed.
        seconds([*command, "train.epochs=1", "sources.number=1", "--out", str(folder / "first")], 1)
        for turn in range(arguments.rounds):
            for number in found:
                out = folder / f"{turn}-{number}"
                found[number].append(seconds([*command, f"train.epochs={arguments.epochs}", "--out", str(out)], number))
    ratios = [several / one for one, several in zip(found[1], found[arguments.workers], strict=True)]
    record = {"bench": "workers", "case": case, "workers": arguments.workers, "n": arguments.rounds}
    record |= {"one_seconds": quantiles(found[1]), "workers_seconds": quantiles(found[arguments.workers])}
    print(json.dumps({**record, "ratio": quantiles(ratios), **where(torch.device("cpu"))}), flush=True)


if __name__ == "__main__":
    main()
