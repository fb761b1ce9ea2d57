"""Time and quality of weight matching, beside PyPI's rebasin 0.0.47 where it is installed.

    python tools/bench_matching.py --arch resnet18 --sources 8 --against rebasin

Networks are trained for a few steps on scikit-learn's digits (theta and every source from another seed; without
scikit-learn on patterns like them), so that they are like trained ones; `--cache DIR` keeps them. One JSON line per
case, each when it is known: seconds per source (median and quantiles over repetitions), and the objective
<theta, pi(theta_n)>. fastar's come first; then, pair by pair and for at most `--rebasin-seconds`, rebasin takes turns
with fastar on all sources, in one process, and `rebasin / fastar` says after each pair what was found so far.

cold: sources as they were trained. warm: sources that an earlier call has already permuted, to the same theta. warm,
theta moved: to a theta that has since been trained for another epoch of the digits, as between a run's epochs.
`with_tracing` adds what rebasin does anew for every pair: building its graph of the model. On a GPU `work` counts what
a call launches, and the GPU's own time.

rebasin is not a dependency: `pip install fastar[bench]`, or put it on PYTHONPATH from a folder of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastar.benchmarks import failing_alone, gpu_work, matching_threads, profiler_sees_gpu, where
from fastar.errors import FastarError
from fastar.experiments.context import resolve_device
from fastar.flat import FlatLayout
from fastar.matching import (
    Permutations,
    Symmetry,
    derive_symmetry,
    match_activations,
    match_weights,
    solver_name,
)
from fastar.models import build_model
from fastar.seeds import derive_seed
from fastar.training import SourcesStore

INPUT_SHAPE = (3, 8, 8)
EXAMPLE = torch.zeros(2, *INPUT_SHAPE)
BATCH = 64


def digits() -> tuple[Tensor, Tensor, str]:
    """Images [n, 3, 8, 8] of mean 0 and deviation 1, labels, and what they are."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(10, (1797,), generator=generator)
        grey = torch.randn(10, 8, 8, generator=generator)[labels] + torch.randn(1797, 8, 8, generator=generator)
        what = "ten noisy patterns"
    else:
        data = load_digits()
        grey, labels = torch.tensor(data.images, dtype=torch.float32), torch.tensor(data.target)
        what = "scikit-learn digits"
    grey = (grey - grey.mean()) / grey.std()
    return grey[:, None].expand(-1, 3, -1, -1).contiguous(), labels, what


def train(model: nn.Module, steps: int, seed: int) -> nn.Module:
    """`steps` steps of SGD (rate 0.05, momentum 0.9) where the model is."""
    device = next(model.parameters()).device
    images, labels = (tensor.to(device) for tensor in digits()[:2])
    generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
    batches = torch.randint(len(images), (steps, BATCH), generator=generator).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for batch in batches:
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def trained(
    arch: str, seed: int, steps: int, cache: Path | None, options: dict[str, Any], device: torch.device
) -> nn.Module:
    """A network after `steps` steps, from the cache if it is there."""
    model = build_model(arch, input_shape=INPUT_SHAPE, classes=10, seed=seed, **options).to(device)
    tag = "-".join([arch, *(f"{k}{v}" for k, v in options.items()), str(steps), f"{seed:03d}"])
    path = None if cache is None else cache / f"{tag}.pt"
    if path is not None and path.exists():
        model.load_state_dict(torch.load(path, weights_only=True, map_location=device))
        return model
    train(model, steps, seed)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model


def objectives(symmetry: Symmetry, theta: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[float, float]:
    """<theta, state> over the parameters in float64, and the same without 1-D parameters."""
    values = {n: float((theta[n].double().cpu() * state[n].double().cpu()).sum()) for n in symmetry.parameters}
    return sum(values.values()), sum(v for n, v in values.items() if theta[n].ndim > 1)


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def summary(seconds: list[float]) -> dict[str, Any]:
    low, middle, high = np.quantile(seconds, [0.1, 0.5, 0.9])
    return {"seconds_per_source": {"median": middle, "q10": low, "q90": high}, "n": len(seconds)}


class Rebasin:
    """PyPI rebasin on one pair: seconds of its search, seconds with the tracing before it, and the permuted model."""

    def __init__(self, theta: nn.Module, device: torch.device):
        from rebasin import PermutationCoordinateDescent

        self.descent, self.theta, self.device = PermutationCoordinateDescent, theta, device

    def __call__(self, source: nn.Module, seed: int) -> tuple[float, float, nn.Module]:
        torch.manual_seed(seed)  # it draws its orders from the global generator
        theta, permuted = copy.deepcopy(self.theta).eval(), copy.deepcopy(source).eval()
        example = EXAMPLE.to(self.device)
        tracing, search = timed(lambda: self.descent(theta, permuted, example, device_b=self.device), self.device)
        seconds, _ = timed(search.rebasin, self.device)
        return seconds, tracing + seconds, permuted


class Fastar:
    """Matching of all sources, in each of the ways that are timed."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        whole = args.width is not None and args.width == int(args.width)  # an mlp's width is a number of units
        options = {} if args.width is None else {"width": int(args.width) if whole else args.width}
        self.args, self.device = args, device
        self.theta_model, *self.models = (
            trained(args.arch, seed, args.steps, args.cache, options, device) for seed in range(args.sources + 1)
        )
        derive = lambda: derive_symmetry(self.theta_model, (EXAMPLE.to(device),), cached=False)  # noqa: E731
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
        moved = copy.deepcopy(self.theta_model)
        train(moved, len(digits()[0]) // BATCH, derive_seed(args.seed, "moved"))
        flat = self.layout.flatten(moved.state_dict())
        self.moved = self.layout.views(flat)
        start = self.layout.flatten(self.theta_model.state_dict())
        self.moved_by = float((flat - start).norm() / start.norm())
        identity = self.symmetry.identity()
        self.ways: dict[str, Callable[[], tuple[float, Any]]] = {
            "cold": lambda: self.match(self.theta, self.sources, None),
            "warm": lambda: self.match(self.theta, self.aligned, identity),
            "warm, theta moved": lambda: self.match(self.moved, self.aligned, identity),
        }

    def match(
        self, theta: dict[str, Tensor], given: dict[str, Tensor], start: Permutations | None
    ) -> tuple[float, Any]:
        args, threads = self.args, matching_threads(self.device)
        settings: dict[str, Any] = {"seed": args.seed, "orders": args.orders, "start": start, "threads": threads}
        return timed(lambda: match_weights(self.symmetry, theta, given, **settings), self.device)

    def pair(self, n: int) -> dict[str, float]:
        """The objective of source `n`, with and without 1-D parameters: matched, and as it was trained."""
        state = {name: value.detach() for name, value in self.models[n].state_dict().items()}
        theta = {name: value.detach() for name, value in self.theta_model.state_dict().items()}
        matched = self.symmetry.apply(self.first.permutations.select(n).to(self.device), state)
        total, weights = objectives(self.symmetry, theta, matched)
        start, start_weights = objectives(self.symmetry, theta, state)
        return {"fastar": total, "fastar_weights": weights, "unmatched": start, "unmatched_weights": start_weights}


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
    seconds: dict[str, list[float]] = {}
    for name, way in fastar.ways.items():
        way()  # from here on nothing is new to the allocator and the libraries
        results = [way() for _ in range(args.repeats)]
        seconds[name] = [took / args.sources for took, _ in results]
        last = results[-1][1]
        more: dict[str, Any] = {"moved_by": fastar.moved_by} if name.endswith("moved") else {}
        more |= {"sweeps_mean": float(last.sweeps.double().mean()), "solves": last.solves}
        report(case=f"fastar {name}", **summary(seconds[name]), **more)
    pairs = [fastar.pair(n) for n in range(min(args.sources, 8))]
    report(case="objective", pairs=pairs, sweeps=fastar.first.sweeps.tolist(), solves=fastar.first.solves)
    if args.against == "rebasin":
        if util.find_spec("rebasin") is None:
            report(case="rebasin", missing="pip install fastar[bench], or put rebasin 0.0.47 on PYTHONPATH")
        else:
            base["versions"] = {**base["versions"], "rebasin": metadata.version("rebasin")}
            with failing_alone("matching", "rebasin", device, arch=args.arch, sources=args.sources):
                against_rebasin(fastar, args, device, report)
    if device.type == "cuda" and profiler_sees_gpu():
        for name in ("warm", "warm, theta moved", "cold"):  # last: reading many events takes the profiler long
            with failing_alone("matching", f"work {name}", device):
                report(case=f"work {name}", **gpu_work(fastar.ways[name], device))
    if args.escapes:
        theta = {n: t.detach() for n, t in fastar.theta_model.state_dict().items()}
        escapes(fastar.theta_model, fastar.symmetry, theta, fastar.sources, report, device, args.seed)


def against_rebasin(
    fastar: Fastar, args: argparse.Namespace, device: torch.device, report: Callable[..., None]
) -> None:
    """rebasin and fastar in turns: rebasin on one pair, fastar on all sources; told of after every pair."""
    other = Rebasin(fastar.theta_model, device)
    theta = {name: value.detach() for name, value in fastar.theta_model.state_dict().items()}
    seconds: dict[str, list[float]] = {}
    pairs: list[dict[str, float]] = []
    begin = time.perf_counter()
    for n, model in enumerate(fastar.models):
        spent = time.perf_counter() - begin
        if args.rebasin_seconds is not None and n and spent * (n + 1) / n > args.rebasin_seconds:
            break  # another pair would take longer than that
        search, whole, permuted = other(model, derive_seed(args.seed, "rebasin", n) % 2**31)
        again, again_whole, _ = other(permuted, derive_seed(args.seed, "rebasin", n, "warm") % 2**31)
        taken = {
            "rebasin cold": search,
            "rebasin cold with_tracing": whole,
            "rebasin warm": again,
            "rebasin warm with_tracing": again_whole,
            **{f"fastar {name}": fastar.ways[name]()[0] / args.sources for name in ("cold", "warm")},
        }
        for name, value in taken.items():
            seconds.setdefault(name, []).append(value)
        pair = fastar.pair(n)
        pair["rebasin"], pair["rebasin_weights"] = objectives(fastar.symmetry, theta, permuted.state_dict())
        pairs.append(pair)
        ratio = {
            name: float(np.median(np.divide(seconds[f"rebasin {name}"], seconds[f"fastar {name.split()[0]}"])))
            for name in ("cold", "warm", "cold with_tracing", "warm with_tracing")
        }
        at_least = sum(one["fastar"] >= one["rebasin"] for one in pairs)
        told = f"{at_least} of {len(pairs)} pairs"
        report(case="rebasin / fastar", times_faster=ratio, objective_at_least_equal=told, n=len(pairs))
    for name, values in seconds.items():
        report(case=f"{name}, in turns" if name.startswith("fastar") else name, **summary(values))
    report(case="objective beside rebasin's", pairs=pairs)


def escapes(
    model: nn.Module,
    symmetry: Symmetry,
    theta: dict[str, Tensor],
    sources: dict[str, Tensor],
    report: Callable[..., None],
    device: torch.device,
    seed: int,
) -> None:
    """What the ways out of local optima buy and cost: gain in the objective over one attempt, and its time.

    One attempt is what `match_weights` does by itself: a guess from the output backwards, and a descent from it.
    """
    count = next(iter(sources.values())).shape[0]
    images = digits()[0]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches = [images[part].to(device) for part in order[:256].split(64)]
    once, base = timed(lambda: match_weights(symmetry, theta, sources, seed=seed), device)
    aligned = {name: tensor.clone() for name, tensor in sources.items()}
    symmetry.apply_rows(base.permutations, aligned)
    # As an epoch later: theta has moved, the sources stand as they were last permuted.
    generator = torch.Generator().manual_seed(seed)
    moved = {
        name: tensor + 0.3 * float(tensor.std()) * torch.randn(tensor.shape, generator=generator).to(device)
        if name in symmetry.parameters and tensor.ndim > 1
        else tensor
        for name, tensor in theta.items()
    }

    def attempt(given: dict[str, Tensor], centre: dict[str, Tensor], **settings: Any) -> Callable[[], Any]:
        return lambda: match_weights(symmetry, centre, given, seed=seed, **settings)

    def by_activations(centre: dict[str, Tensor]) -> Any:
        start = match_activations(model, symmetry, centre, sources, batches)
        return match_weights(symmetry, centre, sources, start=start, seed=seed)

    def measure(name: str, way: Callable[[], Any], once: float, base: Any) -> None:
        took, result = timed(way, device)
        gain = result.objective - base.objective
        report(
            case=f"way out: {name}",
            times_slower=took / once,
            objective_gain={"mean": float(gain.mean()), "min": float(gain.min()), "max": float(gain.max())},
            weights_before=float(base.objective_weights.mean()),
            weights_gain=float((result.objective_weights - base.objective_weights).mean()),
            n=count,
        )

    for name, way in {
        "identity as the start": attempt(sources, theta, start=symmetry.identity()),
        "activations as the start": lambda: by_activations(theta),
        "best of 3 random starts": attempt(
            sources, theta, start=[symmetry.random(derive_seed(seed, "start", n)) for n in range(3)]
        ),
        **{f"{orders} orders": attempt(sources, theta, orders=orders) for orders in (3, 8)},
        **{f"{kicks} kicks": attempt(sources, theta, kicks=kicks) for kicks in (1, 5, 15)},
        "3 orders and 5 kicks": attempt(sources, theta, orders=3, kicks=5),
    }.items():
        measure(name, way, once, base)
    warm, later = timed(attempt(aligned, moved, start=symmetry.identity()), device)
    report(case="last epoch as the start", seconds_per_source=warm / count, n=count)
    for name, way in {
        "a guess instead of last epoch": attempt(aligned, moved),
        "last epoch and 1 kick": attempt(aligned, moved, start=symmetry.identity(), kicks=1),
    }.items():
        measure(name, way, warm, later)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=float, help="width setting of the architecture")
    parser.add_argument("--sources", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="training steps of each network")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of fastar's cases")
    parser.add_argument("--orders", type=int, default=1)
    parser.add_argument("--against", choices=["rebasin", "nothing"], default="nothing")
    parser.add_argument("--rebasin-seconds", type=float, help="stop before that; default: after all sources")
    parser.add_argument("--escapes", action="store_true", help="also measure the ways out of local optima")
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
