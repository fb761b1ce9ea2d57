"""The star step against Algorithm 1 written out plainly in float64 (tests/training_cases.py)."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from training_cases import (
    PlainConvNet,
    PlainMlp,
    algorithm_1,
    batches,
    largest_difference,
    match_exactly,
    network,
    store,
)

from fastar.config import MatchingSettings, StarSettings, TrainSettings
from fastar.errors import FastarError
from fastar.flat import FlatLayout
from fastar.runtime.seeds import derive_seed
from fastar.symmetry import derive_symmetry
from fastar.training import Matcher, RegularStep, SourcesStore, StarStep, draw

SHAPES = {PlainMlp: (12,), PlainConvNet: (3, 5, 5)}
SETTINGS = TrainSettings(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.02, precision="fp32")
SEED, EPOCHS, STEPS, SOURCES = 11, 3, 6, 4
# 18 steps of fp32 on parameters of size 1: rounding is 6e-8 each, gradients and momentum carry it on some tenfold.
TOLERANCE = 5e-6


def matcher_of(model: nn.Module, sources: SourcesStore) -> Matcher:
    """Weight matching."""
    example = (torch.zeros(2, *SHAPES[type(model)]),)
    symmetry = derive_symmetry(copy.deepcopy(model), example, verify=False)
    return Matcher(symmetry, sources, MatchingSettings(), seed=0)


def run(
    kind: type[nn.Module],
    star: StarSettings,
    settings: TrainSettings = SETTINGS,
    match: Any = None,
    *,
    matched: bool = True,
) -> tuple[StarStep, list[float], dict[str, Any]]:
    """Train with the step; what Algorithm 1 needs to do the same comes back too."""
    model, sources = network(kind, 0), [network(kind, 1 + n) for n in range(SOURCES)]
    z = store(sources, FlatLayout.from_module(model))
    matcher = match or (matcher_of(model, z) if matched else None)
    step = StarStep(copy.deepcopy(model), settings, star, z, seed=SEED, match=matcher)
    epochs = [batches(STEPS, 100 + epoch, SHAPES[kind]) for epoch in range(EPOCHS)]
    rates = [[0.05 / (1 + epoch + i) for i in range(STEPS)] for epoch in range(EPOCHS)]
    losses = []
    for epoch in range(EPOCHS):
        step.begin_epoch(epoch, STEPS)
        for (images, labels), lr in zip(epochs[epoch], rates[epoch], strict=True):
            losses.append(float(step(images, labels, torch.tensor(lr))))
    draws = [draw(star, SOURCES, STEPS, derive_seed(SEED, "draws", epoch)) for epoch in range(EPOCHS)]
    plain = {
        "model": model, "sources": sources, "epochs": epochs, "draws": draws, "settings": settings, "rates": rates
    }  # fmt: skip
    if isinstance(matcher, Matcher):
        assert not matcher.permutations.is_identity(), "matching must have something to do in this test"
    return step, losses, plain


@pytest.mark.quick
@pytest.mark.parametrize("kind", [PlainMlp, PlainConvNet])
@pytest.mark.parametrize(
    "star",
    [StarSettings(), StarSettings(t="beta", alpha=2.0, beta=5.0), StarSettings(t="constant", value=0.3)],
    ids=["uniform", "beta", "constant"],
)
def test_equals_algorithm_1(kind: type[nn.Module], star: StarSettings) -> None:
    step, losses, plain = run(kind, star)
    theta, wanted, z = algorithm_1(**plain)
    assert losses == pytest.approx(wanted, abs=TOLERANCE)
    assert largest_difference(step.state(), theta) < TOLERANCE
    for row, source in zip(step.sources.rows, z, strict=True):  # permuting moves fp32 numbers without rounding
        assert largest_difference(step.layout.unflatten(row), source) == 0


@pytest.mark.quick
@pytest.mark.parametrize("kind", [PlainMlp, PlainConvNet])
@pytest.mark.parametrize("mu", [0.5, 1.0])
def test_the_modified_objective_equals_its_formula(kind: type[nn.Module], mu: float) -> None:
    """(L_path + mu L_star) / (1 + mu), differentiated by theta in float64; weight decay is not divided."""
    step, losses, plain = run(kind, StarSettings(mu=mu))
    theta, wanted, _ = algorithm_1(**plain, mu=mu)
    assert losses == pytest.approx(wanted, abs=TOLERANCE)
    assert largest_difference(step.state(), theta) < TOLERANCE
    for other in (0.0, 2 * mu):
        theta, _, _ = algorithm_1(**plain, mu=other)
        assert largest_difference(step.state(), theta) > 100 * TOLERANCE


def test_a_large_mu_is_a_regular_training() -> None:
    step, _, plain = run(PlainMlp, StarSettings(mu=1e6), matched=False)
    regular = RegularStep(copy.deepcopy(plain["model"]), SETTINGS)
    for batch, rates in zip(plain["epochs"], plain["rates"], strict=True):
        for (images, labels), lr in zip(batch, rates, strict=True):
            regular(images, labels, torch.tensor(lr))
    assert largest_difference(step.state(), regular.state()) < 10 * TOLERANCE


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.0, False)])
def test_equals_algorithm_1_with_other_momentum(momentum: float, nesterov: bool) -> None:
    settings = SETTINGS.model_copy(update={"momentum": momentum, "nesterov": nesterov})
    step, losses, plain = run(PlainMlp, StarSettings(), settings)
    theta, wanted, _ = algorithm_1(**plain)
    assert losses == pytest.approx(wanted, abs=TOLERANCE)
    assert largest_difference(step.state(), theta) < TOLERANCE


@pytest.mark.quick
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("kind", [PlainMlp, PlainConvNet])
def test_equals_algorithm_1_with_adam(kind: type[nn.Module], optimizer: Literal["adam", "adamw"]) -> None:
    # eps as large as small gradients: without it the sign of a gradient that rounds to zero would be a whole step.
    changes = {"optimizer": optimizer, "betas": (0.8, 0.95), "eps": 1e-2}
    step, losses, plain = run(kind, StarSettings(), SETTINGS.model_copy(update=changes))
    theta, wanted, _ = algorithm_1(**plain)
    assert losses == pytest.approx(wanted, abs=2 * TOLERANCE)
    assert largest_difference(step.state(), theta) < 2 * TOLERANCE  # a square and a root more than SGD
    other = SETTINGS.model_copy(update={**changes, "optimizer": "adam" if optimizer == "adamw" else "adamw"})
    theta, _, _ = algorithm_1(**{**plain, "settings": other})
    assert largest_difference(step.state(), theta) > 100 * TOLERANCE


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_wrong_variants_of_adam_are_told_apart(optimizer: Literal["adam", "adamw"]) -> None:
    changes = {"optimizer": optimizer, "betas": (0.8, 0.95), "eps": 1e-2}
    step, _, plain = run(PlainMlp, StarSettings(t="beta"), SETTINGS.model_copy(update=changes))
    theta, _, _ = algorithm_1(**plain)
    assert largest_difference(step.state(), theta) < 2 * TOLERANCE
    for wrong in ({"decay_is_scaled": True}, {"gradient_is_scaled": False}):
        theta, _, _ = algorithm_1(**plain, **wrong)
        assert largest_difference(step.state(), theta) > 100 * TOLERANCE


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_clipping_is_of_the_gradient_with_respect_to_the_star(optimizer: Literal["sgd", "adam", "adamw"]) -> None:
    """Some steps are clipped and some are not; clipping before the factor 1 - t would be told apart."""
    changes = {"optimizer": optimizer, "betas": (0.8, 0.95), "eps": 1e-2, "gradient_clip": 0.3}
    step, losses, plain = run(PlainConvNet, StarSettings(), SETTINGS.model_copy(update=changes))
    theta, wanted, _ = algorithm_1(**plain)
    assert losses == pytest.approx(wanted, abs=2 * TOLERANCE)
    assert largest_difference(step.state(), theta) < 2 * TOLERANCE
    for longest in (0.03, None):
        other = plain["settings"].model_copy(update={"gradient_clip": longest})
        theta, _, _ = algorithm_1(**{**plain, "settings": other})
        assert largest_difference(step.state(), theta) > 100 * TOLERANCE
    theta, _, _ = algorithm_1(**plain, clipped_at_the_point=True)
    assert largest_difference(step.state(), theta) > 100 * TOLERANCE


def test_without_matching_the_sources_stay() -> None:
    step, losses, plain = run(PlainMlp, StarSettings(), matched=False)
    theta, wanted, _ = algorithm_1(**plain, matching=False)
    assert losses == pytest.approx(wanted, abs=TOLERANCE)
    assert largest_difference(step.state(), theta) < TOLERANCE
    for row, source in zip(step.sources.rows, plain["sources"], strict=True):
        assert largest_difference(step.layout.unflatten(row), dict(source.named_parameters())) == 0


@pytest.mark.quick
@pytest.mark.parametrize(
    "wrong",
    [{"decay_is_scaled": True}, {"gradient_is_scaled": False}, {"matching": False}],
    ids=lambda w: next(iter(w)),
)
def test_wrong_variants_of_algorithm_1_are_told_apart(wrong: dict[str, bool]) -> None:
    step, _, plain = run(PlainMlp, StarSettings())
    theta, _, _ = algorithm_1(**plain, **wrong)
    assert largest_difference(step.state(), theta) > 100 * TOLERANCE


def test_a_matcher_written_by_hand_gives_the_same_star() -> None:
    """The step hands the matcher the current theta, and reads the rows that the matcher leaves."""

    def by_hand(theta: Tensor, sources: SourcesStore, epoch: int) -> None:
        rows = [sources.layout.unflatten(row) for row in sources.rows]
        for row, state in zip(
            sources.rows, match_exactly(PlainMlp, sources.layout.unflatten(theta), rows), strict=True
        ):
            sources.layout.flatten(state, out=row)

    mine, _, _ = run(PlainMlp, StarSettings(), match=by_hand)
    real, _, _ = run(PlainMlp, StarSettings())
    assert torch.equal(mine.theta, real.theta)


@pytest.mark.parametrize(("every", "wanted"), [(0, []), (1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6])])
def test_matching_at_the_start_of_every_mth_epoch(every: int, wanted: list[int]) -> None:
    model = network(PlainMlp, 0)
    called = []

    def record(theta: Tensor, sources: SourcesStore, epoch: int) -> None:
        assert sources is z
        called.append(epoch)

    z = store([network(PlainMlp, 1)], FlatLayout.from_module(model))
    step = StarStep(model, SETTINGS, StarSettings(), z, seed=0, match=record, match_every=every)
    for epoch in range(7):
        step.begin_epoch(epoch, 2)
    assert called == wanted


def test_one_source_and_one_t_for_the_whole_batch_and_each_step() -> None:
    """Images of a batch see the same point of the same path: a repeated image has one loss, and `describe` names it."""
    model, sources = network(PlainMlp, 0), [network(PlainMlp, n) for n in (1, 2, 3)]
    star = StarSettings()
    step = StarStep(model, SETTINGS, star, store(sources, FlatLayout.from_module(model)), seed=5)
    step.begin_epoch(0, 40)
    indices, ts = draw(star, 3, 40, derive_seed(5, "draws", 0))
    assert [step.describe(i) for i in range(40)] == [
        f" (source source {n}, t={t:.4f})" for n, t in zip(indices, ts, strict=True)
    ]
    assert set(indices) == {0, 1, 2}
    (images, labels), *_ = batches(1, 0, (12,))
    for n, t in zip(indices, ts, strict=True):
        theta = step.layout.unflatten(step.theta)
        point = {name: (1 - t) * theta[name] + t * p.detach() for name, p in sources[n].named_parameters()}
        with torch.no_grad():
            logits = torch.func.functional_call(sources[n], point, (images,))
            wanted = torch.nn.functional.cross_entropy(logits, labels)
        torch.testing.assert_close(step(images, labels, torch.tensor(0.01)), wanted, rtol=1e-5, atol=1e-6)


def test_at_t_zero_it_is_the_regular_step() -> None:
    star = StarSettings(t="constant", value=0.0)
    for kind, shape in SHAPES.items():
        model = network(kind, 0)
        regular = RegularStep(copy.deepcopy(model), SETTINGS)
        z = store([network(kind, 1)], FlatLayout.from_module(model))
        step = StarStep(model, SETTINGS, star, z, seed=0)
        step.begin_epoch(0, 8)
        for images, labels in batches(8, 3, shape):
            lr = torch.tensor(0.05)
            assert step(images, labels, lr) == regular(images, labels, lr)
        # Interpolation at t = 0 gives theta bit for bit, and both steps run the same operations.
        assert torch.equal(step.theta, regular.theta)
        assert torch.equal(step.optimizer.moments[0], regular.optimizer.moments[0])


def test_at_t_one_only_weight_decay_moves_the_star() -> None:
    model, source = network(PlainConvNet, 0), network(PlainConvNet, 1)
    settings = SETTINGS.model_copy(update={"momentum": 0.0, "nesterov": False})
    star = StarSettings(t="constant", value=1.0)
    z = store([source], FlatLayout.from_module(model))
    step = StarStep(model, settings, star, z, seed=0)
    before = step.theta.clone()
    step.begin_epoch(0, 5)
    for images, labels in batches(5, 3, SHAPES[PlainConvNet]):
        loss = step(images, labels, torch.tensor(0.5))
        wanted = torch.nn.functional.cross_entropy(source.train()(images), labels).detach()
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)  # the network is the source
    shrunk = before.double() * (1 - 0.5 * settings.weight_decay) ** 5
    torch.testing.assert_close(step.theta.double(), shrunk, rtol=1e-6, atol=0)  # five fp32 roundings


def test_the_sources_are_not_trained() -> None:
    step, _, _ = run(PlainConvNet, StarSettings(), matched=False)
    for n, row in enumerate(step.sources.rows):
        source = network(PlainConvNet, 1 + n)
        assert torch.equal(row, step.layout.flatten(source.state_dict()))


def test_the_state_is_theta_and_not_the_interpolated_network() -> None:
    step, _, _ = run(PlainMlp, StarSettings())
    state = step.state()
    assert torch.equal(step.layout.flatten(state), step.theta)
    assert not torch.equal(step.layout.flatten(dict(step.model.named_parameters())), step.theta)
    state["first.weight"].zero_()  # a copy
    assert step.layout.views(step.theta)["first.weight"].abs().max() > 0


# The draws


def test_sources_are_drawn_uniformly() -> None:
    indices, _ = draw(StarSettings(), 7, 7000, seed=1)
    counts = [indices.count(n) for n in range(7)]
    assert sum(counts) == 7000  # nothing outside 0..6
    assert stats.chisquare(counts).pvalue > 0.01  # seed is fixed: this passes always or never


@pytest.mark.parametrize(
    ("star", "law"),
    [
        (StarSettings(), stats.uniform()),
        (StarSettings(t="beta", alpha=2.0, beta=2.0), stats.beta(2, 2)),
        (StarSettings(t="beta", alpha=0.5, beta=3.0), stats.beta(0.5, 3)),
    ],
    ids=["uniform", "beta(2, 2)", "beta(0.5, 3)"],
)
def test_t_follows_its_distribution(star: StarSettings, law: Any) -> None:
    _, ts = draw(star, 3, 5000, seed=2)
    assert 0 <= min(ts) <= max(ts) <= 1
    assert stats.kstest(ts, law.cdf).pvalue > 0.01
    others = [stats.uniform(), stats.beta(2, 2), stats.beta(0.5, 3), stats.beta(3, 0.5)]
    accepted = [stats.kstest(ts, other.cdf).pvalue > 1e-6 for other in others]
    assert sum(accepted) == 1  # the test tells the distributions apart


def test_t_does_not_depend_on_the_source() -> None:
    indices, ts = draw(StarSettings(), 2, 4000, seed=3)
    first = [t for n, t in zip(indices, ts, strict=True) if n == 0]
    second = [t for n, t in zip(indices, ts, strict=True) if n == 1]
    assert stats.ks_2samp(first, second).pvalue > 0.01


def test_constant_t() -> None:
    assert draw(StarSettings(t="constant", value=0.25), 3, 5, seed=0)[1] == [0.25] * 5


def test_draws_are_a_function_of_the_seed() -> None:
    star = StarSettings()
    assert draw(star, 5, 50, seed=1) == draw(star, 5, 50, seed=1)
    one, two = draw(star, 5, 50, seed=1), draw(star, 5, 50, seed=2)
    assert one[0] != two[0]
    assert one[1] != two[1]


def test_epochs_draw_differently() -> None:
    model = network(PlainMlp, 0)
    z = store([network(PlainMlp, n) for n in (1, 2, 3)], FlatLayout.from_module(model))
    step = StarStep(model, SETTINGS, StarSettings(), z, seed=5)
    seen = []
    for epoch in (0, 1, 0):
        step.begin_epoch(epoch, 20)
        seen.append([step.describe(i) for i in range(20)])
    assert seen[0] == seen[2]
    assert seen[0] != seen[1]


# The store


def test_store_holds_the_sources_as_rows() -> None:
    sources = [network(PlainConvNet, n) for n in range(3)]
    z = store(sources, FlatLayout.from_module(sources[0]))
    assert len(z) == 3
    assert z.rows.dtype == torch.float32
    for name, view in z.views().items():
        for n, source in enumerate(sources):
            assert torch.equal(view[n], source.state_dict()[name])
            assert view[n].data_ptr() >= z.rows[n].data_ptr()  # a view: matching permutes the rows in place


def test_store_refuses_another_architecture_and_names_the_source() -> None:
    first, other = network(PlainMlp, 0), network(PlainConvNet, 1)
    with pytest.raises(FastarError, match=r"source 1.*first\.weight"):
        store([first, other], FlatLayout.from_module(first))


def test_store_refuses_to_be_empty() -> None:
    with pytest.raises(FastarError, match="at least one source"):
        store([], FlatLayout.from_module(network(PlainMlp, 0)))


def test_star_step_refuses_sources_of_another_layout() -> None:
    z = store([network(PlainConvNet, 1)], FlatLayout.from_module(network(PlainConvNet, 1)))
    with pytest.raises(FastarError, match="another architecture"):
        StarStep(network(PlainMlp, 0), SETTINGS, StarSettings(), z, seed=0)
