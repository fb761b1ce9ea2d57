"""What `fastar.match`, `apply` and `barrier` say to data and networks that do not fit, and how they convert them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastar
from fastar.errors import FastarError

Batch = tuple[Tensor, Tensor]
EXAMPLE = torch.zeros(1, 8)


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def batches(dtype: torch.dtype = torch.float32) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(16, 8, generator=generator).to(dtype), torch.randint(3, (16,), generator=generator))
        for _ in range(2)
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_barrier_is_measured_in_float32_whatever_the_models_are(dtype: torch.dtype) -> None:
    """Also where labels are int32. The models' own rounding to `dtype` is part of them: both sides have it."""
    a, b = (network(seed).to(dtype) for seed in range(2))
    first, second = (network(seed).to(dtype).float() for seed in range(2))
    expected = fastar.barrier(first, second, [(x.float(), y) for x, y in batches(dtype)])
    found = fastar.barrier(a, b, [(x, y.int()) for x, y in batches(dtype)])
    assert found.loss == expected.loss
    assert next(a.parameters()).dtype == dtype


class Wrapped(nn.Module):
    def __init__(self, give: Callable[[Tensor], Any]):
        super().__init__()
        self.inner, self.give = network(0), give

    def forward(self, x: Tensor) -> Any:
        return self.give(self.inner(x))


@pytest.mark.parametrize(
    ("give", "words"),
    [
        (lambda x: ("no", x), "returns tuple of str, Tensor"),
        (lambda x: {"score": x, "hidden": x}, "their keys are 'score', 'hidden'"),
        (lambda x: x.sum(1), r"the network gives float32 \[16\]"),
        (lambda x: x[:1], r"the network gives float32 \[1, 3\]"),
    ],
)
def test_outputs_that_are_not_logits_are_named(give: Callable[[Tensor], Any], words: str) -> None:
    with pytest.raises(FastarError, match=words):
        fastar.barrier(Wrapped(give), Wrapped(give), batches())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: y + 1, "labels from 1 to 3, where the model has 3 classes"),
        (lambda y: y - 200, "labels from -200"),
        (lambda y: y.float(), "torch.float32"),
        (lambda y: y > 0, "torch.bool"),
        (lambda y: y[:, None], r"targets are int64 \[16, 1\]"),
        (lambda y: F.one_hot(y, 3), r"targets are int64 \[16, 3\]"),
    ],
)
def test_labels_that_do_not_fit_are_named(change: Callable[[Tensor], Tensor], words: str) -> None:
    a, b = network(0), network(1)
    with pytest.raises(FastarError, match=words):
        fastar.barrier(a, b, [(x, change(y)) for x, y in batches()])


class Scaled(nn.Module):
    """A buffer that is neither interpolated nor re-estimated, and decides the outputs."""

    def __init__(self, scale: float):
        super().__init__()
        self.inner = network(0)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def test_other_buffers_that_differ_are_refused() -> None:
    """The second model used to be measured with the first one's."""
    with pytest.raises(FastarError, match="buffer 'scale'"):
        fastar.barrier(Scaled(1.0), Scaled(5.0), batches())
    same = fastar.barrier(Scaled(5.0), Scaled(5.0), batches())
    norms = network(0), network(0)
    norm = norms[1].get_submodule("1")
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    norm.running_mean += 3  # re-estimated, so that it does not matter
    assert same.value == fastar.barrier(*norms, batches()).value == 0.0


def test_networks_that_cannot_be_matched_are_refused_in_one_line() -> None:
    whole = network(0)
    for pair, words in (
        ((nn.ReLU(), nn.ReLU()), "model_a, a ReLU, has no parameters"),
        ((network(0).to("meta"), whole), "model_a has no weights yet"),
        ((whole, network(0).to("meta")), "model_b has no weights yet"),
        ((nn.LazyLinear(3), whole), "model_a has parameters without a shape"),
    ):
        for call in (
            lambda a, b: fastar.match(a, b, example_inputs=EXAMPLE),
            lambda a, b: fastar.barrier(a, b, batches()),
        ):
            with pytest.raises(FastarError, match=words):
                call(*pair)
    with pytest.raises(FastarError, match=r"models\[1\] has no weights yet"):
        fastar.match_many([whole, network(0).to("meta")], example_inputs=EXAMPLE)
    computed = network(0)
    computed.register_buffer("product", computed.get_parameter("0.weight") * 2, persistent=False)
    with pytest.raises(FastarError, match="Sequential cannot be copied"):
        fastar.match(computed, computed, example_inputs=EXAMPLE)


@pytest.mark.parametrize(
    "options", [{"method": "activation"}, {"method": "sinkhorn", "sinkhorn": {"objective": "mid"}}]
)
def test_no_batches_to_match_by_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(FastarError, match="there is no batch in what was given as data"):
        fastar.match(network(0), network(1), example_inputs=EXAMPLE, data=[], **options)


def test_a_permuted_copy_has_no_gradients_of_units_in_the_old_order() -> None:
    a, b = network(0), network(1)
    b(batches()[0][0]).sum().backward()
    nearer = fastar.apply(fastar.match(a, b, example_inputs=EXAMPLE), b)
    assert all(parameter.grad is None for parameter in nearer.parameters())
    assert all(parameter.grad is not None for parameter in b.parameters())


class Words(nn.Module):
    """A table of words that may also be what reads them out."""

    def __init__(self, *, tied: bool):
        super().__init__()
        self.table, self.hidden = nn.Embedding(12, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 12, bias=False)
        if tied:
            self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(torch.tanh(self.hidden(self.table(x).mean(1))))
        return logits


def test_ties_that_one_of_the_models_lacks() -> None:
    """Applied to one tensor, the permutations of two used to change what the network computes."""
    example = torch.zeros(1, 4, dtype=torch.long)
    tied, untied = Words(tied=True), Words(tied=False)
    with pytest.raises(FastarError, match=r"model_b: 'out\.weight' and 'table\.weight' are one tensor"):
        fastar.match(untied, tied, example_inputs=example)
    with pytest.raises(FastarError, match=r"models\[1\]: 'out.weight'"):
        fastar.match_many([untied, tied], example_inputs=example)
    matched = fastar.match(untied, Words(tied=False), example_inputs=example)
    with pytest.raises(FastarError, match=r"model: 'out\.weight'"):
        fastar.apply(matched, tied)
    words = torch.arange(12).view(3, 4)
    for first, second in ((tied, untied), (tied, Words(tied=True)), (untied, Words(tied=False))):
        nearer = fastar.apply(fastar.match(first, second, example_inputs=example), second)
        torch.testing.assert_close(nearer(words), second(words), rtol=1e-4, atol=1e-5)  # sums of fp32 in another order
