"""`fastar.train_sources`, `train_star`, `load_run`: a star of a user's own network, data and loss."""

from __future__ import annotations

import doctest
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from run_cases import Heard, poison
from safetensors.torch import save_file
from task_cases import Net, build, recipe, tensors, weighted
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fastar
from fastar.errors import FastarError
from fastar.training import RegularStep, StarStep

TRAIN, TEST = tensors(), tensors(20, seed=1)
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "mine"


@pytest.fixture(scope="module")
def star(out: Path) -> fastar.Star:
    """The star of three sources in `out`, with a user's loss and test data; not to be changed."""
    task: dict[str, Any] = {"test": TEST, "loss": weighted, "metrics": ["accuracy"], "out": out, **QUIET}
    sources = fastar.train_sources(build, TRAIN, recipe(), number=3, **task)
    return fastar.train_star(build, sources, TRAIN, recipe(), matching="activation", **task)


def states_equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the issue has them, at a small size."""
    monkeypatch.chdir(tmp_path)
    (train, test), quiet = (TRAIN, TEST), QUIET
    small = recipe(epochs=3, batch_size=12, lr=0.1)
    sources = fastar.train_sources(build, train, small, number=3, out="runs/mine", **quiet)
    star = fastar.train_star(build, sources, train, small, matching="activation", out="runs/mine", **quiet)
    found = fastar.train_sources(build, train, small, number=2, out="runs/mine", kind="heldout", **quiet)
    values = [star.barrier(model, test).value for model in found]
    assert len(values) == 2
    assert all(0 <= value < 10 for value in values)
    run = fastar.load_run("runs/mine")
    assert [len(run.sources), len(run.heldouts)] == [3, 2]
    assert run.permutations is not None
    assert {name: list(index.shape) for name, index in run.permutations.items()} == {"hidden": [3, 6]}
    assert run.results["train"]["star_source"]["n"] == 3
    assert states_equal(run.star.state, star.state)
    assert repr(run) == "Run(runs/mine: 3 sources, 2 heldouts, a star)"


def test_without_a_folder_nothing_is_left_and_the_bits_are_the_same(
    out: Path, star: fastar.Star, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    task: dict[str, Any] = {"test": TEST, "loss": weighted, "metrics": ["accuracy"], **QUIET}
    before = torch.get_rng_state()
    sources = fastar.train_sources(build, TRAIN, recipe(), number=3, **task)
    again = fastar.train_star(build, sources, TRAIN, recipe(), matching="activation", **task)
    assert torch.equal(torch.get_rng_state(), before)
    assert states_equal(again.state, star.state)
    assert again.results["paths"] == star.results["paths"]
    assert again.path is None
    assert isinstance(again.barrier(sources[0]).value, float)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_results_are_short_and_can_be_drawn(star: fastar.Star, out: Path) -> None:
    run = fastar.load_run(out)
    assert repr(run) == f"Run({out}: 3 sources, 0 heldouts, a star)"
    assert repr(star) == f"Star(star, loss {star.value:.4g}, {out / 'star.safetensors'})"
    assert repr(run.sources[1]).startswith("TrainedModel(source 1, loss ")
    assert run.models == [*run.sources, run.star]
    assert run.value == run.results["test"]["star_source"]["mean"]
    barrier = star.barrier(run.sources[0])
    assert float(barrier) == barrier.value
    assert repr(barrier).startswith(f"Barrier({barrier.value:.4g}, weighted ")
    assert barrier.metrics.keys() == {"accuracy"}
    assert barrier.accuracy == barrier.metrics["accuracy"]
    assert barrier.largest_loss == max(barrier.loss)
    ends = zip(barrier.t, barrier.accuracy, strict=True)
    falls = [one - (1 - t) * barrier.accuracy[0] - t * barrier.accuracy[-1] for t, one in ends]
    assert barrier.accuracy_barrier == pytest.approx(min(falls), abs=1e-12)
    with pytest.raises(FastarError, match="accuracy was not measured"):
        _ = replace(barrier, metrics={}).accuracy_barrier
    for one in (run, star, barrier):
        axes = one.plot()
        assert isinstance(axes, Axes)
        assert one.plot(axes) is axes
        assert len(repr(one)) < 200
    for found in (run, star):
        assert "star model of 3 sources" in found.table()
        assert found.plot(split="test").get_ylabel() == "test loss"
        with pytest.raises(FastarError, match="the losses of train, test were measured"):
            found.plot(split="validation")


def test_heldouts_are_trained_without_sources(tmp_path: Path) -> None:
    fastar.train_sources(build, TRAIN, recipe(), number=1, kind="heldout", out=tmp_path / "run", **QUIET)
    run = fastar.load_run(tmp_path / "run")
    assert [len(run.sources), len(run.heldouts)] == [0, 1]


def test_frames(star: fastar.Star, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pandas; without, it is said."""
    made: list[Any] = []

    class Pandas:
        DataFrame = made.append

    monkeypatch.setitem(sys.modules, "pandas", Pandas)
    star.to_frame()
    star.barrier(star).to_frame()
    assert made[0].keys() == {"kind", "first", "second", "train_barrier", "test_barrier"}
    assert made[0]["kind"].count("star_source") == 3
    assert made[1].keys() == {"t", "loss", "accuracy"}
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(FastarError, match="a frame needs pandas: pip install pandas"):
        star.to_frame()


def test_the_same_call_twice_is_finished_already(out: Path, star: fastar.Star) -> None:
    """Other test data are measured again; nothing is trained again."""
    again: dict[str, Any] = {"loss": weighted, "metrics": ["accuracy"], "out": out}
    sources = fastar.train_sources(build, TRAIN, recipe(), number=3, test=TEST, progress=(heard := Heard()), **again)
    same = fastar.train_star(build, sources, TRAIN, recipe(), matching="activation", test=TEST, progress=heard, **again)
    assert f"{out}: finished already; these are its results" in heard.lines
    assert same.results == star.results
    kept = (out / "results.json").read_bytes()
    try:
        heard = Heard()
        other = fastar.train_star(
            build, sources, TRAIN, recipe(), matching="activation", test=tensors(20, seed=2), progress=heard, **again
        )
        assert not any("finished already" in line for line in heard.lines)
        assert states_equal(other.state, star.state)
        assert other.results["test"]["star_loss"] != star.results["test"]["star_loss"]
    finally:
        (out / "results.json").write_bytes(kept)


def test_a_folder_of_other_data_or_another_loss_is_not_taken(out: Path, star: fastar.Star) -> None:
    again: dict[str, Any] = {"metrics": ["accuracy"], "out": out, "test": TEST, **QUIET}
    sources = fastar.load_run(out).sources
    with pytest.raises(FastarError, match=r"is another model \(dataset_digest was"):
        fastar.train_star(build, sources, tensors(48, 5), recipe(), matching="activation", loss=weighted, **again)
    with pytest.raises(FastarError, match=r"holds another run \(loss was 'task_cases:weighted', now 'cross_entropy'\)"):
        fastar.train_star(build, sources, TRAIN, recipe(), matching="activation", **again)

    def build_(width: int = 6) -> nn.Module:
        return Net(width=width)

    build_.__module__, build_.__qualname__ = build.__module__, build.__qualname__
    with pytest.raises(
        FastarError, match=r"is another model \(the source of its network, or a value in it, has changed"
    ):
        fastar.train_star(build_, sources, TRAIN, recipe(), matching="activation", loss=weighted, **again)


def test_a_users_loss_holds_everywhere(star: fastar.Star, out: Path) -> None:
    """In training, along paths and in barriers."""
    sources = fastar.load_run(out, build).sources
    x, _ = TEST
    with torch.no_grad():
        wanted = float(weighted(star.module()(x), TEST).double().mean())
        of_source = float(weighted(sources[0].module()(x), TEST).double().mean())
    assert star.value == pytest.approx(wanted, rel=1e-5)
    assert sources[0].value == pytest.approx(of_source, rel=1e-5)
    paths = [path for path in star.results["paths"] if path["kind"] == "star_source"]
    assert paths[0]["test_loss"][0] == pytest.approx(wanted, rel=1e-5)
    assert paths[0]["test_loss"][-1] == pytest.approx(of_source, rel=1e-5)
    barrier = star.barrier(sources[0])
    assert [barrier.loss[0], barrier.loss[-1]] == pytest.approx([wanted, of_source], rel=1e-5)
    assert barrier.loss == paths[0]["test_loss"]
    assert star.results["test"]["star_source"]["n"] == 3
    plain = fastar.train_sources(build, TRAIN, recipe(), number=1, **QUIET)
    assert not states_equal(plain[0].state, sources[0].state)
    given = fastar.barrier(star.module(), sources[0].module(), TEST, loss=weighted, metrics=["accuracy"])
    assert given.value >= 0
    assert given.loss[0] == pytest.approx(wanted, rel=1e-5)


def test_sinkhorn_follows_a_users_loss() -> None:
    """On batches, half way between two networks."""
    seen: list[int] = []

    def counted(outputs: Tensor, batch: Any) -> Tensor:
        seen.append(len(batch[1]))
        return weighted(outputs, batch)

    matching = {"method": "sinkhorn", "sinkhorn": {"objective": "mid", "steps": 5}}
    models = [Net(), Net()]
    fastar.match(models[0], models[1], example_inputs=TRAIN[0][:2], data=TRAIN, loss=counted, **matching)
    assert len(seen) >= 5
    seen.clear()
    small = recipe(star={"epochs": 1})
    star = fastar.train_star(build, models, TRAIN, small, loss=counted, matching=matching, **QUIET)
    assert star.permutations is not None
    assert len(seen) > 20


def test_sources_of_every_kind_give_the_same_star(tmp_path: Path) -> None:
    """Files as users save them, state dicts, modules; trained by nobody that fastar knows."""
    models = [Net(), Net(), Net()]
    states = [model.state_dict() for model in models]
    torch.save(states[0], tmp_path / "a.pt")
    torch.save({"model": states[1], "epoch": 3}, tmp_path / "b.pth")
    save_file(states[2], tmp_path / "c.safetensors")
    files: list[Any] = [tmp_path / "a.pt", str(tmp_path / "b.pth"), tmp_path / "c.safetensors"]
    kinds = [files, states, models, [files[0], states[1], models[2]]]
    stars = [fastar.train_star(build, kind, TRAIN, recipe(), heldouts=kind[:1], **QUIET) for kind in kinds]
    for star in stars[1:]:
        assert states_equal(star.state, stars[0].state)
        assert star.results["paths"] == stars[0].results["paths"]
    assert {path["kind"] for path in stars[0].results["paths"]} >= {"star_source", "star_heldout"}
    values = [stars[0].barrier(one, TEST).value for one in (files[0], states[0], models[0])]
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sources_of_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    models = [Net().to(dtype) for _ in range(2)]
    torch.save(models[0].state_dict(), tmp_path / "a.pt")
    star = fastar.train_star(build, [tmp_path / "a.pt", models[1]], TRAIN, recipe(), out=tmp_path / "run", **QUIET)
    assert {value.dtype for value in star.state.values()} == {torch.float32}
    rounded = [{name: value.float() for name, value in model.state_dict().items()} for model in models]
    same = fastar.train_star(build, rounded, TRAIN, recipe(), **QUIET)
    assert states_equal(same.state, star.state)
    assert star.barrier(models[1]).value == same.barrier(rounded[1]).value


def test_given_sources_are_replaced_where_others_are_given(tmp_path: Path) -> None:
    """While there is no star; with one, others are refused and what is there stays."""
    models = [Net() for _ in range(3)]
    first = fastar.train_star(build, models, TRAIN, recipe(), out=tmp_path, **QUIET)
    with pytest.raises(FastarError, match=r"another (run|model)|sources\[2\] is another"):
        fastar.train_star(build, [*models[:2], Net()], TRAIN, recipe(), out=tmp_path, **QUIET)
    again = fastar.train_star(build, models, TRAIN, recipe(), out=tmp_path, progress=(heard := Heard()))
    assert states_equal(again.state, first.state)
    assert any("finished already" in line for line in heard.lines)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epoch": 3}, r"Recipe: unknown key epoch: did you mean epochs\? valid here: "),
        ({"epochs": 0}, r"Recipe: epochs=0: "),
        ({"lr": "fast"}, r"Recipe: lr='fast': "),
        ({"star": {"t": "gamma"}}, r"Recipe: star.t='gamma': "),
        (
            {"star": {"matches": 3}},
            r"Recipe: unknown key star.matches: .*valid here: star.t|Recipe: unknown key star.matches",
        ),
        ({"schedule": "step"}, r"Recipe: schedule=step needs milestones"),
        ({"optimizer": "lion"}, r"Recipe: optimizer='lion': "),
        ({"gpu_memory": "much"}, r"Recipe: gpu_memory='much': |the recipe: gpu_memory='much': "),
        ({"device": "tpu"}, r"tpu"),
        ({"validation": 2.0}, r"validation=2.0: "),
        ({"limit": 0}, r"limit=0: "),
    ],
)
def test_a_recipe_that_is_wrong_names_the_key(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(FastarError, match=says) as refused:
        fastar.train_sources(build, TRAIN, fastar.Recipe(**settings), number=1, **QUIET)
    assert "\n" not in str(refused.value)


def test_a_recipe_has_the_keys_of_the_yaml_files() -> None:
    """`train` by its names, the other sections as they are."""
    from fastar.config import Settings

    known = set(Settings.model_fields["train"].annotation.model_fields)  # type: ignore[union-attr]
    sections = {"star", "matching", "evaluation", "sources", "checkpoint", "logging"}
    others = {"limit", "validation", "seed", "device", "gpu_memory", "workers"}
    assert set(fastar.Recipe.model_fields) == known | sections | others
    assert "lr" in repr(fastar.Recipe(lr=0.3))


def test_a_loaded_run_measures_barriers_where_it_is_told_the_task(out: Path, star: fastar.Star) -> None:
    plain = fastar.load_run(out)
    assert plain.star is not None
    with pytest.raises(FastarError, match=r"a barrier needs the network and its data: give build and train"):
        plain.star.barrier(plain.sources[0])
    with pytest.raises(FastarError, match=r"nothing is known that builds its network: give build"):
        plain.sources[0].module()
    task = fastar.Data(TRAIN, TEST)
    whole = fastar.load_run(out, build, task, loss=weighted)
    assert whole.star is not None
    assert whole.star.barrier(whole.sources[0]).loss == star.barrier(whole.sources[0]).loss
    with pytest.raises(FastarError, match=r"its loss is a function, task_cases:weighted: give loss to fastar.load_run"):
        fastar.load_run(out, build, task)
    with pytest.raises(FastarError, match=r"nowhere: is no run folder"):
        fastar.load_run(out / "nowhere")


def test_modules_of_models_leave_generators_alone(star: fastar.Star) -> None:
    before = torch.get_rng_state()
    model = star.module()
    assert not model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert states_equal(dict(model.state_dict()), dict(star.state))


def test_unmatched_and_by_weights(tmp_path: Path) -> None:
    models = [Net(), Net()]
    none = fastar.train_star(build, models, TRAIN, recipe(), matching="none", **QUIET)
    assert none.permutations is None
    by_weight = fastar.train_star(build, models, TRAIN, recipe(), matching={"method": "weight", "restarts": 2}, **QUIET)
    assert by_weight.permutations is not None
    assert none.barrier(models[0]).loss == none.barrier(models[0], matched=False).loss
    with pytest.raises(FastarError, match=r"matching.method='weights'"):
        fastar.train_star(build, models, TRAIN, recipe(), matching="weights", **QUIET)


@pytest.mark.parametrize("kind", [RegularStep, StarStep])
def test_a_loss_that_is_not_finite_is_retried(kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    poison(monkeypatch, kind, lambda number: number == 4)
    task: dict[str, Any] = {"loss": weighted, "out": tmp_path, "progress": heard}
    twice = recipe(on_nonfinite="retry")
    sources = fastar.train_sources(build, TRAIN, twice, number=2, **task)
    star = fastar.train_star(build, sources, TRAIN, twice, **task)
    assert any("going back to" in line for line in heard.lines)
    found = star.metadata if kind is StarStep else sources[0].metadata
    assert found["retries"] == 1


def test_dict_outputs_and_several_inputs_train_a_star() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 1)

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            hidden = torch.relu(self.left(left) + self.right(right))
            return {"size": hidden.sum(1), "logits": self.out(hidden)}

    x, z = tensors()[0], tensors(seed=3)[0]
    wanted = (x * z).sum(1)
    for data in ((x, z, wanted), {"left": x, "right": z, "target": wanted}, TensorDataset(x, z, wanted)):
        sources = fastar.train_sources(Pair, data, recipe(), number=2, loss="mse", **QUIET)
        star = fastar.train_star(Pair, sources, data, recipe(), loss="mse", metrics=["rmse", "mae"], **QUIET)
        assert star.permutations is not None
        barrier = star.barrier(sources[0])
        assert barrier.metrics.keys() == {"rmse", "mae"}
        assert barrier.metrics["rmse"][0] == pytest.approx(barrier.loss[0] ** 0.5)
        assert json.dumps(dict(star.results["metrics"]))


def test_hidden_values_among_the_outputs_hold_units_in_place() -> None:
    """And that nothing can be matched is said."""

    class Open(Net):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = torch.relu(self.hidden(x))
            return {"hidden": hidden, "logits": self.out(hidden)}

    star = fastar.train_star(Open, [Open(), Open()], TRAIN, recipe(), progress=(heard := Heard()))
    assert star.permutations is None
    assert [line for line in heard.lines if line.startswith("nothing to match: no hidden unit")]


def test_what_a_build_closes_over_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Symmetries of users' networks are not kept: of two of one name and source, each has its own."""
    monkeypatch.setenv("FASTAR_CACHE", str(tmp_path))
    groups = []
    for middle in (nn.ReLU(), nn.Softshrink(), nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Flatten(1), nn.ReLU())):

        def closed(middle: nn.Module = middle) -> nn.Module:
            return nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 3))

        star = fastar.train_star(closed, [closed(), closed()], TRAIN, recipe(), **QUIET)
        groups.append({name: list(index.shape) for name, index in (star.permutations or {}).items()})
    assert groups[0] == groups[1] == {"0": [2, 6]}
    assert not list(tmp_path.rglob("*.json"))


def test_the_public_names() -> None:
    assert set(dir(fastar)) == set(fastar.__all__)
    for name in ("FastarError", "Recipe", "Data", "train_sources", "train_star", "load_run", "match", "barrier"):
        assert name in dir(fastar)
        assert getattr(fastar, name).__doc__
    assert (Path(fastar.__file__).parent / "py.typed").is_file()


PUBLIC = [
    *("match", "match_many", "apply", "barrier", "train_sources", "train_star", "sweep", "load_run", "Recipe", "Data"),
]


@pytest.mark.parametrize("name", PUBLIC)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the docstring of each public function has them."""
    monkeypatch.chdir(tmp_path)
    (example,) = [test for test in doctest.DocTestFinder(recurse=False).find(getattr(fastar, name), name, globs={})]
    assert example.examples
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0


def test_every_public_function_has_an_example() -> None:
    functions = [name for name in fastar.__all__ if inspect.isfunction(getattr(fastar, name))]
    assert set(functions) <= set(PUBLIC)
