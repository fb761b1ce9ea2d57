"""The methods of matching through one interface: activation, sinkhorn and none (weight has files of its own)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_cases import fastar, refused, tiny
from matching_block_models import BLOCK_MODELS
from matching_calls import match_activations, match_sinkhorn, match_weights, objective, stacked
from matching_models import CASES, Mlp, ResNet, derived, random_state
from torch import Tensor, nn
from torch.nn import functional as F

from fastar.config import MatchingSettings, SinkhornSettings, load_settings
from fastar.errors import FastarError
from fastar.matching import Examples, match
from fastar.matching.activation.record import Observer
from fastar.matching.sinkhorn import SoftPermutations, sinkhorn
from fastar.symmetry import Group, Member, Permutations, Symmetry, symmetry_by_settings, without_groups

State = dict[str, Tensor]


def case(name: str) -> tuple[nn.Module, Symmetry, Tensor]:
    """A network, its symmetry, and 64 inputs."""
    if name in BLOCK_MODELS:
        model, symmetry, example = BLOCK_MODELS[name]
    else:
        (model, (example,)), symmetry = CASES[name], derived()[name]
    return model, symmetry, torch.randn(64, *example.shape[1:], generator=torch.Generator().manual_seed(0))


EVERY = [*CASES, *BLOCK_MODELS]


# Sinkhorn


@pytest.mark.parametrize("name", EVERY)
def test_hard_matrices_multiply_as_permutations_permute(name: str) -> None:
    """The soft application to parameters is the gather that permutations make, once the matrices are hard."""
    model, symmetry, _ = case(name)
    state = {n: t for n, t in random_state(model, 0).items() if n in symmetry.parameters and n not in symmetry.tied}
    wanted = symmetry.random(3)
    soft = SoftPermutations(symmetry, SinkhornSettings(noise=0.0), torch.device("cpu"), 0)
    with torch.no_grad():
        for group, logits in zip(symmetry.groups, soft.logits.values(), strict=True):
            if group.parent is None:
                logits[torch.arange(group.size), wanted[group.name]] = 100.0
            else:
                size = logits.shape[-1]
                to = wanted[group.name]
                at = torch.arange(group.size)
                logits[at // size, to // size, at % size, to % size] = 100.0
        moved = soft.apply(state)
    assert soft.hard() == wanted
    for tensor_name, value in symmetry.apply(wanted, random_state(model, 0)).items():
        if tensor_name in moved:
            torch.testing.assert_close(moved[tensor_name], value, rtol=1e-6, atol=1e-7, msg=tensor_name)


def test_matrices_are_doubly_stochastic_and_move_whole_blocks() -> None:
    _, symmetry, _ = case("attention")
    soft = SoftPermutations(symmetry, SinkhornSettings(noise=2.0, iterations=50), torch.device("cpu"), 1)
    matrices = soft.matrices()
    for name, matrix in matrices.items():
        assert bool((matrix > 0).all())
        ones = torch.ones(len(matrix))
        torch.testing.assert_close(matrix.sum(0), ones, rtol=0, atol=1e-4, msg=name)  # 50 iterations of noise 2
        torch.testing.assert_close(matrix.sum(1), ones, rtol=0, atol=1e-4, msg=name)
    blocks = matrices["query"].unflatten(0, (3, 4)).unflatten(2, (3, 4)).sum((1, 3)) / 4
    torch.testing.assert_close(blocks, matrices["heads"], rtol=0, atol=1e-4)
    # In logarithms: logits that overflow exp do not matter.
    assert torch.equal(sinkhorn(torch.tensor([[1000.0, 0.0], [0.0, 1000.0]]), 3), torch.eye(2))


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (2, 3, 5, 5)])
@pytest.mark.parametrize("spread", [3.0, 500.0])
def test_scaling_is_normalising_logarithms_in_turn(shape: tuple[int, ...], spread: float) -> None:
    """And so is its gradient; in float64, to its rounding. Logits that float64 could not hold are left as they are."""
    generator = torch.Generator().manual_seed(len(shape))
    logits, weights = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    logits = (spread * logits).requires_grad_()
    wanted_from = logits.detach().clone().requires_grad_()
    plain = wanted_from
    for _ in range(4):
        plain = plain - plain.logsumexp(-1, keepdim=True)
        plain = plain - plain.logsumexp(-2, keepdim=True)
    found = sinkhorn(logits, 4)
    torch.testing.assert_close(found, plain.exp())
    ((found * weights).sum() + (plain.exp() * weights).sum()).backward()
    torch.testing.assert_close(logits.grad, wanted_from.grad)


@pytest.mark.parametrize("name", ["resnet", "attention", "concatenated"])
def test_gradients_reach_all_groups_at_once(name: str) -> None:
    model, symmetry, _ = case(name)
    theta, source = random_state(model, 0), random_state(model, 1)
    soft = SoftPermutations(symmetry, SinkhornSettings(), torch.device("cpu"), 0)
    moved = soft.apply({n: source[n] for n in symmetry.parameters})
    torch.stack([(theta[n] * t).sum() for n, t in moved.items()]).sum().backward()
    for group, logits in zip(symmetry.groups, soft.logits.values(), strict=True):
        assert logits.grad is not None, group.name
        if group.members:
            assert float(logits.grad.abs().max()) > 0, group.name


@pytest.mark.quick
@pytest.mark.parametrize("name", ["mlp", "resnet", "concatenated", "attention", "group_norm_residual", "gated"])
def test_sinkhorn_recovers_a_shuffled_copy(name: str) -> None:
    model, symmetry, _ = case(name)
    theta = random_state(model, 100)
    shuffles = [symmetry.random(seed) for seed in range(1 if name == "resnet" else 2)]
    sources = stacked(symmetry, [symmetry.apply(shuffle, theta) for shuffle in shuffles])
    settings = MatchingSettings(method="sinkhorn", sinkhorn=SinkhornSettings(steps=20))
    result = match(settings, symmetry, theta, sources)
    for n, shuffle in enumerate(shuffles):
        assert result.permutations.select(n) == shuffle.inverse()
        assert result.objective[n] == pytest.approx(objective(symmetry, theta, theta), rel=1e-6)
        assert result.objective_start[n] < result.objective[n]


def test_sinkhorn_is_a_function_of_its_inputs_and_seed() -> None:
    model, symmetry, _ = case("mlp")
    theta, states = random_state(model, 100), [random_state(model, seed) for seed in range(3)]
    sources = stacked(symmetry, states)
    settings = SinkhornSettings(steps=20)
    before = {n: t.clone() for n, t in sources.items()}
    found = match_sinkhorn(symmetry, theta, sources, settings, seed=3)
    torch.manual_seed(1)
    with torch.no_grad():  # as a caller's may be
        again = match_sinkhorn(symmetry, theta, {n: t[1:] for n, t in sources.items()}, settings, seed=3)
    assert again == found.part(1, 3)
    assert all(torch.equal(t, before[n]) for n, t in sources.items())
    # Nothing but the noise of the first logits is drawn: other noise, another way.
    noisy = SinkhornSettings(steps=1, lr=1e-6, noise=5.0)
    one, two = (match_sinkhorn(symmetry, theta, sources, noisy, seed=seed) for seed in (0, 1))
    assert one != two


@pytest.mark.parametrize("name", ["concatenated", "attention"])
def test_sinkhorn_comes_near_weight_matching(name: str) -> None:
    """Networks that are near one another but for noise: both end at the same objective, far above the start."""
    model, symmetry, _ = case(name)
    theta = random_state(model, 100)
    states = [random_state(model, seed) for seed in range(2)]
    noisy = [{n: theta[n] + 0.5 * t if t.is_floating_point() else t for n, t in one.items()} for one in states]
    sources = stacked(symmetry, [symmetry.apply(symmetry.random(n), state) for n, state in enumerate(noisy)])
    weight = match_weights(symmetry, theta, sources)
    settings = MatchingSettings(method="sinkhorn", sinkhorn=SinkhornSettings(steps=60))
    result = match(settings, symmetry, theta, sources)
    assert bool((result.objective > 0.98 * weight.objective).all())
    assert bool((result.objective_start < 0.7 * weight.objective).all())


@pytest.mark.parametrize("wanted", ["mid", "random"])
def test_sinkhorn_descends_on_the_loss_of_the_path(wanted: str) -> None:
    """Of a shuffled copy whose labels are its own answers, the path is flat where the copy is undone."""
    model, symmetry = Mlp(5, 6, 3), None
    symmetry = Symmetry(
        (Group("hidden", 6, (Member("layers.0.weight", 0), Member("layers.0.bias", 0), Member("layers.1.weight", 1))),),
        {n: tuple(p.shape) for n, p in model.named_parameters()},
    )
    theta = {n: 3 * t for n, t in random_state(model, 7).items()}
    inputs = torch.randn(256, 5, generator=torch.Generator().manual_seed(0))

    def answers(state: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = torch.func.functional_call(model, dict(state), (inputs,))
        return out

    labels = answers(theta).argmax(1)
    source = symmetry.apply(symmetry.random(1), theta)

    def middle(state: State) -> float:
        return float(F.cross_entropy(answers({n: (theta[n] + state[n]) / 2 for n in theta}), labels))

    settings = MatchingSettings(
        method="sinkhorn",
        sinkhorn=SinkhornSettings(objective=wanted, steps=150),  # type: ignore[arg-type]
    )
    given = Examples(model, [(inputs[:128], labels[:128]), (inputs[128:], labels[128:])])
    result = match(settings, symmetry, theta, stacked(symmetry, [source]), examples=lambda: given)
    after, best = middle(symmetry.apply(result.permutations.select(0), source)), middle(theta)
    assert after == pytest.approx(best, rel=1e-5)
    assert middle(source) > 2 * best
    assert all(p.grad is None for p in model.parameters())


def test_bad_input_to_sinkhorn() -> None:
    model, symmetry, inputs = case("mlp")
    theta = random_state(model, 0)
    sources = stacked(symmetry, [theta])
    mid = MatchingSettings(method="sinkhorn", sinkhorn=SinkhornSettings(objective="mid"))
    with pytest.raises(FastarError, match=r"matching\.sinkhorn\.objective=mid needs data"):
        match(mid, symmetry, theta, sources)
    with pytest.raises(FastarError, match="need labels"):
        match(mid, symmetry, theta, sources, examples=lambda: Examples(model, [(inputs, None)]))
    broken = {n: torch.full_like(t, float("nan")) if n == "layers.1.weight" else t for n, t in sources.items()}
    with pytest.raises(FastarError, match=r"source 0 has NaN or infinite values in 'layers\.1\.weight'"):
        match(MatchingSettings(method="sinkhorn"), symmetry, theta, broken)
    with pytest.raises(FastarError, match="lacks parameter"):
        match(MatchingSettings(method="sinkhorn"), symmetry, {}, sources)
    wild = SinkhornSettings(lr=1e20, temperature=1e-20, noise=0.0, steps=2)
    with pytest.raises(FastarError, match=r"not finite in group 'layers\.0': lower matching\.sinkhorn\.lr"):
        match_sinkhorn(symmetry, theta, sources, wild)


# Activations


@pytest.mark.quick
@pytest.mark.parametrize("name", EVERY)
def test_activations_as_the_method_find_a_shuffled_copy(name: str) -> None:
    """Up to units that do the same: what is reached is the function's, not the objective's."""
    model, symmetry, inputs = case(name)
    theta = random_state(model, 100)
    shuffle = symmetry.random(1)
    sources = stacked(symmetry, [symmetry.apply(shuffle, theta)])
    settings = MatchingSettings(method="activation")
    given = Examples(model, [(inputs, None)])
    result = match(settings, symmetry, theta, sources, examples=lambda: given)
    assert result.left == ()
    symmetry.check(result.permutations)
    for group, index in result.permutations.items():
        agree = (index[0] == shuffle.inverse()[group]).float().mean()
        assert agree >= 0.75, (group, float(agree))  # units that never fire are one as good as the other


def test_activations_as_the_method_do_not_fall_back() -> None:
    """Where weights say otherwise, what the units do still decides (as a start of weight matching it would not)."""
    model, symmetry, inputs = case("mlp")
    theta = random_state(model, 100)
    shuffle = symmetry.random(3)
    source = symmetry.apply(shuffle, theta)
    source["layers.2.weight"] = 10 * theta["layers.2.weight"]
    result = match(
        MatchingSettings(method="activation"),
        symmetry,
        theta,
        stacked(symmetry, [source]),
        examples=lambda: Examples(model, [(inputs, None)]),
        start=symmetry.identity(),
    )
    assert not result.permutations.is_identity()
    assert float(result.objective[0]) < float(result.objective_start[0])
    permuted = symmetry.apply(result.permutations.select(0), source)
    assert float(result.objective[0]) == pytest.approx(objective(symmetry, theta, permuted), rel=1e-6)


class Hidden(nn.Module):
    """One group is read and made by a parameter that is reshaped in between; another only scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(5 * 6))
        self.second = nn.Parameter(torch.randn(6 * 3))
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x * self.scale)
        return torch.tanh(x @ self.first.view(5, 6)) @ self.second.view(6, 3)


def test_units_that_cannot_be_observed_stay_and_are_named() -> None:
    model = Hidden()
    hidden = Group("hidden", 6, (Member("first", 0, outer=5), Member("second", 0, inner=3)))
    scaled = Group("scaled", 5, (Member("scale", 0),))
    symmetry = Symmetry((scaled, hidden), {n: tuple(p.shape) for n, p in model.named_parameters()})
    theta = random_state(model, 0)
    inputs = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).expand(64, 5)
    shuffle = symmetry.random(0)
    lines: list[str] = []

    class Lines:
        def task(self, *args: Any, **kwargs: Any) -> Any:
            from fastar.runtime.progress import SILENT

            return SILENT.task(*args, **kwargs)

        def line(self, text: str) -> None:
            lines.append(text)

    result = match(
        MatchingSettings(method="activation"),
        symmetry,
        theta,
        stacked(symmetry, [symmetry.apply(shuffle, theta)]),
        examples=lambda: Examples(model, [(inputs, None)]),
        progress=Lines(),
    )
    assert result.left == ("hidden",)
    assert torch.equal(result.permutations["hidden"][0], torch.arange(6))
    assert lines == ["matching by activations: units of hidden cannot be observed and stay"]
    # A scale of one number for each unit is all there is to see of the other group: x * s, up to the sign of s.
    products = theta["scale"] * inputs
    assert len({tuple(column.sign().tolist()) for column in products.T}) == 2
    assert torch.equal(
        theta["scale"].sign(), theta["scale"][shuffle["scaled"]][result.permutations["scaled"][0]].sign()
    )


def test_attention_modules_and_everything_else_are_observed() -> None:
    """torch's own attention layer in one call, norms, embeddings, transposed convolutions, products, named inputs."""

    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm = nn.LayerNorm(8)
            self.matrix = nn.Parameter(torch.randn(8, 6))
            self.up = nn.ConvTranspose1d(6, 4, 2)
            self.activation = nn.PReLU(4)
            self.groups = nn.GroupNorm(2, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.table(tokens)
            x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
            return self.groups(self.activation(self.up((x @ self.matrix).mT)))  # type: ignore[no-any-return]

    model = Everything().eval()
    seen: dict[tuple[str, int], Tensor] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    with torch.no_grad(), Observer(names, lambda name, axis, kind, values: seen.update({(name, axis): values})):
        out = model(tokens=torch.arange(9).view(3, 3))
    assert out.shape == (3, 4, 4)
    assert seen.keys() >= {
        ("table.weight", 1),
        ("attention.in_proj_weight", 0),
        ("attention.in_proj_weight", 1),
        ("attention.out_proj.weight", 0),
        ("norm.weight", 0),
        ("matrix", 0),
        ("matrix", 1),
        ("up.weight", 0),
        ("up.weight", 1),
        ("activation.weight", 0),
        ("groups.weight", 0),
    }
    assert torch.equal(seen["groups.weight", 0], out.movedim(1, -1))
    with torch.no_grad():
        x = model.table(torch.arange(9).view(3, 3))
        wanted = F.linear(x, model.attention.in_proj_weight, model.attention.in_proj_bias)
    torch.testing.assert_close(seen["attention.in_proj_weight", 0], wanted.transpose(0, 1))  # tokens first, inside


def test_named_inputs_and_tied_weights_are_taken() -> None:
    model, symmetry, inputs = case("two_axes")
    theta = random_state(model, 0)
    shuffle = symmetry.random(1)
    sources = stacked(symmetry, [symmetry.apply(shuffle, theta)])
    for batch in (inputs, (inputs,), {"x": inputs}):
        found, unseen = match_activations(model, symmetry, theta, sources, [batch])
        assert unseen == ()
        assert found.select(0) == shuffle.inverse()


# None, and all of them through settings


def test_none_derives_nothing_and_moves_nothing() -> None:
    class Untraceable(ResNet):
        def forward(self, images: Tensor) -> Tensor:
            raise AssertionError("it is run")

    models = [Untraceable((3, 4), 1) for _ in range(3)]
    settings = MatchingSettings(method="none")
    symmetry = symmetry_by_settings(settings, models[0], ())
    sources = {name: torch.stack([model.state_dict()[name] for model in models[1:]]) for name in symmetry.moved}
    result = match(settings, symmetry, models[0].state_dict(), sources)
    states = [symmetry.apply(result.permutations.select(n), model.state_dict()) for n, model in enumerate(models[1:])]
    assert len(result.permutations) == 0
    assert result.left == ()
    for model, state in zip(models[1:], states, strict=True):
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(result.objective, result.objective_start)
    tied = without_groups(CASES["two_axes"][0])
    assert tied.tied == {"again.weight": "readout.weight", "again.bias": "readout.bias"}
    assert tied.groups == ()


def test_none_with_groups_leaves_every_source() -> None:
    model, symmetry, _ = case("mlp")
    states = [random_state(model, seed) for seed in range(2)]
    result = match(MatchingSettings(method="none"), symmetry, states[0], stacked(symmetry, states))
    assert result.permutations.is_identity()
    assert result.permutations.count == 2
    assert float(result.objective[0]) == pytest.approx(objective(symmetry, states[0], states[0]), rel=1e-7)


def test_methods_that_need_data_say_so() -> None:
    model, symmetry, _ = case("mlp")
    theta = random_state(model, 0)
    for settings, message in (
        (MatchingSettings(method="activation"), r"matching\.method=activation needs data"),
        (MatchingSettings(start="activations"), r"matching\.start=activations needs data"),
    ):
        with pytest.raises(FastarError, match=message):
            match(settings, symmetry, theta, stacked(symmetry, [theta]))


def test_keys_of_methods() -> None:
    loaded = load_settings(dataset="digits", overrides=["matching.method=sinkhorn", "matching.sinkhorn.lr=0.5"])
    assert (loaded.matching.method, loaded.matching.sinkhorn.lr) == ("sinkhorn", 0.5)
    assert loaded.ends_matched
    none = load_settings(dataset="digits", overrides=["matching.method=none"])
    assert not none.ends_matched
    assert none.star_matched_every == 0
    assert loaded.star_matched_every == 1
    for wrong in ("matching.method=best", "matching.sinkhorn.lr=0", "matching.sinkhorn.rate=1"):
        with pytest.raises(FastarError, match=wrong.split("=")[0].replace(".", r"\.")):
            load_settings(dataset="digits", overrides=[wrong])
    assert "method" in refused("train-star", "--dataset", "digits", "matching.methd=none")


@pytest.mark.parametrize(
    "method", [("activation",), ("sinkhorn", "matching.sinkhorn.steps=5"), ("none",)], ids=lambda m: m[0]
)
def test_a_run_by_each_method(method: tuple[str, ...], tmp_path: Path) -> None:
    name, *more = method
    outcome = fastar(
        "train-star", *tiny(tmp_path / "data"), "--out", tmp_path / "run", f"matching.method={name}",
        "evaluation.regular_pairs=1", *more,
    )  # fmt: skip
    assert outcome.code == 0, outcome
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    kinds = {path["kind"] for path in results["paths"]}
    assert ("regular_regular" in kinds) == (name != "none")
    assert {"star_heldout", "star_source", "regular_regular_unmatched"} <= kinds
    report = fastar("report", tmp_path / "run")
    assert report.code == 0, report


def test_commands_on_files_take_every_method(tmp_path: Path) -> None:
    data = f"dataset.directory={tmp_path / 'data'}"
    assert fastar("train-sources", *tiny(tmp_path / "data", heldout=0), "--out", tmp_path / "run").code == 0
    pair = [tmp_path / "run" / "sources" / f"seed-000{n}.safetensors" for n in range(2)]
    found = {}
    for method in ("weight", "activation", "sinkhorn", "none"):
        outcome = fastar("match", *pair, "--json", data, "device=cpu", f"matching.method={method}")
        assert outcome.code == 0, outcome
        found[method] = json.loads(outcome.out)
        outcome = fastar(
            "barrier",
            *pair,
            "--match",
            "--json",
            data,
            "device=cpu",
            f"matching.method={method}",
            "evaluation.points=3",
            "dataset.limit=100",
        )
        assert outcome.code == 0, outcome
    start = found["none"]["objective_start"]
    assert (found["none"]["moved"], found["none"]["units"], found["none"]["objective"]) == (0, 0, start)
    for method in ("weight", "activation", "sinkhorn"):
        assert found[method]["objective_start"] == pytest.approx(start, rel=1e-6)
        assert found[method]["moved"] > 0
    assert found["weight"]["objective"] >= found["sinkhorn"]["objective"] > 2 * start
    assert found["activation"]["objective"] > 1.5 * start


def test_permutations_of_no_groups_are_anyones() -> None:
    assert Permutations({}).select(3) == Permutations({})
