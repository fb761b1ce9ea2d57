"""Trained networks, stars and runs, as the functions of `fastar` return them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, Union

from torch import Tensor, nn

from fastar.api.after_runs import Curve, Fusion, Graph, Perturbation, Plane, Uncertainty
from fastar.api.curves import Barrier, paths_frame
from fastar.data.generators import generators_kept
from fastar.errors import FastarError
from fastar.evaluation import Segment
from fastar.experiments.averages import uncertainty as measured_uncertainty
from fastar.experiments.distances import distances
from fastar.experiments.finished_run import FinishedRun, finished_run
from fastar.experiments.fusion import fuse
from fastar.experiments.landscape.barrier_graph import barrier_graph
from fastar.experiments.landscape.connecting_curves import PAIR, connecting_curves
from fastar.experiments.landscape.loss_plane import CORNERS, loss_plane
from fastar.experiments.measure import check_endpoint, endpoint, evaluated, match_to
from fastar.experiments.perturbed import RADII, perturbed_stars
from fastar.experiments.session import Session, measuring, new_session, threads
from fastar.report.notebook_curves import plot_paths
from fastar.report.page import write_page
from fastar.report.results import results_text
from fastar.runs import RunFolder
from fastar.runs.model_files import Checkpoint, check_values, load_checkpoint, load_whole_into
from fastar.runtime.progress import SILENT, Progress, TerminalProgress
from fastar.runtime.user_code import users_code
from fastar.symmetry import Permutations

Build = Callable[..., nn.Module]
"""Returns a fresh network each time; its weights are drawn from torch's generator, which fastar seeds before."""


@dataclass(frozen=True, repr=False)
class TrainedModel:
    """A trained network of a run.

    Args:
        name: source 0, heldout 2, star.
        state: its state dict, on the CPU.
        metadata: what is recorded of it: recipe, losses, versions.
        path: of its file; None: it is kept in memory alone.
        build: makes a network that it can be loaded into.
    """

    name: str
    state: Mapping[str, Tensor] = field(repr=False)
    metadata: Mapping[str, Any] = field(repr=False)
    path: Path | None = None
    build: Build | None = field(default=None, repr=False)

    @property
    def value(self) -> float:
        """Its loss on the test data, or on the training data where there are no others."""
        return float(self.metadata.get("test_loss", self.metadata["train_loss"]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, loss {self.value:.4g}, {self.path or 'in memory'})"

    def module(self) -> nn.Module:
        """A fresh network that holds its weights, in evaluation mode.

        Raises:
            FastarError: nothing is known that builds one.
        """
        if self.build is None:
            raise FastarError(f"{self.name}: nothing is known that builds its network: give build to fastar.load_run")
        with generators_kept(), users_code("build: calling it"):
            made = self.build()
        model = made[0] if isinstance(made, tuple) else made  # beside its example inputs
        load_whole_into(model, Checkpoint(dict(self.state)))
        return model.eval()


Source: TypeAlias = Union[TrainedModel, nn.Module, Mapping[str, Tensor], Path, str]  # noqa: UP007  # of 3.10
"""A network of any of the kinds that users have."""


class WithResults:
    """Results of a run, and their forms: a table, a picture, a frame."""

    results: Mapping[str, Any]

    def table(self) -> str:
        """Losses and barriers of the run, their means and standard deviations, as a table to print."""
        return results_text(self.results)

    def plot(self, axes: Any = None, *, split: str = "train") -> Any:
        """Draw the loss along the run's paths, of the training data or another split; the matplotlib Axes."""
        return plot_paths(self.results, split, axes)

    def to_frame(self) -> Any:
        """A pandas DataFrame of the run's paths and their barriers."""
        return paths_frame(self.results)


@dataclass(frozen=True, repr=False)
class Star(TrainedModel, WithResults):
    """A star model: the straight path from it to each source has low loss.

    Args:
        permutations: of the sources that it was trained with: group name -> int64 [N, size]; None: none were matched.
        results: what `results.json` holds: losses and barriers along all paths.
    """

    permutations: Permutations | None = None
    results: Mapping[str, Any] = field(default_factory=dict, repr=False)
    _session: Session | None = field(default=None, repr=False)

    def barrier(
        self, model: Source, data: Any = None, *, matched: bool = True, progress: Progress | bool = False
    ) -> Barrier:
        """The loss barrier from the star to another network, whose units are permuted to match it first.

        Args:
            model: of the architecture, of any kind that `train_star` takes.
            data: what losses are measured on; None: the run's own test data, or training data.
            matched: permute it to match the star, as the run matches.

        Raises:
            FastarError: another architecture, or a run that was loaded without its network and data.
        """
        if self._session is None:
            raise FastarError("a barrier needs the network and its data: give build and train to fastar.load_run")
        session = self._session
        if data is not None:
            splits = session.given.data
            assert splits is not None
            given = replace(session.given, data=replace(splits, test=data))
            session = new_session(session.settings, session.run, shown(progress), given=given)
        star, other = (
            Checkpoint(dict(self.state)),
            checkpoint_of(model, session.network.build(seed=0, device="cpu"), "the model"),
        )
        with threads(session), measuring("a barrier"):
            permutation = match_to(session, star, [other])[0] if matched and session.settings.ends_matched else None
            for name, one, moved in (("the star", star, None), ("the model", other, permutation)):
                check_endpoint(session, name, one, moved)
            ends = endpoint(session, "star", star), endpoint(session, "model", other, permutation)
            (path,), _ = evaluated(session, [Segment("path", *ends)])
        return Barrier.of(path, session.data.names()[-1], session.loss.name)


@dataclass(frozen=True, repr=False)
class Run(WithResults):
    """A run folder: its models, permutations and results.

    Args:
        sources, heldouts: those that are finished; given ones are not among them.
        star: the star model; None: not yet trained.
        results: what `results.json` holds; empty: not yet measured.
    """

    path: Path
    sources: list[TrainedModel]
    heldouts: list[TrainedModel]
    star: Star | None
    results: Mapping[str, Any]

    def __repr__(self) -> str:
        star = "a star" if self.star is not None else "no star"
        return f"Run({self.path}: {len(self.sources)} sources, {len(self.heldouts)} heldouts, {star})"

    @property
    def models(self) -> list[TrainedModel]:
        """All models: sources, heldouts and the star."""
        return [*self.sources, *self.heldouts, *([] if self.star is None else [self.star])]

    @property
    def permutations(self) -> Permutations | None:
        """Those of the sources that the star was trained with."""
        return None if self.star is None else self.star.permutations

    @property
    def value(self) -> float:
        """The mean barrier from the star to the heldouts (without heldouts: to the sources) on the last split.

        Raises:
            FastarError: nothing has been measured yet.
        """
        if not self.results:
            raise FastarError(f"{self.path}: nothing is measured yet; train its star")
        split = self.results["test" if "test" in self.results else "train"]
        return float(split["star_heldout" if split["star_heldout"]["n"] else "star_source"]["mean"])

    def uncertainty(
        self,
        *,
        most: int = 19,
        repetitions: int = 10,
        radius: float = 0.1,
        swag: bool = False,
        corruptions: bool = False,
        ood: str | Sequence[str] = (),
        progress: Progress | bool = False,
    ) -> Uncertainty:
        """Scores of averages around the star and of their uncertainty: the star domain, the ensemble, and controls.

        Args:
            most: networks of the largest average.
            repetitions: sequences of draws.
            radius: of the ball around the star, as a share of its norm.
            swag: add SWA and SWAG, of one more training, which the run folder keeps.
            corruptions: also measure on corrupted images.
            ood: also tell its images from another data set's, or from made ones: noise, gaussian, phase, blocks.

        Raises:
            FastarError: a run that was loaded without its network and data, whose loss is not cross_entropy, or (for
                other images) whose inputs are no images.

        Example:
            >>> import fastar, torch
            >>> from torch import nn
            >>> build = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
            >>> train = torch.randn(60, 4), torch.randint(3, (60,))
            >>> recipe = fastar.Recipe(epochs=1, batch_size=20)
            >>> sources = fastar.train_sources(build, train, recipe, number=2, out="runs/averaged", progress=False)
            >>> star = fastar.train_star(build, sources, train, recipe, out="runs/averaged", progress=False)
            >>> run = fastar.load_run("runs/averaged", build, train)
            >>> found = run.uncertainty(most=2, repetitions=2)
            >>> found.results["families"]["star domain"]["k"], run.fuse().results["predictors"]["ensemble"]["networks"]
            ([1, 2], 2)
        """
        others = [ood] if isinstance(ood, str) else list(ood)
        with self._finished(progress) as run:
            found = measured_uncertainty(
                run,
                most=most,
                repetitions=repetitions,
                radius=radius,
                swag=swag,
                corruptions=corruptions,
                ood=others,
            )
        return Uncertainty(found)

    def fuse(self, *, student: bool = False, swag: bool = False, progress: Progress | bool = False) -> Fusion:
        """Compare ways to make one predictor of the sources: star, mean, greedy soup, ensemble, the best source.

        Args:
            student: add a student of the ensemble: one network, trained once, which the run folder keeps.
            swag: add SWA, of one more training, which the run folder keeps.

        Raises:
            FastarError: as of `uncertainty`.
        """
        with self._finished(progress) as run:
            return Fusion(fuse(run, student=student, swag=swag))

    def perturb(
        self,
        *,
        radii: Sequence[float] = RADII,
        draws: int = 3,
        by_filter: bool = False,
        progress: Progress | bool = False,
    ) -> Perturbation:
        """Perturb the star at random: its loss, and the barriers from it to the heldouts, matched anew.

        Args:
            radii: lengths of the steps, as shares of the star's norm.
            draws: directions for each radius.
            by_filter: perturb each filter by its own norm.

        Raises:
            FastarError: no heldouts, or a run that was loaded without its network and data.
        """
        with self._finished(progress) as run:
            return Perturbation(perturbed_stars(run, radii=radii, draws=draws, by_filter=by_filter))

    def distances(self, *, progress: Progress | bool = False) -> dict[str, Any]:
        """L2 distances, cosines and norms of its models, without and with permutation: what `distances.json` holds,
        which is written into the folder.

        Raises:
            FastarError: no star yet, or a network, data or a loss of Python's that were not given to `load_run`.
        """
        with self._finished(progress) as run:
            return distances(run)

    def graph(self, *, models: int = 12, star_of_one: bool = False, progress: Progress | bool = False) -> Graph:
        """Barriers between all pairs of sources, heldouts, the star and the mean of the sources; hubs compared.

        Args:
            models: the most sources, and the most heldouts; more are drawn from.
            star_of_one: train a star of the first source alone in the folder `star-of-one`, and compare it.

        Raises:
            FastarError: as `distances`; `star_of_one` without heldouts.
        """
        with self._finished(progress) as run:
            return Graph(barrier_graph(run, models=models, star_of_one=star_of_one))

    def plane(
        self,
        *networks: str,
        points: int = 21,
        margin: float = 0.2,
        split: str | None = None,
        progress: Progress | bool = False,
    ) -> Plane:
        """The loss over the plane through three networks, the second and third permuted to match the first.

        Args:
            networks: "star", "mean", "source:0", "heldout:1"; none: star, heldout:0, heldout:1.
            points: of the grid along each axis.
            margin: around the networks, as a share of their extent.
            split: the one to measure on; None: all.

        Raises:
            FastarError: as `distances`; networks that are not there or lie on one line.
        """
        with self._finished(progress) as run:
            return Plane(loss_plane(run, networks or CORNERS, points=points, margin=margin, split=split))

    def curve(self, *networks: str, epochs: int | None = None, progress: Progress | bool = False) -> Curve:
        """Losses along curves between two networks: straight, through the star, and trained for this pair. The trained
        bends are kept in the folder `curves`, and used again.

        Args:
            networks: "star", "mean", "source:0", "heldout:1"; none: heldout:0, heldout:1.
            epochs: of each bend; None: as many as the star's.

        Raises:
            FastarError: as `distances`; networks that are not there or the same.
        """
        with self._finished(progress) as run:
            return Curve(connecting_curves(run, networks or PAIR, epochs=epochs))

    @contextmanager
    def _finished(self, progress: Progress | bool) -> Iterator[FinishedRun]:
        """The run for experiments on it; its folder is this process's until the block ends."""
        known = None if self.star is None else self.star._session
        session = None if known is None else replace(known, progress=shown(progress))
        run = finished_run(RunFolder(self.path), shown(progress), session)
        with run.session.run.held(shown(progress)):
            yield run

    def report_html(self, path: Path | str | None = None) -> Path:
        """Write everything that its folder holds as one HTML page; the file that was written.

            fastar.load_run("runs/mine").report_html()  # runs/mine/report.html

        Args:
            path: the file; None: report.html in the run folder.

        Raises:
            FastarError: it is not called .html, or cannot be written.
        """
        return write_page(self.path, None if path is None else Path(path))


def checkpoint_of(model: Source, network: nn.Module, name: str) -> Checkpoint:
    """A network that was given, as a whole state of `network`.

    Args:
        name: of it, for errors; a file has its own.

    Raises:
        FastarError: it does not fit, or has values that are not finite.
    """
    if isinstance(model, str | Path):
        return load_whole_into(network, load_checkpoint(Path(model)))
    state = model.state if isinstance(model, TrainedModel) else model
    state = state.state_dict() if isinstance(state, nn.Module) else state
    if not isinstance(state, Mapping):
        kind = type(model).__name__
        raise FastarError(f"{name} is a {kind}: give a trained model, a module, a state dict or a file")
    tensors = {key: value.detach().cpu() for key, value in state.items() if isinstance(value, Tensor)}
    for key, value in tensors.items():
        check_values(Path(name), key, value)
    return load_whole_into(network, Checkpoint(tensors, path=Path(name)))


def shown(progress: Progress | bool) -> Progress:
    """The progress that a caller means."""
    if isinstance(progress, bool):
        return TerminalProgress() if progress else SILENT
    return progress
