"""One path's 11 points: all models sharing each batch, against one model at a time, on JPEGs decoded by FFCV.

    python tools/bench_barrier.py [--data-root DIR] [--images 1000] [--size 32] [--rounds 2] [--device cuda|cpu]

DIR is train/<class>/*.JPEG, or the class folders themselves; files are repeated up to --images. Without it random
JPEGs are made, and the lines say so. One at a time: for each point a pass for the batch-norm statistics and a pass for
the losses. On a GPU the models sharing each batch are also measured by CUDA graphs (`evaluation.graph`). The ways take
turns inside each round; `passes` counts how often the data was read, `speed_up` is one at a time's seconds over the
way's own, within a round, `difference` the largest between the losses of the way and of `together`. Only loading is
saved: the larger the network and --size, the smaller the gain.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from bench import claim, failing_alone, quantiles, where
from bench.fake_images import link_images, make_images
from fastar.kernels import interpolate
from torch import Tensor, nn

from fastar.data.convert import Form, prepare
from fastar.data.encode import Encoding
from fastar.data.streaming import StreamingDataset
from fastar.errors import FastarError
from fastar.evaluation import Endpoint, PathLosses, Segment, evaluate_paths, evaluate_rows
from fastar.flat import FlatLayout
from fastar.models import build_model
from fastar.runtime.device import resolve_device

POINTS = 11


class CountedData:
    """Passes over a data set, counted."""

    def __init__(self, data: StreamingDataset, batch: int):
        self.data, self.batch, self.passes = data, batch, 0

    def __call__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return self.data.sequential(self.batch)


def together(model: nn.Module, path: Segment, data: CountedData, *, graph: bool = False) -> list[float]:
    """fastar's way."""
    layout = FlatLayout.from_module(model)
    found: list[PathLosses] = evaluate_paths(
        model, layout, [path], {"train": data}, points=POINTS, statistics_batches=data, graph=graph
    )
    return found[0].loss["train"]


def one_at_a_time(model: nn.Module, path: Segment, data: CountedData) -> list[float]:
    """Each point by itself: statistics, then losses."""
    layout = FlatLayout.from_module(model)
    device = data.data.device
    losses, point = [], torch.empty(1, layout.numel, device=device)
    first, second = path.first.row_on(device), path.second.row_on(device)
    for k in range(POINTS):
        interpolate(first, second, torch.tensor(k / (POINTS - 1), device=device), point[0])
        found = evaluate_rows(model, layout, point, {"train": data}, statistics_batches=data)
        losses.append(float(found["train"].loss[0]))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=32, help="height and width given to the network")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--arch", default="resnet8")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="decoding threads")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    if arguments.rounds < 2 or arguments.images < 2:
        raise FastarError("--rounds and --images must be at least 2")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        if arguments.data_root is None:
            make_images(raw, arguments.images)
        else:
            link_images(arguments.data_root, raw, arguments.images)
        files = prepare(
            "imagefolder", own_name="bench", raw=raw, directory=Path(folder), form=Form(Encoding(500, 1.0, 90))
        )
        source = StreamingDataset(files, "train", device, size=arguments.size, threads=arguments.workers)
        shape, classes = (3, arguments.size, arguments.size), len(files.classes)

        def network(seed: int) -> nn.Module:
            return build_model(arguments.arch, input_shape=shape, classes=classes, seed=seed, width=arguments.width).to(
                device
            )

        model = network(0)
        layout = FlatLayout.from_module(model)
        ends = [Endpoint(str(n), layout.flatten(network(n).state_dict())) for n in (1, 2)]
        path = Segment("bench", ends[0], ends[1])
        for _ in source.sequential(arguments.batch):  # the file's pages are in memory for both
            pass
        ways: dict[str, Callable[..., list[float]]] = {"together": together, "one at a time": one_at_a_time}
        if device.type == "cuda":
            ways["together, graph"] = partial(together, graph=True)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        losses: dict[str, list[float]] = {}
        passes: dict[str, int] = {}
        for number in range(1 + arguments.rounds):  # the first warms up: kernels and algorithms are chosen, graphs made
            for name in sorted(set(seconds), reverse=number % 2 == 1):
                data = CountedData(source, arguments.batch)
                taken = seconds.pop(name)  # a way that fails is measured no more
                with failing_alone("barrier", name, device, arch=arguments.arch):
                    begin, used = time.perf_counter(), time.process_time()
                    losses[name] = ways[name](model, path, data)  # on the host: nothing is left to wait for
                    seconds[name] = [*taken, time.perf_counter() - begin] if number else []
                    cpu[name] = [*cpu[name], time.process_time() - used] if number else []
                    passes[name] = data.passes
        slow = seconds.get("one at a time", [])
        for name in sorted(seconds, key=list(ways).index):
            record = {
                "bench": "barrier",
                "case": name,
                "passes": passes[name],
                "s": quantiles(seconds[name]),
                **({"speed_up": quantiles([b / a for a, b in zip(seconds[name], slow, strict=True)])} if slow else {}),
                "difference": max(
                    abs(a - b) for a, b in zip(losses[name], losses.get("together", losses[name]), strict=True)
                ),
                "n": arguments.rounds,
                "images": len(source),
                "data": "random JPEGs" if arguments.data_root is None else "JPEGs of --data-root, repeated",
                "arch": arguments.arch,
                "parameters": layout.numel,
                "size": arguments.size,
                "batch": arguments.batch,
                "decoding_threads": arguments.workers,
                "load": os.getloadavg()[0],
                **where(device),
            }
            print(json.dumps(record), flush=True)
        if "together" in seconds and slow:
            both = {"ours": "together", "peer": "one at a time"}
            found = ({side: of[way] for side, way in both.items()} for of in (seconds, cpu))
            facts = {"arch": arguments.arch, "threads": torch.get_num_threads(), **where(device)}
            text = f"{POINTS} points of a path on JPEGs ({arguments.arch}, {len(source):,} images)"
            print(claim("barrier", text, "fastar, one at a time", *found, **facts), flush=True)


if __name__ == "__main__":
    try:
        main()
    except FastarError as error:
        sys.exit(f"error: {error}")
