"""The models of a finished run, opened from its folder, for experiments on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastar.config.load import validate
from fastar.errors import FastarError
from fastar.experiments.matchings import Matchings, star_permutations
from fastar.experiments.measure import match_to
from fastar.experiments.plan import check_network, use_device
from fastar.experiments.regular import device_name, given_models
from fastar.experiments.session import Session, new_session
from fastar.runs import RunFolder, versions
from fastar.runs.model_files import Checkpoint, load_checkpoint, state_digest
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.user_code import can_be_found
from fastar.symmetry import Permutations


@dataclass(frozen=True)
class FinishedRun:
    """A run whose star is trained: its session and its models, read when they are asked for."""

    session: Session

    @cached_property
    def star(self) -> Checkpoint:
        return load_checkpoint(self.session.run.star, own=True).released()

    @cached_property
    def sources(self) -> list[Checkpoint]:
        return self._models("source")

    @cached_property
    def heldouts(self) -> list[Checkpoint]:
        return self._models("heldout")

    @cached_property
    def permutations(self) -> list[Permutations] | list[None]:
        """Those of the sources that match them to the star: as its barriers were measured with, where they are kept;
        else found from where its training left them. None: the run does not match."""
        if not self.session.settings.ends_matched:
            return [None] * len(self.sources)
        start = star_permutations(self.session.run.permutations) or None
        return self.matched(self.star, self.sources, start=start, progress=self.session.progress)

    def matched(
        self,
        first: Checkpoint,
        others: Sequence[Checkpoint],
        *,
        start: Permutations | None = None,
        progress: Progress = SILENT,
    ) -> list[Permutations]:
        """The permutations of `others` that match each to `first`: those that the run's barriers were measured with,
        others anew, from `start`."""
        kept = self._kept
        found = {i: kept.between(first, other) for i, other in enumerate(others) if kept.has(first, other)}
        missing = [i for i in range(len(others)) if i not in found]
        if missing:
            known = None if start is None else Permutations({name: index[missing] for name, index in start.items()})
            some = [others[i] for i in missing]
            found |= zip(missing, match_to(self.session, first, some, start=known, progress=progress), strict=True)
        return [found[i] for i in range(len(others))]

    def described(self) -> dict[str, Any]:
        """Facts of the run that the results of an experiment on it begin with."""
        settings = self.session.settings
        return {
            "dataset": settings.dataset.label,
            "arch": settings.model.arch,
            "sources": settings.sources.number,
            "seed": settings.seed,
            "star_digest": state_digest(self.star),
            "versions": versions(),
            "device": device_name(self.session.device),
        }

    @cached_property
    def _kept(self) -> Matchings:
        path = self.session.run.matchings
        return Matchings.load(path) if path.is_file() else Matchings()

    def _models(self, kind: str) -> list[Checkpoint]:
        """The run's own models, or those that were given, each left in its file and its digest taken once."""
        run, (number, folder) = self.session.run, self.session.settings.sources.of_kind(kind)
        if folder is not None:
            return [one.released() for one in given_models(self.session, kind)]
        missing = next((index for index in range(number) if not run.finished(kind, index)), None)
        if missing is not None:
            raise FastarError(f"{run.model(kind, missing)}: missing; finish the run first: give its command again")
        return [load_checkpoint(run.model(kind, index), own=True).released() for index in range(number)]


def finished_run(run: RunFolder, progress: Progress = SILENT, session: Session | None = None) -> FinishedRun:
    """A run whose star is trained.

    Args:
        session: of it, where its task was given from Python; None: from its settings.

    Raises:
        FastarError: no run folder, a star that is not trained yet, or a task that was given from Python.
    """
    saved: dict[str, Any] = run.saved_settings()
    if not run.finished("star", 0):
        raise FastarError(f"{run.path}: its star is not trained yet; give its `fastar train-star` command again")
    if session is None:
        settings = validate(saved, str(run.config))
        named = settings.dataset.name, settings.model.arch, settings.loss, *(settings.metrics or ())
        given = [name for name in named if not can_be_found(name)]
        if given:
            raise FastarError(
                f"{run.path}: its {given[0]} was given from Python: open it there, and give build and train to "
                "fastar.load_run"
            )
        session = new_session(settings, run, progress)
        use_device(session)
        check_network(session)
    return FinishedRun(session)
