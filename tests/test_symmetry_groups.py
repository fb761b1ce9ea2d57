"""Permutation groups derived from a model's graph: which they are, that they are right, and what is refused."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from matching_models import CASES, IMAGES, Grouped, Mlp, ResNet, derived, random_state
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.errors import FastarError
from fastar.flat.state_check import check_state_of
from fastar.symmetry import Group, Member, Permutations, PermutationSpec, Symmetry, derive_symmetry, verify_symmetry


@pytest.fixture(scope="module")
def symmetries() -> dict[str, Symmetry]:
    return derived()


def outputs(model: nn.Module, state: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    double = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    generator = torch.Generator().manual_seed(3)
    x = tuple(torch.randn(i.shape, generator=generator, dtype=torch.float64) for i in inputs)
    with torch.no_grad():
        return torch.func.functional_call(copy.deepcopy(model).eval(), double, x, tie_weights=False)


def rolled(size: int) -> Tensor:
    return torch.arange(size).roll(1)


def test_resnet18_has_twelve_groups(symmetries: dict[str, Symmetry]) -> None:
    symmetry = symmetries["resnet"]
    assert [(g.name, g.size) for g in symmetry.groups] == [
        ("conv1", 6),
        ("layers.0.conv1", 6),
        ("layers.1.conv1", 6),
        ("layers.2.conv1", 8),
        ("layers.2.conv2", 8),
        ("layers.3.conv1", 8),
        ("layers.4.conv1", 10),
        ("layers.4.conv2", 10),
        ("layers.5.conv1", 10),
        ("layers.6.conv1", 12),
        ("layers.6.conv2", 12),
        ("layers.7.conv1", 12),
    ]
    # Everything but the input channels, kernel positions, classes and counters belongs to exactly one group.
    placed = {(m.tensor, m.axis) for g in symmetry.groups for m in g.members}
    assert len(placed) == sum(len(g.members) for g in symmetry.groups)
    expected = set()
    for name, tensor in CASES["resnet"][0].state_dict().items():
        if "num_batches" in name or name == "linear.bias":
            continue
        axes = range(min(tensor.ndim, 2))
        expected |= {(name, a) for a in axes if (name, a) not in {("conv1.weight", 1), ("linear.weight", 0)}}
    assert placed == expected


@pytest.mark.quick
@pytest.mark.parametrize("name", list(CASES))
def test_permuted_network_computes_the_same(name: str, symmetries: dict[str, Symmetry]) -> None:
    """To float64 rounding; a permutation that skips one member of a group changes the outputs (negative control)."""
    model, inputs = CASES[name]
    symmetry = symmetries[name]
    assert symmetry.groups
    state = random_state(model, 1)
    before = {k: (v.clone(), v.stride()) for k, v in state.items()}
    expected = outputs(model, state, inputs)
    permutations = symmetry.random(7)
    permuted = symmetry.apply(permutations, state)
    tolerance = 1e-9 * expected.abs().max()  # float64 rounding is 1e-15 per operation
    assert (outputs(model, permuted, inputs) - expected).abs().max() <= tolerance
    assert not permutations.is_identity()
    for key, (value, stride) in before.items():
        assert torch.equal(state[key], value), f"{key} of the input was changed"
        assert permuted[key].stride() == stride
        assert permuted[key].data_ptr() != state[key].data_ptr()

    tree_of = {symmetry.groups[i].name: tree for tree in symmetry.trees for i in tree}
    for group in symmetry.groups:
        tree = [symmetry.groups[i].name for i in tree_of[group.name]]
        moved = {one: permutations[one] for one in tree} if tree[1:] else {group.name: rolled(group.size)}
        only = Permutations({**symmetry.identity(), **moved})
        for member in {m.tensor: m for m in group.members}.values():
            if member.tensor in symmetry.tied or member.tensor in symmetry.tied.values():
                continue
            missing = replace(group, members=tuple(m for m in group.members if m.tensor != member.tensor))
            broken = replace(symmetry, groups=tuple(missing if g is group else g for g in symmetry.groups))
            change = (outputs(model, broken.apply(only, state), inputs) - expected).abs().max()
            assert change > 1e3 * tolerance, f"{group.name} without {member.tensor} still computes the same"


def test_groups_of_other_layers(symmetries: dict[str, Symmetry]) -> None:
    flatten = symmetries["flatten"]
    assert [(g.name, g.size) for g in flatten.groups] == [("conv", 7), ("hidden", 9)]
    assert Member("hidden.weight", 1, inner=4) in flatten.group("conv").members

    # 4 blocks: 2 channels of the stem, 4 of the depthwise, 3 of the grouped, which alone move inside their block too.
    blocks, inside = symmetries["grouped"].groups
    assert (blocks.size, blocks.parent) == (4, None)
    assert (inside.size, inside.parent) == (12, blocks.name)
    assert {(m.tensor, m.axis, m.inner) for m in blocks.members if m.tensor.endswith("weight")} == {
        ("stem.weight", 0, 2),
        ("depthwise.weight", 0, 4),
    }
    assert {(m.tensor, m.axis) for m in inside.members} == {
        ("grouped.weight", 0),
        ("grouped.bias", 0),
        ("out.weight", 1),
    }
    # 6 channels of 2 against 4 blocks of 3: both halves of 3 channels and 2 blocks change places, whole. Of the blocks
    # of the grouped convolution, the first in each half and the second write channels that move among themselves.
    halves = derive_symmetry(Grouped(6), IMAGES).groups
    assert [(g.size, g.parent is not None) for g in halves] == [(2, False), (6, True), (6, True)]

    # Groups of 2 channels read, of 3 written, move whole; inside them those that are read.
    transposed = symmetries["transposed"]
    assert [(g.size, g.parent is not None) for g in transposed.groups] == [(4, False), (8, True), (7, False)]
    assert Member("whole.weight", 1) in transposed.groups[2].members

    padded = symmetries["zero_padded"]
    assert [(g.name, g.size) for g in padded.groups] == [("stem", 4), ("conv", 2), ("conv#1", 2)]
    assert Member("conv.weight", 0, offset=2) in padded.group("stem").members
    assert Member("out.weight", 1, offset=6) in padded.group("conv#1").members

    dense = symmetries["concatenated"]
    assert [(g.name, g.size) for g in dense.groups] == [("a", 5), ("b", 4)]
    assert Member("norm.running_var", 0, offset=5) in dense.group("b").members
    assert Member("side.weight", 1) in dense.group("b").members

    (both,) = symmetries["two_axes"].groups
    assert {Member("mix.weight", 0), Member("mix.weight", 1)} <= set(both.members)
    assert symmetries["two_axes"].tied == {"again.weight": "readout.weight", "again.bias": "readout.bias"}
    assert {Member("again.weight", 1), Member("readout.weight", 1)} <= set(both.members)


def test_deriving_leaves_the_model_alone() -> None:
    model = ResNet((4, 6), blocks=1).train()
    model.layers[0].bn1.eval()
    state = copy.deepcopy(model.state_dict())
    modes = {name: module.training for name, module in model.named_modules()}
    derive_symmetry(model, (torch.randn(2, 3, 8, 8),))
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Wrapped(nn.Module):
    """A hidden layer, `middle` in between, and a readout."""

    def __init__(self, middle: Callable[[Tensor], Tensor], width: int = 8, out: int = 8):
        super().__init__()
        self.hidden, self.readout, self.middle = nn.Linear(6, width), nn.Linear(out, 3), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.middle(self.hidden(x)))


@pytest.mark.parametrize(
    ("middle", "out", "operation"),
    [
        (lambda h: torch.fft.rfft(h).real, 5, "fft"),
        (lambda h: torch.linalg.svdvals(h)[:, None] * h[:2], 8, "svdvals"),
    ],
)
def test_what_cannot_be_proven_is_refused_by_name(middle: Callable[[Tensor], Tensor], out: int, operation: str) -> None:
    with pytest.raises(FastarError, match=operation) as refused:
        derive_symmetry(Wrapped(middle, out=out), (torch.zeros(2, 6),))
    text = str(refused.value)
    assert "Wrapped" in text
    assert "node " in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("middle", "operation"),
    [
        (lambda h: h.cumsum(1), "cumsum"),
        (lambda h: h.argsort(1).float() * h, "argsort"),
        (lambda h: h.max(1, keepdim=True).indices * h, "mul"),
    ],
)
def test_what_depends_on_the_order_holds_and_is_named(middle: Callable[[Tensor], Tensor], operation: str) -> None:
    symmetry = derive_symmetry(Wrapped(middle), (torch.zeros(2, 6),))
    assert symmetry.groups == ()
    assert any(re.search(rf"hidden \(8 units\): held by aten\.{operation}.*order", line) for line in symmetry.frozen)


@pytest.mark.parametrize(
    ("middle", "groups"),
    [
        (lambda h: F.softmax(h, 1), 1),
        (lambda h: F.layer_norm(h, (8,)), 1),
        (lambda h: h - h.mean(1, keepdim=True), 1),
        (lambda h: h * torch.arange(8.0), 0),  # every unit has a constant of its own: nothing may move
        (lambda h: h * torch.full((8,), 2.0), 1),
        (lambda h: torch.cat([h[:, :3], h[:, 3:]], 1), 2),
        (lambda h: h.view(-1, 8, 1).transpose(1, 2).squeeze(1).relu_(), 1),
        (lambda h: h.clone().mul_(2).add_(h), 1),
        (lambda h: torch.where(h > 0, h, 0.1 * h), 1),
        (lambda h: torch.stack([h, h], 0).sum(0), 1),
        (lambda h: torch.stack([h, h], 1).flatten(1)[:, 4:12], 2),  # each half of the units in a place of its own
        (lambda h: h.select(1, 0)[:, None] + h, 1),  # unit 0 stays
        (lambda h: F.glu(torch.cat([h, h], 1), 1), 1),
        (lambda h: F.rms_norm(h, (8,)), 1),
        (lambda h: F.normalize(h, dim=1), 1),
        (lambda h: h.flip(1), 1),
        (lambda h: h.roll(1, 1), 1),
        (lambda h: torch.cat([h[:, ::2], h[:, 1::2]], 1), 2),  # the even ones and the others
        (lambda h: h.sort(1).values + h.sum(1, keepdim=True), 1),  # sorted, it has no order of its own
    ],
)
def test_other_operations_are_followed(middle: Callable[[Tensor], Tensor], groups: int) -> None:
    symmetry = derive_symmetry(Wrapped(middle), (torch.zeros(2, 6),))  # proves itself
    assert len(symmetry.groups) == groups


@pytest.mark.parametrize("shown", [False, True])
def test_an_output_holds_the_units_that_it_numbers(shown: bool) -> None:
    """The two largest units are put back where they were: all 8 move, unless an output says which two they are."""

    class Largest(Wrapped):
        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            h = self.hidden(x)
            values, indices = h.topk(2, -1)
            out = self.readout(torch.zeros_like(h).scatter(-1, indices, values))
            return (out, indices) if shown else out

    symmetry = derive_symmetry(Largest(torch.relu), (torch.zeros(2, 6),))
    assert [group.size for group in symmetry.groups] == ([] if shown else [8])
    assert any("held by output 1" in line for line in symmetry.frozen) == shown


def test_a_forward_that_cannot_be_traced_is_refused() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(FastarError, match="cannot trace Branch"):
        derive_symmetry(Branch(), (torch.zeros(2, 3),))


@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_with_a_value_for_each_unit_move_if_the_state_has_them(persistent: bool) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.readout = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("mask", torch.arange(1.0, 9.0), persistent=persistent)

        def forward(self, x: Tensor) -> Tensor:
            return self.readout(self.hidden(x) * self.mask)

    symmetry = derive_symmetry(Masked(), (torch.zeros(2, 6),))
    moved = [member.tensor for group in symmetry.groups for member in group.members]
    assert moved == (["hidden.weight", "hidden.bias", "mask", "readout.weight"] if persistent else [])
    assert any("held by buffer 'mask'" in line for line in symmetry.frozen) == (not persistent)


@pytest.mark.quick
def test_verification_finds_a_wrong_group() -> None:
    model, inputs = Mlp(5, 4, 4, 3), (torch.zeros(2, 5),)
    symmetry = derive_symmetry(model, inputs)
    first, second = symmetry.groups
    wrong = Group(first.name, 4, (*first.members[:2], Member("layers.2.weight", 1)))
    with pytest.raises(FastarError, match=r"layers\.0"):
        verify_symmetry(model, replace(symmetry, groups=(wrong, second)), inputs)


def test_verification_is_not_fooled_by_fresh_batch_norms() -> None:
    """A new batch-norm's weights and statistics are all equal, so that forgetting to permute them would not show."""
    model = ResNet((4, 6), blocks=1)
    symmetry = derive_symmetry(model, IMAGES)
    for leaf in ("bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
        forgetful = replace(
            symmetry,
            groups=tuple(replace(g, members=tuple(m for m in g.members if m.tensor != leaf)) for g in symmetry.groups),
        )
        with pytest.raises(FastarError, match="conv1"):
            verify_symmetry(model, forgetful, IMAGES)


def test_states_of_another_architecture_are_refused(symmetries: dict[str, Symmetry]) -> None:
    symmetry, state = symmetries["mlp"], random_state(CASES["mlp"][0], 0)
    identity = symmetry.identity()
    with pytest.raises(FastarError, match=r"lacks parameter 'layers\.1\.bias'"):
        symmetry.apply(identity, {k: v for k, v in state.items() if k != "layers.1.bias"})
    with pytest.raises(FastarError, match=r"shape \[7\]"):
        symmetry.apply(identity, {**state, "layers.0.bias": torch.zeros(7)})
    with pytest.raises(FastarError, match="'extra'"):
        symmetry.apply(identity, {**state, "extra": torch.zeros(7)})
    with pytest.raises(FastarError, match="do not fit"):
        symmetry.apply(symmetries["flatten"].identity(), state)


def test_rows_of_a_store_are_permuted_in_place_like_single_states(symmetries: dict[str, Symmetry]) -> None:
    model, _ = CASES["flatten"]
    symmetry = symmetries["flatten"]
    states = [random_state(model, seed) for seed in range(3)]
    permutations = symmetry.random(4, count=3)
    size = sum(t.numel() for t in states[0].values())
    store = torch.full((3, size + 5), 9.0)
    views, at = {}, 0
    for name, tensor in states[0].items():
        flat = store[:, at : at + tensor.numel()]
        at += tensor.numel()
        if tensor.ndim == 4:
            o, i, h, w = tensor.shape
            views[name] = flat.unflatten(1, (o, h, w, i)).permute(0, 1, 4, 2, 3)
        else:
            views[name] = flat.unflatten(1, tensor.shape) if tensor.ndim else flat[:, 0]
        views[name].copy_(torch.stack([s[name] for s in states]))
    symmetry.apply_rows(permutations, views)
    for n, state in enumerate(states):
        for name, tensor in symmetry.apply(permutations.select(n), state).items():
            assert torch.equal(views[name][n].to(tensor.dtype), tensor), name
    assert (store[:, size:] == 9.0).all()
    with pytest.raises(FastarError, match="2 permutations for 3 sources"):
        symmetry.apply_rows(symmetry.random(4, count=2), views)


def test_permutations_compose_invert_and_survive_saving(symmetries: dict[str, Symmetry]) -> None:
    symmetry = symmetries["flatten"]
    state = random_state(CASES["flatten"][0], 2)
    p, q = symmetry.random(1), symmetry.random(2)
    assert p != q
    assert symmetry.random(1) == p
    once = symmetry.apply(q, symmetry.apply(p, state))
    assert all(torch.equal(t, once[n]) for n, t in symmetry.apply(p.then(q), state).items())
    assert p.then(p.inverse()).is_identity()
    assert not p.is_identity()
    assert Permutations.from_dict(p.as_dict()) == p
    batch = Permutations.stack([p, q])
    assert batch.count == 2
    assert batch.select(1) == q
    assert batch.then(batch.inverse()).is_identity()
    assert p.then(batch.inverse()).select(0).is_identity()
    with pytest.raises(FastarError, match="bijection"):
        Permutations({"conv": torch.tensor([0, 0, 1])})
    with pytest.raises(FastarError, match="int64"):
        Permutations({"conv": torch.tensor([0.0, 1.0])})


class Stateful(nn.Module):
    """Its state dict holds a mapping beside its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.readout = nn.Linear(6, 8), nn.Linear(8, 3)
        self.extra: object = {"version": 1}

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.hidden(x).relu())

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


def test_what_a_state_dict_holds_beside_tensors_is_handed_on() -> None:
    model, inputs = Stateful(), (torch.randn(2, 6),)
    symmetry = derive_symmetry(model, inputs)
    assert [g.size for g in symmetry.groups] == [8]
    assert symmetry.buffers == {}
    verify_symmetry(model, symmetry, inputs)
    axes = {"hidden.weight": ("h", None), "hidden.bias": ("h",), "readout.weight": (None, "h"), "readout.bias": (None,)}
    assert [g.size for g in PermutationSpec(axes).symmetry(model, inputs).groups] == [8]
    other = Stateful()
    other.extra = {"version": 2}
    check_state_of(model, other.state_dict(), "other")
    del other.readout.bias
    with pytest.raises(FastarError, match=r"^other lacks parameter 'readout\.bias'"):
        check_state_of(model, other.state_dict(), "other")
    moved = symmetry.apply(symmetry.random(0), model.state_dict())
    assert moved["_extra_state"] == {"version": 1}
    assert not torch.equal(moved["hidden.weight"], model.hidden.weight)
    twin = Stateful()
    twin.load_state_dict(moved)
    torch.testing.assert_close(twin(*inputs), model(*inputs))
