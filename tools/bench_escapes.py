"""Gain and cost of the ways out of matching's local optima, beside one attempt: a JSON line for each.

    python tools/bench_escapes.py --arch resnet18 --sources 2

On networks as those of tools/bench_matching.py. `weights_gain` is the gain in the objective <theta, pi(theta_n)>
without 1-D parameters, mean over the sources, over what one attempt finds (`weights_before`); `times_slower` its time
over that attempt's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import timed, where
from bench.trained import EXAMPLE, digits, trained
from torch import Tensor, nn

from fastar.config import MatchingSettings
from fastar.errors import FastarError
from fastar.flat import FlatLayout
from fastar.matching import Examples, match, solver_name
from fastar.runtime.device import resolve_device
from fastar.symmetry import Permutations, Symmetry, derive_symmetry


def escapes(
    model: nn.Module,
    symmetry: Symmetry,
    theta: dict[str, Tensor],
    sources: dict[str, Tensor],
    report: Callable[..., None],
    device: torch.device,
    seed: int,
) -> None:
    """Measure the ways out of local optima: gain in the objective over one attempt, and time.

    One attempt is what the default settings do: a start from the output backwards, and a descent from it.
    """
    count = next(iter(sources.values())).shape[0]
    images = digits()[0]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    batches = [images[part].to(device) for part in order[:256].split(64)]

    def attempt(
        given: dict[str, Tensor], centre: dict[str, Tensor], start: Permutations | None = None, **settings: Any
    ) -> Callable[[], Any]:
        begin = settings.pop("begin", "auto")
        chosen = MatchingSettings(start=begin, **settings)
        examples = Examples(model, [(batch, None) for batch in batches])
        return lambda: match(chosen, symmetry, centre, given, start=start, examples=lambda: examples, seed=seed)

    once, base = timed(attempt(sources, theta), device)
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
        "activations as the start": attempt(sources, theta, begin="activations"),
        **{f"{n} restarts": attempt(sources, theta, restarts=n) for n in (3, 8)},
        **{f"{n} perturbations": attempt(sources, theta, perturbations=n) for n in (1, 5, 15)},
        "3 restarts and 5 perturbations": attempt(sources, theta, restarts=3, perturbations=5),
    }.items():
        measure(name, way, once, base)
    warm, later = timed(attempt(aligned, moved, start=symmetry.identity()), device)
    report(case="last epoch as the start", seconds_per_source=warm / count, n=count)
    for name, way in {
        "backward instead of last epoch": attempt(aligned, moved),
        "last epoch and 1 perturbation": attempt(aligned, moved, start=symmetry.identity(), perturbations=1),
    }.items():
        measure(name, way, warm, later)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=float, help="width setting of the architecture")
    parser.add_argument("--sources", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60, help="training steps of each network")
    parser.add_argument("--cache", type=Path, help="folder in which trained networks are kept")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.sources < 1 or args.steps < 1:
        parser.error("--sources and --steps must be at least 1")
    device = resolve_device(args.device)
    model, *sources = (
        trained(args.arch, seed, args.steps, args.cache, args.width, device) for seed in range(args.sources + 1)
    )
    symmetry = derive_symmetry(model, (EXAMPLE.to(device),))
    layout = FlatLayout.from_module(model)
    rows = layout.views(torch.stack([layout.flatten(source.state_dict()) for source in sources]))
    theta = {name: value.detach() for name, value in model.state_dict().items()}
    base = {
        "bench": "escapes",
        "arch": args.arch,
        "sources": args.sources,
        "trained_steps": args.steps,
        "trained_on": digits()[2],
        "solver": solver_name(),
        **where(device),
    }

    def report(**case: Any) -> None:
        print(json.dumps({**base, **case}), flush=True)

    escapes(model, symmetry, theta, rows, report, device, args.seed)


if __name__ == "__main__":
    try:
        main()
    except FastarError as error:
        sys.exit(f"bench_escapes: {error}")
