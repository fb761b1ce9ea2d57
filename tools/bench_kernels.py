"""Interpolation and updates against the copy bandwidth of the same device, one JSON line per case.

    python tools/bench_kernels.py [--device cuda|cpu] [--millions 11 100] [--rounds 30] [--sweep]

The cases of one size take turns inside each round, so that their ratios hold while the machine's speed drifts.
`of_copy` is the case's bandwidth over that of the faster copy (median of per-round ratios): torch's, which on a GPU the
driver does, or one by a kernel. Bytes are those that the operation must move at least. The torch cases do the same work
by plain torch calls: what the kernels replace. On a GPU the calls of a measurement are one CUDA graph, so that kernels
are timed and not their launches, and go through several sets of buffers, so that none is found in the cache. --sweep
times the kernels at other block sizes and warps too.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from bench import Case, Timing, built_when_run, failure, in_one_graph, line, time_in_turns
from fastar.kernels import adam_update, backend, find_nonfinite, interpolate, sgd_update

SGD = {"weight_decay": 5e-4, "momentum": 0.9, "nesterov": True}
ADAM = {"weight_decay": 5e-4, "betas": (0.9, 0.999), "eps": 1e-8, "decoupled": True}
COPIES = ("copy", "copy, by a kernel")
# Compiled for an H100 (by Triton 3.8, which needs no GPU for that), an update with a bf16 gradient changes layouts
# through shared memory at block 1024 with 4 warps, the default (4 KiB, 3 barriers), and at 2048; not at 512, nor at
# 1024 with 8 warps.
BLOCKS, WARPS = (512, 1024, 2048), (4, 8)
# What --sweep varies: the module that holds a kernel and its block size, and the kernel.
KERNELS = {
    "interpolate bf16": ("interpolation", "_interpolate_kernel"),
    "sgd_update bf16 gradient": ("star_update", "_sgd_update_kernel"),
    "adam_update bf16 gradient": ("adam", "_adam_update_kernel"),
}


class Buffers:
    """A network's flat buffers, and each operation on them."""

    def __init__(self, numel: int, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        theta, source, out, buffer = (torch.randn(numel, device=device, generator=generator) for _ in range(4))
        square = buffer.abs()
        half = torch.empty(numel, dtype=torch.bfloat16, device=device)
        gradient = out * 1e-3
        half_gradient = gradient.bfloat16()
        # So small a step that thousands of them leave the numbers as they are.
        t, lr, scale, one = (torch.tensor(value, device=device) for value in (0.3, 1e-9, 0.7, 1.0))
        found = torch.zeros((), device=device)

        def sgd(given: torch.Tensor, scaled_by: torch.Tensor) -> None:
            sgd_update(theta, given, buffer, lr=lr, scale=scaled_by, inverse_loss_scale=one, **SGD)

        def adam() -> None:
            scalars = {"lr": lr, "scale": scale, "inverse_loss_scale": one, "steps_done": one}
            adam_update(theta, half_gradient, buffer, square, **scalars, **ADAM)

        parameter = torch.nn.Parameter(theta.clone())
        parameter.grad = torch.zeros_like(theta)
        optimizer = torch.optim.SGD([parameter], 1e-9, momentum=0.9, nesterov=True, weight_decay=5e-4)

        def plain_update() -> None:
            torch.mul(gradient, scale, out=parameter.grad)
            optimizer.step()

        # Name to bytes per parameter, and the operation.
        self.operations: dict[str, tuple[int, Callable[[], object]]] = {
            "copy": (8, lambda: out.copy_(source)),
            "copy, by a kernel": (8, lambda: torch.neg(source, out=out)),
            "interpolate fp32": (12, lambda: interpolate(theta, source, t, out)),
            "interpolate bf16": (10, lambda: interpolate(theta, source, t, half)),
            "interpolate bf16, torch": (10, lambda: ((1 - t) * theta + t * source).to(torch.bfloat16)),
            "sgd_update fp32": (20, lambda: sgd(gradient, scale)),
            "sgd_update fp32, scale 1": (20, lambda: sgd(gradient, one)),
            "sgd_update bf16 gradient": (18, lambda: sgd(half_gradient, scale)),
            "sgd_update fp32, torch": (20, plain_update),
            "adam_update bf16 gradient": (26, adam),
            "find_nonfinite bf16": (2, lambda: find_nonfinite(half_gradient, found)),
        }


def buffer_sets(numel: int, device: torch.device) -> list[Buffers]:
    """As many sets of buffers as make the operation that moves least touch several times what the GPU's cache holds;
    8 at most."""
    first = Buffers(numel, device)
    if device.type != "cuda":
        return [first]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    least = numel * min(moved for moved, _ in first.operations.values())
    return [first, *(Buffers(numel, device) for _ in range(min(8, -(-4 * cache // least)) - 1))]


def case(name: str, sets: list[Buffers], numel: int, repeats: int, device: torch.device, label: str = "") -> Case:
    """The operation on each set of buffers in turn: `repeats` calls, in one graph on a GPU."""
    bytes_each = sets[0].operations[name][0]
    runs = itertools.cycle([buffers.operations[name][1] for buffers in sets])
    whole = built_when_run(lambda: in_one_graph(lambda: next(runs)(), repeats, device))
    return Case(label or name, whole, {"bytes": bytes_each * numel, "buffer_sets": len(sets)}, calls=repeats)


@contextmanager
def launched_with(module: str, kernel: str, block: int, warps: int) -> Iterator[None]:
    """Inside, the launcher uses this block size and number of warps."""

    class Launched:
        def __getitem__(self, grid: Any) -> Any:
            return partial(true[grid], num_warps=warps)

    found: Any = import_module(f"fastar.kernels.{module}")
    true, before = getattr(found, kernel), found.BLOCK
    setattr(found, kernel, Launched())
    found.BLOCK = block
    try:
        yield
    finally:
        setattr(found, kernel, true)
        found.BLOCK = before


def swept(sets: list[Buffers], numel: int, repeats: int, device: torch.device) -> list[Case]:
    """The kernels at other block sizes and warps; captured, or run, as they were then."""
    cases = [case(name, sets, numel, repeats, device) for name in COPIES]
    for (name, kernel), block, warps in itertools.product(KERNELS.items(), BLOCKS, WARPS):
        one = case(name, sets, numel, repeats, device, f"{name} (block {block}, {warps} warps)")

        def run(one: Case = one, kernel: tuple[str, str] = kernel, block: int = block, warps: int = warps) -> None:
            with launched_with(*kernel, block, warps):
                one.run()

        cases.append(Case(one.name, run, {**one.facts, "block": block, "warps": warps}, calls=repeats))
    return cases


def of_copy(timing: Timing, timings: list[Timing]) -> dict[str, Any]:
    """Its bandwidth over that of the faster copy, and which one that is; nothing where no copy could be timed."""
    copies = [one for one in timings if one.case.name in COPIES]
    if not copies:
        return {}
    copy = min(copies, key=lambda one: one.median)
    moved, its = timing.case.facts["bytes"], copy.case.facts["bytes"]
    ratios = [(moved / mine) / (its / theirs) for mine, theirs in zip(timing.seconds, copy.seconds, strict=True)]
    return {"of_copy": statistics.median(ratios), "copied_by": copy.case.name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--millions", type=int, nargs="+", default=[11, 100], help="parameters, in millions")
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each case")
    parser.add_argument("--repeats", type=int, help="calls in one measurement (30 on a GPU, 1 elsewhere)")
    parser.add_argument("--sweep", action="store_true", help="the kernels' block sizes and warps instead (Triton)")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or min(arguments.millions) < 1:
        parser.error("--rounds must be at least 2 and --millions at least 1")
    device = torch.device(arguments.device)
    if arguments.sweep and backend(device) != "triton":
        parser.error("--sweep is of the Triton kernels, which do not run here (`fastar doctor` says why)")
    for millions in arguments.millions:
        numel = millions * 1_000_000 // 16 * 16
        repeats = arguments.repeats or (30 if device.type == "cuda" else 1)
        sets = buffer_sets(numel, device)
        if arguments.sweep:
            cases = swept(sets, numel, repeats, device)
        else:
            cases = [case(name, sets, numel, repeats, device) for name in sets[0].operations]

        def failed(case: Case, error: Exception, numel: int = numel) -> None:
            print(failure("kernels", case.name, error, device, parameters=numel), flush=True)

        timings = time_in_turns(cases, device, rounds=arguments.rounds, repeats=repeats, on_failure=failed)
        for timing in timings:
            facts = {
                "parameters": numel,
                "gb_per_s": timing.case.facts["bytes"] / timing.median / 1e9,
                **of_copy(timing, timings),
            }
            print(line("kernels", timing, device, **facts), flush=True)
        del sets, cases, timings


if __name__ == "__main__":
    main()
