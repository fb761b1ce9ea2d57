"""`fastar.match`, `fastar.apply`, `fastar.barrier`: a user's own networks in a few lines, as README has them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastar
from fastar.errors import FastarError
from fastar.symmetry import Permutations, PermutationSpec, Symmetry

ROOT = Path(__file__).resolve().parent.parent


class Net(nn.Module):
    """A convolution with batch-norm, and a hidden layer on what it flattens to."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width)
        self.hidden, self.out = nn.Linear(4 * width, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.out(torch.relu(self.hidden(x)))


IMAGES = torch.zeros(2, 1, 4, 4)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """Two networks trained on the same learnable data, and the data in batches."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 4
    images = torch.randn(256, 1, 4, 4, generator=generator) * 0.3
    images[torch.arange(256), 0, labels] += 1.5  # a bright row says the class
    data = list(zip(images.split(64), labels.split(64), strict=True))
    models = []
    for seed in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Net()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(30):
            for x, y in data:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        models.append(model.eval())
    return models[0], models[1], data


def test_the_snippet_in_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (snippet,) = [block for block in blocks if "fastar.match(" in block]
    lines = [line for line in snippet.strip().splitlines() if line]
    assert len(lines) <= 10
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(snippet, names)
    images = torch.randn(9, 8)
    # A permutation reorders sums of fp32 numbers: equal to rounding.
    torch.testing.assert_close(names["nearer"](images), names["b"](images), rtol=1e-5, atol=1e-5)
    assert names["nearer"] is not names["b"]
    before, after = map(float, re.findall(r"(\d+\.\d+)", capsys.readouterr().out))
    assert (before, after) == (round(names["before"].value, 4), round(names["after"].value, 4))
    result = names["matched"].result
    assert float(result.objective[0]) > float(result.objective_start[0])


@pytest.mark.parametrize("method", ["weight", "activation", "sinkhorn", "none"])
def test_every_method_keeps_the_function_and_lowers_the_barrier(method: str, trained: Any) -> None:
    a, b, data = trained
    states = [{k: v.clone() for k, v in model.state_dict().items()} for model in (a, b)]
    matched = fastar.match(a, b, example_inputs=IMAGES, method=method, data=data)
    nearer = fastar.apply(matched, b)
    x = data[0][0]
    torch.testing.assert_close(nearer(x), b(x), rtol=1e-4, atol=1e-4)
    assert matched.is_identity() == (method == "none")
    before, after = fastar.barrier(a, b, data), fastar.barrier(a, nearer, data)
    if method == "none":
        assert len(matched) == 0
        assert float(after) == float(before)
    else:
        assert {name: len(index) for name, index in matched.items()} == {"conv": 6, "hidden": 10}
        assert float(after) < float(before)
    for model, state in zip((a, b), states, strict=True):  # neither is changed
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.quick
def test_a_shuffled_copy_is_brought_back(trained: Any) -> None:
    a, _, data = trained
    symmetry = fastar.match(a, a, example_inputs=IMAGES).symmetry
    shuffle = symmetry.random(3)
    shuffled = fastar.apply(shuffle, a, symmetry=symmetry)
    assert not torch.equal(shuffled.state_dict()["hidden.weight"], a.state_dict()["hidden.weight"])
    matched = fastar.match(a, shuffled, example_inputs=IMAGES)
    assert matched == shuffle.inverse()
    back = fastar.apply(matched, shuffled)
    assert all(torch.equal(value, a.state_dict()[name]) for name, value in back.state_dict().items())
    found = fastar.barrier(a, back, data)
    assert found.value == 0.0
    assert found.t == [n / 10 for n in range(11)]
    with pytest.raises(FastarError, match="give symmetry"):
        fastar.apply(matched.inverse(), a)


def test_barrier_is_that_of_the_formula(trained: Any) -> None:
    """Against the loss of each interpolated network, its batch-norm statistics taken from all data as one batch."""
    a, b, data = trained
    images, labels = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    found = fastar.barrier(a, b, [(images, labels)], points=5)
    losses = []
    for t in found.t:
        model = Net()
        model.load_state_dict(a.state_dict())
        with torch.no_grad():
            for p, q in zip(model.parameters(), b.parameters(), strict=True):
                p.lerp_(q, t)
            model.train()  # normalises with the batch, which is all there is
            losses.append(float(nn.functional.cross_entropy(model(images), labels)))
    assert found.loss == pytest.approx(losses, rel=1e-4)  # running variances are the unbiased ones in neither
    gaps = [loss - ((1 - t) * losses[0] + t * losses[-1]) for t, loss in zip(found.t, losses, strict=True)]
    assert found.value == pytest.approx(max(gaps), rel=1e-3, abs=1e-4)


def passes(data: list[tuple[Tensor, Tensor]]) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    return lambda: iter(data)


def test_data_may_be_given_in_several_ways(trained: Any) -> None:
    a, b, data = trained
    whole = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    dataset = torch.utils.data.TensorDataset(*whole)
    ways = [data, passes(data), torch.utils.data.DataLoader(dataset, batch_size=64), whole]
    values = [fastar.barrier(a, b, way, points=3).value for way in ways]
    assert values == pytest.approx([values[0]] * 4, rel=1e-5)


def one_pass(data: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    yield from data


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda a, b, d: fastar.match(a, b, example_inputs=IMAGES, method="weights"), "'weight'"),
        (
            lambda a, b, d: fastar.match(a, b, example_inputs=IMAGES, perturbation=3),
            "did you mean matching.perturbations?",
        ),
        (lambda a, b, d: fastar.match(a, b, example_inputs=IMAGES, perturbations=-1), "matching.perturbations=-1"),
        (lambda a, b, d: fastar.match(a, b, example_inputs=IMAGES, method="activation"), "give (inputs, labels)"),
        (lambda a, b, d: fastar.match(a, Net(7), example_inputs=IMAGES), "model_b has 'conv.weight' of shape [7, 1, 3"),
        (lambda a, b, d: fastar.match(a, b, example_inputs=torch.zeros(2, 3, 4, 4)), "cannot trace Net"),
        (lambda a, b, d: fastar.barrier(a, Net(7), d), "model_b has 'conv.weight' of shape [7, 1, 3, 3]"),
        (lambda a, b, d: fastar.barrier(a, b, d, points=1), "points=1"),
        (lambda a, b, d: fastar.barrier(a, b, []), "no data"),
        (lambda a, b, d: fastar.barrier(a, b, one_pass(d)), "gone through once only"),
        (lambda a, b, d: fastar.barrier(a, b, [d[0][0]]), "the targets are float32"),
        (lambda a, b, d: fastar.barrier(a, b, (d[0][0], d[0][1][:3])), "64 inputs and 3 labels"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call: Callable[..., object], says: str, trained: Any) -> None:
    with pytest.raises(FastarError) as refused:
        call(*trained)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_forward_that_branches_on_values_takes_a_spec() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.a(x))
            return self.b(hidden if float(x.sum()) > 0 else 2 * hidden)

    first, second, example = Branching(), Branching(), torch.ones(2, 6)
    with pytest.raises(FastarError, match="PermutationSpec"):
        fastar.match(first, second, example_inputs=example)
    spec = PermutationSpec(
        {"a.weight": ("hidden", None), "a.bias": ("hidden",), "b.weight": (None, "hidden"), "b.bias": (None,)}
    )
    matched = fastar.match(first, second, example_inputs=example, spec=spec)
    assert list(matched) == ["hidden"]
    x = torch.randn(5, 6)
    torch.testing.assert_close(fastar.apply(matched, second)(x), second(x), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_proven_is_left_in_place_and_said() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.fft.fft(self.a(x)).abs())))

    a, b, example = Spectrum(), Spectrum(), torch.zeros(2, 6)
    with pytest.raises(FastarError, match="fft_fft"):
        fastar.match(a, b, example_inputs=example)
    matched = fastar.match(a, b, example_inputs=example, allow_partial=True)
    assert list(matched) == ["b"]
    assert isinstance(matched.symmetry, Symmetry)
    assert any("fft_fft" in line for line in matched.symmetry.frozen)


def test_importing_fastar_is_instant() -> None:
    code = "import sys, fastar; assert 'torch' not in sys.modules; fastar.match; assert 'torch' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'matched'"):
        fastar.matched  # noqa: B018


@pytest.mark.quick
def test_permutations_of_a_matching_are_permutations(trained: Any) -> None:
    a, b, _ = trained
    matched = fastar.match(a, b, example_inputs=IMAGES)
    assert isinstance(matched, Permutations)
    assert Permutations.from_dict(matched.as_dict()) == matched


def test_a_set_of_networks_that_keep_more_than_tensors() -> None:
    class Counting(Net):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state == {"version": 1}

    models = [Counting().eval() for _ in range(3)]
    matched = fastar.match_many(models, example_inputs=IMAGES)
    x = torch.randn(5, 1, 4, 4)
    for model, permutations in zip(models, matched.permutations, strict=True):
        nearer = fastar.apply(permutations, model, symmetry=matched.symmetry)
        torch.testing.assert_close(nearer(x), model(x), rtol=1e-4, atol=1e-5)
    assert isinstance(matched.average, Counting)
    permuted = [
        fastar.apply(permutations, model, symmetry=matched.symmetry).state_dict()["out.weight"]
        for model, permutations in zip(models, matched.permutations, strict=True)
    ]
    torch.testing.assert_close(matched.average.state_dict()["out.weight"], torch.stack(permuted).mean(0))
