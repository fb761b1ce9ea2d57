"""Whether everything that needs a GPU runs at all: each thing once, in a minute or so, a JSON line for each.

    python tools/gpu_smoke.py [--device cuda|cpu] [--small] [--only NAME ...]

Each item ends by itself: what fails has a line with its error and the rest goes on. Numbers are compared roughly, so
as to notice what is plainly wrong; the tests marked `gpu` are the strict ones. Exit code 1 where something failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import pkgutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench import CannotRun, Problem, failure, profile, profiler_sees_gpu, where
from bench.fake_images import make_images
from fastar.kernels import adam_update, backend, find_nonfinite, interpolate, sgd_update
from torch import Tensor

import fastar
from fastar.config import MatchingSettings, TrainSettings, parse_bytes
from fastar.data.convert import Form, prepare
from fastar.data.encode import Encoding
from fastar.data.streaming import StreamingDataset
from fastar.errors import FastarError
from fastar.evaluation import evaluate_rows
from fastar.flat import FlatLayout
from fastar.matching import match
from fastar.runtime.device import resolve_device, simulated, synchronize
from fastar.runtime.memory import cap_gpu, peak_bytes
from fastar.symmetry import derive_symmetry
from fastar.training import RegularStep, StarStep, fit

STEPS = 5
ROUGHLY = 0.05  # of a loss after some steps in half precision, whose sums other kernels round otherwise

Facts = dict[str, Any]


def imports(problem: Problem) -> Facts:
    """Every module of fastar, the kernels' too."""
    names = [found.name for found in pkgutil.walk_packages(fastar.__path__, "fastar.")]
    names += [f"fastar.kernels.{name}" for name in ("interpolation", "star_update", "adam")]
    for name in set(names) - {"fastar.__main__"}:
        importlib.import_module(name)
    return {"modules": len(set(names))}


def kernels(problem: Problem) -> Facts:
    """Each operation on the device against the plain-torch one on the CPU."""
    numel = 100_003

    def run(device: torch.device) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        theta, source, buffer, gradient = (torch.randn(numel, generator=generator).to(device) for _ in range(4))
        square = buffer.square()
        t, lr, scale, one = (torch.tensor(value, device=device) for value in (0.3, 0.1, 0.7, 1.0))
        out, found = torch.empty(numel, dtype=torch.bfloat16, device=device), torch.zeros((), device=device)
        scalars = {"lr": lr, "scale": scale, "inverse_loss_scale": one, "weight_decay": 1e-3}
        sgd_update(theta, gradient.bfloat16(), buffer, momentum=0.9, nesterov=True, **scalars)
        more = {"steps_done": one, "betas": (0.9, 0.99), "eps": 1e-8, "decoupled": True}
        adam_update(theta, gradient, buffer, square, **scalars, **more)
        interpolate(theta, source, t, out)
        straight = interpolate(theta, source, t, torch.empty_like(theta))
        find_nonfinite(theta / 0, found)
        return [tensor.float().cpu() for tensor in (theta, buffer, square, out, straight, found)]

    for here, there in zip(run(torch.device("cpu")), run(problem.device), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-3)  # one of them is bf16
    path = backend(problem.device)
    if problem.device.type == "cuda" and path != "triton" and not simulated():
        raise FastarError("the Triton kernels do not run here: `fastar doctor` says why")
    return {"kernels": path}


def run_steps(problem: Problem, kind: str, **changes: Any) -> list[float]:
    """The losses of some steps; not finite ones are an error."""
    step = problem.star_step(**changes) if kind == "star" else problem.regular_step(**changes)
    images, labels = problem.batch()
    lr = torch.tensor(0.01, device=problem.device)
    step.begin_epoch(0, STEPS)
    losses = torch.stack([step(images, labels, lr).clone() for _ in range(STEPS)]).tolist()
    if not all(map(math.isfinite, losses)) or not all(bool(torch.isfinite(v).all()) for v in step.state().values()):
        raise FastarError(f"losses or weights are not finite: {losses}")
    return losses


def alike(found: list[float], wanted: list[float], what: str) -> None:
    if any(abs(a - b) > ROUGHLY * max(1.0, abs(b)) for a, b in zip(found, wanted, strict=True)):
        raise FastarError(f"losses {found} differ from {wanted} {what}")


def steps(kind: str, **changes: Any) -> Callable[[Problem], Facts]:
    """Some steps, which lose about what the same steps do eagerly."""

    def item(problem: Problem) -> Facts:
        losses = run_steps(problem, kind, **changes)
        eager = {key: value for key, value in changes.items() if key not in ("graph", "compile")}
        alike(losses, run_steps(problem, kind, **eager), "of eager steps")
        return {"losses": losses}

    return item


def stores(problem: Problem) -> Facts:
    """The sources in each place: the same losses."""
    found = {
        place: run_steps(replace(problem, store=place, sources=4), "star", graph=graph)
        for graph in (False, problem.device.type == "cuda")
        for place in ("device", "host", "file")
    }
    for place, losses in found.items():
        alike(losses, found["device"], f"of sources on the device ({place})")
    return {"losses": found}


def epochs(problem: Problem) -> Facts:
    """Two star epochs with matching and a short last batch, with graphs where there is a GPU."""
    settings = problem.settings.model_copy(update={"drop_last": False, "graph": problem.device.type == "cuda"})
    given = replace(problem, settings=settings)
    data = given.dataset(settings.batch_size * 3 + settings.batch_size // 2)
    done = fit(given.star_step(matching="weight"), data, settings, name="star", seed=0, epochs=2)
    return {"losses": [e.loss for e in done], "seconds": [e.seconds for e in done], "parts": done[-1].parts}


def streaming(problem: Problem) -> Facts:
    """JPEG files through FFCV, two epochs whose images grow, with graphs where there is a GPU."""
    side = 64
    with tempfile.TemporaryDirectory() as folder:
        raw, count = Path(folder) / "raw", 3 * problem.settings.batch_size
        make_images(raw, count)
        files = prepare(
            "imagefolder", own_name="smoke", raw=raw, directory=Path(folder), form=Form(Encoding(200, 1.0, 90))
        )
        data = StreamingDataset(files, "train", problem.device, size=side)
        changes: Facts = {"resolutions": ((0, side // 2), (1, side)), "graph": problem.device.type == "cuda"}
        settings = problem.settings.model_copy(update=changes)
        given = replace(problem, settings=settings, size=side, classes=len(files.classes))
        done = fit(given.regular_step(), data, settings, name="streaming", seed=0, epochs=2)
    return {"losses": [e.loss for e in done], "images_per_s": done[-1].images_per_second}


def matching(problem: Problem) -> Facts:
    """Four sources on the device: objectives as on the CPU."""
    found = {}
    for device in (torch.device("cpu"), problem.device):
        models = [problem.network(seed).to(device) for seed in range(5)]
        symmetry = derive_symmetry(problem.network(0).cpu(), (torch.zeros(2, *problem.shape),))
        layout = FlatLayout.from_module(models[0])
        rows = torch.stack([layout.flatten(model.state_dict()) for model in models])
        views = layout.views(rows[1:])
        result = match(MatchingSettings(), symmetry, layout.views(rows[0]), views)
        found[device.type] = result.objective.tolist()
    # Ends of descents differ where sums are rounded otherwise; objectives hardly do.
    for here, there in zip(*found.values(), strict=True) if len(found) == 2 else ():
        if abs(here - there) > 0.02 * abs(here):
            raise FastarError(f"objectives differ between devices: {found}")
    return {"objectives": found}


def evaluation(problem: Problem) -> Facts:
    """Three models in two passes, with graphs as without."""
    model = problem.network(0)
    layout = FlatLayout.from_module(model)
    rows = torch.stack([layout.flatten(problem.network(seed).state_dict()) for seed in range(3)])
    batch = problem.settings.batch_size
    data = problem.dataset(3 * batch + batch // 2)
    found = []
    for graph in {False, problem.device.type == "cuda"}:
        given = {"test": lambda: data.sequential(batch)}
        measured = evaluate_rows(model, layout, rows, given, statistics_batches=given["test"], graph=graph)
        found.append(measured["test"].loss.tolist())
    alike(found[0], found[-1], "without a graph")
    return {"losses": found}


def memory_cap(problem: Problem) -> Facts:
    """What a cap leaves out cannot be allocated, and can without the cap."""
    device = problem.device
    if device.type != "cuda":
        raise CannotRun("a cap is of a GPU's memory")
    whole, cap = torch.cuda.mem_get_info(device)[1], parse_bytes("2GB")
    torch.cuda.empty_cache()
    cap_gpu(device, cap)
    held = []
    try:
        for _ in range(3):
            held.append(torch.empty(cap // 2, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError:
        return {"peak_bytes": peak_bytes(device), "allocated": len(held)}
    finally:
        held.clear()
        torch.cuda.empty_cache()
        cap_gpu(device, whole)
    raise FastarError("3 GB could be allocated under a cap of 2 GB")


def profiles(problem: Problem) -> Facts:
    """Steps under torch's profiler, with a trace."""
    if problem.device.type == "cuda" and not profiler_sees_gpu():
        raise CannotRun("torch's profiler sees no GPU here")
    run = problem.endless(problem.star_step())
    run()
    with tempfile.TemporaryDirectory() as folder:
        found = profile(run, problem.device, trace=Path(folder) / "trace.json")
        sizes = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
    if not sizes.get("trace.json"):
        raise FastarError("no trace was written")
    return {"parts": found.parts, "idle": found.idle, "bytes": sizes}


def no_waits(kind: str, graph: bool) -> Callable[[Problem], Facts]:
    """An epoch's steps while every wait of the host for the device is an error."""

    def item(problem: Problem) -> Facts:
        if problem.device.type != "cuda":
            raise CannotRun("steps wait for no device but a GPU")
        step: RegularStep | StarStep
        step = problem.star_step(graph=graph) if kind == "star" else problem.regular_step(graph=graph)
        batch, count = problem.settings.batch_size, 2 * STEPS
        data = problem.dataset(count * batch)
        lr = torch.tensor(0.01, device=problem.device)
        losses = torch.zeros(count, device=problem.device)
        step.begin_epoch(0, count)
        try:
            for number, (images, labels) in enumerate(data.batches(batch, seed=0, epoch=0)):
                if number == 1:  # the first may compile, choose algorithms and capture
                    torch.cuda.set_sync_debug_mode("error")
                losses[number] = step(images, labels, lr)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {"losses": losses.tolist()}

    return item


ITEMS: dict[str, Callable[[Problem], Facts]] = {
    "imports": imports,
    "kernels": kernels,
    "regular": steps("regular"),
    "star": steps("star"),
    "regular, graph": steps("regular", graph=True),
    "star, graph": steps("star", graph=True),
    "star, graph, fp16": steps("star", graph=True, precision="fp16"),
    "star, graph, adamw": steps("star", graph=True, optimizer="adamw"),
    "stores": stores,
    "two epochs, short last batches": epochs,
    "matching": matching,
    "evaluation by graphs": evaluation,
    "regular without waits": no_waits("regular", False),
    "star without waits": no_waits("star", False),
    "star, graph, without waits": no_waits("star", True),
    "memory cap": memory_cap,
    "profile": profiles,
    "streaming, growing images": streaming,
    "star, compiled, graph": steps("star", compile=True, graph=True),
    "regular, compiled": steps("regular", compile=True),
    "star, compiled": steps("star", compile=True),
    "regular, compiled, graph": steps("regular", compile=True, graph=True),
}


def run_items(problem: Problem, names: list[str]) -> int:
    """Print a line for each item: seconds and its facts, or why there are none; how many failed."""
    failed = 0
    for name in names:
        begin = time.perf_counter()
        try:
            facts = ITEMS[name](problem)
            synchronize(problem.device)  # what a kernel did wrong is this item's, not the next one's
        except Exception as error:  # noqa: BLE001 - an error of any kind is the item's result
            failed += not isinstance(error, CannotRun)
            print(failure("smoke", name, error, problem.device), flush=True)
        else:
            took = {"item_seconds": round(time.perf_counter() - begin, 2)}
            print(json.dumps({"bench": "smoke", "case": name, **facts, **took, **where(problem.device)}), flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="smaller networks and batches")
    parser.add_argument("--only", nargs="+", choices=list(ITEMS), help="items to run")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    settings = TrainSettings(
        lr=0.01, batch_size=8 if arguments.small else 64, precision="bf16", schedule="constant", epochs=2
    )
    width, size = (0.25, 16) if arguments.small else (None, 32)
    problem = Problem("resnet8", device, settings, sources=2, size=size, width=width)
    return 1 if run_items(problem, arguments.only or list(ITEMS)) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FastarError as error:
        sys.exit(f"gpu_smoke: {error}")
