"""Time and quality of weight matching, beside PyPI's rebasin 0.0.47 where it is installed.

    python tools/bench_matching.py --arch resnet18 --sources 8 --against rebasin

Networks are trained for a few steps on scikit-learn's digits (theta and every source from another seed; without
scikit-learn on patterns like them), so that they are like trained ones; `--cache DIR` keeps them. One JSON line per
case, each when it is known: seconds per source (median and quartiles over repetitions, in which the cases take turns),
and the objective <theta, pi(theta_n)>. fastar's come first; then, pair by pair and for at most `--rebasin-seconds`,
rebasin takes turns with fastar on all sources, in one process, and `rebasin / fastar` says after each pair what was
found so far.

cold: sources as they were trained. warm: sources that an earlier call has already permuted, to the same theta. warm,
theta moved: to a theta that has since been trained for another epoch of the digits, as between a run's epochs. floor:
one sweep's matrix products alone, fp32, which is what this machine allows a sweep over all groups to take at the least;
`warm_over_floor`, `moved_over_floor` and `cold_over_floor` are the others' times over it. `chunk=1`: source by source,
where a network is so small that several are matched together (`chunk` says how many). `with_tracing` adds what rebasin
does anew for every pair: building its graph of the model; claims are without. On a GPU `work` counts what a call
launches, and the GPU's own time. Ways out of local optima: tools/bench_escapes.py.

--assignment: also the assignments of all sources alone, of each size of a group, of random scores, in turns: by lapjv
on CPU threads, the copy from the device included, as matching does it, and all at once on the device by
torch-linear-assignment (`pip install torch-linear-assignment`, 0.1 or newer). `total_over` is the second's total score
over the first's: 1 where both are optimal.

rebasin is not a dependency: `pip install fastar[bench]`, or put it on PYTHONPATH from a folder of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import claim, failing_alone, gpu_work, matching_threads, profiler_sees_gpu, timed, where
from bench.trained import BATCH, EXAMPLE, digits, train, trained
from torch import Tensor, nn

from fastar.config import MatchingSettings
from fastar.errors import FastarError
from fastar.flat import FlatLayout
from fastar.matching import match, solver_name
from fastar.matching.assignment import solve_assignment
from fastar.matching.weight.match_weights import chunk_size
from fastar.runtime.device import resolve_device
from fastar.runtime.seeds import derive_seed
from fastar.symmetry import Permutations, Symmetry, derive_symmetry
from fastar.training import SourcesStore


def objectives(symmetry: Symmetry, theta: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[float, float]:
    """<theta, state> over the parameters in float64, and the same without 1-D parameters."""
    values = {n: float((theta[n].double().cpu() * state[n].double().cpu()).sum()) for n in symmetry.parameters}
    return sum(values.values()), sum(v for n, v in values.items() if theta[n].ndim > 1)


def summary(seconds: list[float]) -> dict[str, Any]:
    return {"seconds_per_source": spread(seconds), "n": len(seconds)}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles, of one value too."""
    low, middle, high = (float(value) for value in np.quantile(values, [0.25, 0.5, 0.75]))
    return {"median": middle, "q25": low, "q75": high}


@dataclass(frozen=True)
class Searched:
    """One pair matched by rebasin: seconds of its search (and of the CPU), of the tracing before it, and the result."""

    seconds: float
    cpu: float
    tracing: float
    permuted: nn.Module


def by_rebasin(theta: nn.Module, source: nn.Module, seed: int, device: torch.device) -> Searched:
    """Match a copy of `source` to theta by PyPI's rebasin."""
    from rebasin import PermutationCoordinateDescent

    torch.manual_seed(seed)  # it draws its orders from the global generator
    theta, permuted = copy.deepcopy(theta).eval(), copy.deepcopy(source).eval()
    example = EXAMPLE.to(device)
    tracing, search = timed(lambda: PermutationCoordinateDescent(theta, permuted, example, device_b=device), device)
    cpu = time.process_time()
    seconds, _ = timed(search.rebasin, device)
    return Searched(seconds, time.process_time() - cpu, tracing, permuted)


class Fastar:
    """Matching of all sources, in each of the ways that are timed."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.theta_model, *self.models = (
            trained(args.arch, seed, args.steps, args.cache, args.width, device) for seed in range(args.sources + 1)
        )
        derive = lambda: derive_symmetry(self.theta_model, (EXAMPLE.to(device),))  # noqa: E731
        self.tracing, self.symmetry = timed(derive, device)
        self.layout = FlatLayout.from_module(self.theta_model)
        names = [str(n) for n in range(args.sources)]
        store = SourcesStore(self.layout, [m.state_dict() for m in self.models], names, device, store="device")
        self.sources = store.views()
        self.theta = self.layout.views(self.layout.flatten(self.theta_model.state_dict()))
        self.first_seconds, self.first = self.match(self.theta, self.sources, None)
        # As a run's sources are from its second epoch on.
        self.aligned = self.layout.views(store.rows.clone())
        self.symmetry.apply_rows(self.first.permutations, self.aligned)
        self.moved_model = copy.deepcopy(self.theta_model)
        train(self.moved_model, len(digits()[0]) // BATCH, derive_seed(args.seed, "moved"))
        flat = self.layout.flatten(self.moved_model.state_dict())
        self.moved = self.layout.views(flat)
        start = self.layout.flatten(self.theta_model.state_dict())
        self.moved_by = float((flat - start).norm() / start.norm())
        identity = self.symmetry.identity()
        self.ways: dict[str, Callable[[], tuple[float, Any]]] = {
            "cold": lambda: self.match(self.theta, self.sources, None),
            "warm": lambda: self.match(self.theta, self.aligned, identity),
            "warm, theta moved": lambda: self.match(self.moved, self.aligned, identity),
        }
        threads = matching_threads(device)
        self.chunk = chunk_size(self.symmetry, device, args.sources, threads)
        if self.chunk > 1:
            self.ways |= {
                "cold, chunk=1": lambda: self.match(self.theta, self.sources, None, chunk=1),
                "warm, theta moved, chunk=1": lambda: self.match(self.moved, self.aligned, identity, chunk=1),
            }

    def match(
        self, theta: dict[str, Tensor], given: dict[str, Tensor], start: Permutations | None, chunk: int | None = None
    ) -> tuple[float, Any]:
        settings, seed = MatchingSettings(restarts=self.args.restarts, chunk=chunk), self.args.seed
        return timed(lambda: match(settings, self.symmetry, theta, given, start=start, seed=seed), self.device)

    def pair(self, n: int) -> dict[str, float]:
        """The objective of source `n`, with and without 1-D parameters: matched, and as it was trained."""
        state = {name: value.detach() for name, value in self.models[n].state_dict().items()}
        theta = {name: value.detach() for name, value in self.theta_model.state_dict().items()}
        matched = self.symmetry.apply(self.first.permutations.select(n).to(self.device), state)
        total, weights = objectives(self.symmetry, theta, matched)
        start, start_weights = objectives(self.symmetry, theta, state)
        return {"fastar": total, "fastar_weights": weights, "unmatched": start, "unmatched_weights": start_weights}


class Floor:
    """The matrix products of one sweep alone, fp32 and of the same shapes: what is left of matching where nothing has
    changed and everything else costs nothing.

    Each member of each group takes one product of theta's and a source's share of it, [units, k] by [k, units]; they
    are made where these lie in memory, source by source, on a CPU by as many threads as match.
    """

    def __init__(self, symmetry: Symmetry, theta: dict[str, Tensor], sources: dict[str, Tensor], threads: int):
        counted = set(symmetry.counted(theta, sources))
        count = len(next(iter(sources.values())))
        products: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(count)]
        self.flops = 0
        for group in symmetry.groups:
            for member in group.members:
                if member.tensor not in counted:
                    continue
                own = theta[member.tensor]
                units, k = group.size, own.numel() // own.shape[member.axis] * member.inner * member.outer
                self.flops += 2 * units * units * k
                for n in range(count):
                    left = own.as_strided((units, k), (k, 1))
                    products[n].append((left, sources[member.tensor][n].as_strided((k, units), (units, 1))))
        self._products = products
        self._threads = 1 if next(iter(theta.values())).device.type == "cuda" else threads

    def __call__(self) -> None:
        if self._threads == 1:
            for products in self._products:
                self._multiply(products)
            return
        # As matching does: each thread has sources of its own, and torch no further threads.
        before = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(self._multiply, self._products))
        finally:
            torch.set_num_threads(before)

    @staticmethod
    def _multiply(products: list[tuple[Tensor, Tensor]]) -> None:
        for left, right in products:
            torch.mm(left, right)


def bench(args: argparse.Namespace) -> None:
    device = resolve_device(args.device)
    begin = time.perf_counter()
    fastar = Fastar(args, device)
    base = {
        "bench": "matching",
        "arch": args.arch,
        "sources": args.sources,
        "trained_steps": args.steps,
        "trained_on": digits()[2],
        "parameters": sum(entry.numel for entry in fastar.layout.entries),
        "threads": matching_threads(device),
        "chunk": fastar.chunk,
        "solver": solver_name(),
        **where(device),
    }

    def report(**case: Any) -> None:
        print(json.dumps({**base, **case}), flush=True)

    groups = len(fastar.symmetry.groups)
    report(case="derive and verify the groups (once per architecture)", seconds=fastar.tracing, groups=groups)
    report(
        case="fastar cold, first call",
        seconds_per_source=fastar.first_seconds / args.sources,
        setup_seconds=time.perf_counter() - begin,
    )
    floor = Floor(fastar.symmetry, fastar.theta, fastar.sources, matching_threads(device))
    ways = {**fastar.ways, "floor": lambda: timed(floor, device)}
    for way in ways.values():
        way()  # from here on nothing is new to the allocator and the libraries
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    last: dict[str, Any] = {}
    for _ in range(args.repeats):
        for name, way in ways.items():
            took, last[name] = way()
            seconds[name].append(took / args.sources)
    for name in fastar.ways:
        more: dict[str, Any] = {"moved_by": fastar.moved_by} if "moved" in name else {}
        more |= {"sweeps_mean": float(last[name].sweeps.double().mean()), "solves": last[name].solves}
        report(case=f"fastar {name}", **summary(seconds[name]), **more)
    over = {
        name: spread([one / least for one, least in zip(seconds[name], seconds["floor"], strict=True)])
        for name in ("warm", "warm, theta moved", "cold")
    }
    report(
        case="floor",
        **summary(seconds["floor"]),
        gflop_per_source=floor.flops / 1e9,
        warm_over_floor=over["warm"],
        moved_over_floor=over["warm, theta moved"],
        cold_over_floor=over["cold"],
    )
    pairs = [fastar.pair(n) for n in range(min(args.sources, 8))]
    report(case="objective", pairs=pairs, sweeps=fastar.first.sweeps.tolist(), solves=fastar.first.solves)
    if args.against == "rebasin":
        if util.find_spec("rebasin") is None:
            report(case="rebasin", missing="pip install fastar[bench], or put rebasin 0.0.47 on PYTHONPATH")
        else:
            base["versions"] = {**base["versions"], "rebasin": metadata.version("rebasin")}
            with failing_alone("matching", "rebasin", device, arch=args.arch, sources=args.sources):
                against_rebasin(fastar, args, device, report)
    if args.assignment:
        sizes = sorted({group.size for group in fastar.symmetry.groups})
        with failing_alone("matching", "assignment", device, sources=args.sources):
            compare_assignments(sizes, args, device, report)
    if device.type == "cuda" and profiler_sees_gpu():
        for name in ("warm", "warm, theta moved", "cold"):  # last: reading many events takes the profiler long
            with failing_alone("matching", f"work {name}", device):
                report(case=f"work {name}", **gpu_work(fastar.ways[name], device))


def against_rebasin(
    fastar: Fastar, args: argparse.Namespace, device: torch.device, report: Callable[..., None]
) -> None:
    """rebasin and fastar in turns: rebasin on one pair, fastar on all sources; told of after every pair."""
    theta = {name: value.detach() for name, value in fastar.theta_model.state_dict().items()}
    seconds: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    pairs: list[dict[str, float]] = []
    begin = time.perf_counter()
    for n, model in enumerate(fastar.models):
        spent = time.perf_counter() - begin
        if args.rebasin_seconds is not None and n and spent * (n + 1) / n > args.rebasin_seconds:
            break  # another pair would take longer than that
        found: dict[str, Searched] = {}
        for name in fastar.ways:  # the first as it was trained, the others as permuted by the first
            centre = fastar.moved_model if name.endswith("moved") else fastar.theta_model
            given, seed = found["cold"].permuted if found else model, derive_seed(args.seed, "rebasin", n, name) % 2**31
            found[name] = one = by_rebasin(centre, given, seed, device)
            used = time.process_time()
            ours = fastar.ways[name]()[0] / args.sources
            used = (time.process_time() - used) / args.sources
            taken = {f"fastar {name}": (ours, used), f"rebasin {name}": (one.seconds, one.cpu)}
            taken[f"rebasin {name} with_tracing"] = (one.seconds + one.tracing, one.cpu)
            for who, (wall, processor) in taken.items():
                seconds.setdefault(who, []).append(wall)
                cpu.setdefault(who, []).append(processor)
        pair = fastar.pair(n)
        state = found["cold"].permuted.state_dict()
        pair["rebasin"], pair["rebasin_weights"] = objectives(fastar.symmetry, theta, state)
        pairs.append(pair)
        ratio = {
            f"{name}{tracing}": float(
                np.median(np.divide(seconds[f"rebasin {name}{tracing}"], seconds[f"fastar {name}"]))
            )
            for tracing in ("", " with_tracing")
            for name in fastar.ways
        }
        at_least = sum(one["fastar"] >= one["rebasin"] for one in pairs)
        told = f"{at_least} of {len(pairs)} pairs"
        report(case="rebasin / fastar", times_faster=ratio, objective_at_least_equal=told, n=len(pairs))
    for name, values in seconds.items():
        report(case=f"{name}, in turns" if name.startswith("fastar") else name, **summary(values))
    report(case="objective beside rebasin's", pairs=pairs)
    facts = {"arch": args.arch, "threads": matching_threads(device), "objective_at_least_equal": told, **where(device)}
    for name, text in {
        "cold": "matching a source, from the start",
        "warm, theta moved": "matching a source again, theta an epoch further",
        "warm": "matching a source again, theta as it was",
    }.items():
        both = ({"ours": of[f"fastar {name}"], "peer": of[f"rebasin {name}"]} for of in (seconds, cpu))
        print(claim("matching", f"{text} ({args.arch})", "rebasin", *both, **facts), flush=True)


def compare_assignments(
    sizes: list[int], args: argparse.Namespace, device: torch.device, report: Callable[..., None]
) -> None:
    """Assignments of `args.sources` tables of each size, one by one on CPU threads, and at once on the device."""
    if util.find_spec("torch_linear_assignment") is None:
        report(case="assignment", missing="pip install torch-linear-assignment, or put it on PYTHONPATH")
        return
    from torch_linear_assignment import batch_linear_assignment

    generator = torch.Generator(device).manual_seed(args.seed)
    version = metadata.version("torch-linear-assignment")
    with ThreadPoolExecutor(matching_threads(device)) as pool:
        for size in sizes:
            scores = torch.randn(args.sources, size, size, generator=generator, dtype=torch.float32, device=device)
            ways: dict[str, Callable[[], Tensor]] = {
                "threads": lambda scores=scores: torch.stack(
                    [torch.from_numpy(found) for found in pool.map(solve_assignment, scores.cpu())]
                ),
                "device": lambda scores=scores: batch_linear_assignment(-scores),
            }
            for way in ways.values():
                way()  # what is compiled is compiled now
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            totals: dict[str, float] = {}
            for _ in range(args.repeats):
                for name, way in ways.items():
                    took, found = timed(way, device)
                    seconds[name].append(took / args.sources)
                    totals[name] = float(scores.double().gather(2, found.to(device).long()[..., None]).sum())
            for name, values in seconds.items():
                report(case=f"assignment of {size}, {name}", **summary(values), torch_linear_assignment=version)
            report(case=f"assignment of {size}, total", total_over=totals["device"] / totals["threads"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=float, help="width setting of the architecture")
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="training steps of each network")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of fastar's cases")
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--against", choices=["rebasin", "nothing"], default="nothing")
    parser.add_argument("--assignment", action="store_true", help="also the assignments alone")
    parser.add_argument("--rebasin-seconds", type=float, help="stop before that; default: after all sources")
    parser.add_argument("--cache", type=Path, help="folder in which trained networks are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.sources < 1 or arguments.repeats < 1 or arguments.steps < 1:
        parser.error("--sources, --repeats and --steps must be at least 1")
    bench(arguments)


if __name__ == "__main__":
    try:
        main()
    except FastarError as error:
        sys.exit(f"bench_matching: {error}")
