"""The main job: sources and heldouts, a star model, and how well it is connected (paper, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastar.config import Settings
from fastar.errors import FastarError
from fastar.experiments.measure import measure, speed
from fastar.experiments.plan import Plan
from fastar.experiments.preflight import check_network, prepare_data, use_device_early
from fastar.experiments.regular import device_name, given_sources, regular_models
from fastar.experiments.reuse import finished_results, kept_results, measured_digest
from fastar.experiments.session import MEASURE_WITH_LESS, Context, within_memory
from fastar.experiments.star import star_model, steps_profile
from fastar.runs import RunFolder
from fastar.runs.live_metrics import LiveFigures, import_wandb
from fastar.runtime.memory import peak_bytes
from fastar.runtime.progress import SILENT, Progress, size_text


def prepare_context(settings: Settings, out: Path, progress: Progress = SILENT) -> Context:
    """A context whose cheap checks have passed: device, kernels, precision, dataset, architecture and its settings.

    Raises:
        FastarError: one of them is unknown or not to be had; nothing has been written.
    """
    context = Context(settings, RunFolder(out), progress)
    if settings.logging.wandb:
        import_wandb(settings.logging.wandb)
    use_device_early(context)
    check_network(context)
    return context


def train_sources(settings: Settings, out: Path, progress: Progress = SILENT) -> list[Path]:
    """Train the sources and heldouts of a run that are missing; the files of all of them. `progress` is told of speed
    and memory.

    Raises:
        FastarError: bad input, or sources that are given and not to be trained.
    """
    if settings.sources.folder is not None:
        raise FastarError("sources.folder gives the sources, so none are to be trained; leave it out or use train-star")
    context = prepare_context(settings, out, progress)
    context.run.check(settings)
    planned = planned_bytes(context, prepare_data(context))
    with opened(context), context.threads():
        regular_models(context, "source", settings.sources.number)
        regular_models(context, "heldout", settings.sources.heldout)
    found = speed(context.run.log.read())["regular"]
    if found is not None:
        progress.line(f"training: {found['images_per_second']:,.0f} images/s, {found['limited']}")
    peak = f"{size_text(peak_bytes(context.device))} ({device_name(context.device)})"
    progress.line(f"peak memory: {peak}, {size_text(planned)} planned for the whole run")
    return [
        *(context.run.model("source", i) for i in range(settings.sources.number)),
        *(context.run.model("heldout", i) for i in range(settings.sources.heldout)),
    ]


def train_star(
    settings: Settings, out: Path, progress: Progress = SILENT, *, profile: int | None = None
) -> dict[str, Any]:
    """Do all of it: data, sources, heldouts, star, barriers. What is there and matches is reused.

    Args:
        profile: look at so many steps of the star's training, and write what was found into `profile/`.

    Returns:
        What is written to `results.json`.

    Raises:
        FastarError: bad input; what was finished stays and the same command goes on from there.
    """
    if settings.sources.number + settings.sources.heldout < 2:
        raise FastarError("a barrier between regular models needs two of them: raise sources.number or .heldout")
    run = RunFolder(out)
    run.check(settings)
    if profile is None and (results := finished_results(settings, run, progress)) is not None:
        return results
    context = prepare_context(settings, out, progress)
    planned = planned_bytes(context, prepare_data(context))
    with opened(context), context.threads():
        looking = None if profile is None else steps_profile(context, profile)
        folder = settings.sources.folder
        if folder is not None:
            sources = given_sources(context, folder.expanduser(), settings.sources.number)
        else:
            sources = regular_models(context, "source", settings.sources.number)
        heldouts = regular_models(context, "heldout", settings.sources.heldout)
        star, permutations = star_model(context, sources, profile=looking)
        measured = measured_digest(settings, run, str(context.files.digest))
        # What was missing of the models may have become the same bits again.
        kept = kept_results(run, measured, progress)
        if kept is not None:
            return kept
        with within_memory("measuring barriers", MEASURE_WITH_LESS):
            found = measure(context, star, sources, heldouts, permutations)
        results = {**found, "measured": measured, "planned_bytes": planned}
        run.write_results(results)
    return results


def planned_bytes(context: Context, plan: Plan) -> int:
    """The planned peak of the run's device, as it is measured: on a host with what this process has taken already."""
    return plan.peak("gpu") if "gpu" in plan.limits else plan.peak("host") + peak_bytes(context.device)


@contextmanager
def opened(context: Context) -> Iterator[None]:
    """The run folder held, and its live figures shown, until the block ends."""
    settings, run = context.settings, context.run
    with run.open(settings, context.progress):
        context.figures = LiveFigures(run.path, settings.logging, settings.model_dump(mode="json"))
        try:
            yield
        finally:
            context.figures.close()
            context.figures = None
