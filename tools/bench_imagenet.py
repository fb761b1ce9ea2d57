"""ImageNet's sizes: steps, images per second with and without the loader, and peak memory beside the plan's.

    python tools/bench_imagenet.py [--arch imagenet-resnet18] [--batch 256] [--size 224] [--counts 30 500]
        [--gpu-memory 40GB] [--images 4000] [--threads 16]

compute: regular and star steps take turns on one batch that lies on the device. loader: epochs of regular training over
a generated set (of at most 2,000 different images, `tools/make_images.py`, written at the default preset into a
temporary folder), with the share of time that steps waited; an epoch's first batches, which nothing had decoded ahead,
are in it, so that a longer one is a little faster. memory: for each number of sources, kept in host memory, a star's
matching (of the first parts of the store: the rest takes no more) and some steps under the cap, with two batches on the
device as a run has them; on a GPU the most that tensors took (`peak_bytes`) beside what `fastar plan` says (on a CPU
the plan alone), the most that torch's allocator had taken for them (`reserved_bytes`: what the cap holds down), and
what the whole GPU had in use then, other programs' memory and CUDA's own included (`device_bytes`). Prints JSON lines,
each when it is known; what fails has a line that says so.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench import (
    Case,
    Problem,
    add_problem_arguments,
    built_when_run,
    failing_alone,
    failure,
    line,
    matching_threads,
    problem_of,
    ratio,
    time_in_turns,
    where,
)
from bench.fake_images import link_images

from fastar.config import Settings, StarSettings, load_settings, parse_bytes
from fastar.data.convert import prepare
from fastar.data.streaming import StreamingDataset
from fastar.errors import FastarError
from fastar.experiments.plan import plan_run
from fastar.flat import FlatLayout
from fastar.runtime.memory import cap_gpu
from fastar.symmetry import derive_symmetry
from fastar.training import RegularStep, SourcesStore, StarStep, fit, match_store

TOOLS = Path(__file__).resolve().parent
STEPS = 5
DIFFERENT = 2000  # images of the loader's set; more are these again


def compute(problem: Problem, rounds: int, repeats: int) -> Iterator[str]:
    """Regular and star steps in turns."""
    makes: dict[str, Callable[..., RegularStep | StarStep]]
    makes = {"regular": problem.regular_step, "star": problem.star_step}

    def case(name: str, make: Callable[..., RegularStep | StarStep]) -> Case:
        run = built_when_run(lambda: problem.endless(make()))
        return Case(f"compute: {name} step", run, problem.facts())

    def failed(case: Case, error: Exception) -> None:
        print(failure("imagenet", case.name, error, problem.device, **problem.facts()), flush=True)

    cases = [case(name, make) for name, make in makes.items()]
    timings = time_in_turns(cases, problem.device, rounds=rounds, repeats=repeats, on_failure=failed)
    for timing in timings:
        more = {"images_per_second": problem.settings.batch_size / timing.median}
        yield line("imagenet", timing, problem.device, **more, of_regular=ratio(timing, timings[0]))


def with_loader(problem: Problem, images: int, threads: int | None, rounds: int) -> Iterator[str]:
    """Epochs of regular training over files."""
    with tempfile.TemporaryDirectory() as folder:
        made_images, raw = Path(folder) / "made", Path(folder) / "raw"
        different = str(min(images, DIFFERENT))
        made = [sys.executable, str(TOOLS / "make_images.py"), str(made_images), "--train", different, "--val", "20"]
        done = subprocess.run([*made, "--workers", str(threads or 2)], capture_output=True, text=True)
        if done.returncode:
            raise FastarError(f"make_images failed: {done.stderr.strip()[-300:]}")
        link_images(made_images, raw, images)
        files = prepare("imagefolder", own_name="made", raw=raw, directory=Path(folder) / "beton", workers=threads or 2)
        data = StreamingDataset(files, "train", problem.device, size=problem.size, threads=threads)
        step = replace(problem, classes=len(files.classes)).regular_step()
        epochs = fit(step, data, problem.settings, name="loader", seed=0, epochs=rounds + 1)[1:]
    facts = {**problem.facts(), "images": images, "threads": threads, **where(problem.device)}
    for epoch in epochs:
        found = {"images_per_second": epoch.images_per_second, "load_share": epoch.load_share, "parts": epoch.parts}
        yield json.dumps({"bench": "imagenet", "case": "loader: regular epoch", **facts, **found})


def memory(problem: Problem, count: int, cap: str) -> str:
    """Peak memory of a star's matching and steps with `count` sources in host memory, and the plan's."""
    device = problem.device
    settings = load_settings(
        dataset="imagenet",
        arch=problem.arch,
        overrides=[
            f"sources.number={count}",
            "sources.store=host",
            f"gpu_memory={cap}",
            f"train.batch_size={problem.settings.batch_size}",
            f"train.precision={problem.settings.precision!s}",
            f"dataset.resolution={problem.size}",
            f"device={device}",
            *([] if problem.width is None else [f"model.width={problem.width}"]),
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_run(settings, Path(folder) / "run", speed=1.0)
    planned = plan["needed"]["gpu"]["training"]
    found: dict[str, Any] = {"bench": "imagenet", "case": "memory", **problem.facts(), "sources": count, "cap": cap}
    if device.type == "cuda":
        peaks = _peaks(replace(problem, classes=1000), count, cap, settings)
        found |= {"peak_bytes": max(peaks["training"], peaks["matching"]), "peaks": peaks}
        free, whole = torch.cuda.mem_get_info(device)
        found |= {"reserved_bytes": peaks.pop("reserved"), "device_bytes": whole - free}
        found["of_plan"] = peaks["training"] / planned
    items = {f"{item['phase']}: {item['what']}": item["bytes"] for item in plan["items"] if item["place"] == "gpu"}
    return json.dumps({**found, "planned_bytes": planned, "planned_items": items, **where(device)})


class FirstParts:
    """The first parts of a store alone: a matching of all takes no more memory at a time, only time."""

    def __init__(self, store: SourcesStore, parts: int):
        self.store, self.layout, self.number = store, store.layout, parts

    def parts(self) -> Iterator[dict[str, torch.Tensor]]:
        return itertools.islice(self.store.parts(), self.number)


def _peaks(problem: Problem, count: int, cap: str, settings: Settings) -> dict[str, float]:
    """Bytes at the fullest moment of a first matching and of the steps; seconds to make the store, to match a part."""
    device = problem.device
    gc.collect()
    torch.cuda.empty_cache()
    cap_gpu(device, parse_bytes(cap))
    few = [problem.network(seed).cpu().state_dict() for seed in range(3)]
    model = problem.network(9)
    layout = FlatLayout.from_module(model)
    symmetry = derive_symmetry(problem.network(0).cpu(), (torch.zeros(2, *problem.shape),))
    names = [str(n) for n in range(count)]
    begin = time.perf_counter()
    store = SourcesStore(layout, [few[n % 3] for n in range(count)], names, device, store="host")
    found = {"store_seconds": time.perf_counter() - begin}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)

    def match(theta: torch.Tensor, sources: SourcesStore, epoch: int) -> None:
        begin = time.perf_counter()
        first: Any = FirstParts(sources, 2)
        threads = matching_threads(device)
        # As the first of a run, which starts from a guess: it does the most.
        match_store(symmetry, theta, first, settings.matching, start=None, seed=0, threads=threads)
        found["matching"] = float(torch.cuda.max_memory_allocated(device))
        found["reserved"] = float(torch.cuda.max_memory_reserved(device))
        found["matching_seconds"] = time.perf_counter() - begin
        torch.cuda.reset_peak_memory_stats(device)

    step = StarStep(model, problem.settings, StarSettings(), store, seed=0, match=match)
    kept = [step.state(), step.state()]  # as training keeps the last good ones
    step.begin_epoch(0, STEPS)
    # A run has two batches on the device, as bytes and normalised: the one in use and the next.
    batches = [(images, (images * 10).to(torch.uint8), labels) for images, labels in (problem.batch(), problem.batch())]
    lr = torch.tensor(problem.settings.lr, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    for number in range(STEPS):
        images, _, labels = batches[number % len(batches)]
        step(images, labels, lr)
    torch.cuda.synchronize(device)
    found["training"] = float(torch.cuda.max_memory_allocated(device))
    found["reserved"] = max(found["reserved"], float(torch.cuda.max_memory_reserved(device)))
    assert len(kept) == 2
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_problem_arguments(parser)
    parser.set_defaults(arch="imagenet-resnet18", batch=256, size=224)
    parser.add_argument("--counts", type=int, nargs="+", default=[30, 500], help="sources of the memory cases")
    parser.add_argument("--gpu-memory", default="40GB", help="cap of the memory cases")
    parser.add_argument("--images", type=int, default=4000, help="of the loader's set; 0 leaves it out")
    parser.add_argument("--threads", type=int, help="decoding threads; default: one per CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, help="steps in one measurement (20 on a GPU, 2 elsewhere)")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2")
    try:
        problem = problem_of(arguments)
    except FastarError as error:
        parser.error(str(error))
    device, facts = problem.device, problem.facts()
    with failing_alone("imagenet", "compute", device, **facts):
        for text in compute(problem, arguments.rounds, arguments.repeats or (20 if device.type == "cuda" else 2)):
            print(text, flush=True)
    if arguments.images:
        with failing_alone("imagenet", "loader: regular epoch", device, **facts):
            for text in with_loader(problem, arguments.images, arguments.threads, min(arguments.rounds, 3)):
                print(text, flush=True)
    for count in arguments.counts:
        with failing_alone("imagenet", "memory", device, **{**facts, "sources": count}):
            print(memory(problem, count, arguments.gpu_memory), flush=True)


if __name__ == "__main__":
    main()
