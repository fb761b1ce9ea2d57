"""Time and quality of weight matching, beside PyPI's rebasin 0.0.47 where it is installed.

    python tools/bench_matching.py --arch resnet18 --sources 8 --against rebasin

Networks are trained for a few steps on scikit-learn's digits (theta and every source from another seed), so that they
are like trained ones; `--cache DIR` keeps them. Every repetition times rebasin on one pair, then fastar on all sources,
in one process. Prints one JSON line per case: seconds per source (median and quantiles over repetitions), and the
objective <theta, pi(theta_n)> of every pair, with and without 1-D parameters.

cold: sources as they were trained. warm: the same call on sources that an earlier call has already permuted.
`with_tracing` adds what rebasin does anew for every pair: building its graph of the model.

rebasin is not a dependency: `pip install fastar[bench]`, or put it on PYTHONPATH from a folder of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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

INPUT_SHAPE = (3, 8, 8)
EXAMPLE = torch.zeros(2, *INPUT_SHAPE)


def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 3, 8, 8] of mean 0 and deviation 1, labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)
    images = (images - images.mean()) / images.std()
    return images[:, None].expand(-1, 3, -1, -1).contiguous(), torch.tensor(data.target)


def trained(arch: str, seed: int, steps: int, cache: Path | None, options: dict[str, Any]) -> nn.Module:
    """A network after `steps` steps of SGD (batch 64, rate 0.05, momentum 0.9), from the cache if it is there."""
    model = build_model(arch, input_shape=INPUT_SHAPE, classes=10, seed=seed, **options)
    tag = "-".join([arch, *(f"{k}{v}" for k, v in options.items()), str(steps), f"{seed:03d}"])
    path = None if cache is None else cache / f"{tag}.pt"
    if path is not None and path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    images, labels = digits()
    generator = torch.Generator().manual_seed(derive_seed(seed, "order"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return model


def stacked(symmetry: Symmetry, models: list[nn.Module], device: torch.device) -> dict[str, Tensor]:
    """name -> [N, *shape]: views of one [N, P] store, convolution weights channels-last, as in a star run."""
    states = [m.state_dict() for m in models]
    sizes = {n: states[0][n].numel() for n in symmetry.parameters}
    store = torch.empty(len(models), sum(sizes.values()), device=device)
    out, at = {}, 0
    for name, size in sizes.items():
        flat, shape = store[:, at : at + size], states[0][name].shape
        at += size
        if len(shape) == 4:
            o, i, h, w = shape
            out[name] = flat.unflatten(1, (o, h, w, i)).permute(0, 1, 4, 2, 3)
        else:
            out[name] = flat.unflatten(1, shape)
        for n, state in enumerate(states):
            out[name][n].copy_(state[name])
    return out


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


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "python": platform.python_version(), "solver": solver_name()}
    if util.find_spec("rebasin") is not None:
        found["rebasin"] = metadata.version("rebasin")
    return found


def device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


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


def bench(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    options = {} if args.width is None else {"width": args.width}
    theta_model, *models = (
        trained(args.arch, seed, args.steps, args.cache, options).to(device) for seed in range(args.sources + 1)
    )
    tracing, symmetry = timed(lambda: derive_symmetry(theta_model, (EXAMPLE.to(device),), cached=False), device)
    theta = {n: t.detach() for n, t in theta_model.state_dict().items()}
    sources = stacked(symmetry, models, device)
    base = {
        "bench": "matching",
        "arch": args.arch,
        "sources": args.sources,
        "trained_steps": args.steps,
        "parameters": sum(t[0].numel() for t in sources.values()),
        "device": device_text(device),
        "versions": versions(),
    }

    def report(**case: Any) -> None:
        print(json.dumps({**base, **case}), flush=True)

    report(case="derive and verify the groups (once per architecture)", seconds=tracing, groups=len(symmetry.groups))
    other = None
    if args.against == "rebasin":
        if util.find_spec("rebasin") is None:
            report(case="rebasin", missing="pip install fastar[bench], or put rebasin 0.0.47 on PYTHONPATH")
        else:
            other = Rebasin(theta_model, device)

    def fastar(given: dict[str, Tensor], start: Permutations | None) -> tuple[float, Any]:
        settings = {"seed": args.seed, "orders": args.orders, "start": start}
        return timed(lambda: match_weights(symmetry, theta, given, **settings), device)

    _, first = fastar(sources, None)  # warms up threads and libraries, as the first epoch of a run does
    aligned = {n: t.clone() for n, t in sources.items()}
    symmetry.apply_rows(first.permutations, aligned)
    seconds: dict[str, list[float]] = {}
    pairs: list[dict[str, Any]] = []
    for n in range(min(args.repeats or args.sources, args.sources)):
        if other is not None:
            search, whole, permuted = other(models[n], derive_seed(args.seed, "rebasin", n) % 2**31)
            again, again_whole, _ = other(permuted, derive_seed(args.seed, "rebasin", n, "warm") % 2**31)
            for name, value in (
                ("rebasin cold", search),
                ("rebasin cold with_tracing", whole),
                ("rebasin warm", again),
                ("rebasin warm with_tracing", again_whole),
            ):
                seconds.setdefault(name, []).append(value)
        for name, given, start in (("fastar cold", sources, None), ("fastar warm", aligned, symmetry.identity())):
            took, result = fastar(given, start)
            seconds.setdefault(name, []).append(took / args.sources)
            if name == "fastar cold":
                check = symmetry.apply(result.permutations.select(n).to(device), models[n].state_dict())
                total, weights = objectives(symmetry, theta, check)
        start_total, start_weights = objectives(symmetry, theta, models[n].state_dict())
        pair = {
            "fastar": total,
            "fastar_weights": weights,
            "unmatched": start_total,
            "unmatched_weights": start_weights,
        }
        if other is not None:
            pair["rebasin"], pair["rebasin_weights"] = objectives(symmetry, theta, permuted.state_dict())
        pairs.append(pair)
    for name, values in seconds.items():
        report(case=name, **summary(values))
    report(case="objective", pairs=pairs, sweeps=first.sweeps.tolist(), solves=first.solves)
    if other is not None:
        ratio = {
            name: float(
                np.median(np.array(seconds[f"rebasin {name}"]) / np.array(seconds[f"fastar {name.split()[0]}"]))
            )
            for name in ("cold", "warm", "cold with_tracing", "warm with_tracing")
        }
        at_least = sum(p["fastar"] >= p["rebasin"] for p in pairs)
        report(
            case="rebasin / fastar", times_faster=ratio, objective_at_least_equal=f"{at_least} of {len(pairs)} pairs"
        )
    if args.escapes:
        escapes(theta_model, symmetry, theta, sources, report, device, args.seed)


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
    parser.add_argument("--repeats", type=int, help="repetitions; default: one per source")
    parser.add_argument("--orders", type=int, default=1)
    parser.add_argument("--against", choices=["rebasin", "nothing"], default="nothing")
    parser.add_argument("--escapes", action="store_true", help="also measure the ways out of local optima")
    parser.add_argument("--cache", type=Path, help="folder in which trained networks are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    bench(parser.parse_args())


if __name__ == "__main__":
    main()
