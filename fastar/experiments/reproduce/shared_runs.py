"""The runs and sweeps below the folder of a reproduction; models of equal recipes are trained once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastar.config import Settings, load_settings, validate
from fastar.errors import FastarError
from fastar.experiments.sweeps import sweep
from fastar.experiments.sweeps.points import Point, points_of, take_over
from fastar.experiments.whole_run import train_star
from fastar.runs import RunFolder
from fastar.runtime.progress import SILENT, Progress

if TYPE_CHECKING:
    from fastar.experiments.finished_run import FinishedRun


@dataclass
class SharedRuns:
    """The folder of a reproduction at one scale.

    Args:
        scale: full, small or smoke.
        overrides: `key=value` over all settings.
    """

    folder: Path
    scale: str
    overrides: Sequence[str] = ()
    progress: Progress = field(default=SILENT)

    def settings(self, part: Mapping[str, Any], *more: str, config: str | None = None) -> Settings:
        """The settings of a part: its configuration at its scale, what it sets, and `more`.

        Raises:
            FastarError: settings that there are not, or no heldouts.
        """
        settings = load_settings(
            file=Path(config or part["config"]),
            scale=part.get("at", self.scale),
            overrides=[*part.get("set", ()), *more, *self.overrides],
        )
        if not settings.sources.heldout:
            raise FastarError("sources.heldout=0: tables and figures show barriers to heldouts; give some")
        return settings

    def point(self, part: Mapping[str, Any], *more: str, config: str | None = None) -> Point:
        """The run of a part, in the folder that is named by its configuration and by what is set."""
        name = ",".join([config or part["config"], *part.get("set", ()), *more]).replace("/", "_")
        return Point(None, {}, self.settings(part, *more, config=config), RunFolder(self.folder / "runs" / name))

    def points(self, part: Mapping[str, Any], folder: Path) -> list[Point]:
        """The points of a part that is a sweep."""
        return points_of(self.settings(part), part["of"], part["values"], folder, part.get("seeds", 1))

    def results(self, point: Point) -> dict[str, Any]:
        """The results of a run, trained where it is not there; models of other runs that are the same are taken."""
        take_over(point, self._known(), self.progress)
        return train_star(point.settings, point.run.path, self.progress)

    @contextmanager
    def finished(self, point: Point) -> Iterator[FinishedRun]:
        """A run, trained where it is not there, for experiments on it."""
        self.results(point)
        with self.opened(point.run) as run:
            yield run

    @contextmanager
    def opened(self, folder: RunFolder) -> Iterator[FinishedRun]:
        """A finished run, whose folder is this process's until the block ends."""
        from fastar.experiments.finished_run import finished_run  # imports torch, which lists do not need

        run = finished_run(folder, self.progress)
        with folder.held(self.progress):
            yield run

    def swept(self, part: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """The results of a sweep in `folder`."""
        return sweep(
            self.settings(part),
            part["of"],
            part["values"],
            folder,
            self.progress,
            seeds=part.get("seeds", 1),
            others=self._known(),
        )

    def _known(self) -> list[Point]:
        """All runs that are there, those of sweeps too; what cannot be read is another's, or damaged, and left out."""
        found = []
        for config in sorted([*self.folder.glob("runs/*/config.yaml"), *self.folder.glob("*/points/*/config.yaml")]):
            run = RunFolder(config.parent)
            try:
                found.append(Point(None, {}, validate(run.saved_settings(), str(config)), run))
            except FastarError:
                continue
        return found
