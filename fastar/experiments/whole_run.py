"""The entrance to the main job: a run that is finished is known by its files, before anything slow is imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastar.config import Settings
from fastar.errors import FastarError
from fastar.experiments.reuse import finished_results
from fastar.runs import RunFolder
from fastar.runtime import ranks
from fastar.runtime.progress import SILENT, Progress

if TYPE_CHECKING:
    from fastar.experiments.user_task import Given


def check_whole(settings: Settings, run: RunFolder) -> None:
    """Raise FastarError unless a whole run with these settings may be done, or gone on with, in its folder."""
    if settings.sources.number + settings.sources.heldout < 2:
        raise FastarError("a barrier between regular models needs two of them: give more sources or heldouts")
    run.check(settings)


def known_results(
    settings: Settings, run: RunFolder, progress: Progress = SILENT, given: Given | None = None
) -> dict[str, Any] | None:
    """The results of a run that is finished; None: it is not."""

    def task() -> str:
        from fastar.experiments.regular import task_digest  # a user's functions import torch anyway
        from fastar.experiments.session import new_session

        return task_digest(new_session(settings, run, given=given))

    own = given is not None or settings.names_code
    return finished_results(settings, run, progress, task=task if own else None)


def train_star(
    settings: Settings,
    out: Path,
    progress: Progress = SILENT,
    *,
    profile: int | None = None,
    measured_by: int | None = None,
    given: Given | None = None,
) -> dict[str, Any]:
    """Do a whole run (`star_domain.do_run`), unless it is finished.

    Args:
        profile: look at so many steps of the star's training.
        measured_by: as of `do_run`.
        given: parts of the task that the settings do not name.

    Returns:
        The content of `results.json`; empty where `measured_by` is 0 and it is not there.

    Raises:
        FastarError: the folder belongs to another run, or bad input.
    """
    run = RunFolder(out)

    def finished() -> dict[str, Any] | None:
        check_whole(settings, run)
        return known_results(settings, run, progress, given) if profile is None else None

    results = ranks.by_first(finished)
    if results is None:
        from fastar.experiments.star_domain import do_run  # only now torch and all that is slow to import

        results = do_run(settings, out, progress, profile=profile, measured_by=measured_by, given=given)
    return results
