"""The start of a star (`star.start`): a new network, the first source, or the matched mean of its sources."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from run_cases import Killed, assert_log_is_whole, assert_same_models, at_call, kill, small
from torch import Tensor, nn
from training_cases import (
    CPU,
    PlainConvNet,
    PlainMlp,
    largest_difference,
    match_exactly,
    network,
    permute_hidden,
    store,
)

import fastar
from fastar.config import MatchingSettings, StarSettings, TrainSettings, changes, load_settings
from fastar.errors import FastarError
from fastar.experiments import train_star
from fastar.flat import FlatLayout
from fastar.runs import read_metadata
from fastar.runs.model_files import load_checkpoint
from fastar.symmetry import derive_symmetry
from fastar.training import Matcher, SourcesStore, StarStep

SHAPES = {PlainMlp: (12,), PlainConvNet: (3, 5, 5)}
SETTINGS = TrainSettings(precision="fp32")
SOURCES = 4
NEAR = ("star.start=mean", "star.lr=0.05")


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().double() for name, value in model.named_parameters()}


def begun(kind: type[nn.Module], start: str, *, every: int | None, in_place: bool = True) -> tuple[StarStep, Matcher]:
    """A star step at the beginning of its first epoch, and the matcher of its sources (every: None, it is not used)."""
    model, sources = network(kind, 0), [network(kind, 1 + n) for n in range(SOURCES)]
    symmetry = derive_symmetry(copy.deepcopy(model), (torch.zeros(2, *SHAPES[kind]),), verify=False)
    layout, names = FlatLayout.from_module(model), [f"source {n}" for n in range(SOURCES)]
    z = SourcesStore(layout, [one.state_dict() for one in sources], names, CPU, in_place=in_place, part_rows=3)
    matcher = Matcher(symmetry, z, MatchingSettings(), seed=0)
    used = matcher if every is not None else None
    step = StarStep(model, SETTINGS, StarSettings(start=start), z, seed=1, match=used, match_every=every or 0)
    step.begin_epoch(0, 3)
    return step, matcher


@pytest.mark.quick
@pytest.mark.parametrize("kind", [PlainMlp, PlainConvNet])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_mean_start_is_the_matched_mean(kind: type[nn.Module], in_place: bool) -> None:
    """The sources matched to the first and averaged in float64; then matched to that, as the first epoch does."""
    step, matcher = begun(kind, "mean", every=1, in_place=in_place)
    plain = [parameters(network(kind, 1 + n)) for n in range(SOURCES)]
    matched = match_exactly(kind, plain[0], plain)
    mean = {name: sum(one[name] for one in matched) / SOURCES for name in plain[0]}
    assert largest_difference(step.layout.unflatten(step.theta), mean) < 1e-7  # one rounding to fp32 of numbers below 2
    unmatched = {name: sum(one[name] for one in plain) / SOURCES for name in plain[0]}
    assert largest_difference(step.layout.unflatten(step.theta), unmatched) > 0.1
    to_mean = match_exactly(kind, mean, matched)
    for n, (row, wanted) in enumerate(zip(step.sources.rows, to_mean, strict=True)):
        assert largest_difference(step.layout.unflatten(row), wanted) == 0
        order = matcher.permutations.select(n)  # since the files, whatever the source was matched to on the way
        (index,) = order.values()
        assert largest_difference(permute_hidden(kind, plain[n], index), wanted) == 0


@pytest.mark.parametrize("every", [None, 0])
def test_sources_that_are_never_matched_are_averaged_as_they_are(every: int | None) -> None:
    step, matcher = begun(PlainMlp, "mean", every=every)
    plain = [parameters(network(PlainMlp, 1 + n)) for n in range(SOURCES)]
    mean = {name: sum(one[name] for one in plain) / SOURCES for name in plain[0]}
    assert largest_difference(step.layout.unflatten(step.theta), mean) < 1e-7
    assert matcher.permutations.is_identity()


@pytest.mark.parametrize(("start", "seed"), [("random", 0), ("source", 1)])
def test_other_starts_are_the_network_and_the_first_source(start: str, seed: int) -> None:
    step, _ = begun(PlainConvNet, start, every=1)
    wanted = parameters(network(PlainConvNet, seed))
    assert largest_difference(step.layout.unflatten(step.theta), wanted) == 0


def test_later_epochs_go_on_from_where_they_are() -> None:
    z = store([network(PlainMlp, 1)], FlatLayout.from_module(network(PlainMlp, 0)))
    step = StarStep(network(PlainMlp, 0), SETTINGS, StarSettings(start="source"), z, seed=1)
    for epoch in (0, 1):
        step.begin_epoch(epoch, 3)
        step.theta.add_(1)
    assert torch.equal(step.theta, z.rows[0] + 1 + 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The data, and a run whose star starts at the mean."""
    data, folder = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("whole") / "run"
    train_star(small(data, *NEAR, "checkpoint.minutes=0", "checkpoint.epochs=0"), folder)
    return data, folder


@pytest.mark.quick
@pytest.mark.parametrize("call", [1, 2, 11])
def test_an_interrupted_training_goes_on_to_the_same_bits(
    whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Before its first checkpoint, within its first epoch, and later: the star does not start anew at the mean."""
    data, folder = whole
    with monkeypatch.context() as patch:
        at_call(patch, StarStep, call, kill)
        with pytest.raises(Killed):
            train_star(small(data, *NEAR), tmp_path / "run")
    train_star(small(data, *NEAR), tmp_path / "run")
    assert_same_models(tmp_path / "run", folder)
    assert_log_is_whole(tmp_path / "run", folder)


def test_a_star_is_reused_only_from_the_same_start(whole: tuple[Path, Path]) -> None:
    data, folder = whole
    recorded = read_metadata(folder / "star.safetensors", own=True)["recipe"]["star"]
    assert recorded["start"] == "mean"
    assert "schedule" not in recorded
    stamp = (folder / "star.safetensors").stat().st_mtime_ns
    train_star(small(data, *NEAR), folder)
    assert (folder / "star.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(FastarError, match=r"another run \(star\.start was 'mean', now 'random'\)"):
        train_star(small(data, NEAR[1]), folder)
    assert changes({"star": recorded}, {"star": StarSettings(lr=0.05, epochs=7, match_every_epochs=3).recorded()}) == {
        "star.start": ("mean", "random")
    }


def test_default_stars_are_recorded_as_older_versions_did() -> None:
    older = {"t", "alpha", "beta", "value", "mu", "seed", "match_every_epochs", "epochs", "lr"}
    assert StarSettings().recorded().keys() == older
    assert StarSettings(start="source", schedule="linear").recorded().keys() == {*older, "start", "schedule"}


def test_a_schedule_of_its_own_ends_with_the_stars_epochs(whole: tuple[Path, Path], tmp_path: Path) -> None:
    """By milestones of the sources' epochs it would stay at its first rate."""
    steps = ["train.schedule=step", "train.milestones=[20]", "train.epochs=30"]
    given = [f"sources.folder={whole[1] / 'sources'}", "star.epochs=3", *steps]
    rates = []
    for name, schedule in (("null", "null"), ("linear", "linear")):
        train_star(small(whole[0], *given, f"star.schedule={schedule}"), tmp_path / name)
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        rates.append([json.loads(line)["lr"] for line in lines])
    steps_done, steps_of_epoch = (2, 5, 8), 3  # of 300 images in batches of 100
    assert rates[0] == pytest.approx([0.1] * 3)
    assert rates[1] == pytest.approx([0.1 * (1 - done / (3 * steps_of_epoch)) for done in steps_done])
    settings = load_settings(dataset="digits", overrides=[*steps, "star.schedule=cosine"])
    assert (settings.train.schedule, settings.star_train.schedule) == ("step", "cosine")
    assert settings.star_train.milestones == ()


def test_from_python_with_a_users_network(tmp_path: Path) -> None:
    """At a rate of next to nothing a star is where it started: at the mean of its sources, as the mean of the files."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    generator = torch.Generator().manual_seed(0)
    train = torch.randn(60, 4, generator=generator), torch.randint(3, (60,), generator=generator)
    recipe = fastar.Recipe(epochs=2, batch_size=20, weight_decay=0.0, star={"start": "mean", "lr": 1e-12, "epochs": 1})
    sources = fastar.train_sources(build, train, recipe, number=3, out=tmp_path, progress=False)
    star = fastar.train_star(build, sources, train, recipe, out=tmp_path, progress=False)
    states = [dict(load_checkpoint(tmp_path / "sources" / f"seed-000{n}.safetensors").state) for n in range(3)]
    biases = torch.stack([state["2.bias"].double() for state in states]).mean(0)  # of no hidden unit: never permuted
    assert torch.allclose(star.state["2.bias"].double(), biases, atol=1e-7)
    weights = torch.stack([state["0.weight"].double() for state in states]).mean(0)
    assert not torch.allclose(star.state["0.weight"].double(), weights, atol=1e-3)
