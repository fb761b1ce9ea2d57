"""Ways out of local optima: perturbations, activations as a start, and the settings that ask for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_cases import fastar, tiny
from matching_calls import activations_start, hard_problem, match_weights, objective, problem_of, stacked
from matching_models import CASES, IMAGES, derived
from torch import Tensor, nn

import fastar as package
from fastar.config import MatchingSettings, load_settings
from fastar.errors import FastarError
from fastar.matching import Examples, MatchResult, match
from fastar.matching.weight.descent import Descent
from fastar.matching.weight.problem import Problem
from fastar.symmetry import Permutations, Symmetry


@pytest.fixture(scope="module")
def symmetries() -> dict[str, Symmetry]:
    return derived()


def images(case: str, count: int = 2) -> list[Tensor]:
    shape = CASES[case][1][0].shape[1:]
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(32, *shape, generator=generator) for _ in range(count)]


# Perturbations


@pytest.mark.quick
@pytest.mark.parametrize("name", ["resnet", "concatenated", "two_axes", "grouped"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_perturbations_never_lower_the_objective_and_are_what_they_say(
    name: str, chunk: int, symmetries: dict[str, Symmetry]
) -> None:
    symmetry = symmetries[name]
    theta, states = hard_problem() if name == "resnet" else problem_of(name)
    sources = stacked(symmetry, states)
    plain = match_weights(symmetry, theta, sources, chunk=chunk)
    perturbed = match_weights(symmetry, theta, sources, chunk=chunk, perturbations=4)
    assert bool((perturbed.objective >= plain.objective).all())
    torch.testing.assert_close(perturbed.objective_start, plain.objective_start, rtol=0, atol=0)
    for n, state in enumerate(states):
        reached = objective(symmetry, theta, symmetry.apply(perturbed.permutations.select(n), state))
        assert perturbed.objective[n] == pytest.approx(reached, rel=1e-6, abs=1e-5)
        if perturbed.objective[n] == plain.objective[n]:
            assert perturbed.permutations.select(n) == plain.permutations.select(n)
    assert bool(perturbed.converged.all())
    if name == "resnet":  # of many local optima better ones are found
        assert int((perturbed.objective > plain.objective + 1).sum()) >= 2


def test_more_perturbations_go_on_from_fewer_and_a_source_does_not_see_the_others(
    symmetries: dict[str, Symmetry],
) -> None:
    symmetry = symmetries["resnet"]
    theta, states = hard_problem()
    sources = stacked(symmetry, states)
    three, six = (match_weights(symmetry, theta, sources, perturbations=k) for k in (3, 6))
    assert bool((six.objective >= three.objective).all())
    together = match_weights(symmetry, theta, sources, perturbations=3, chunk=3)
    for n, state in enumerate(states):
        alone = match_weights(symmetry, theta, stacked(symmetry, [state]), perturbations=3)
        assert alone.permutations.select(0) == three.permutations.select(n) == together.permutations.select(n)
    others = [match_weights(symmetry, theta, sources, perturbations=3, seed=s).permutations for s in (1, 2)]
    assert any(other != three.permutations for other in others)


def test_perturbations_after_several_attempts_start_from_the_best(symmetries: dict[str, Symmetry]) -> None:
    symmetry = symmetries["resnet"]
    theta, states = hard_problem()
    sources = stacked(symmetry, states)
    tried = match_weights(symmetry, theta, sources, restarts=4)
    perturbed = match_weights(symmetry, theta, sources, restarts=4, perturbations=1)
    assert bool((perturbed.objective >= tried.objective).all())
    assert perturbed.sweeps.tolist() == tried.sweeps.tolist()
    assert perturbed.solves > tried.solves


@pytest.mark.parametrize("name", ["resnet", "two_axes", "concatenated"])
@pytest.mark.parametrize("count", [1, 2])
def test_going_back_restores_the_very_numbers(name: str, count: int, symmetries: dict[str, Symmetry]) -> None:
    symmetry = symmetries[name]
    theta, states = problem_of(name, count)
    sources = stacked(symmetry, states)
    problem = Problem(symmetry, theta, sources)
    data = problem.part(sources, 0, count)
    start = [np.tile(np.arange(group.size), (count, 1)) for group in symmetry.groups]
    descent = Descent(problem, data, start, "auto", None)
    descent.run(lambda sweep: range(len(symmetry.trees)), 100)
    before = {n: t.clone() for n, t in descent.sources.permuted()}
    mark, (values, _) = descent.mark(), descent.sources.objectives()
    random = symmetry.random(5, count=count)
    for t, tree in enumerate(symmetry.trees):
        for g in tree:
            descent.score(g)
        descent.force(t, tuple(random[symmetry.groups[g].name].numpy() for g in tree))
    assert (descent.sources.objectives()[0] < values).all()
    descent.go_back(mark, np.arange(count))
    assert descent.sources.objectives()[0].tolist() == values.tolist()
    assert all(torch.equal(t, before[n]) for n, t in descent.sources.permuted())
    for g in range(len(symmetry.groups)):
        # Restored, not computed again: to the rounding of the corrections before the mark.
        fresh = descent._full_score(g)
        torch.testing.assert_close(descent.score(g), fresh, rtol=1e-4, atol=1e-5 * float(fresh.abs().max()))
        assert not descent.unsolved[g].any()


# Activations


@pytest.mark.parametrize("name", ["resnet", "flatten", "grouped", "zero_padded", "concatenated", "mlp"])
def test_activations_find_the_units_of_a_shuffled_copy(name: str, symmetries: dict[str, Symmetry]) -> None:
    """Under another scale of every weight too: correlations do not see it, inner products do not mind."""
    symmetry, model = symmetries[name], CASES[name][0]
    theta, _ = problem_of(name)
    shuffles = [symmetry.random(seed) for seed in range(2)]
    copies = [symmetry.apply(shuffle, theta) for shuffle in shuffles]
    sources = stacked(symmetry, [{n: t * 1.5 for n, t in copy.items()} for copy in copies])
    found = activations_start(model, symmetry, {n: theta[n] for n in symmetry.parameters}, sources, images(name))
    for n, shuffle in enumerate(shuffles):
        inverse = shuffle.inverse()
        for group in symmetry.groups:
            # Units that never fire, or that fire alike, are one as good as the other.
            agree = (found.select(n)[group.name] == inverse[group.name]).float().mean()
            assert agree >= 0.75, (group.name, float(agree))


def test_activations_touch_nothing_and_need_no_statistics(symmetries: dict[str, Symmetry]) -> None:
    symmetry, model = symmetries["resnet"], CASES["resnet"][0]
    theta, states = problem_of("resnet")
    parameters = {n: theta[n] for n in symmetry.parameters}
    sources = stacked(symmetry, states)
    copies = {n: t.clone() for n, t in sources.items()}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    found = activations_start(model, symmetry, parameters, sources, images("resnet"))
    other = {**theta, **{n: t + 3 for n, t in theta.items() if "running" in n}}
    assert activations_start(model, symmetry, other, sources, images("resnet")) == found
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(torch.equal(t, copies[n]) for n, t in sources.items())
    for n, state in enumerate(states):
        permuted = symmetry.apply(found.select(n), state)
        assert objective(symmetry, theta, permuted) >= objective(symmetry, theta, state) - 1e-5


def test_activations_that_would_lower_the_objective_are_not_taken(symmetries: dict[str, Symmetry]) -> None:
    """A source that is -theta but for the sign of its functions: the nearest is wherever it is not itself."""
    symmetry, model = symmetries["mlp"], CASES["mlp"][0]
    theta, _ = problem_of("mlp")
    source = {n: t.clone() for n, t in theta.items()}
    # What the units do is theirs shuffled; what the next layer makes of them says the opposite, ten times as loud.
    shuffled = symmetry.apply(symmetry.random(3), source)
    shuffled["layers.2.weight"] = 10 * theta["layers.2.weight"]
    found = activations_start(model, symmetry, theta, stacked(symmetry, [shuffled]), images("mlp"))
    after = objective(symmetry, theta, symmetry.apply(found.select(0), shuffled))
    assert after >= objective(symmetry, theta, shuffled) - 1e-5
    assert found.is_identity()


def test_bad_input_to_activations(symmetries: dict[str, Symmetry]) -> None:
    symmetry, model = symmetries["mlp"], CASES["mlp"][0]
    theta, states = problem_of("mlp")
    sources = stacked(symmetry, states)
    with pytest.raises(FastarError, match="at least one batch"):
        activations_start(model, symmetry, theta, sources, [])
    broken = {n: t.clone() for n, t in sources.items()}
    broken["layers.0.bias"][1, 0] = float("nan")
    with pytest.raises(FastarError, match=r"source 1 has NaN or infinite values in 'layers\.0\.bias'"):
        activations_start(model, symmetry, theta, broken, images("mlp"))
    broken["layers.0.bias"][1], broken["layers.1.weight"][1] = 1e30, 1e30
    with pytest.raises(FastarError, match=r"source 1: activations at 'layers\.2\.weight' are not finite"):
        activations_start(model, symmetry, theta, broken, images("mlp"))


# Settings


def test_settings_say_where_the_descent_starts(symmetries: dict[str, Symmetry]) -> None:
    """Told by the objective there, and of several starts by the one it ends no lower than."""
    symmetry = symmetries["mlp"]
    theta, states = problem_of("mlp")
    sources = stacked(symmetry, states)
    model, known, identity = CASES["mlp"][0], symmetry.random(1), symmetry.identity()
    examples = Examples(model, [(batch, None) for batch in images("mlp")])
    acts = activations_start(model, symmetry, theta, sources, images("mlp"))

    def found(start: str, given: Permutations | None) -> MatchResult:
        settings = MatchingSettings(start=start)  # type: ignore[arg-type]
        return match(settings, symmetry, theta, sources, start=given, examples=lambda: examples)

    def at(start: Permutations) -> list[float]:
        chosen = start if start.count else Permutations.stack([start] * len(states))
        return [objective(symmetry, theta, symmetry.apply(chosen.select(n), s)) for n, s in enumerate(states)]

    for start, given, wanted in (
        ("auto", None, identity), ("auto", known, known), ("identity", None, identity), ("identity", known, known),
        ("backward", None, identity), ("backward", known, known),
        ("activations", None, acts), ("activations", known, acts),
    ):  # fmt: skip
        assert found(start, given).objective_start.tolist() == pytest.approx(at(wanted), rel=1e-5), (start, given)
    for start in ("backward", "activations"):
        both, first, second = found(start, known), found(start, None), found("auto", known)
        assert torch.equal(both.objective, torch.maximum(first.objective, second.objective))
    with pytest.raises(FastarError, match="needs data"):
        match(MatchingSettings(start="activations"), symmetry, theta, sources)


def test_keys_of_settings() -> None:
    loaded = load_settings(
        dataset="digits", overrides=["matching.perturbations=5", "matching.start=activations"]
    ).matching
    assert (loaded.perturbations, loaded.start) == (5, "activations")
    for wrong in ("matching.perturbations=-1", "matching.start=best", "matching.perturbation=1"):
        with pytest.raises(FastarError, match=wrong.split("=")[0]):
            load_settings(dataset="digits", overrides=[wrong])


def test_a_run_that_starts_from_activations_and_perturbs(tmp_path: Path) -> None:
    """Star, heldouts, sources and pairs are all matched so."""
    outcome = fastar(
        "train-star", *tiny(tmp_path / "data"), "--out", tmp_path / "run", "matching.start=activations",
        "matching.perturbations=1", "evaluation.regular_pairs=1",
    )  # fmt: skip
    assert outcome.code == 0, outcome


# Whole modules


def test_whole_modules_as_a_new_user_would() -> None:
    """The snippet of the README, on two plain modules of no architecture that fastar knows."""

    def network(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)]
        return nn.Sequential(*layers).eval()

    with torch.random.fork_rng():
        a, *others = (network(seed) for seed in range(3))
        x = torch.randn(5, 3, 8, 8)
    before = [{n: t.clone() for n, t in b.state_dict().items()} for b in others]
    outputs = [b(x) for b in others]
    for b, old, expected in zip(others, before, outputs, strict=True):
        matched = package.match(a, b, example_inputs=IMAGES)
        assert bool((matched.result.objective > matched.result.objective_start).all())
        state = matched.symmetry.apply(matched, b.state_dict())
        assert all(torch.equal(t, old[n]) for n, t in b.state_dict().items())
        assert not torch.equal(state["0.weight"], old["0.weight"])
        b.load_state_dict(state)
        # The sum over permuted units, in another order.
        torch.testing.assert_close(b(x), expected, rtol=1e-5, atol=1e-5)
