"""What the numerical proof of groups sees, and what it says where it could not have seen a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matching_models import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.errors import FastarError
from fastar.symmetry import PermutationSpec, Symmetry, derive_symmetry, verify_symmetry
from fastar.symmetry.random_network import RandomNetwork

X = (torch.zeros(2, 6),)
Axes = dict[str, Any]


def dense(*layers: tuple[str, str | None, str | None]) -> Axes:
    """Axes of linear layers: name, group of its outputs, group of its inputs."""
    axes: Axes = {}
    for name, out, into in layers:
        axes |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    return axes


class Deep(nn.Module):
    """Many layers of one width."""

    def __init__(self, depth: int, act: Callable[[Tensor], Tensor], width: int = 6):
        super().__init__()
        sizes = [6, *[width] * (depth - 1), 6]
        self.layers = nn.ModuleList([nn.Linear(sizes[n], sizes[n + 1]) for n in range(depth)])
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)

    def axes(self) -> Axes:
        last = len(self.layers) - 1
        names = [None, *(f"h{n}" for n in range(last)), None]
        return dense(*((f"layers.{n}", names[n + 1], names[n]) for n in range(last + 1)))


def prove(model: nn.Module, axes: Axes, inputs: Any = X) -> Symmetry:
    return PermutationSpec(axes).symmetry(model, inputs)


def refused(message: str, model: nn.Module, axes: Axes, inputs: Any = X) -> None:
    with pytest.raises(FastarError, match=message) as why:
        prove(model, axes, inputs)
    assert "\n" not in str(why.value)


@pytest.mark.parametrize(("depth", "act"), [(16, torch.sigmoid), (40, F.relu), (24, torch.tanh)])
def test_the_first_layers_of_deep_networks_are_seen(depth: int, act: Callable[[Tensor], Tensor]) -> None:
    model = Deep(depth, act, width=12)
    axes = model.axes()
    assert len(prove(model, axes).groups) == depth - 1
    refused(r"changes its outputs \(groups h0\)", model, {**axes, "layers.0.bias": (None,)})
    refused(r"changes its outputs \(groups h1\)", model, {**axes, "layers.2.weight": ("h2", None)})


class Tokens(nn.Module):
    """One head of attention on embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 5)
        self.query, self.key, self.value = (nn.Linear(5, 4) for _ in range(3))
        self.out = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        return self.out(F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)).mean(1))


def test_tokens_that_are_all_alike_hide_nothing() -> None:
    axes = {"tokens.weight": (None, "x")} | dense(("query", "q", "x"), ("key", "q", "x"), ("value", "v", "x"))
    axes |= dense(("out", None, "v"))
    same = (torch.zeros(2, 6, dtype=torch.int64),)
    model = Tokens()
    assert [g.name for g in prove(model, axes, same).groups] == ["x", "q", "v"]
    wrong = {**axes, **dense(("key", "k", "x"))}
    refused("changes its outputs", model, wrong, same)
    # One token attends to itself whatever queries and keys are: nothing can be seen, and nothing is said to be proven.
    refused("cannot be proven.*do not depend on the order of group", model, wrong, (torch.zeros(2, 1).long(),))


def test_whole_number_inputs_that_cannot_be_varied_stay() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(6, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            if int(at.min()) < 2:
                raise ValueError("there is no such place")
            return self.out(self.hidden(x).relu()) * at.sum()

    inputs = (torch.zeros(2, 6), torch.tensor([2, 3]))
    axes = dense(("hidden", "h", None), ("out", None, "h"))
    assert [g.size for g in prove(Picks(), axes, inputs).groups] == [7]
    trial = RandomNetwork(Picks(), inputs, 0)
    trial.vary_integers(trial.state(1.0, buffers=True))
    assert trial.inputs[1].tolist() == [2, 3]


class Two(nn.Module):
    """Two outputs, the second very small."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.large, self.small = nn.Linear(6, 7), nn.Linear(6, 8), nn.Linear(7, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.large(self.a(x).relu()), self.small(self.b(x).relu()) * 1e-12


def test_each_output_is_compared_by_its_own_size() -> None:
    axes = dense(("a", "a", None), ("b", "b", None), ("large", None, "a"), ("small", None, "b"))
    assert len(prove(Two(), axes).groups) == 2
    refused(r"changes its outputs \(groups b\)", Two(), {**axes, "b.bias": (None,)})


def test_an_output_that_is_only_rounding_does_not_refuse() -> None:
    class Cancels(Mlp):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            h = self.layers[0](x).relu()
            return y, h.sum(-1) - h.flip(-1).sum(-1) + 0 * y.sum(-1)

    axes = dense(("layers.0", "h", None), ("layers.1", None, "h"))
    assert len(prove(Cancels(6, 50, 3), axes).groups) == 1


class Gate(nn.Module):
    """A branch that a factor of 0 switches off."""

    def __init__(self, *, persistent: bool):
        super().__init__()
        self.stem, self.branch, self.out = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.register_buffer("gate", torch.zeros(1), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.out(x + self.gate * self.branch(x))


def test_what_a_gate_of_zero_hides_is_seen_or_not_proven() -> None:
    axes = dense(("stem", "h", None), ("branch", "h", "h"), ("out", None, "h"))
    wrong = {**axes, "branch.weight": ("h", None)}
    assert len(prove(Gate(persistent=True), axes).groups) == 1
    refused("changes its outputs", Gate(persistent=True), wrong)
    for one in (axes, wrong):
        refused("cannot be proven.*'branch.weight'", Gate(persistent=False), one)
    derived = derive_symmetry(Gate(persistent=False), X)  # the derivation is the proof
    assert [g.size for g in derived.groups] == [7]


def test_parameters_of_training_alone_stay_in_place() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.out, self.extra = nn.Linear(6, 7), nn.Linear(7, 3), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            return self.out(x) + self.extra(x) if self.training else self.out(x)

    axes = dense(("stem", "h", None), ("out", None, "h"))
    message = "cannot be proven.*'h' in axis 1 of 'extra.weight'.*None for the axes"
    refused(message, Auxiliary(), axes | dense(("extra", None, "h")))
    assert len(prove(Auxiliary(), axes | dense(("extra", None, None))).groups) == 1  # as it is told to
    derived = derive_symmetry(Auxiliary(), X)
    assert "extra.weight" not in {m.tensor for g in derived.groups for m in g.members}


def test_groups_of_two_units_move() -> None:
    """A random permutation of two units is none half of the time."""
    model = Deep(2, F.relu, width=2)
    axes = model.axes()
    for seed in range(6):
        symmetry = prove(model, axes)
        verify_symmetry(model, symmetry, X, seed)
        wrong = PermutationSpec({**axes, "layers.0.bias": (None,)}).symmetry(model, X, verify=False)
        with pytest.raises(FastarError, match="changes its outputs"):
            verify_symmetry(model, wrong, X, seed)


@pytest.mark.parametrize("prover", ["spec", "derived"])
def test_a_forward_that_draws_random_numbers_is_refused_and_draws_none_of_ours(prover: str) -> None:
    class Dropout(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](F.dropout(self.layers[0](x).relu(), 0.5))

    model, before = Dropout(6, 7, 3), torch.get_rng_state()
    axes = dense(("layers.0", "h", None), ("layers.1", None, "h"))
    call = {"spec": lambda: prove(model, axes), "derived": lambda: derive_symmetry(model, X)}[prover]
    with pytest.raises(FastarError, match=r"random|dropout|rand") as why:
        call()
    assert "\n" not in str(why.value)
    assert "self.training" in str(why.value)
    if prover == "spec":
        assert "draws random numbers in evaluation mode" in str(why.value)
        assert torch.equal(before, torch.get_rng_state())


def test_a_model_without_floating_outputs_is_refused() -> None:
    class Classes(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    refused(
        "none of its outputs is a tensor of floating-point numbers",
        Classes(6, 7, 3),
        dense(("layers.0", "h", None), ("layers.1", None, "h")),
    )
