"""What users give `fastar.match`, `match_many`, `apply` and `barrier`, and what torch is set to meanwhile."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastar

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = torch.zeros(2, 1, 4, 4)


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        norm = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()]
        return nn.Sequential(*norm, nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(16, 1, 4, 4, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(2)
    ]


@contextmanager
def torch_set_to(what: torch.dtype | str) -> Iterator[None]:
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    try:
        if isinstance(what, torch.dtype):
            torch.set_default_dtype(what)
        else:
            torch.set_default_device(what)
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None if device.type == "cpu" else device)


def all_results(networks: list[nn.Module], data: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """What the package computes for three networks, in plain numbers and tensors."""
    found: dict[str, Any] = {}
    for method in ("weight", "activation", "sinkhorn"):
        matched = fastar.match(networks[0], networks[1], example_inputs=EXAMPLE, method=method, data=data)
        nearer = fastar.apply(matched, networks[1])
        found[method] = dict(matched), matched.result.objective, nearer.state_dict()
    many = fastar.match_many(networks, example_inputs=EXAMPLE)
    assert many.average is not None
    found["many"] = [dict(one) for one in many.permutations], many.average.state_dict(), many.result.objective
    found["barrier"] = vars(fastar.barrier(networks[0], networks[1], data, points=3))
    return found


def assert_same(first: Any, second: Any) -> None:
    """Bits, dtypes and devices too."""
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        assert (first.dtype, first.device) == (second.dtype, second.device)
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key, value in first.items():
            assert_same(value, second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


@pytest.fixture(scope="module")
def given() -> tuple[list[nn.Module], list[tuple[Tensor, Tensor]], dict[str, Any]]:
    networks, data = [network(seed) for seed in range(3)], batches()
    return networks, data, all_results(networks, data)


@pytest.mark.parametrize("what", [torch.float64, torch.bfloat16, "meta"], ids=str)
def test_results_are_the_same_under_any_default_dtype_and_device(what: torch.dtype | str, given: Any) -> None:
    networks, data, expected = given
    with torch_set_to(what):
        assert_same(all_results(networks, data), expected)


def test_every_tensor_that_is_made_says_its_dtype_and_device() -> None:
    """Models aside, whose parameters are torch's layers' and follow its defaults."""
    floating = {"zeros", "ones", "empty", "rand", "randn", "full", "tensor", "linspace", "eye", "empty_strided"}
    whole = {"arange", "randint", "randperm", "as_tensor", "asarray"}
    silent = []
    for file in sorted([*ROOT.glob("fastar/**/*.py"), *ROOT.glob("kernels/*.py")]):
        if file.parent.name == "models":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch."):
                name, said = ast.unparse(node.func).removeprefix("torch."), {word.arg for word in node.keywords}
                needed = {"dtype", "device"} if name in floating else {"device"} if name in whole else set()
                if needed - said:
                    silent.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not silent
