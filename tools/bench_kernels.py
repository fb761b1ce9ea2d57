"""Interpolation and updates against the copy bandwidth of the same device, one JSON line per case.

    python tools/bench_kernels.py [--device cuda|cpu] [--millions 11 100] [--rounds 30]

The cases of one size take turns inside each round, so that their ratios hold while the machine's speed drifts.
`of_copy` is the case's bandwidth over that of `copy` (median of per-round ratios); bytes are those that the operation
must move at least. The torch cases do the same work by plain torch calls: what the kernels replace.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from fastar.kernels import NextPoint, adam_update, find_nonfinite, interpolate, sgd_update

from fastar.benchmarks import Case, Timing, line, time_in_turns

SGD = {"weight_decay": 5e-4, "momentum": 0.9, "nesterov": True}
ADAM = {"weight_decay": 5e-4, "betas": (0.9, 0.999), "eps": 1e-8, "decoupled": True}


def make_cases(numel: int, device: torch.device) -> list[Case]:
    generator = torch.Generator(device).manual_seed(0)
    theta, source, out, buffer = (torch.randn(numel, device=device, generator=generator) for _ in range(4))
    square = buffer.abs()
    store = torch.stack([source, theta])
    index = torch.tensor(1, device=device)
    half = torch.empty(numel, dtype=torch.bfloat16, device=device)
    gradient = out * 1e-3
    half_gradient = gradient.bfloat16()
    # So small a step that thousands of them leave the numbers as they are.
    t, lr, scale, one = (torch.tensor(value, device=device) for value in (0.3, 1e-9, 0.7, 1.0))
    found = torch.zeros((), device=device)
    next_point = NextPoint(store, t, half, index)

    def sgd(given: torch.Tensor, scaled_by: torch.Tensor, point: NextPoint | None = None) -> None:
        sgd_update(theta, given, buffer, lr=lr, scale=scaled_by, inverse_loss_scale=one, **SGD, next_point=point)

    def sgd_then_interpolate() -> None:
        sgd(half_gradient, scale)
        interpolate(theta, store, t, half, index=index)

    def adam(point: NextPoint | None = None) -> None:
        scalars = {"lr": lr, "scale": scale, "inverse_loss_scale": one, "steps_done": one}
        adam_update(theta, half_gradient, buffer, square, **scalars, **ADAM, next_point=point)

    def plain_interpolate() -> torch.Tensor:
        return ((1 - t) * theta + t * source).to(torch.bfloat16)

    parameter = torch.nn.Parameter(theta.clone())
    parameter.grad = torch.zeros_like(theta)
    optimizer = torch.optim.SGD([parameter], 1e-9, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def plain_update() -> None:
        torch.mul(gradient, scale, out=parameter.grad)
        optimizer.step()

    def case(name: str, bytes_each: int, run: object) -> Case:
        assert callable(run)
        return Case(name, run, {"bytes": bytes_each * numel})

    return [
        case("copy", 8, lambda: out.copy_(source)),
        case("interpolate fp32", 12, lambda: interpolate(theta, source, t, out)),
        case("interpolate bf16", 10, lambda: interpolate(theta, source, t, half)),
        case("interpolate bf16 indexed", 10, lambda: interpolate(theta, store, t, half, index=index)),
        case("interpolate bf16, torch", 10, plain_interpolate),
        case("sgd_update fp32", 20, lambda: sgd(gradient, scale)),
        case("sgd_update fp32, scale 1", 20, lambda: sgd(gradient, one)),
        case("sgd_update bf16 gradient", 18, lambda: sgd(half_gradient, scale)),
        case("sgd_update bf16, next point", 24, lambda: sgd(half_gradient, scale, next_point)),
        case("sgd_update bf16, then interpolate", 28, sgd_then_interpolate),
        case("sgd_update fp32, torch", 20, plain_update),
        case("adam_update bf16 gradient", 26, adam),
        case("adam_update bf16, next point", 32, lambda: adam(next_point)),
        case("find_nonfinite bf16", 2, lambda: find_nonfinite(half_gradient, found)),
    ]


def of_copy(timing: Timing, copy: Timing) -> float:
    moved, its = timing.case.facts["bytes"], copy.case.facts["bytes"]
    ratios = [(moved / mine) / (its / theirs) for mine, theirs in zip(timing.seconds, copy.seconds, strict=True)]
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--millions", type=int, nargs="+", default=[11, 100], help="parameters, in millions")
    parser.add_argument("--rounds", type=int, default=30, help="measurements of each case")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or min(arguments.millions) < 1:
        parser.error("--rounds must be at least 2 and --millions at least 1")
    device = torch.device(arguments.device)
    for millions in arguments.millions:
        numel = millions * 1_000_000 // 16 * 16
        repeats = 10 if device.type == "cuda" else 1
        timings = time_in_turns(make_cases(numel, device), device, rounds=arguments.rounds, repeats=repeats)
        for timing in timings:
            facts = {
                "parameters": numel,
                "gb_per_s": timing.case.facts["bytes"] / timing.median / 1e9,
                "of_copy": of_copy(timing, timings[0]),
            }
            print(line("kernels", timing, device, **facts), flush=True)


if __name__ == "__main__":
    main()
