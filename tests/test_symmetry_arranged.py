"""Units at places that no run of one axis describes: read so that it does, moved, matched, and put back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matching_calls import match_one, match_weights, objective, stacked
from matching_models import random_state
from torch import Tensor, nn
from torch.nn import functional as F
from within_models import both as _both
from within_models import deep_experts, grouped, hyper, shared_keys, written

from fastar.config import MatchingSettings, SinkhornSettings
from fastar.errors import FastarError
from fastar.flat import FlatLayout
from fastar.matching import Examples, match, match_many
from fastar.matching.activation.record import Observer
from fastar.matching.weight.match_weights import bytes_of_one
from fastar.symmetry import Arrangement, Group, Member, Symmetry, cache, check_ties, verify_symmetry
from fastar.symmetry.random_network import RandomNetwork
from fastar.training import SourcesStore, match_store

STREAM, HEADS, INSIDE = 6, 3, 4
WIDE = HEADS * INSIDE
SHUFFLED = (3, 9, 0, 7, 4, 11, 1, 2, 10, 5, 8, 6)
MIXED = (8, 2, 0, 5, 7, 1, 10, 4, 9, 3, 6)
EXPERTS, OF_EACH = 3, 5


class Fused(nn.Module):
    """Attention whose queries, keys and values of one head lie after each other, as in GPT-NeoX."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv = nn.Linear(5, STREAM), nn.Linear(STREAM, 3 * WIDE)
        self.project, self.readout = nn.Linear(WIDE, STREAM), nn.Linear(STREAM, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        q, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, INSIDE)).movedim(-2, 0).transpose(2, 3).unbind()
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.readout((x + self.project(y)).mean(1))


class Shuffled(nn.Module):
    """Channels of one convolution, five of which are read by another, and the others by what reads its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.next = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(5, 4, 2)
        self.readout = nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        some, others = torch.tanh(self.norm(self.conv(x)))[:, list(SHUFFLED)].split([5, 7], 1)
        both = torch.cat([torch.tanh(self.next(some)).mean((2, 3)), others.mean((2, 3))], 1)
        return self.readout(both[:, list(MIXED)])


class Experts(nn.Module):
    """Stacked experts, each with hidden units of its own, weighted by a gate; products by bmm or by einsum."""

    def __init__(self, by_einsum: bool = False) -> None:
        super().__init__()
        self.by_einsum = by_einsum
        self.stem, self.gate, self.readout = nn.Linear(5, STREAM), nn.Linear(STREAM, EXPERTS), nn.Linear(STREAM, 4)
        self.first = nn.Parameter(torch.zeros(EXPERTS, STREAM, OF_EACH))
        self.shift = nn.Parameter(torch.zeros(EXPERTS, 1, OF_EACH))
        self.second = nn.Parameter(torch.zeros(EXPERTS, OF_EACH, STREAM))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        if self.by_einsum:
            hidden = torch.tanh(torch.einsum("...d,edf->e...f", x, self.first) + self.shift)
            made = torch.einsum("efd,ebf->ebd", self.second, hidden)
        else:
            hidden = torch.tanh(torch.bmm(x.expand(EXPERTS, *x.shape), self.first) + self.shift)
            made = torch.bmm(hidden, self.second)
        return self.readout(torch.einsum("be,ebd->bd", torch.sigmoid(self.gate(x)), made))


def both(name: str, offset: int = 0) -> tuple[Member, ...]:
    return tuple(replace(member, offset=offset) for member in _both(name))


def fused() -> tuple[nn.Module, Symmetry, Tensor]:
    order = torch.arange(3 * WIDE).view(HEADS, 3, INSIDE).transpose(0, 1).flatten().tolist()
    model = Fused()
    stream = (*both("stem"), Member("qkv.weight", 1), *both("project"), Member("readout.weight", 1))
    groups = (
        Group("stream", STREAM, stream),
        Group("heads", HEADS, ()),
        Group("query", WIDE, (*both("qkv"), *both("qkv", WIDE)), "heads"),
        Group("value", WIDE, (*both("qkv", 2 * WIDE), Member("project.weight", 1)), "heads"),
    )
    arranged = {
        "qkv.weight": Arrangement(((0,), (1,)), {0: tuple(order)}),
        "qkv.bias": Arrangement(((0,),), {0: tuple(order)}),
    }
    return model, written(model, groups, arranged), torch.zeros(2, 7, 5)


def shuffled() -> tuple[nn.Module, Symmetry, Tensor]:
    model = Shuffled()
    vectors = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "conv.bias")

    def made(offset: int) -> tuple[Member, ...]:
        return tuple(Member(name, 0, offset=offset) for name in ("conv.weight", *vectors))

    back = tuple(sorted(range(11), key=MIXED.__getitem__))
    groups = (
        Group("some", 5, (*made(0), Member("next.weight", 1))),
        Group("others", 7, (*made(5), Member("readout.weight", 1, offset=4))),
        Group("next", 4, (*both("next"), Member("readout.weight", 1))),
    )
    arranged = {
        "conv.weight": Arrangement(((0,), (1,), (2,), (3,)), {0: SHUFFLED}),
        "readout.weight": Arrangement(((0,), (1,)), {1: back}),
        **{name: Arrangement(((0,),), {0: SHUFFLED}) for name in vectors},
    }
    return model, written(model, groups, arranged), torch.zeros(2, 3, 6, 6)


def experts(by_einsum: bool = False) -> tuple[nn.Module, Symmetry, Tensor]:
    model = Experts(by_einsum)
    groups = (
        Group("stream", STREAM, (*both("stem"), Member("first", 1), Member("gate.weight", 1))),
        Group("experts", EXPERTS, both("gate")),
        Group("hidden", EXPERTS * OF_EACH, (Member("first", 0), Member("shift", 0), Member("second", 0)), "experts"),
        Group("out", STREAM, (Member("second", 1), Member("readout.weight", 1))),
    )
    arranged = {
        "first": Arrangement(((0, 2), (1,)), {}),
        "shift": Arrangement(((0, 1, 2),), {}),
        "second": Arrangement(((0, 1), (2,)), {}),
    }
    return model, written(model, groups, arranged), torch.zeros(2, 5)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Symmetry, Tensor]]] = {
    "fused": fused,
    "shuffled": shuffled,
    "experts": experts,
    "experts_einsum": lambda: experts(by_einsum=True),
}
MERGED = pytest.mark.parametrize("name", list(NETWORKS))
NETWORKS |= {"grouped": grouped, "deep_experts": deep_experts, "shared_keys": shared_keys, "hyper": hyper}
EVERY = pytest.mark.parametrize("name", list(NETWORKS))


def examples_of(model: nn.Module, example: Tensor) -> Examples:
    """256 inputs of a network."""
    return Examples(model, [(torch.randn(256, *example.shape[1:], generator=torch.Generator().manual_seed(0)), None)])


@EVERY
def test_a_permuted_network_is_the_same_function(name: str) -> None:
    model, symmetry, example = NETWORKS[name]()
    trial = RandomNetwork(model, (example,), 0)
    state = trial.state(1.4)
    (expected,) = trial.outputs(state)
    for seed in range(5):
        moved = symmetry.apply(symmetry.random(seed), state)
        assert all((moved[n] != state[n]).any() for n in symmetry.arranged)
        (found,) = trial.outputs(moved)
        assert float((found - expected).abs().max()) < 1e-10 * float(expected.abs().max())
    verify_symmetry(model, symmetry, (example,))  # each site by itself does change it


@MERGED
def test_another_arrangement_is_another_function(name: str) -> None:
    """Negative controls: positions or axes in another order; and none."""
    model, symmetry, example = NETWORKS[name]()
    state = model.state_dict()

    def other(tensor: str, one: Arrangement) -> Arrangement:
        if not one.orders:
            return replace(one, axes=(one.axes[0][::-1], *one.axes[1:]))  # units of one expert are taken for others'
        return replace(one, orders={axis: order[1:] + order[:1] for axis, order in one.orders.items()})

    for tensor, one in symmetry.arranged.items():
        if state[tensor].ndim > 1:
            wrong = replace(symmetry, arranged={**symmetry.arranged, tensor: other(tensor, one)})
            with pytest.raises(FastarError, match="changes its outputs"):
                verify_symmetry(model, wrong, (example,))


def test_experts_move_as_when_it_is_written_out() -> None:
    model, symmetry, _ = experts()
    state = random_state(model, 0)
    permutations = symmetry.random(3)
    sigma, tau = permutations["experts"], permutations["hidden"].view(EXPERTS, OF_EACH) % OF_EACH
    moved = symmetry.apply(permutations, state)
    for e in range(EXPERTS):
        first, second = (state[n][sigma[e]] for n in ("first", "second"))
        assert torch.equal(moved["first"][e], first[permutations["stream"]][:, tau[e]])
        assert torch.equal(moved["second"][e], second[tau[e]][:, permutations["out"]])
        assert torch.equal(moved["shift"][e], state["shift"][sigma[e]][:, tau[e]])
    assert torch.equal(moved["gate.bias"], state["gate.bias"][sigma])


@EVERY
def test_a_shuffled_copy_comes_back_by_every_method(name: str) -> None:
    model, symmetry, example = NETWORKS[name]()
    theta = random_state(model, 100)
    shuffles = symmetry.random(4, count=2)
    copies = [symmetry.apply(shuffles.select(n), theta) for n in range(2)]
    sources = stacked(symmetry, copies)
    before = {n: t.clone() for n, t in sources.items()}
    ways: list[dict[str, Any]] = [
        {},
        {"chunk": 1, "perturbations": 1},
        {"start": "activations"},
        {"method": "activation"},
        {"method": "sinkhorn", "sinkhorn": SinkhornSettings(steps=20)},
    ]
    for way in ways:
        result = match(MatchingSettings(**way), symmetry, theta, sources, examples=lambda: examples_of(model, example))
        assert result.left == (), way
        assert result.permutations == shuffles.inverse(), way
        for n, one in enumerate(copies):
            back = symmetry.apply(result.permutations.select(n), one)
            assert all(torch.equal(back[key], theta[key]) for key in theta), way
            assert float(result.objective[n]) == pytest.approx(objective(symmetry, theta, theta), rel=1e-6)
            weights = objective(symmetry, theta, theta, weights_only=True)
            assert float(result.objective_weights[n]) == pytest.approx(weights, rel=1e-6)
    assert all(torch.equal(t, before[n]) for n, t in sources.items())


@EVERY
def test_of_other_networks_the_objective_is_what_the_permuted_one_has(name: str) -> None:
    """And higher than without permuting; whatever the number of sources that are matched at once."""
    model, symmetry, _ = NETWORKS[name]()
    theta, states = random_state(model, 100), [random_state(model, seed) for seed in range(3)]
    sources = stacked(symmetry, states)
    result = match_weights(symmetry, theta, sources)
    assert match_weights(symmetry, theta, sources, chunk=1).permutations == result.permutations
    for n, state in enumerate(states):
        permuted = symmetry.apply(result.permutations.select(n), state)
        assert float(result.objective[n]) == pytest.approx(objective(symmetry, theta, permuted), rel=1e-6)
        assert float(result.objective[n]) > objective(symmetry, theta, state)


@EVERY
def test_rows_of_a_store_are_permuted_in_place(name: str) -> None:
    """As many rows at a time as a network's numbers: the largest tensors take several turns."""
    model, symmetry, _ = NETWORKS[name]()
    layout = FlatLayout.from_module(model)
    states = [random_state(model, seed) for seed in range(7)]
    rows = torch.stack([layout.flatten(state) for state in states])
    views, permutations = layout.views(rows), symmetry.random(2, count=7)
    symmetry.apply_rows(permutations, views)
    for n, state in enumerate(states):
        wanted = symmetry.apply(permutations.select(n), state)
        assert all(torch.equal(one[n], wanted[key]) for key, one in views.items())
    symmetry.apply_rows(permutations.inverse(), views)
    assert torch.equal(rows, torch.stack([layout.flatten(state) for state in states]))
    alike = symmetry.random(5)  # one for all, of some of the tensors
    some = {key: views[key] for key in symmetry.arranged if key in views}
    symmetry.apply_rows(alike, some)
    wanted = symmetry.apply(alike, states[6])
    assert all(torch.equal(one[6], wanted[key]) for key, one in some.items())
    (first, *_) = some
    before = rows.clone()
    with pytest.raises(FastarError, match=rf"6 permutations for 7 sources of '{first}': give one each"):
        symmetry.apply_rows(permutations.part(0, 6), some)
    assert torch.equal(rows, before)
    symmetry.apply_rows(symmetry.identity(0), {key: one[:0] for key, one in views.items()})


@EVERY
def test_a_star_s_store_is_matched_in_place(name: str) -> None:
    model, symmetry, _ = NETWORKS[name]()
    layout, theta = FlatLayout.from_module(model), random_state(model, 100)
    copies = [symmetry.apply(symmetry.random(n), theta) for n in range(4)]
    store = SourcesStore(layout, copies, list("abcd"), torch.device("cpu"), store="device")
    centre = layout.flatten(theta)
    with torch.inference_mode():
        match_store(symmetry, centre, store, MatchingSettings(), start=None, seed=0, threads=1)
    assert torch.equal(store.rows, centre.expand(4, -1))


@EVERY
def test_a_set_of_networks_comes_together(name: str) -> None:
    model, symmetry, example = NETWORKS[name]()
    theta = random_state(model, 100)
    copies = [symmetry.apply(symmetry.random(n), theta) for n in range(3)]
    mean = match_many(symmetry, copies)
    assert mean.mean is not None
    for key, value in copies[0].items():
        torch.testing.assert_close(mean.mean[key], value, rtol=1e-6, atol=1e-7)  # the first network stays
    pairs = match_many(
        symmetry,
        copies,
        to="pairwise",
        settings=MatchingSettings(method="activation"),
        examples=lambda: examples_of(model, example),
    )
    for (i, j), found in pairs.pairs.items():
        assert all(torch.equal(value, copies[i][key]) for key, value in symmetry.apply(found, copies[j]).items())


@EVERY
def test_sinkhorn_follows_a_loss_of_the_network_as_it_is(name: str) -> None:
    model, symmetry, example = NETWORKS[name]()
    theta = random_state(model, 100)
    source = symmetry.apply(symmetry.random(1), theta)
    ((inputs, _),) = examples_of(model, example).batches
    settings = MatchingSettings(method="sinkhorn", sinkhorn=SinkhornSettings(objective="mid", steps=3))
    given = Examples(model, [(inputs, torch.zeros(len(inputs), dtype=torch.int64))])
    result = match(settings, symmetry, theta, stacked(symmetry, [source]), examples=lambda: given)
    symmetry.check(result.permutations)


@pytest.mark.gpu
@EVERY
def test_a_gpu_permutes_and_matches_as_the_cpu_does(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, symmetry, example = NETWORKS[name]()
    theta, shuffles = random_state(model, 100), symmetry.random(4, count=5)
    sources = stacked(symmetry, [symmetry.apply(shuffles.select(n), theta) for n in range(5)])
    there, centre = ({key: value.cuda() for key, value in one.items()} for one in (sources, theta))
    ((inputs, _),) = examples_of(model, example).batches
    given = Examples(model, [(inputs.cuda(), None)])
    sinkhorn = {"method": "sinkhorn", "sinkhorn": SinkhornSettings(steps=20)}
    for way in ({}, {"chunk": 2}, {"method": "activation"}, sinkhorn):
        result = match(MatchingSettings(**way), symmetry, centre, there, examples=lambda: given)
        assert result.permutations.to("cpu") == shuffles.inverse(), way
    symmetry.apply_rows(shuffles.inverse(), there)
    assert all(torch.equal(one.cpu(), theta[key].expand_as(one)) for key, one in there.items())


def test_what_copies_take_counts_where_chunks_are_made() -> None:
    symmetry = experts()[1]
    copied = 4 * EXPERTS * OF_EACH * (2 * STREAM + 1)
    assert bytes_of_one(symmetry) == bytes_of_one(replace(symmetry, arranged={})) + copied


def test_channels_last_weights_stay_so() -> None:
    model, symmetry, _ = shuffled()
    state = random_state(model, 0)
    last = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()}
    wanted = symmetry.apply(symmetry.random(1), state)
    found = symmetry.apply(symmetry.random(1), last)
    assert all(torch.equal(value, wanted[key]) for key, value in found.items())
    assert found["conv.weight"].is_contiguous(memory_format=torch.channels_last)
    source = symmetry.apply(symmetry.random(2), last)
    back, _, _ = match_one(symmetry, last, source)
    assert all(torch.equal(value, state[key]) for key, value in back.items())


# What is observed


def test_values_are_seen_along_the_axes_that_are_read() -> None:
    model, symmetry, _ = experts()
    by_einsum = Experts(by_einsum=True)
    state = random_state(model, 0)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    names = {id(tensor): name for name, tensor in state.items()}
    found: list[dict[tuple[str, int, str], Tensor]] = []
    for one in (model, by_einsum):
        seen: dict[tuple[str, int, str], Tensor] = {}

        def keep(name: str, axis: int, kind: str, values: Tensor, seen: dict[Any, Tensor] = seen) -> None:
            seen[name, axis, kind] = values

        with torch.no_grad(), Observer(names, keep, symmetry.arranged):
            torch.func.functional_call(one, state, (x,))
        found.append(seen)
    stream = torch.tanh(F.linear(x, state["stem.weight"], state["stem.bias"]))
    before = torch.stack([stream @ state["first"][e] for e in range(EXPERTS)], 1)  # [batch, experts, units]
    after = before + state["shift"][:, 0]
    wanted = {("first", 0, "made"): before, ("shift", 0, "other"): after, ("second", 0, "read"): torch.tanh(after)}
    for seen in found:
        for key, values in wanted.items():
            torch.testing.assert_close(seen[key], values.flatten(1))
    torch.testing.assert_close(found[1]["first", 1, "read"], stream)


def test_a_pair_of_axes_beside_one_of_length_one() -> None:
    """As GAT's vector for each head, [1, heads, units], which is read with either axis outermost."""
    weight = torch.randn(1, 2, 3)
    for axes, wanted in (((1, 2), lambda y: y.flatten(1)), ((2, 0, 1), lambda y: y.transpose(1, 2).flatten(1))):
        rest = () if 0 in axes else ((0,),)
        arranged = {"weight": Arrangement((*rest, axes), {})}
        seen: dict[int, Tensor] = {}
        with Observer(
            {id(weight): "weight"}, lambda name, axis, kind, values, to=seen: to.update({axis: values}), arranged
        ):
            y = torch.randn(4, 2, 3) * weight
        assert seen.keys() == {len(rest)}
        assert torch.equal(seen[len(rest)], wanted(y))
        assert torch.equal(arranged["weight"].read(weight)[0 if rest else ...], wanted(weight)[0])


def test_nothing_else_is_seen_where_nothing_is_arranged() -> None:
    """Stacks of matrices are no sites by themselves."""
    model = Experts(by_einsum=True)
    seen = set()
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    for one in (model, Experts()):
        one.load_state_dict(model.state_dict())
        names = {id(tensor): name for name, tensor in one.named_parameters()}
        with Observer(names, lambda name, axis, kind, values: seen.add((name, axis))):
            one(torch.randn(3, 5))
    assert {key for key in seen if "." not in key[0]} == {("shift", 0), ("shift", 2)}


# Arrangements


@pytest.mark.parametrize("leading", [0, 1, 2])
@pytest.mark.parametrize(
    ("axes", "orders", "split"),
    [
        (((0,), (1,), (2,)), {}, {}),
        (((0,), (1,), (2,)), {2: (3, 1, 0, 2), 0: (1, 0)}, {}),
        (((0, 2), (1,)), {2: (3, 1, 0, 2)}, {}),
        (((2, 1), (0,)), {}, {}),
        (((2, 0, 1),), {0: (1, 0), 1: (2, 0, 1)}, {}),
        (((0,), (1,), (2,), (3,)), {}, {2: (2, 2)}),
        (((3, 0), (1,), (2,)), {2: (3, 1, 0, 2)}, {2: (2, 2)}),
        (((4, 0), (3, 1), (2,)), {1: (2, 0, 1)}, {1: (3, 1), 2: (2, 2)}),
        (((2,), (3, 1), (0,)), {}, {0: (1, 2)}),
    ],
)
def test_what_is_read_is_written_back(leading: int, axes: Any, orders: Any, split: Any) -> None:
    arrangement = Arrangement(axes, orders, split)
    arrangement.check((2, 3, 4), "it")
    tensor = torch.randn(*(5, 2)[:leading], 2, 3, 4)
    read, before = arrangement.read(tensor, leading), tensor.clone()
    ones = tensor.reshape(-1, 2, 3, 4)
    for k, one in enumerate(read.reshape(-1, *read.shape[leading:])):
        plain = ones[k]
        for axis, order in orders.items():
            plain = torch.stack([plain.select(axis, position) for position in order], axis)
        finer = plain.reshape([part for axis, n in enumerate((2, 3, 4)) for part in split.get(axis, (n,))])
        assert torch.equal(one, finer.permute([axis for group in axes for axis in group]).reshape(one.shape))
        assert list(one.shape) == arrangement.lengths((2, 3, 4))
    assert torch.equal(arrangement.written(read, (2, 3, 4), leading), before)
    other = torch.zeros_like(tensor)
    arrangement.write(read, other, leading)
    assert torch.equal(other, before)
    arrangement.write(read, tensor, leading)  # even where it is a view of it
    assert torch.equal(tensor, before)


def test_gradients_pass_after_a_reading_in_inference_mode() -> None:
    """Whose tensors autograd would not keep, were any cached."""
    arrangement, tensor = Arrangement(((0,),), {0: (4, 2, 0, 3, 1)}), torch.randn(5)
    with torch.inference_mode():
        read = arrangement.read(tensor)
    tensor.requires_grad_()
    read = read.clone()
    (arrangement.written(arrangement.read(tensor), (5,)) * read).sum().backward()
    assert torch.equal(tensor.grad, read)  # type: ignore[arg-type]


def test_networks_without_arrangements_are_read_as_they_are() -> None:
    model, symmetry, _ = fused()
    state = random_state(model, 0)
    plain = replace(symmetry, arranged={})
    assert plain.read(state) is state
    read = symmetry.read(state)
    assert {name for name in state if read[name] is not state[name]} == set(symmetry.arranged)
    assert symmetry.read({"stem.bias": state["stem.bias"]}).keys() == {"stem.bias"}


@EVERY
def test_a_record_holds_arrangements(name: str, tmp_path: Path) -> None:
    symmetry = NETWORKS[name]()[1]
    cache.keep(tmp_path / "one.json", symmetry)
    assert cache.find(tmp_path / "one.json") == symmetry
    assert json.loads(json.dumps(asdict(symmetry)))["arranged"].keys() == symmetry.arranged.keys()


@pytest.mark.parametrize(
    ("tensor", "axes", "more", "message"),
    [
        ("first", ((0, 2),), {}, r"'first': its axes are \[0, 2\], the tensor has 3: name each of them once"),
        ("first", ((0, 2), (1,), (2,)), {}, r"'first': its axes are \[0, 2, 1, 2\], the tensor has 3"),
        ("first", ((0, 2), (3,)), {}, r"'first': its axes are \[0, 2, 3\]"),
        ("first", ((0, 2), (1,)), {"orders": {1: (0, 1, 2, 3, 4, 4)}}, r"'first': its order of axis 1 is no permut"),
        ("first", ((0, 2), (1,)), {"orders": {0: (0, 2)}}, r"order of axis 0 .* the tensor is \[3, 6, 5\]"),
        ("first", ((0, 2), (1,)), {"orders": {3: ()}}, r"'first': its order of axis 3 is no permutation"),
        ("first", ((0,), (1,), (2,), (3,)), {"split": {1: (2, 4)}}, r"splits axis 1 into \[2, 4\].* is \[3, 6, 5\]"),
        ("first", ((0,), (1,), (2,), (3,)), {"split": {1: (-2, -3)}}, r"splits axis 1 into \[-2, -3\]"),
        ("first", ((0,), (1,), (2,), (3,)), {"split": {3: (2, 3)}}, r"splits axis 3"),
        ("first", ((0,), (1,), (2,)), {"split": {1: (2, 3)}}, r"axes are \[0, 1, 2\], the tensor has 4 once they are"),
        ("third", ((0,),), {}, r"'third': there is no such parameter or buffer"),
    ],
)
def test_arrangements_that_cannot_be_are_refused(tensor: str, axes: Any, more: Any, message: str) -> None:
    symmetry = experts()[1]
    with pytest.raises(FastarError, match=message) as why:
        replace(symmetry, arranged={**symmetry.arranged, tensor: Arrangement(axes, **more)})
    assert "\n" not in str(why.value)


def test_tied_tensors_are_arranged_alike() -> None:
    once = Arrangement(((0,), (1,)), {1: (2, 0, 1)})
    shapes = {"one": (2, 3), "two": (2, 3)}
    Symmetry((), shapes, tied={"two": "one"}, arranged={"one": once, "two": once})
    with pytest.raises(FastarError, match="'two': it is one tensor with 'one'; arrange both alike"):
        Symmetry((), shapes, tied={"two": "one"}, arranged={"one": once})


def test_tensors_that_share_memory_are_arranged_alike() -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.zeros(2, 3))
            self.two = nn.Parameter(self.one.data)

    groups = (Group("units", 3, (Member("one", 1), Member("two", 1))),)
    once = Arrangement(((0,), (1,)), {1: (2, 0, 1)})
    shapes = {"one": (2, 3), "two": (2, 3)}
    check_ties(Symmetry(groups, shapes, arranged={"one": once, "two": once}), Sharing(), "model")
    with pytest.raises(FastarError, match="share memory"):
        check_ties(Symmetry(groups, shapes, arranged={"one": once}), Sharing(), "model")


@EVERY
def test_inverse_and_combined_permutations_hold(name: str) -> None:
    model, symmetry, _ = NETWORKS[name]()
    state = random_state(model, 0)
    first, second = symmetry.random(0), symmetry.random(1)
    one = symmetry.apply(second, symmetry.apply(first, state))
    assert all(torch.equal(one[n], t) for n, t in symmetry.apply(first.then(second), state).items())
    back = symmetry.apply(first.inverse(), symmetry.apply(first, state))
    assert all(torch.equal(back[n], t) for n, t in state.items())
