"""The main job from Python: `fastar.train_sources`, `fastar.train_star`, `fastar.sweep`, `fastar.load_run`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from fastar.api.models import Build, Run, Source, Star, TrainedModel, checkpoint_of, shown
from fastar.api.recipe import Recipe
from fastar.config import MatchingSettings, Settings, matching_settings, validate
from fastar.data.user_data import UserSplits
from fastar.errors import FastarError
from fastar.experiments.matchings import star_permutations
from fastar.experiments.plan.trial import check_task
from fastar.experiments.session import Session, new_session
from fastar.experiments.star_domain import train_sources as train_missing
from fastar.experiments.sweeps import sweep as whole_sweep
from fastar.experiments.user_task import PYTHON, Given
from fastar.experiments.whole_run import train_star as do_whole_run
from fastar.losses import LossChoice, MetricChoice
from fastar.runs import RunFolder
from fastar.runs.folder import GIVEN, remove_if_empty
from fastar.runs.model_files import load_checkpoint, save_checkpoint, state_digest
from fastar.runtime.progress import Progress
from fastar.runtime.signals import Stopped, signals_stop
from fastar.runtime.user_code import is_reference, name_of


def train_sources(
    build: Build,
    train: Any,
    recipe: Recipe | None = None,
    *,
    number: int = 10,
    kind: Literal["source", "heldout"] = "source",
    test: Any = None,
    loss: LossChoice = "cross_entropy",
    metrics: Sequence[MetricChoice] | None = None,
    out: Path | str | None = None,
    progress: Progress | bool = True,
) -> list[TrainedModel]:
    """Train networks from different seeds; those that are in the run folder already are reused.

    Args:
        build: returns a fresh network; it is called once for each, after torch's generator was seeded.
        train: the training data: tensors (inputs, targets), a torch Dataset, a DataLoader, or a `fastar.Data`.
        recipe: how to train; None: the defaults.
        number: of networks.
        kind: "source", or "heldout": networks that no star is trained with.
        test: data that losses are measured on beside the training data.
        loss: cross_entropy, mse, bce, lm, or a function f(outputs, batch) -> [batch].
        metrics: beside it; None: those that belong to the loss's name.
        out: run folder, which a training that was stopped goes on in; None: nothing is left on the disk.
        progress: where to show it; True: the terminal, False: nowhere.

    Raises:
        FastarError: bad input, in one line; what was finished stays.

    Example:
        >>> import fastar, torch
        >>> from torch import nn
        >>> build = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> train = torch.randn(60, 4), torch.randint(3, (60,))
        >>> recipe = fastar.Recipe(epochs=1, batch_size=20)
        >>> fastar.train_sources(build, train, recipe, number=2, progress=False)
        [TrainedModel(source 0, loss ..., in memory), TrainedModel(source 1, loss ..., in memory)]
    """
    if kind not in ("source", "heldout"):
        raise FastarError(f"kind is {kind!r}: choose source or heldout")
    if not isinstance(number, int) or number < 1:
        raise FastarError(f"number is {number!r}: give a whole number of networks, 1 or more")
    given = _given(build, train, test, loss, metrics)
    with _folder(out) as folder, _interruptible():
        run, key = RunFolder(folder), "number" if kind == "source" else "heldout"
        numbers = {key: max(number, _saved(run).get("sources", {}).get(key, 0))}
        settings = _settings(recipe, build, given, run, out is not None, numbers)
        train_missing(settings, folder, shown(progress), kinds=[kind], given=given)
        files = [run.model(kind, index) for index in range(number)]
        return [_model(f"{kind} {index}", path, build, out is not None) for index, path in enumerate(files)]


def train_star(
    build: Build,
    sources: Sequence[Source],
    train: Any,
    recipe: Recipe | None = None,
    *,
    heldouts: Sequence[Source] = (),
    test: Any = None,
    loss: LossChoice = "cross_entropy",
    metrics: Sequence[MetricChoice] | None = None,
    matching: str | Mapping[str, Any] | MatchingSettings | None = None,
    out: Path | str | None = None,
    profile: int | None = None,
    progress: Progress | bool = True,
) -> Star:
    """Train a star model of `sources` (Algorithm 1), and measure the barriers from it and between them.

    Args:
        build: returns a fresh network of the sources' architecture.
        sources: networks that `train_sources` returned, modules, state dicts, or files, of any floating-point type.
        train: as of `train_sources`.
        recipe: how to train; None: the defaults.
        heldouts: networks that only barriers are measured to, of the same kinds. Those that `train_sources` trained in
            the folder `out` are measured too.
        test, loss, metrics, progress: as of `train_sources`.
        matching: weight, activation, sinkhorn or none; or settings of `matching` by their names. None: the recipe's.
        out: run folder; None: nothing is left on the disk.
        profile: time so many steps of the star's training, part by part, into the folder's `profile/`.

    Raises:
        FastarError: bad input, in one line; what was finished stays.

    Example:
        >>> import fastar, torch
        >>> from torch import nn
        >>> build = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> train = torch.randn(60, 4), torch.randint(3, (60,))
        >>> recipe = fastar.Recipe(epochs=1, batch_size=20)
        >>> star = fastar.train_star(build, [build(), build()], train, recipe, progress=False)
        >>> star
        Star(star, loss ..., in memory)
        >>> star.barrier(build()).value >= 0
        True
    """
    sources, heldouts = _several(sources, "sources"), _several(heldouts, "heldouts")
    if not sources:
        raise FastarError("there are no sources: give those of fastar.train_sources, modules, state dicts or files")
    if profile is not None and out is None:
        raise FastarError("a profile is written into the run folder: give out")
    given = _given(build, train, test, loss, metrics)
    with _folder(out) as folder, _interruptible():
        run, chosen = RunFolder(folder), _as_matching(matching)
        held = _saved(run).get("sources", {}).get("heldout", 0)  # those that were trained since are measured too
        numbers: dict[str, Any] = {"number": len(sources), "heldout": max(held, len(heldouts))}
        models: dict[str, Sequence[Source]] = {}
        for key, kind, given_ones in (("folder", "source", sources), ("heldout_folder", "heldout", heldouts)):
            if given_ones and not _are_of_run(given_ones, run, kind):
                models[kind], numbers[key] = given_ones, folder / GIVEN / kind
        settings = _settings(recipe, build, given, run, out is not None, numbers, chosen)
        run.check(settings)
        session = new_session(settings, run, given=given)
        with _nothing_half_written(run):
            _keep(models, folder / GIVEN, session)
            results = do_whole_run(settings, folder, shown(progress), profile=profile, given=given)
        found = _model("star", run.star, build, out is not None)
        permutations = star_permutations(run.permutations) or None
        return Star(**vars(found), permutations=permutations, results=results, _session=session)


def sweep(
    build: Build,
    train: Any,
    recipe: Recipe | None,
    kind: str,
    values: Sequence[Any],
    *,
    out: Path | str,
    sources: int = 10,
    heldouts: int = 3,
    seeds: int = 1,
    test: Any = None,
    loss: LossChoice = "cross_entropy",
    metrics: Sequence[MetricChoice] | None = None,
    progress: Progress | bool = True,
) -> dict[str, Any]:
    """Train and measure a star for each value of a setting; sources and heldouts that do not change are trained once.

    Args:
        kind: sources, t, mu, or a setting of the recipe by its dotted name, such as train.lr. width, depth, and
            model.NAME are arguments of `build`.
        values: of it.
        out: folder of the sweep; the same call goes on there, and more values are added.
        sources, heldouts: their numbers.
        seeds: stars of each point.
        build, train, recipe, test, loss, metrics, progress: as of `train_sources`.

    Returns:
        What `sweep.json` in the folder holds: points, with the mean of each figure, its standard deviation and 95 %
        interval, and fits through them.

    Raises:
        FastarError: bad input, in one line; what was finished stays.

    Example:
        >>> import fastar, torch
        >>> from torch import nn
        >>> build = lambda width: nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        >>> train = torch.randn(60, 4), torch.randint(3, (60,))
        >>> recipe = fastar.Recipe(epochs=1, batch_size=20)
        >>> found = fastar.sweep(build, train, recipe, "width", [4, 8], out="runs/widths", sources=2, progress=False)
        >>> [(point["value"], point["train"]["star_heldout"]["n"]) for point in found["points"]]
        [(4, 3), (8, 3)]
    """
    given, folder = _given(build, train, test, loss, metrics), Path(out)
    numbers = {"number": sources, "heldout": heldouts}
    with _interruptible():
        settings = _settings(recipe, build, given, RunFolder(folder), True, numbers)
        plain = [value.item() if hasattr(value, "item") else value for value in values]  # of NumPy's
        return whole_sweep(settings, kind, plain, folder, shown(progress), seeds=seeds, given=given)


def load_run(
    path: Path | str,
    build: Build | None = None,
    train: Any = None,
    *,
    loss: LossChoice | None = None,
    metrics: Sequence[MetricChoice] | None = None,
) -> Run:
    """The models, permutations and results of a run folder.

    Args:
        path: the folder, of `train_star` or of the command line.
        build: makes its network; needed for `module()` and `barrier`.
        train: its training data, or a `fastar.Data`; needed for `barrier`.
        loss, metrics: those of the run where they are functions; by name they are known.

    Raises:
        FastarError: it is no run folder, or damaged.

    Example:
        >>> import fastar, torch
        >>> from torch import nn
        >>> build = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> train = torch.randn(60, 4), torch.randint(3, (60,))
        >>> recipe = fastar.Recipe(epochs=1, batch_size=20)
        >>> sources = fastar.train_sources(build, train, recipe, number=2, out="runs/mine", progress=False)
        >>> star = fastar.train_star(build, sources, train, recipe, out="runs/mine", progress=False)
        >>> run = fastar.load_run("runs/mine")
        >>> run
        Run(runs/mine: 2 sources, 0 heldouts, a star)
        >>> run.value >= 0, run.results["train"]["star_source"]["n"]
        (True, 2)
    """
    run = RunFolder(Path(path))
    saved = run.saved_settings()
    models: dict[str, list[TrainedModel]] = {"source": [], "heldout": []}
    for file, kind, index in run.models():
        models[kind].append(_model(f"{kind} {index}", file, build, True))
    results = run.read_results() if run.results.is_file() else {}
    star = None
    if run.finished("star", 0):
        session = None
        if build is not None and train is not None:
            settings = validate(saved, str(run.config))
            named = [one for one in settings.metrics or () if not is_reference(one)]
            metrics = named if metrics is None and settings.metrics is not None else metrics
            given = Given(build=build, data=_splits(train, None), loss=loss, metrics=metrics)
            if loss is None and is_reference(settings.loss):
                raise FastarError(f"{run.path}: its loss is a function, {settings.loss}: give loss to fastar.load_run")
            session = new_session(settings, run, given=given)
            check_task(session.network, session.data, session.loss, session.device)
        permutations = star_permutations(run.permutations) or None
        found = _model("star", run.star, build, True)
        star = Star(**vars(found), permutations=permutations, results=results, _session=session)
    return Run(run.path, models["source"], models["heldout"], star, results)


def _splits(train: Any, test: Any) -> UserSplits:
    if isinstance(train, UserSplits):
        return train if test is None else replace(train, test=test)
    return UserSplits(train, test)


def _several(models: Any, name: str) -> list[Source]:
    one = isinstance(models, str | Path | Mapping | nn.Module | TrainedModel)
    if one or not isinstance(models, Iterable):
        raise FastarError(f"{name} is a {type(models).__name__}: give a list of networks, such as [{name}]")
    return list(models)


def _given(build: Build, train: Any, test: Any, loss: LossChoice, metrics: Sequence[MetricChoice] | None) -> Given:
    if isinstance(build, nn.Module) or not callable(build):
        raise FastarError(f"build is a {type(build).__name__}: give a function that returns a fresh network")
    if isinstance(metrics, str):
        raise FastarError(f"metrics is one text: give a list, [{metrics!r}]")
    return Given(build=build, data=_splits(train, test), loss=loss, metrics=metrics)


def _settings(
    recipe: Recipe | None,
    build: Build,
    given: Given,
    run: RunFolder,
    kept: bool,
    numbers: Mapping[str, Any],
    matching: MatchingSettings | None = None,
) -> Settings:
    """The settings of a run. What a call does not speak of stays as it is in the folder."""
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise FastarError(f"recipe is a {type(recipe).__name__}: give a fastar.Recipe, such as Recipe(epochs=50)")
    loss = given.loss if isinstance(given.loss, str) else name_of(given.loss)
    settings = recipe.settings(PYTHON, name_of(build), loss)
    saved = _saved(run)
    known = {**settings.sources.model_dump(), "heldout": 0, **saved.get("sources", {})}
    sections: dict[str, Any] = {"sources": {**known, **numbers}}
    if matching is not None:
        sections["matching"] = matching
    elif run.star.is_file():
        sections |= {name: saved.get(name, {}) for name in ("matching", "star")}
    if not kept:
        sections["logging"] = {"tensorboard": False}
    if given.metrics is not None:
        sections["metrics"] = [one if isinstance(one, str) else name_of(one) for one in given.metrics]
    return validate({**settings.model_dump(), **{key: _plain(value) for key, value in sections.items()}}, "the recipe")


def _saved(run: RunFolder) -> dict[str, Any]:
    """The settings that a run folder was made with; empty of a new one."""
    return run.saved_settings() if run.config.is_file() else {}


def _plain(section: Any) -> Any:
    return section.model_dump() if isinstance(section, MatchingSettings) else section


def _as_matching(matching: str | Mapping[str, Any] | MatchingSettings | None) -> MatchingSettings | None:
    if matching is None or isinstance(matching, MatchingSettings):
        return matching
    return matching_settings({"method": matching} if isinstance(matching, str) else matching)


def _model(name: str, path: Path, build: Build | None, kept: bool) -> TrainedModel:
    checkpoint = load_checkpoint(path, own=True)
    state = {key: value.clone() for key, value in checkpoint.state.items()}
    return TrainedModel(name, state, checkpoint.metadata, path if kept else None, build)


def _are_of_run(models: Sequence[Source], run: RunFolder, kind: str) -> bool:
    """Tell whether these are the run's own models, all of its first ones."""
    paths = [model.path if isinstance(model, TrainedModel) else None for model in models]
    return paths == [run.model(kind, index) for index in range(len(models))]


def _keep(models: Mapping[str, Sequence[Source]], folder: Path, session: Session) -> None:
    """Write sources and heldouts that were given into folders of the run, unless they are there."""
    network = session.network.build(seed=0, device="cpu") if models else None
    star_begun = session.run.star.is_file() or session.run.in_training("star", 0).is_dir()
    for kind, some in models.items():
        place = folder / kind
        place.mkdir(parents=True, exist_ok=True)
        for index, model in enumerate(some):
            assert network is not None
            found, path = checkpoint_of(model, network, f"{kind}s[{index}]"), place / f"{index:04d}.safetensors"
            if not path.is_file() or state_digest(load_checkpoint(path)) != state_digest(found):
                if path.is_file() and kind == "source" and star_begun:
                    raise FastarError(
                        f"{path}: the star there was trained with this network, and sources[{index}] is another; "
                        "choose another out"
                    )
                save_checkpoint(path, found.state, {})
        for path in place.glob("*.safetensors"):
            if path.stem.isdecimal() and int(path.stem) >= len(some):
                path.unlink()


@contextmanager
def _nothing_half_written(run: RunFolder) -> Iterator[None]:
    """Inside, an error before the run has begun leaves none of the networks that were given to it."""
    made, new = not run.path.exists(), not run.config.is_file()
    try:
        yield
    except BaseException:
        if new and not run.config.is_file():
            shutil.rmtree(run.path / GIVEN, ignore_errors=True)
            if made:
                remove_if_empty(run.path)
        raise


@contextmanager
def _folder(out: Path | str | None) -> Iterator[Path]:
    """The run folder; without one, a temporary folder that is deleted."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="fastar-") as folder:
        yield Path(folder) / "run"


@contextmanager
def _interruptible() -> Iterator[None]:
    """Inside, Ctrl-C saves what is in training, and is KeyboardInterrupt then."""
    try:
        with signals_stop():
            yield
    except Stopped as stopped:
        raise KeyboardInterrupt(str(stopped)) from stopped
