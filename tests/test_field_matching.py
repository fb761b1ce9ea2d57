"""Matching by activations where samples move with other units or units do the same; what matching says and takes."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastar
from fastar.config import MatchingSettings
from fastar.errors import FastarError
from fastar.evaluation import Endpoint
from fastar.flat import FlatLayout
from fastar.matching import ActivationCache, Examples, UnitActivations, cache_bytes, match_many
from fastar.matching.activation import statistics
from fastar.runs.model_files import Checkpoint
from fastar.symmetry import Permutations, Symmetry, derive_symmetry
from fastar.training import SourcesStore, match_store
from fastar.training.epochs import Good

CPU = torch.device("cpu")
State = dict[str, Tensor]


class Mixer(nn.Module):
    """Patches; a layer that mixes 16 tokens, channel by channel; and one that mixes 16 channels, token by token."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(2 * layers)])
        self.tokens = nn.ModuleList(
            [nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16)) for _ in range(layers)]
        )
        self.channels = nn.ModuleList(
            [nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(layers)]
        )
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        for n, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            x = x + tokens(self.norms[2 * n](x).mT).mT
            x = x + channels(self.norms[2 * n + 1](x))
        return self.out(x.mean(1))  # type: ignore[no-any-return]


class Both(nn.Module):
    """Each of two groups is read along the other."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = nn.Linear(6, 7), nn.Linear(6, 9)
        self.of_rows, self.of_columns = nn.Linear(7, 4), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.tanh(self.rows(x)[:, :, None] * self.columns(x)[:, None])
        return self.of_rows(table.mT).mean(1) + self.of_columns(table).mean(1)  # type: ignore[no-any-return]


class Beside(nn.Module):
    """Five places that stay and seven hidden ones on one axis, along which the last hidden units are seen alone."""

    def __init__(self) -> None:
        super().__init__()
        self.more, self.hidden, self.out = nn.Linear(5, 7), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.tanh(self.more(x.mT)).mT], 1)
        x = self.out(torch.tanh(self.hidden(x)))
        return x[:, :5].mean(1) + x[:, 5:].square().mean(1)


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide_in, wide in itertools.pairwise(sizes):
        layers += [nn.Linear(wide_in, wide), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def seeded(model: Any, *args: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(*args)


def images(count: int = 512) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def points(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def shuffled(model: nn.Module, inputs: Tensor, seed: int = 0) -> tuple[nn.Module, Symmetry, Permutations]:
    """A shuffled copy, and the way back."""
    symmetry = derive_symmetry(model, (inputs[:2],))
    shuffle, twin = symmetry.random(seed), copy.deepcopy(model)
    twin.load_state_dict(symmetry.apply(shuffle, model.state_dict()))
    return twin, symmetry, shuffle.inverse()


def wrong(found: Permutations, wanted: Permutations) -> dict[str, int]:
    """Of each group, the units in other places than they should be."""
    return {name: int((found[name] != wanted[name]).sum()) for name in wanted}


def by_activations(model: nn.Module, twin: nn.Module, inputs: Tensor) -> fastar.api.Matched:
    labels = torch.zeros(len(inputs), dtype=torch.int64)
    return fastar.match(model, twin, example_inputs=inputs[:2], method="activation", data=(inputs, labels))


# Samples that move with other units


@pytest.mark.parametrize("layers", [1, 2])
def test_a_mixer_s_shuffled_copy_is_recovered(layers: int) -> None:
    """Tokens' hidden units are seen once for each channel, and channels are in other places in the copy."""
    model, inputs = seeded(Mixer, layers), images()
    twin, symmetry, back = shuffled(model, inputs)
    assert {group.size for group in symmetry.groups} == {16, 20, 24}
    found = by_activations(model, twin, inputs)
    assert wrong(found, back) == dict.fromkeys(back, 0)
    assert found.result.left == ()


def test_without_following_the_channels_tokens_are_mispaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: what the count above is worth."""
    model, inputs = seeded(Mixer), images()
    twin, _, back = shuffled(model, inputs)
    monkeypatch.setattr(statistics, "moving_axes", lambda *args: {})
    found = wrong(by_activations(model, twin, inputs), back)
    assert found.pop("tokens.0.0") >= 15
    assert set(found.values()) == {0}


def test_near_copies_are_told_apart_by_all_that_channels_do() -> None:
    """With noise as large as the weights, which an average over channels would not survive."""
    model, inputs = seeded(Mixer), images()
    twin, symmetry, back = shuffled(model, inputs)
    generator = torch.Generator().manual_seed(3)
    near = {k: v + 0.6 * v.std() * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}
    twin.load_state_dict(symmetry.apply(back.inverse(), near))
    assert wrong(by_activations(model, twin, inputs), back) == dict.fromkeys(back, 0)


def test_a_store_of_mixers_is_matched_by_what_was_kept(tmp_path: Any) -> None:
    """As a star does: sources are looked at once, and matched again after they have moved."""
    model, batches = seeded(Mixer), list(images(256).split(128))
    symmetry, theta = derive_symmetry(model, (batches[0][:2],)), model.state_dict()
    sources = [symmetry.apply(symmetry.random(n), theta) for n in range(3)]
    kept = ActivationCache(UnitActivations(model, symmetry, batches, CPU), sources, list("abc"))
    assert cache_bytes(model, symmetry, batches) >= kept.rows[0].nbytes
    layout = FlatLayout.from_module(model)
    store = SourcesStore(layout, sources, list("abc"), CPU, store="file", folder=tmp_path)
    now = symmetry.identity(3)
    for centre in (symmetry.apply(symmetry.random(9), theta), theta):
        moves, _, _ = match_store(
            symmetry,
            layout.flatten(centre),
            store,
            MatchingSettings(method="activation"),
            start=symmetry.identity(),
            seed=0,
            threads=1,
            activations=kept.permuted(now),
        )
        now = now.then(moves)
        for row in store.rows:
            assert torch.equal(row, layout.flatten(centre))
    for n in range(3):
        assert wrong(now.select(n), symmetry.random(n).inverse()) == dict.fromkeys(now, 0)


def test_mixers_of_a_set_are_matched_pairwise_and_to_one() -> None:
    model, inputs = seeded(Mixer), images(256)
    symmetry, theta = derive_symmetry(model, (inputs[:2],)), model.state_dict()
    shuffles = [symmetry.random(n) for n in range(3)]
    states = [symmetry.apply(shuffle, theta) for shuffle in shuffles]
    how: dict[str, Any] = {
        "settings": MatchingSettings(method="activation"),
        "examples": lambda: Examples(model, [(inputs, None)]),
    }
    pairs = match_many(symmetry, states, to="pairwise", **how).pairs
    for (i, j), found in pairs.items():
        assert wrong(found, shuffles[j].inverse().then(shuffles[i])) == dict.fromkeys(found, 0)
    star = match_many(symmetry, states, to="star", centre=theta, **how)
    assert star.permutations is not None
    for n, shuffle in enumerate(shuffles):
        assert wrong(star.permutations.select(n), shuffle.inverse()) == dict.fromkeys(shuffle, 0)


def test_two_groups_that_are_read_along_each_other_are_recovered() -> None:
    """One of the two is matched by what makes it, the other by what it is read as, along the first."""
    model, inputs = seeded(Both), points(400, 6)
    twin, _, back = shuffled(model, inputs)
    found = by_activations(model, twin, inputs)
    assert wrong(found, back) == dict.fromkeys(back, 0)
    assert found.result.left == ()


def test_what_moves_in_a_way_that_is_not_understood_is_left_and_named() -> None:
    model, inputs = seeded(Beside), points(400, 5, 6)
    twin, _, back = shuffled(model, inputs)
    found = by_activations(model, twin, inputs)
    assert found.result.left == ("hidden",)
    assert wrong(found, back)["more"] == 0
    assert torch.equal(found["hidden"], torch.arange(8))
    labels = torch.zeros(400, dtype=torch.int64)
    many = fastar.match_many(
        [twin], to="star", centre=model, example_inputs=inputs[:2], method="activation", data=(inputs, labels)
    )
    assert many.result.left == ("hidden",)


class OfOneSize(nn.Module):
    """Its forward is written for batches of 100."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(x.view(100, 6))))  # type: ignore[no-any-return]


def test_a_forward_may_be_written_for_one_batch_size() -> None:
    model, inputs = seeded(OfOneSize), points(100, 6)
    symmetry, twin = derive_symmetry(model, (inputs,)), copy.deepcopy(model)
    twin.load_state_dict(symmetry.apply(symmetry.random(0), model.state_dict()))
    data = [(inputs, torch.zeros(100, dtype=torch.int64))]
    found = fastar.match(model, twin, example_inputs=inputs, method="activation", data=data)
    assert wrong(found, symmetry.random(0).inverse()) == {"hidden": 0}


# Units that do the same


def test_dead_units_are_told_apart_by_their_weights() -> None:
    """10 of 64 units of each layer never fire."""
    model, inputs = seeded(mlp, 20, 64, 64, 10), points(512, 20)
    with torch.no_grad():
        for layer in (0, 2):
            model[layer].bias[:10] = -100
    twin, _, back = shuffled(model, inputs)
    assert wrong(by_activations(model, twin, inputs), back) == {"0": 0, "2": 0}


def test_units_that_do_the_same_are_told_apart_by_what_reads_them() -> None:
    model, inputs = seeded(mlp, 20, 32, 10), points(512, 20)
    with torch.no_grad():
        model[0].weight[5:10] = model[0].weight[5]
        model[0].bias[5:10] = model[0].bias[5]
    for seed in range(3):
        twin, _, back = shuffled(model, inputs, seed)
        assert wrong(by_activations(model, twin, inputs), back) == {"0": 0}


def test_dead_heads_and_dead_units_of_heads_are_told_apart() -> None:
    """Blocks of which nothing is seen, and units inside blocks, of sources whose activations were kept."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.norm, self.out = nn.Linear(12, 24), nn.GroupNorm(6, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(F.relu(self.norm(self.make(x))))  # type: ignore[no-any-return]

    model, inputs = seeded(Blocks), points(512, 12)
    with torch.no_grad():
        model.norm.bias[:8] = -100  # two blocks of four
        model.norm.bias[[9, 10]] = -100
        model.norm.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    twin, symmetry, back = shuffled(model, inputs)
    assert len(symmetry.trees) == 1
    assert wrong(by_activations(model, twin, inputs), back) == dict.fromkeys(back, 0)


def test_weights_decide_nothing_that_activations_do() -> None:
    """Three dead units in one network, one in the other: of the live ones, those with partners keep them."""
    model, inputs = seeded(mlp, 20, 16, 10), points(512, 20)
    twin, _, back = shuffled(model, inputs)
    with torch.no_grad():
        model[0].bias[:3] = -100
        twin[0].bias[back["0"][0]] = -100
        twin[2].weight.mul_(-5)  # the weights say otherwise throughout
    found = by_activations(model, twin, inputs)
    assert torch.equal(found["0"][3:], back["0"][3:])
    assert sorted(found["0"][:3].tolist()) == sorted(back["0"][:3].tolist())


@pytest.mark.gpu
def test_a_gpu_recovers_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    mixer, dead = seeded(Mixer), seeded(mlp, 20, 64, 10)
    with torch.no_grad():
        dead[0].bias[:10] = -100
    for model, inputs in ((mixer, images()), (dead, points(512, 20))):
        twin, _, back = shuffled(model, inputs)
        found = by_activations(model.to("cuda"), twin.to("cuda"), inputs)
        assert wrong(found.to("cpu"), back) == dict.fromkeys(back, 0)


# What networks and data may be


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_networks_and_data_of_any_precision_are_matched_by_data(dtype: torch.dtype) -> None:
    model, inputs = seeded(mlp, 8, 16, 3).to(dtype), points(200, 8)
    twin, _, back = shuffled(model, inputs.to(dtype))
    data = (inputs, torch.arange(200) % 3)
    for given in (inputs, inputs.to(dtype)):
        found = fastar.match(
            model, twin, example_inputs=inputs[:2].to(dtype), method="activation", data=(given, data[1])
        )
        assert wrong(found, back) == {"0": 0}
    descended = [
        fastar.match(
            model,
            twin,
            example_inputs=inputs[:2].to(dtype),
            method="sinkhorn",
            sinkhorn={"objective": "mid", "steps": 2},
            data=(given, data[1]),
        )
        for given in (inputs.to(dtype), inputs.to(dtype).float())
    ]
    assert descended[0] == descended[1]


@pytest.mark.parametrize("objective", ["l2", "mid"])
def test_sinkhorn_runs_inside_inference_mode(objective: str) -> None:
    model, inputs = seeded(mlp, 8, 6, 3), points(64, 8)
    twin, _, back = shuffled(model, inputs)
    how: dict[str, Any] = {"method": "sinkhorn", "sinkhorn": {"objective": objective, "steps": 30}}
    wanted = fastar.match(model, twin, example_inputs=inputs[:2], data=(inputs, torch.arange(64) % 3), **how)
    with torch.inference_mode():
        made_inside = copy.deepcopy(model)
        data = inputs.clone(), torch.arange(64) % 3
        for one in (model, made_inside):
            found = fastar.match(one, twin, example_inputs=inputs[:2], data=data, **how)
            assert found == wanted
    if objective == "l2":
        assert wrong(wanted, back) == {"0": 0}


class Named(nn.Module):
    """Takes its inputs in a mapping, tokens beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.out = nn.Embedding(9, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, batch: dict[str, Any]) -> Tensor:
        x = batch["x"] + self.table(batch["tokens"][0])
        return self.out(torch.tanh(self.hidden(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("keyword", [False, True])
def test_inputs_may_lie_deeper(keyword: bool) -> None:
    def given(count: int) -> Any:
        inner = {"x": points(count, 8), "tokens": [torch.arange(count) % 9]}
        return {"batch": inner} if keyword else (inner,)

    model = seeded(Named)
    symmetry = derive_symmetry(model, given(2))
    assert [(group.name, group.size) for group in symmetry.groups] == [("hidden", 12)]
    shuffle, twin = symmetry.random(0), copy.deepcopy(model)
    twin.load_state_dict(symmetry.apply(shuffle, model.state_dict()))
    data = [(given(200), torch.zeros(200, dtype=torch.int64))]
    for method in ("weight", "activation"):
        found = fastar.match(model, twin, example_inputs=given(2), method=method, data=data)
        assert wrong(found, shuffle.inverse()) == {"hidden": 0}


class Masked(nn.Module):
    """A value for each hidden unit that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(8, 12), nn.Linear(12, 3)
        self.register_buffer("scale", torch.linspace(-2, 2, 12))
        self.register_buffer("mask", torch.arange(12) % 3 > 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(x) * self.scale) * self.mask)  # type: ignore[no-any-return]


def test_each_network_is_looked_at_with_its_own_values_for_units() -> None:
    model, inputs = seeded(Masked), points(300, 8)
    twin, symmetry, back = shuffled(model, inputs)
    assert {member.tensor for member in symmetry.groups[0].members} >= {"scale", "mask"}
    assert wrong(by_activations(model, twin, inputs), back) == {"hidden": 0}
    data = (inputs, torch.zeros(300, dtype=torch.int64))
    how: dict[str, Any] = {"example_inputs": inputs[:2], "method": "activation", "data": data}
    star = fastar.match_many([twin], to="star", centre=model, **how)
    assert wrong(star.permutations[0], back) == {"hidden": 0}
    pairs = fastar.match_many([model, twin], to="pairwise", **how).result.pairs
    assert wrong(pairs[0, 1], back) == {"hidden": 0}


class Caching(nn.Module):
    """As Hugging Face's do, it returns keys and values unless it is told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True)
        self.key, self.value, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, use_cache: bool | None = None) -> dict[str, Any]:
        key, value = self.key(x), self.value(x)
        found = {"logits": self.out(torch.softmax(x[..., :6] @ key.mT, -1) @ value)}
        if self.config.use_cache if use_cache is None else use_cache:
            found["past_key_values"] = ((key, value),)
        return found


def test_a_network_that_returns_caches_is_traced_without() -> None:
    model, x = seeded(Caching), points(2, 5, 8)
    symmetry = derive_symmetry(model, {"x": x})
    assert [group.name for group in symmetry.groups] == ["value"]
    assert model.config.use_cache is True
    asked = derive_symmetry(model, {"x": x, "use_cache": True})
    assert asked.groups == ()  # whoever asks for outputs has them held


class Cache:
    """As `DynamicCache`: what torch.export knows nothing of."""

    def __init__(self, key: Tensor) -> None:
        self.key = key


def test_outputs_that_are_no_tensors_are_named() -> None:
    class Returns(nn.Sequential):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), Cache(x)

    model = Returns(*seeded(mlp, 8, 6, 3))
    with pytest.raises(
        FastarError, match=r"cannot trace Returns.* returns a Cache, .*: use_cache=False in the example"
    ):
        derive_symmetry(model, (points(2, 8),))


# What is said


def test_sets_are_told_what_methods_that_look_at_data_can_do() -> None:
    """What the refusal advises works."""
    models, inputs = [seeded(mlp, 8, 6, 3) for _ in range(2)], points(64, 8)
    how: dict[str, Any] = {"example_inputs": inputs[:2], "data": (inputs, torch.arange(64) % 3)}
    with pytest.raises(
        FastarError, match=r"not matching\.method=activation.*to=star.*to=pairwise.*method=weight.*start=act"
    ):
        fastar.match_many(models, method="activation", **how)
    with pytest.raises(FastarError, match=r"not matching\.sinkhorn\.objective=mid.*to=star.*method=weight"):
        fastar.match_many(models, method="sinkhorn", sinkhorn={"objective": "mid"}, **how)
    assert fastar.match_many(models, method="activation", to="star", centre=models[0], **how).average is not None
    assert fastar.match_many(models, method="activation", centre=models[0], **how).average is not None
    assert len(fastar.match_many(models, method="activation", to="pairwise", **how).result.pairs) == 1
    assert fastar.match_many(models, method="weight", start="activations", **how).average is not None


def test_reprs_are_short() -> None:
    models, inputs = [seeded(mlp, 8, 60, 3) for _ in range(2)], points(64, 8)
    found = fastar.match(*models, example_inputs=inputs[:2])
    many = fastar.match_many(models, example_inputs=inputs[:2])
    pairs = fastar.match_many(models, example_inputs=inputs[:2], to="pairwise")
    assert repr(found) == "Matched(1 groups, 60 units)"
    assert repr(many.permutations[0]) == "Permutations(1 groups, 60 units)"
    assert repr(found.symmetry) == "Symmetry(1 groups, 60 units, 4 parameters)"
    assert repr(found.result).startswith("MatchResult(1 sources, mean objective ")
    assert repr(pairs.result).startswith("ManyResult(1 pairs, mean objective ")
    assert repr(many).startswith("ManyMatched(ManyResult(2 networks, mean objective ")
    assert repr(many).endswith(", Symmetry(1 groups, 60 units, 4 parameters), average Sequential)")
    checkpoint = Checkpoint(models[0].state_dict(), {"kind": "star"}, Path("a.safetensors"))
    assert repr(checkpoint) == "Checkpoint('a.safetensors', 4 tensors, kind='star')"
    assert repr(Examples(models[0], [(inputs, None)])) == "Examples(Sequential, 1 batches)"
    ends = Endpoint("a", torch.zeros(1000)), Good({"a": torch.zeros(1000)}, 1, 0)
    assert all("tensor" not in repr(one) and len(repr(one)) < 100 for one in (*ends, many.result, found.result))
