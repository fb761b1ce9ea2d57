"""The main job: sources, a star model, heldouts, and how well it is connected (paper, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastar.config import Settings
from fastar.errors import FastarError
from fastar.experiments.epoch_times import speed
from fastar.experiments.measure import measure
from fastar.experiments.plan import check_network, prepare_ranks, use_device
from fastar.experiments.regular import device_name, models_of, task_digest, train_regulars, train_small
from fastar.experiments.reuse import finished_results, measured_digest
from fastar.experiments.session import Session, measuring, new_session, opened, threads
from fastar.experiments.shared_measuring import SharedMeasuring
from fastar.experiments.star import star_model, steps_profile
from fastar.experiments.user_task import Given
from fastar.experiments.work_list import Model, alone_at, claimed
from fastar.runs import RunFolder, delete, stored_digest
from fastar.runs.live_metrics import import_wandb
from fastar.runs.model_files import Checkpoint, load_checkpoint
from fastar.runtime import ranks
from fastar.runtime.memory import peak_bytes
from fastar.runtime.progress import SILENT, Progress, size_text
from fastar.symmetry import Permutations


def prepare_session(settings: Settings, out: Path, progress: Progress = SILENT, given: Given | None = None) -> Session:
    """A session whose cheap checks have passed: device, kernels, precision, dataset, architecture and its settings.

    Raises:
        FastarError: one of them is unknown or not to be had; nothing has been written.
    """
    if settings.logging.wandb:
        import_wandb(settings.logging.wandb)
    session = new_session(settings, RunFolder(out), progress, given=given)
    use_device(session)
    check_network(session)
    return session


def train_sources(
    settings: Settings,
    out: Path,
    progress: Progress = SILENT,
    *,
    kinds: Sequence[str] = ("source", "heldout"),
    only: range | None = None,
    given: Given | None = None,
) -> list[Path]:
    """Train the sources and heldouts of a run that are missing, with other processes that do the same; the files of all
    of them. `progress` is told of speed and memory.

    Args:
        kinds: which of the two; those that are given are left out.
        only: numbers of those that are wanted, counted from 0, sources before heldouts; None: all.
        given: parts of the task that the settings do not name.

    Raises:
        FastarError: bad input, or models that are given and not to be trained.
    """
    run, numbers = RunFolder(out), {k: number for k, number in settings.sources.trained().items() if k in kinds}
    if not numbers:
        kind = kinds[0]
        name = "sources.folder" if kind == "source" else "sources.heldout_folder"
        raise FastarError(
            f"{name} gives the {kind}s, so none are to be trained; leave it out, or choose another run folder (out)"
        )
    whole = sum(numbers.values())
    if only is not None and (not only or only[-1] >= whole):
        asked = f"{only.start}" if len(only) == 1 else f"{only.start}-{only.stop - 1}"
        raise FastarError(
            f"--only {asked}: the run's sources and heldouts have the numbers 0 to {whole - 1}; give some of them"
        )
    ranks.by_first(partial(run.check, settings))
    session = prepare_session(settings, out, progress, given)
    prepare_ranks(session, star=False)
    models: list[Model] = [(kind, index) for kind, number in numbers.items() for index in range(number)]
    models = models if only is None else models[only.start : only.stop]
    if session.runs_user_code and not all(run.finished(*model) for model in models):
        try:
            _ = session.network.symmetry
        except FastarError as error:  # they may be wanted for something else
            progress.line(f"a star of these networks will be refused as it stands: {error}")
    with opened(session) as session, threads(session):
        train_small(session, models)
        train_regulars(session, models)
        for model in models:  # read, and so checked
            load_checkpoint(run.model(*model), own=True)
    found = speed(run.log.read())["regular"] if ranks.is_first() else None
    if found is not None:
        progress.line(f"training: {found['images_per_second']:,.0f} samples/s, {found['limited']}")
    progress.line(f"peak memory: {size_text(peak_bytes(session.device))} ({device_name(session.device)})")
    return [run.model(*model) for model in models]


def do_run(
    settings: Settings,
    out: Path,
    progress: Progress = SILENT,
    *,
    profile: int | None = None,
    measured_by: int | None = None,
    given: Given | None = None,
) -> dict[str, Any]:
    """Do all of a run: data, sources, star, heldouts, barriers. Models that are there and match are reused.

    Args:
        profile: look at so many steps of the star's training, and write what was found into `profile/`.
        measured_by: processes that share the measuring, though some come later; 0: end once the star is trained.
        given: parts of the task that the settings do not name.

    Returns:
        The content of `results.json`; empty where `measured_by` is 0.

    Raises:
        FastarError: bad input; what was finished stays and the same command goes on from there.
    """
    session = prepare_session(settings, out, progress, given)
    prepare_ranks(session, star=True)
    session.network.share_symmetry()  # units that cannot be matched are named before anything is trained
    with opened(session) as session, threads(session):
        looking = None if profile is None or not ranks.is_first() else steps_profile(session, profile)
        numbers = settings.sources.trained()
        train_small(session, [(kind, index) for kind, number in numbers.items() for index in range(number)])
        found = models_of(session, "source")
        with star_claimed(session):
            star, sources, permutations = star_model(session, found, profile=looking)
        if measured_by == 0:
            return {}
        heldouts = [one.released() for one in models_of(session, "heldout")]
        return ranks.by_first(partial(measured_run, session, star, sources, heldouts, permutations, measured_by or 1))


@contextmanager
def star_claimed(session: Session) -> Iterator[None]:
    """Hold the star until the block ends; while another process trains it, train heldouts, or wait."""
    with claimed(session, "star") as ours:
        if ours:
            yield
            return
    for _ in models_of(session, "heldout"):
        pass
    with alone_at(session, "star"):
        yield


def measured_run(
    session: Session,
    star: Checkpoint,
    sources: Sequence[Checkpoint],
    heldouts: Sequence[Checkpoint],
    permutations: Permutations | None,
    processes: int = 1,
) -> dict[str, Any]:
    """Measure a run's barriers, with the other processes at work on it, and write its results; the results.

    Args:
        processes: at least so many, though some come later.
    """
    run, settings = session.run, session.settings
    digest = measured_digest(settings, run, task_digest(session))
    with measuring("barriers"):
        share = SharedMeasuring(session, digest, processes)
        found, matchings = measure(session, star, sources, heldouts, permutations, share)
    with alone_at(session, "results"):
        results = finished_results(settings, run, session.progress, task=partial(task_digest, session))
        if results is not None:  # of another
            return results
        delete(run.results)  # of other permutations than those that are written first
        kept = matchings.save(run.matchings)
        results = {
            **found,
            "measured": digest,
            "matchings": {"file": run.matchings.name, "digest": stored_digest(run.matchings)} if kept else None,
        }
        run.write_results(results)
    return results
