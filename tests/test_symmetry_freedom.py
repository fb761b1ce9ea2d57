"""Hidden units that are free to move, counted by hand, and proven: none is held that could move."""

from __future__ import annotations

import re

import pytest
import torch
from freedom_networks import CASES, IMAGES, TOKENS
from operation_networks import OPERATIONS, PARAMETRISED
from symmetry_checks import comes_back, counted, in_order, keeps_outputs, sizes
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.symmetry import Symmetry, derive_symmetry

EVERY = {**CASES, **OPERATIONS}
# Counted by hand; less is found, and the symmetry says so in a line. Rows and columns of one axis that both move, two
# orders in each block of one parameter, and weights that are chosen by the data.
WAITING = frozenset(
    {"both_parts", "hyper", "mean_of_heads", "one_key_for_all", "one_scale_for_all", "heads_averaged"}
    | {"grouped_queries", "grouped_convolution", "grouped_convolutions", "experts_looked_up"}
)


@pytest.fixture(scope="module")
def derived() -> dict[str, tuple[nn.Module, Symmetry]]:
    return {}


def found(name: str, derived: dict[str, tuple[nn.Module, Symmetry]]) -> tuple[nn.Module, Symmetry]:
    """The network and its symmetry; tracing takes long, so once for all tests."""
    if name not in derived:
        torch.manual_seed(0)
        model = EVERY[name].make().eval()
        derived[name] = model, derive_symmetry(model, EVERY[name].inputs, verify=False)
    return derived[name]


NAMES = [name for name in EVERY if name not in WAITING]


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_those_counted_by_hand(name: str, derived: dict[str, tuple[nn.Module, Symmetry]]) -> None:
    _, symmetry = found(name, derived)
    assert in_order(sizes(symmetry)) == EVERY[name].sizes


@pytest.mark.parametrize("name", sorted(WAITING))
def test_freedom_that_is_missed_is_said(name: str, derived: dict[str, tuple[nn.Module, Symmetry]]) -> None:
    model, symmetry = found(name, derived)
    assert symmetry.frozen
    keeps_outputs(model, symmetry, EVERY[name].inputs)


@pytest.mark.parametrize("name", NAMES)
def test_permuted_network_computes_the_same(name: str, derived: dict[str, tuple[nn.Module, Symmetry]]) -> None:
    model, symmetry = found(name, derived)
    keeps_outputs(model, symmetry, EVERY[name].inputs)


@pytest.mark.parametrize("name", NAMES)
def test_shuffled_copy_comes_back(name: str, derived: dict[str, tuple[nn.Module, Symmetry]]) -> None:
    model, symmetry = found(name, derived)
    comes_back(model, symmetry, EVERY[name].inputs)


# What an output holds


class Shown(nn.Module):
    """A stream of 8 with 7 hidden units; beside the logits it shows `also` of the stream, the last by its name."""

    def __init__(self, also: str):
        super().__init__()
        self.stem, self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 8), nn.Linear(8, 3)
        self.also = also

    def forward(self, x: Tensor) -> object:
        x = self.stem(x)
        x = x + self.down(F.gelu(self.up(x)))
        if self.also == "mean":  # the same in whatever order
            return self.head(x), x.mean(-1)
        if self.also == "named":
            return {"logits": self.head(x), "hidden": x}
        return (self.head(x), x) if self.also == "stream" else self.head(x)


LINES = {
    "stream": r"(stem|down) \(8 units\): held by output 1\b",
    "named": r"(stem|down) \(8 units\): held by output 'hidden'",
    "mean": None,
    "nothing": None,
}


@pytest.mark.parametrize("also", [also for also in LINES if also not in WAITING])
def test_units_that_an_output_shows_are_said(also: str) -> None:
    """The stream would move, were it not shown; what is shown is the order of its units, not their mean."""
    symmetry, line = derive_symmetry(Shown(also), TOKENS), LINES[also]
    assert in_order(sizes(symmetry)) == (counted(8, 7) if line is None else counted(7))
    assert len(symmetry.frozen) == (line is not None)
    assert line is None or re.search(line, symmetry.frozen[0])


# What an operation without a rule holds


class Recognised(nn.Module):
    """Columns of an image as a sequence: 6 and 7 channels, 5 recurrent units, whose spectrum is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 7, 3, padding=1)
        self.layer, self.readout = nn.LSTM(7, 5, batch_first=True), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x)))).mean(2)
        return self.readout(torch.fft.rfft(self.layer(x.transpose(1, 2))[0], dim=-1).abs())


PARTIAL = {"recognised": Recognised}


@pytest.mark.parametrize("name", [name for name in PARTIAL if name not in WAITING])
def test_an_operation_without_a_rule_holds_no_more_than_it_reads(name: str) -> None:
    symmetry = derive_symmetry(PARTIAL[name](), IMAGES, allow_partial=True)
    assert in_order(sizes(symmetry)) == counted(6, 7)
    (line,) = symmetry.frozen
    assert "fft" in line


# Parametrised weights


@pytest.mark.parametrize("name", [name for name in PARAMETRISED if name not in WAITING])
def test_units_move_through_parametrisations(name: str, derived: dict[str, tuple[nn.Module, Symmetry]]) -> None:
    """What a weight is computed from moves, its buffers too: nothing of it is left out."""
    _, symmetry = found(name, derived)
    first = {(m.tensor, m.axis) for m in symmetry.groups[0].members}
    begun = "0.parametrizations.weight"
    if name.startswith("weight_norm"):
        assert {("0.bias", 0), (f"{begun}.original0", 0), (f"{begun}.original1", 0)} <= first
        assert ("2.parametrizations.weight.original1", 1) in first
    else:
        assert {("0.bias", 0), (f"{begun}.original", 0), (f"{begun}.0._u", 0)} <= first
        assert {("2.parametrizations.weight.original", 1), ("2.parametrizations.weight.0._v", 0)} <= first
