"""What units do, as tables that are compared, and kept while the units are moved."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from matching_calls import match_activations, match_cached, stacked
from matching_models import random_state
from run_cases import Killed, Settings, assert_same_models, at_call, kill, small
from safetensors.torch import load_file
from test_matching_methods import case
from torch import Tensor, nn

from fastar.config import MatchingSettings
from fastar.errors import FastarError
from fastar.experiments import train_star
from fastar.flat import FlatLayout
from fastar.matching import ActivationCache, Examples, UnitActivations, cache_bytes, match, match_many
from fastar.symmetry import Symmetry, derive_symmetry
from fastar.training import SourcesStore, StarStep, match_store
from fastar.training import sources as store_module

CPU = torch.device("cpu")
State = dict[str, Tensor]


def keep(name: str, count: int = 5) -> tuple[nn.Module, Symmetry, list[Tensor], State, list[State], ActivationCache]:
    """theta, and sources that are shuffled copies of it, all a little different."""
    model, symmetry, inputs = case(name)
    batches = [inputs[:40], inputs[40:]]
    theta = random_state(model, 100)
    sources = []
    for n in range(count):
        noise = random_state(model, n)
        near = {k: v + 0.1 * noise[k] if v.is_floating_point() else v for k, v in theta.items()}
        sources.append(symmetry.apply(symmetry.random(n), near))
    kept = ActivationCache(
        UnitActivations(model, symmetry, batches, CPU), sources, [f"source {n}" for n in range(count)]
    )
    return model, symmetry, batches, theta, sources, kept


@pytest.mark.parametrize("name", ["mlp", "resnet", "attention", "concatenated", "group_norm_residual"])
def test_what_was_kept_follows_the_units(name: str) -> None:
    """Tables of sources that have moved since are those of the moved sources looked at anew, in half precision."""
    model, symmetry, batches, _, sources, kept = keep(name)
    moves = symmetry.random(7, count=5)
    moved = kept.permuted(moves)
    look = UnitActivations(model, symmetry, batches, CPU)
    for n in (0, 3):
        anew = look(symmetry.apply(moves.select(n), sources[n]), "moved")
        (tables,) = [moved.part(2).tables(n - 2, n - 1)] if n else [moved.tables(0, 1)]
        assert tables.keys() == anew.keys()
        for group, table in tables.items():
            # Half precision, and of sums in another order; entries are at most 1.
            torch.testing.assert_close(table[0], anew[group], rtol=2e-3, atol=2e-4, msg=group)


@pytest.mark.parametrize("name", ["mlp", "resnet", "attention"])
def test_sources_are_matched_by_what_was_kept_as_by_what_they_do(name: str) -> None:
    model, symmetry, batches, theta, sources, kept = keep(name)
    permutations = symmetry.identity(5)
    state = sources
    for epoch in range(2):
        centre = random_state(model, 100) if not epoch else symmetry.apply(symmetry.random(50), theta)
        wanted, left = match_activations(model, symmetry, centre, stacked(symmetry, state), batches)
        moves, unseen = match_cached(centre, stacked(symmetry, state), kept.permuted(permutations))
        assert unseen == left
        for group, index in moves.items():  # units that never fire are one as good as the other
            assert float((index == wanted[group]).float().mean()) >= 0.85, (group, epoch)
        permutations = permutations.then(moves)
        state = [symmetry.apply(moves.select(n), one) for n, one in enumerate(state)]


def test_chunks_and_threads_change_nothing() -> None:
    model, symmetry, batches, theta, sources, kept = keep("resnet")
    given = stacked(symmetry, sources)
    wanted, _ = match_activations(model, symmetry, theta, given, batches, chunk=1)
    now = kept.permuted(symmetry.random(1, count=5))
    of_kept, _ = match_cached(theta, given, now, chunk=1)
    for chunk, threads in ((2, 1), (5, 3), (None, 2)):
        assert match_activations(model, symmetry, theta, given, batches, chunk=chunk, threads=threads)[0] == wanted
        assert match_cached(theta, given, now, chunk=chunk, threads=threads)[0] == of_kept


def test_settings_take_what_was_kept_and_need_no_examples() -> None:
    _, symmetry, _, theta, sources, kept = keep("mlp")
    given, now = stacked(symmetry, sources), kept.permuted(symmetry.identity(5))
    found = match(MatchingSettings(method="activation"), symmetry, theta, given, activations=now)
    assert found.permutations == match_cached(theta, given, now)[0]
    for n in range(5):  # near copies: all that fires is found again
        assert float(found.objective[n]) > 1.2 * float(found.objective_start[n])
    start = match(MatchingSettings(start="activations"), symmetry, theta, given, activations=now)
    assert bool((start.objective >= found.objective - 1e-3).all())


def test_what_is_kept_has_its_bytes_known_beforehand() -> None:
    for name in ("mlp", "resnet", "attention"):
        model, symmetry, batches, _, _, kept = keep(name, count=2)
        assert kept.rows.dtype == torch.float16
        assert cache_bytes(model, symmetry, batches) == kept.rows[0].numel() * 2
        assert len(kept) == 2


def test_no_place_has_more_samples_than_the_limit() -> None:
    model, symmetry, inputs = case("resnet")
    state = random_state(model, 0)
    whole = UnitActivations(model, symmetry, [inputs], CPU)(state, "whole")
    assert max(len(table) for table in whole.values()) > 300
    few = UnitActivations(model, symmetry, [inputs[:32], inputs[32:]], CPU, samples=100)
    tables = few(state, "few")
    for group in symmetry.groups:
        places = len({(m.tensor, m.axis) for m in group.members})
        assert len(tables[group.name]) <= 100 * places
    again = few(state, "few")
    assert all(torch.equal(table, again[name]) for name, table in tables.items())


class Still(nn.Module):
    """Its second hidden unit says 3.1 whatever it sees; the third is never 0 either."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(x)))  # type: ignore[no-any-return]


def test_a_unit_that_never_changes_resembles_no_other() -> None:
    model = Still()
    with torch.no_grad():
        model.hidden.weight.copy_(torch.tensor([[1.0, 0.5], [0.0, 0.0], [0.3, -0.2]]))
        model.hidden.bias.copy_(torch.tensor([0.1, 3.1, 5.0]))
    symmetry = derive_symmetry(model, (torch.zeros(2, 2),))
    inputs = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
    (table,) = UnitActivations(model, symmetry, [inputs], CPU)(model.state_dict(), "it").values()
    torch.testing.assert_close(table.norm(dim=0), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(table.sum(0), torch.zeros(3), rtol=0, atol=1e-4)


class Chooses(nn.Module):
    """Looks at fewer images where its first parameter is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.hidden(x[:5] if float(self.out.bias[0]) < 0 else x)))  # type: ignore[no-any-return]


def test_bad_networks_are_named() -> None:
    model, symmetry, inputs = case("mlp")
    look = UnitActivations(model, symmetry, [inputs], CPU)
    good, bad = random_state(model, 0), random_state(model, 1)
    bad["layers.0.weight"][:] = float("inf")
    with pytest.raises(FastarError, match=r"source two: activations at 'layers\.1\.weight' are not finite"):
        ActivationCache(look, [good, bad], ["source one", "source two"])
    with pytest.raises(FastarError, match="at least one batch"):
        UnitActivations(model, symmetry, [], CPU)
    chooses = Chooses()
    positive = {n: p.detach().abs() + 0.1 for n, p in chooses.named_parameters()}
    chooses.load_state_dict(positive)
    data = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    look = UnitActivations(chooses, derive_symmetry(Still(), (data,)), [data], CPU)
    with pytest.raises(
        FastarError, match=r"source odd shows other numbers of activations at '\w+\.\w+' than source a:"
    ):
        ActivationCache(look, [positive, {n: -p for n, p in positive.items()}], ["source a", "source odd"])


def test_starts_by_activations_take_the_time_that_looking_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, symmetry, batches, theta, sources, _ = keep("mlp")
    looked(monkeypatch, seconds=0.1)
    given = Examples(model, [(batch, None) for batch in batches])
    for how in (MatchingSettings(start="activations"), MatchingSettings(method="activation")):
        found = match(how, symmetry, theta, stacked(symmetry, sources), examples=lambda: given)
        assert found.seconds > 0.6  # theta and five sources


def test_theta_that_is_not_finite_is_named() -> None:
    _, symmetry, _, theta, _, kept = keep("mlp")
    now = kept.permuted(symmetry.identity())
    broken = {**theta, "layers.1.weight": torch.full_like(theta["layers.1.weight"], torch.nan)}
    with pytest.raises(FastarError, match=r"theta has NaN or infinite values in 'layers\.1\.weight'"):
        now.with_theta(broken)
    large = {**theta, "layers.0.weight": theta["layers.0.weight"] * 1e38 * 10}
    with pytest.raises(FastarError, match=r"theta"):
        now.with_theta(large)


# Many, and runs


def test_a_store_s_parts_are_of_its_own_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Seven sources in parts of three are matched as they are together; theta is looked at once."""
    model, symmetry, _, theta, sources, kept = keep("resnet", count=7)
    layout = FlatLayout.from_module(model)
    names = [str(n) for n in range(7)]
    centre = layout.flatten(theta)
    found = []
    for in_place in (True, False):
        store = SourcesStore(layout, sources, names, CPU, store="file", folder=tmp_path, in_place=in_place, part_rows=3)
        asked = looked(monkeypatch)
        seen = kept.permuted(symmetry.identity(7))
        how: dict[str, Any] = {"start": symmetry.identity(), "seed": 0, "threads": 1, "activations": seen}
        moves, _, _ = match_store(symmetry, centre, store, MatchingSettings(method="activation"), **how)
        found.append((moves, store.rows.clone()))
        assert asked == ["theta"]
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert not found[0][0].is_identity()


def test_a_mean_of_networks_starts_from_their_own_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    model, symmetry, batches, _, sources, _ = keep("mlp", count=4)
    given = Examples(model, [(batch, None) for batch in batches])
    how = MatchingSettings(start="activations", max_sweeps=1)
    more: dict[str, Any] = {"to": "mean", "settings": how, "examples": lambda: given, "rounds": 1}
    kept = match_many(symmetry, sources, **more)
    monkeypatch.setattr("fastar.matching.many.ActivationCache", lambda *args, **more: None)
    anew = match_many(symmetry, sources, **more)
    assert kept.history[0] == pytest.approx(anew.history[0], rel=1e-3)


def test_every_network_of_a_set_is_looked_at_once_more_as_theta_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 networks 6 are looked at and kept, and 5 once more as theta; by pairs there would be 15 more."""
    model, symmetry, batches, _, sources, _ = keep("mlp", count=6)
    names = looked(monkeypatch)
    given = Examples(model, [(batch, None) for batch in batches])
    how = MatchingSettings(method="activation")
    many = match_many(symmetry, sources, to="pairwise", settings=how, examples=lambda: given)
    assert names == [*(f"model {n}" for n in range(6)), *["theta"] * 5]
    for (i, j), found in many.pairs.items():
        wanted, _ = match_activations(model, symmetry, sources[i], stacked(symmetry, [sources[j]]), batches)
        for group, index in found.items():
            assert float((index == wanted[group][0]).float().mean()) >= 0.75, (i, j, group)


def looked(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> list[str]:
    """The networks that are run from now on, each `seconds` longer."""
    names: list[str] = []
    call = UnitActivations.__call__

    def counted(self: UnitActivations, state: Mapping[str, Tensor], where: str) -> Any:
        if self.device.type != "meta":
            names.append(where)
            time.sleep(seconds)
        return call(self, state, where)

    monkeypatch.setattr(UnitActivations, "__call__", counted)
    return names


def settings(tmp_path: Path, *more: str) -> Settings:
    return small(
        tmp_path / "data",
        "matching.method=activation",
        "star.match_every_epochs=1",
        "star.epochs=3",
        "model.width=12",
        "evaluation.regular_pairs=1",
        *more,
    )


@pytest.mark.parametrize("store", ["device", "file"])
def test_a_star_looks_at_each_source_once_and_goes_on_to_the_same_bits(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = looked(monkeypatch)
    chosen = settings(tmp_path, f"sources.store={store}")
    train_star(chosen, tmp_path / "whole")
    star = names[: names.index("theta")]
    assert star == ["source seed-0000.safetensors", "source seed-0001.safetensors"]
    assert names[2:5] == ["theta"] * 3  # an epoch each
    assert "source seed-0001.safetensors" not in names[5:]
    at_call(monkeypatch, StarStep, 6, kill)  # of 9: in the second epoch, when sources have been permuted
    with pytest.raises(Killed):
        train_star(chosen, tmp_path / "again")
    train_star(chosen, tmp_path / "again")
    assert_same_models(tmp_path / "again", tmp_path / "whole")


def test_what_is_kept_lives_where_the_sources_do(tmp_path: Path) -> None:
    model, _, _ = case("mlp")
    layout = FlatLayout.from_module(model)
    states = [random_state(model, n) for n in range(3)]
    needed = 3 * (4 * layout.numel + 1000)
    for free, place in ((2 * needed, "device"), (2 * needed - 1, "file")):
        store = SourcesStore(
            layout, states, ["a", "b", "c"], CPU, folder=tmp_path, beside=1000, free=lambda device, free=free: free
        )
        assert store.store == place
    rows = store.make_beside(500, torch.float16)
    assert (rows.shape, rows.dtype, float(rows.abs().sum())) == ((3, 500), torch.float16, 0.0)
    rows[1] = 2.5
    assert rows.sum(1).tolist() == [0.0, 1250.0, 0.0]
    assert list(tmp_path.iterdir()) == []  # the file has no name
    assert torch.equal(store.rows[2], layout.flatten(states[2]))


# On a GPU


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mlp", "resnet", "attention"])
def test_a_gpu_pairs_as_the_cpu_does(name: str, cuda: torch.device) -> None:
    """What is kept may lie on the host; convolutions of a GPU may round inputs to ten bits."""
    model, symmetry, batches, theta, sources, kept = keep(name)
    moves = symmetry.random(7, count=5)
    given = stacked(symmetry, [symmetry.apply(moves.select(n), one) for n, one in enumerate(sources)])
    wanted, left = match_cached(theta, given, kept.permuted(moves))
    look = UnitActivations(model, symmetry, [batch.to(cuda) for batch in batches], cuda)
    there = {key: value.to(cuda) for key, value in theta.items()}
    for place in (None, lambda width, dtype: torch.zeros(5, width, dtype=dtype)):
        on_gpu = ActivationCache(look, sources, [f"source {n}" for n in range(5)], allocate=place)
        assert on_gpu.rows.device.type == ("cuda" if place is None else "cpu")
        for chunk in (None, 2):
            found, unseen = match_cached(
                there,
                {k: v.to(cuda) for k, v in given.items()},
                on_gpu.permuted(moves),
                chunk=chunk,
                threads=2,
            )
            assert unseen == left
            for group, index in found.items():
                assert index.device.type == "cpu"
                assert float((index == wanted[group]).float().mean()) >= 0.85, group


@pytest.mark.gpu
def test_a_star_on_a_gpu_is_matched_by_what_was_kept(cuda: torch.device, tmp_path: Path) -> None:
    for store in ("device", "host", "file"):
        chosen = settings(tmp_path, "device=cuda", f"sources.store={store}")
        results = train_star(chosen, tmp_path / store)
        assert results["paths"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_sources_of_other_types_are_looked_at_as_they_are_used(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's own type is not what steps take; what is kept counts where sources are placed, and is given back."""
    folder = tmp_path / "given"
    folder.mkdir()
    train_star(settings(tmp_path, "star.epochs=1"), tmp_path / "run")
    for path in (tmp_path / "run" / "sources").glob("*.safetensors"):
        state = {n: v.to(dtype) if v.is_floating_point() else v for n, v in load_file(path).items()}
        torch.save(state, folder / f"{path.stem}.pt")
    places: list[int] = []
    choose = store_module.choose_placement

    def chosen(setting: str, needed: int, *given: Any, **more: Any) -> str:
        places.append(needed)
        return choose(setting, needed, *given, **more)

    monkeypatch.setattr(store_module, "choose_placement", chosen)
    released: list[Any] = []
    release = StarStep.release

    def giving_back(self: Any) -> None:
        kept = weakref.ref(self._match._kept)
        released.append(kept().rows.nbytes)
        release(self)
        assert kept() is None

    monkeypatch.setattr(StarStep, "release", giving_back)
    results = train_star(settings(tmp_path, f"sources.folder={folder}", "star.epochs=1"), tmp_path / "other")
    assert results["paths"]
    numel = FlatLayout.from_module(nn.ParameterList(state.values())).numel
    assert places == [2 * 4 * numel + released[0]]
    assert released[0] > 0
