"""Buffers that move with units or hold them, copies of networks, and two networks that are not one function."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import fastar as command
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fastar
from fastar.errors import FastarError
from fastar.runs import read_metadata
from fastar.runs.model_files import Checkpoint, load_checkpoint, load_into, save_checkpoint
from fastar.symmetry import Symmetry, derive_symmetry, verify_symmetry

X = torch.zeros(2, 6)
Apply = Callable[[Tensor, Tensor], Tensor]


def tensors(symmetry: Symmetry) -> list[list[str]]:
    return [[member.tensor for member in group.members] for group in symmetry.groups]


def draw(model: nn.Module, seed: int) -> nn.Module:
    """`model` with every floating tensor of its state at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
            elif tensor.dtype == torch.bool:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) < 0.5)
    return model.eval()


class Frozen(nn.Module):
    """A batch-norm of which all is buffers, as in object detectors."""

    def __init__(self, channels: int):
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        one, bias, mean, var = (
            getattr(self, name).reshape(1, -1, 1, 1) for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = one * (var + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3), Frozen(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 5, 3, padding=1, bias=False), Frozen(5)
        self.outer, self.outer_norm = nn.Conv2d(5, 6, 3, padding=1, bias=False), Frozen(6)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = x + self.outer_norm(self.outer(torch.relu(self.inner_norm(self.inner(x)))))
        return self.out(x.mean((2, 3)))


class Masked(nn.Module):
    """Two linear layers with a buffer between them."""

    def __init__(self, mask: Tensor, use: Apply = torch.mul, *, persistent: bool = True):
        super().__init__()
        self.a, self.b, self.use = nn.Linear(6, 8), nn.Linear(8, 3), use
        self.register_buffer("mask", mask, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.use(torch.relu(self.a(x)), self.mask))


def test_frozen_batch_norms_move_with_their_channels() -> None:
    a, images = draw(Residual(), 0), torch.randn(3, 3, 6, 6)
    symmetry = derive_symmetry(Residual(), (images,))
    stream = {member.tensor for member in symmetry.group("stem").members}
    assert {group.name: group.size for group in symmetry.groups} == {"stem": 6, "inner": 5}
    assert stream >= {f"{n}_norm.{k}" for n in ("stem", "outer") for k in ("weight", "bias", "running_mean")}
    assert symmetry.frozen == ()
    shuffle = symmetry.random(1)
    b = fastar.apply(shuffle, a, symmetry=symmetry)
    torch.testing.assert_close(b(images), a(images), rtol=1e-4, atol=1e-4)
    matched = fastar.match(a, b, example_inputs=images)
    back = fastar.apply(matched, b).state_dict()
    assert all(torch.equal(value, back[name]) for name, value in a.state_dict().items())


@pytest.mark.slow
def test_twelve_groups_of_resnet18_with_frozen_batch_norms() -> None:
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    import symmetry_table  # which gets by the wheel that the CPU build does not fit

    symmetry_table.import_torchvision()
    from torchvision.models import resnet18

    symmetry = derive_symmetry(resnet18(norm_layer=Frozen), (torch.zeros(1, 3, 64, 64),))
    assert (len(symmetry.groups), sum(group.size for group in symmetry.groups)) == (12, 2880)


@pytest.mark.parametrize(
    ("mask", "use"),
    [
        (torch.ones(8), torch.mul),
        (torch.ones(1, 8), lambda h, m: h * m.expand_as(h)),
        (torch.ones(8, dtype=torch.bool), torch.mul),
        (torch.zeros(8, dtype=torch.bool), lambda h, m: h.masked_fill(m, 0.5)),
    ],
)
def test_a_mask_moves_with_its_units(mask: Tensor, use: Apply) -> None:
    a = draw(Masked(mask.clone(), use), 0)
    matched = fastar.match(a, a, example_inputs=X)
    assert tensors(matched.symmetry) == [["a.weight", "a.bias", "mask", "b.weight"]]
    b = fastar.apply(matched.symmetry.random(2), a, symmetry=matched.symmetry)
    assert not torch.equal(b.state_dict()["mask"], a.state_dict()["mask"])
    x = torch.randn(5, 6)
    torch.testing.assert_close(b(x), a(x))
    back = fastar.apply(fastar.match(a, b, example_inputs=X), b).state_dict()
    assert all(torch.equal(value, back[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("mask", [torch.ones(8), torch.ones(8, dtype=torch.bool)])
def test_the_proof_sees_a_buffer_that_is_left_out(mask: Tensor) -> None:
    """Its values are all alike, so that only other ones show it."""
    model = Masked(mask)
    symmetry = derive_symmetry(model, (X,))
    (group,) = symmetry.groups
    kept = replace(group, members=tuple(member for member in group.members if member.tensor != "mask"))
    with pytest.raises(FastarError, match=r"changes its outputs .groups a."):
        verify_symmetry(model, replace(symmetry, groups=(kept,)), (X,), controls=False)


class Constant(Masked):
    def __init__(self) -> None:
        super().__init__(torch.ones(()))
        self.scale = torch.rand(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) * self.scale)


class Positions(nn.Module):
    """A table of positions, which all networks of the architecture have in common, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.out = (nn.Linear(n, m) for n, m in ((6, 8), (8, 9), (9, 8), (8, 3)))
        self.register_buffer("table", torch.randn(4, 8))
        self.register_buffer("causal", torch.ones(4, 4, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.table
        scores = (x @ x.transpose(1, 2)).masked_fill(~self.causal, float("-inf"))
        x = x + torch.softmax(scores, -1) @ x
        return self.out(x + self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize(
    ("model", "inputs", "groups", "line"),
    [
        (Masked(torch.rand(8), persistent=False), X, [], r"^a \(8 units\): held by buffer 'mask'.*persistent=False"),
        (Constant(), X, [], "held by attribute 'scale', which is not in the state dict"),
        (Masked(torch.arange(8)), X, [], r"^a \(8 units\): held by buffer 'mask'$"),
        (Masked(torch.rand(8), lambda h, m: h * m.cumsum(0)), X, [], r"held by aten\.cumsum.*depends on the order"),
        (Masked(torch.rand(8), lambda h, m: h * m.sort().values), X, [], r"held by aten\.sort.*sorted values stay"),
        (
            Masked(torch.rand(8), lambda h, m: h * torch.fft.ifft(m).real),
            X,
            [],
            r"held by aten\.view_as_real.*unknown operation",
        ),
        (Masked(torch.rand(8), lambda h, m: h @ (m[:, None] * m)), X, [], "held by buffer 'mask'"),
        (Positions(), torch.zeros(2, 4, 6), ["up"], r"^embed \(8 units\): held by buffer 'table'$"),
    ],
)
def test_what_holds_units_is_named(model: nn.Module, inputs: Tensor, groups: list[str], line: str) -> None:
    """Tables, frequencies and indices stay; where an operation refuses a moving buffer, it stays as before."""
    matched = fastar.match(draw(model, 0), model, example_inputs=inputs)
    assert list(matched) == groups
    assert any(re.search(line, said) for said in matched.symmetry.frozen), matched.symmetry.frozen


class Turned(nn.Module):
    """Queries and keys turned by frequencies that are a buffer with one value for each pair of units."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.5, 0.2, 0.1]))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], dtype=self.inv_freq.dtype)[:, None] * self.inv_freq
        cos, sin = (torch.cat([turn, turn], 1) for turn in (angles.cos(), angles.sin()))

        def turned(y: Tensor) -> Tensor:
            return y * cos + torch.cat([-y[..., 4:], y[..., :4]], -1) * sin

        q, k = turned(self.q(x)), turned(self.k(x))
        return self.out(torch.softmax(q @ k.transpose(1, 2), -1) @ self.v(x))


def test_frequencies_of_rotary_embeddings_stay() -> None:
    symmetry = derive_symmetry(Turned(), (torch.zeros(2, 5, 8),))
    assert tensors(symmetry) == [["v.weight", "v.bias", "out.weight"]]
    assert any("inv_freq" in line for line in symmetry.frozen)


def test_a_buffer_under_two_names_moves_under_both_and_memory_that_is_shared_in_part_stays() -> None:
    class Shared(Masked):
        def __init__(self, part: slice) -> None:
            super().__init__(torch.rand(8))
            self.other = nn.Module()
            self.other.register_buffer("mask", self.mask if part == slice(None) else self.mask[part])

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.other.mask.sum()

    whole = derive_symmetry(Shared(slice(None)), (X,))
    assert tensors(whole) == [["a.weight", "a.bias", "mask", "other.mask", "b.weight"]]
    assert derive_symmetry(Shared(slice(0, 4)), (X,)).groups == ()
    apart = Shared(slice(4, 8))
    apart.other.mask = apart.mask[4:].clone()
    assert len(derive_symmetry(apart, (X,)).groups) == 1  # a graph alone does not say whether memory is shared
    assert derive_symmetry(Shared(slice(4, 8)), (X,)).groups == ()
    apart, b = Shared(slice(None)), Shared(slice(None))
    apart.other.mask = apart.mask.clone()
    with pytest.raises(FastarError, match=r"'other\.mask' and 'mask' are one tensor"):
        fastar.match(apart, b, example_inputs=X)


def test_buffers_alone_are_no_group() -> None:
    model = Masked(torch.rand(7), lambda h, m: h * m.sum())
    assert tensors(derive_symmetry(model, (X,))) == [["a.weight", "a.bias", "b.weight"]]


def build_masked(persistent: bool) -> str:
    return f"""
import torch
from torch import nn


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("mask", torch.linspace(1, 2, 8), persistent={persistent})

    def forward(self, x):
        return self.b(torch.relu(self.a(x)) * self.mask)


def build():
    return Masked()
"""


@pytest.mark.parametrize("persistent", [True, False])
def test_commands_move_buffers_and_say_what_is_held(
    persistent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"field_masked_{persistent}".lower()
    (tmp_path / f"{name}.py").write_text(build_masked(persistent))
    monkeypatch.syspath_prepend(str(tmp_path))
    network = importlib.import_module(name).build
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for seed, file in enumerate(files):
        save_checkpoint(file, draw(network(), seed).state_dict(), {})
    options = ("--model", f"{name}:build", "--input-shape", "2x6")
    done = command("match", *files, *options, "--out", tmp_path / "c.safetensors")
    many = command("match-many", *files, *options)
    assert (done.code, many.code) == (0, 0), (done, many)
    held = "left: a (8 units): held by buffer 'mask', which is not in the state dict (persistent=False)"
    if not persistent:
        assert "groups:     none: no hidden units are permuted\n" in done.out
        assert held.replace(" ", "       ", 1) in done.out
        assert f"groups: none: no hidden units are permuted\n{held}\n" in many.out
        return
    assert "groups:     a (8)" in done.out
    assert "held by" not in done.out + many.out
    written, given = network(), network()
    for model, file in ((written, tmp_path / "c.safetensors"), (given, files[1])):
        load_into(model, load_checkpoint(file))
    x = torch.randn(4, 6)
    torch.testing.assert_close(written(x), given(x))
    assert not torch.equal(written.mask, given.mask)
    assert read_metadata(tmp_path / "c.safetensors")["matched_to"] == "a.safetensors"


class Versioned(nn.Linear):
    """Loads only what says of which version it is, as torchvision's MNASNet."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError(f"version {local_metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


def test_versions_of_modules_are_kept() -> None:
    def network() -> nn.Module:
        return nn.Sequential(Versioned(6, 8), nn.ReLU(), Versioned(8, 3))

    a, b, x = network(), network(), torch.randn(5, 6)
    matched = fastar.match(a, b, example_inputs=X)
    torch.testing.assert_close(fastar.apply(matched, b)(x), b(x))
    assert matched.symmetry.apply(matched, b.state_dict())._metadata == b.state_dict()._metadata  # type: ignore[attr-defined]
    assert fastar.match_many([a, b], example_inputs=X).average is not None
    load_into(a, Checkpoint(dict(b.state_dict()), {}))  # a file has none
    torch.testing.assert_close(a(x), b(x))


class Caching(nn.Module):
    """A bias of heads that is looked up once in evaluation mode, and dropped when training begins."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 3 * 8), nn.Linear(8, 3)
        self.biases = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("at", torch.tensor([[0, 1, 2], [1, 0, 1], [2, 1, 0]]), persistent=False)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Caching:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            bias = self.biases[:, self.at]
        else:
            if "cpu" not in self.cache:
                self.cache["cpu"] = self.biases[:, self.at]
            bias = self.cache["cpu"]
        q, k, v = (y.unflatten(-1, (4, 2)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = torch.softmax(q @ k.transpose(2, 3) + bias, -1) @ v
        return self.out(y.transpose(1, 2).flatten(2)).mean(1)


TOKENS = torch.randn(7, 3, 6, generator=torch.Generator().manual_seed(0))


def test_caches_of_evaluation_mode_are_not_copied() -> None:
    """Heads move, though both networks have been evaluated before: their caches are of the old order."""
    a, b = draw(Caching(), 0), draw(Caching(), 1)
    with torch.no_grad():
        before = [model(TOKENS) for model in (a, b)]
    matched = fastar.match(a, b, example_inputs=TOKENS[:2])
    heads = next(group for group in matched.symmetry.groups if any(m.tensor == "biases" for m in group.members))
    assert heads.size == 4
    assert not matched.is_identity()
    nearer = fastar.apply(matched.symmetry.random(1), b, symmetry=matched.symmetry)
    torch.testing.assert_close(nearer(TOKENS), before[1], rtol=1e-5, atol=1e-6)
    assert not nearer.training
    assert [list(model.cache) for model in (a, b)] == [["cpu"]] * 2  # type: ignore[arg-type]
    data = [(TOKENS, torch.zeros(7, dtype=torch.int64))]
    by_activations = fastar.match(a, nearer, example_inputs=TOKENS[:2], method="activation", data=data)
    torch.testing.assert_close(fastar.apply(by_activations, nearer)(TOKENS), before[1], rtol=1e-5, atol=1e-6)


def test_each_point_of_a_path_computes_its_own_caches() -> None:
    a, b, labels = draw(Caching(), 0), draw(Caching(), 1), torch.arange(7) % 3
    found = fastar.barrier(a, b, [(TOKENS, labels)], points=3)
    middle = fastar.apply(fastar.match(a, a, example_inputs=TOKENS[:2]), a)
    with torch.no_grad():
        for mine, one, two in zip(middle.parameters(), a.parameters(), b.parameters(), strict=True):
            mine.copy_((one + two) / 2)
    losses = [float(F.cross_entropy(model(TOKENS), labels)) for model in (a, middle, b)]
    assert found.loss == pytest.approx(losses, rel=1e-5)


class Keeping(nn.Module):
    """Computes its weight once, and never again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.a.weight.t().clone()
        return self.b(torch.relu(x @ self.kept + self.a.bias))


def test_a_cache_that_is_never_dropped_is_named() -> None:
    a, b = Keeping(), Keeping()
    fresh = fastar.match(a, b, example_inputs=X)  # each pass of the proof computes its own
    assert tensors(fresh.symmetry) == [["a.weight", "a.bias", "b.weight"]]
    with torch.no_grad():
        b(X)
    with pytest.raises(
        FastarError, match=r"same weights: 'kept' of the whole is None in model_a and a tensor \[6, 8\]"
    ):
        fastar.match(a, b, example_inputs=X)


class Recording(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.a(x))
        self.seen.append(hidden)
        return self.b(hidden)


def network(act: nn.Module | None = None, eps: float = 1e-5, p: float = 0.1) -> nn.Module:
    norm, middle = nn.BatchNorm1d(8, eps=eps), act or nn.ReLU()
    return nn.Sequential(nn.Linear(6, 8), norm, middle, nn.Dropout(p), nn.Linear(8, 3)).eval()


def changed(change: Callable[[nn.Module], object]) -> nn.Module:
    model = network()
    change(model.get_submodule("0"))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (changed(lambda m: prune.l1_unstructured(m, "weight", 0.3)), r"module '0'.*prune\.remove\(module, 'weight'\)"),
        (changed(lambda m: prune.random_structured(m, "weight", 1, dim=0)), r"prune\.remove\(module, 'weight'\)"),
        (changed(nn.utils.weight_norm), r"module '0'.*nn\.utils\.remove_weight_norm\(module, 'weight'\)"),
    ],
)
def test_computed_weights_are_named_with_what_undoes_them(model: nn.Module, message: str) -> None:
    for call in (
        lambda: fastar.match(model, model, example_inputs=X),
        lambda: derive_symmetry(model, (X,)),
        lambda: fastar.barrier(model, model, [(X, torch.zeros(2, dtype=torch.int64))]),
    ):
        with pytest.raises(FastarError, match=message) as why:
            call()
        assert "\n" not in str(why.value)
    if "prune" in message:
        prune.remove(model.get_submodule("0"), "weight")
        assert len(fastar.match(model, model, example_inputs=X).symmetry.groups) == 1


def test_a_file_of_a_pruned_network_is_named_as_one(tmp_path: Path) -> None:
    model = changed(lambda module: prune.l1_unstructured(module, "weight", 0.3))
    torch.save(model.state_dict(), tmp_path / "pruned.pt")
    with pytest.raises(
        FastarError, match=r"pruned\.pt has '0\.weight_orig' .*utils\.prune\.remove\(module, 'weight'\)"
    ):
        load_into(network(), load_checkpoint(tmp_path / "pruned.pt"))
    with pytest.raises(FastarError, match=r"prune\.remove\(module, 'weight'\)"):
        fastar.match(network(), model, example_inputs=X)


@pytest.mark.parametrize("grad", [True, False])
def test_kept_activations_do_no_harm(grad: bool) -> None:
    a, b = (nn.Sequential(Recording(), nn.Identity()) for _ in range(2))
    with torch.set_grad_enabled(grad):
        a(X)
    matched = fastar.match(a, b, example_inputs=X)
    assert list(matched) == ["0.a"]
    assert len(fastar.apply(matched, a).get_submodule("0").seen) == 1  # type: ignore[arg-type]
    assert [len(model.get_submodule("0").seen) for model in (a, b)] == [1, 0]  # type: ignore[arg-type]


def test_a_buffer_that_is_computed_is_named() -> None:
    model = network()
    model.get_submodule("2").register_buffer("product", model.get_parameter("0.weight") * 2)
    with pytest.raises(FastarError, match="module '2' has a buffer 'product' that is computed from others: detach it"):
        fastar.match(model, model, example_inputs=X)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (network(nn.Tanh()), "module '2' is ReLU in model_a and Tanh in model_b"),
        (network(eps=1e-3), "'eps' of module '1' is 1e-05 in model_a and 0.001 in model_b"),
        (network(nn.LeakyReLU()), "module '2' is ReLU in model_a and LeakyReLU in model_b"),
    ],
)
def test_networks_that_are_not_one_function_are_refused(other: nn.Module, message: str) -> None:
    a = network()
    with pytest.raises(FastarError, match="compute something else with the same weights") as why:
        fastar.match(a, other, example_inputs=X)
    assert message in str(why.value)
    with pytest.raises(FastarError, match=r"models.0. and models.2. compute"):
        fastar.match_many([a, a, other], example_inputs=X)


def test_differences_that_change_nothing_are_none() -> None:
    class Named(nn.ReLU):
        def __init__(self, function: Apply, name: str):
            super().__init__()
            self.function, self.name = function, name

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x)

    a, b = network(Named(torch.mul, "a")), network(Named(lambda x, y: x * y, "b"), p=0.5)
    b.train()
    b.get_submodule("0").register_forward_hook(lambda module, inputs, output: None)
    assert len(fastar.match(a, b, example_inputs=X).symmetry.groups) == 1


def test_a_path_between_matched_networks_interpolates_buffers_that_moved() -> None:
    """The same frozen statistics in both, in another order after matching: at its ends the path is the models."""
    generator = torch.Generator().manual_seed(0)
    frozen = {name: value + torch.rand(8, generator=generator) for name, value in Frozen(8).state_dict().items()}
    a, b = (with_frozen(seed, frozen) for seed in (0, 1))
    inputs, labels = torch.randn(32, 3, 8, 8, generator=generator), torch.arange(32) % 4
    matched = fastar.match(a, b, example_inputs=torch.zeros(1, 3, 8, 8))
    nearer = fastar.apply(matched, b)
    assert not torch.equal(nearer[1].running_var, b[1].running_var)
    measured = fastar.barrier(a, nearer, [(inputs, labels)], points=3)
    halfway = with_frozen(0, frozen)
    halfway.load_state_dict({n: (v + nearer.state_dict()[n]) / 2 for n, v in a.state_dict().items()})
    for model, loss in zip((a, halfway, b), measured.loss, strict=True):
        wanted = torch.nn.functional.cross_entropy(model(inputs), labels).item()
        assert loss == pytest.approx(wanted, rel=1e-5)


def with_frozen(seed: int, statistics: dict[str, torch.Tensor]) -> nn.Sequential:
    torch.manual_seed(seed)
    frozen = Frozen(8)
    frozen.load_state_dict(statistics)
    return nn.Sequential(nn.Conv2d(3, 8, 3), frozen, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
