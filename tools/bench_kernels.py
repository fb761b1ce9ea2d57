"""Interpolation and star update against the copy bandwidth of the same device, one JSON line per case.

    python tools/bench_kernels.py [--device cuda|cpu] [--millions 11 100] [--rounds 30]

The cases of one size take turns inside each round, so that their ratios hold while the machine's speed drifts.
`of_copy` is the case's bandwidth over that of `copy` (median of per-round ratios); bytes are those that the operation
must move at least. The torch cases do the same work by plain torch calls: what the kernels replace.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fastar.kernels import backend, interpolate, sgd_update

SETTINGS = {"weight_decay": 5e-4, "momentum": 0.9, "nesterov": True}


@dataclass(frozen=True)
class Case:
    name: str
    bytes_moved: int
    run: Callable[[], object]


def make_cases(numel: int, device: torch.device) -> list[Case]:
    generator = torch.Generator(device).manual_seed(0)
    theta, source, out, momentum_buffer = (torch.randn(numel, device=device, generator=generator) for _ in range(4))
    store = torch.stack([source, theta])
    index = torch.tensor(1, device=device)
    half = torch.empty(numel, dtype=torch.bfloat16, device=device)
    gradient = out * 1e-3
    half_gradient = gradient.bfloat16()
    # So small a step that thousands of them leave the numbers as they are.
    t, lr, scale, one = (torch.tensor(value, device=device) for value in (0.3, 1e-9, 0.7, 1.0))

    def update(given: torch.Tensor, scaled_by: torch.Tensor) -> None:
        sgd_update(theta, given, momentum_buffer, lr=lr, scale=scaled_by, inverse_loss_scale=one, **SETTINGS)

    def plain_interpolate() -> torch.Tensor:
        return ((1 - t) * theta + t * source).to(torch.bfloat16)

    parameter = torch.nn.Parameter(theta.clone())
    parameter.grad = torch.zeros_like(theta)
    optimizer = torch.optim.SGD([parameter], 1e-9, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def plain_update() -> None:
        torch.mul(gradient, scale, out=parameter.grad)
        optimizer.step()

    return [
        Case("copy", 8 * numel, lambda: out.copy_(source)),
        Case("interpolate fp32", 12 * numel, lambda: interpolate(theta, source, t, out)),
        Case("interpolate bf16", 10 * numel, lambda: interpolate(theta, source, t, half)),
        Case("interpolate bf16 indexed", 10 * numel, lambda: interpolate(theta, store, t, half, index=index)),
        Case("interpolate bf16, torch", 10 * numel, plain_interpolate),
        Case("sgd_update fp32", 20 * numel, lambda: update(gradient, scale)),
        Case("sgd_update fp32, scale 1", 20 * numel, lambda: update(gradient, one)),
        Case("sgd_update bf16 gradient", 18 * numel, lambda: update(half_gradient, scale)),
        Case("sgd_update fp32, torch", 20 * numel, plain_update),
    ]


def seconds_of(case: Case, device: torch.device, repeats: int) -> float:
    """Seconds per call, by events on a GPU (several calls, so that launches overlap) and by the clock elsewhere."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            case.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        case.run()
    return (time.perf_counter() - begin) / repeats


def measure(numel: int, device: torch.device, rounds: int) -> list[dict[str, object]]:
    cases = make_cases(numel, device)
    repeats = 10 if device.type == "cuda" else 1
    for case in cases:
        for _ in range(3):
            case.run()
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            seconds[case.name].append(seconds_of(case, device, repeats))
    copy = next(case for case in cases if case.name == "copy")
    rows = []
    for case in cases:
        taken = seconds[case.name]
        low, _, high = statistics.quantiles(taken, n=4)
        ratios = [
            (case.bytes_moved / mine) / (copy.bytes_moved / its)
            for mine, its in zip(taken, seconds[copy.name], strict=True)
        ]
        rows.append(
            {
                "bench": "kernels",
                "case": case.name,
                "parameters": numel,
                "path": "torch" if case.name == "copy" or case.name.endswith("torch") else backend(device),
                "ms": {"median": statistics.median(taken) * 1e3, "q25": low * 1e3, "q75": high * 1e3},
                "gb_per_s": case.bytes_moved / statistics.median(taken) / 1e9,
                "of_copy": statistics.median(ratios),
                "n": rounds,
                **describe(device),
            }
        )
    return rows


def describe(device: torch.device) -> dict[str, object]:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if backend(device) == "triton":
        import triton

        versions["triton"] = triton.__version__
    return {"device": name, "versions": versions}


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
        for row in measure(millions * 1_000_000 // 16 * 16, device, arguments.rounds):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
