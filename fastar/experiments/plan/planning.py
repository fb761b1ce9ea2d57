"""`fastar plan`: memory of the GPU and the host, disk and hours of a run, before anything runs."""

from __future__ import annotations

import functools
import itertools
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastar.config import Settings, as_override, flatten, nested, validate
from fastar.data.counts import DataCounts
from fastar.errors import FastarError, UserCodeError
from fastar.evaluation.batch_norm import statistics_bytes
from fastar.evaluation.paths import ENDS
from fastar.experiments.plan import sizes
from fastar.experiments.plan.preflight import check_together, of_classes
from fastar.experiments.plan.sizes import Item
from fastar.experiments.reuse import model_paths
from fastar.experiments.session import Session, new_session, threads
from fastar.experiments.statistics_batches import LOOKED_AT
from fastar.flat import FlatLayout
from fastar.flat.forward import Batch, arguments_of, on_device
from fastar.losses import Loss, repeated
from fastar.matching import EXAMPLE_BATCHES, Examples, cache_bytes, match
from fastar.matching.activation import match_activations
from fastar.matching.weight import match_weights
from fastar.runs import RunFolder
from fastar.runs.model_files import check_header
from fastar.runtime.live_bytes import LiveBytes
from fastar.runtime.memory import models_that_fit, within_memory
from fastar.runtime.progress import SILENT, Progress, count_text, size_text
from fastar.training import RegularStep, resolve_precision
from fastar.training.amp import DTYPES

MATCHING = "matching of a source"
# Images per second that may be stated.
SLOWEST, FASTEST = 0.001, 1e9
# Steps that are timed, and values in the images of one on a CPU: a larger batch's speed is the same.
STEPS, CPU_VALUES = 3, 1 << 20


def plan_run(
    settings: Settings,
    out: Path,
    speed: float | None = None,
    progress: Progress = SILENT,
    *,
    gpus: int = 1,
    nodes: int = 1,
) -> dict[str, Any]:
    """Plan the run of `settings` in the folder `out`; nothing is written, and the data need not be there. Long, since
    all of a plan stands in one place.

    Args:
        speed: images per second of a GPU, stated; None: measured here, where the run would be here.
        gpus: of a node, each with a process of its own.
        nodes: they share the run folder.

    Returns:
        What the report shows: the `items` that take memory or disk, bytes that are `needed` of the `limits` of each
        place, the `work` that takes time, its `seconds` (None: no speed is known), and `problems`, a line for each
        place that is too small.

    Raises:
        FastarError: a setting out of range, or a set whose size is not known.
    """
    if speed is not None and not SLOWEST <= speed <= FASTEST:
        raise FastarError(f"--images-per-second={speed} must be from {SLOWEST} to {FASTEST:.0f}")
    for name, number in (("gpus", gpus), ("nodes", nodes)):
        if number < 1:
            raise FastarError(f"--{name}={number} must be at least 1")
    session, chosen = new_session(settings, RunFolder(out), progress), settings.dataset
    counts = session.data.counts()
    if counts is None:
        options = f"--dataset {chosen.name} --name {shlex.quote(chosen.label)} --source FOLDER"
        tool = f"python tools/write_ffcv.py {options} --out {shlex.quote(str(chosen.directory))}"
        raise FastarError(f"{chosen.directory.expanduser() / chosen.label}: not written yet; `{tool}` writes it")
    session = of_classes(session, counts.classes)
    check_together(session, counts)
    for kind in ("source", "heldout"):
        for path in model_paths(settings, session.run, kind) if settings.sources.of_kind(kind)[1] is not None else ():
            check_header(session.network.build(seed=0, device="cpu"), path)
    progress.line("planning: counting bytes")
    limits, processes = sizes.limits_of(session, here=False), gpus * nodes
    if processes > 1 and "gpu" not in limits:
        raise FastarError(f"--gpus={gpus} --nodes={nodes}: there is no GPU here; say how large each is (--gpu-memory)")
    notes = [
        "~: estimated, from batches of tensors without memory; all other sizes are exact; memory of CUDA and "
        "its libraries comes on top, and a GPU matches more sources at a time, in up to half of what is left"
    ]
    items_of = _items_by_settings(session, counts, limits, notes.append, processes)
    items = items_of(settings)
    memory = {place: limit for place, limit in limits.items() if place != "disk"}
    lacking = sizes.shortages(items, memory)
    remedy = _remedy(settings, items_of, memory) if lacking else ""
    problems = [f"{line}; {remedy}" for line in lacking] + sizes.shortages(items, {"disk": limits["disk"]})
    speed, matching, rates = _speeds(session, speed, fits=not problems)
    work = work_of(session, counts, speed, matching, processes)
    seconds = [part["seconds"] for part in work]
    if processes > 1:
        notes.append(
            "bytes are those of one process with a GPU of its own, but for the disk; only the one that trains the star "
            "holds its sources; a node's processes share its cores and its disk when they load"
        )
    if chosen.spec.variable_size and not counts.written:
        preset = chosen.encoding or "rn50"
        size = chosen.spec.gigabytes.get(preset)
        about = "" if size is None else f"about {size} GB for training as {preset}, by FFCV's published sizes; "
        notes.append(f"disk: the .beton files are not written yet: {about}tools/write_ffcv.py predicts their size")
    return {
        "title": f"{chosen.label}, {settings.model.arch}: "
        f"{count_text(settings.sources.number, 'source')}, {count_text(settings.sources.heldout, 'heldout')}",
        "device": f"a GPU of {size_text(limits['gpu'])}" if "gpu" in limits else "this machine's CPU",
        "gpus": processes,
        "items": [asdict(item) for item in items],
        "limits": limits,
        "needed": {place: {when: sizes.total(items, place, when) for when in sizes.MOMENTS} for place in limits},
        "work": work,
        "seconds": None if None in seconds else sum(part["rounds"] * part["seconds"] for part in work),
        "rates": rates,
        "notes": list(dict.fromkeys(notes)),
        "problems": problems,
    }


def _items_by_settings(
    session: Session, counts: DataCounts, limits: dict[str, int], say: Callable[[str], None], processes: int
) -> Callable[[Settings], list[Item]]:
    """Count the run's network once; what is returned says all that the run takes, with other batches and stores too.

    Args:
        say: is told what cannot be counted.
    """
    chosen, symmetry, samples = session.settings, session.network.symmetry, session.data.samples
    device, precision = "gpu" if "gpu" in limits else "host", chosen.train.precision
    elsewhere = device == "gpu" and session.device.type == "cpu"  # any GPU that is worth planning for has bf16
    dtype = DTYPES.get(precision, torch.bfloat16) if elsewhere else resolve_precision(precision, session.device)
    model, kept, matching = session.network.build(seed=0, device="cpu"), 0, 0
    if chosen.matching.by_activations and symmetry.groups:
        inputs, _ = session.data.made(min(chosen.train.batch_size, LOOKED_AT))
        kept = cache_bytes(model, symmetry, [inputs] * EXAMPLE_BATCHES)
    if chosen.star_matched_every:
        compared = match_activations.bytes_of_one(symmetry, kept) if kept else 0
        matching = max(match_weights.bytes_of_one(symmetry, chosen.matching.perturbations), compared)
    row, statistics = 4 * FlatLayout.from_module(model).numel, statistics_bytes(model)

    @functools.cache
    def running(count: int, *, training: bool) -> int:
        sample = session.data.made(2, max(sizes.training_sides(chosen), default=None) if training else None)
        try:
            return batch_bytes(model, sample, dtype, count, loss=session.loss, training=training)
        except (RuntimeError, UserCodeError) as error:  # of a user's code, which looks at values
            reason = " ".join(str(error).split())[:100]
            say(f"not counted: activations, since network or loss look at the values of tensors ({reason})")
            return 0

    def items_of(settings: Settings) -> list[Item]:
        batch, wanted = settings.train.batch_size, sizes.evaluated_models(settings)
        some, step = f"{batch} {samples}", running(batch, training=True)
        what, most = (f"a step on {some}", step) if step >= matching else (MATCHING, matching)
        if settings.train.graph and device == "gpu":  # its memory stays while there is matching
            what, most = f"a graph on {some}, and {MATCHING}", step + matching
        # Losses are measured in one batch size, batch-norm statistics in the other.
        batches = [settings.evaluation.batch_size, *([batch] if statistics else [])]
        measured = max(running(size, training=False) for size in batches)
        items = [
            *sizes.exact_items(settings, counts, limits, model, dtype, kept, processes),
            Item(device, what, most, "training", exact=False),
            Item(device, f"{samples} and activations", measured, "evaluation", exact=False),
            Item(device, "ends of paths, and one model", (ENDS + 1) * row, "evaluation"),
        ]
        free = max(0, limits[device] - sizes.total(items, device, "evaluation"))
        models = models_that_fit(row + statistics, free, wanted, 0, gpu=device == "gpu")
        held = models * (row + statistics)
        return [*items, Item(device, f"{models} of {wanted} models at a time", held, "evaluation")]

    return items_of


def batch_bytes(
    model: nn.Module, sample: Batch, dtype: torch.dtype, count: int, *, loss: Loss, training: bool = True
) -> int:
    """Peak bytes of a batch of `count` samples, its tensors included, counted on tensors without memory; those of
    `model` are not touched.

    Args:
        model: put into training or evaluation mode.
        sample: inputs and targets of some samples.
        dtype: of a step.
        loss: its metrics are not counted.
        training: a step (forward, backward, and the new gradients), else an evaluation, in fp32.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes seconds to import

    model.train(training)
    sample = on_device(sample, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = {}
        for name, one in (*model.named_parameters(), *model.named_buffers()):
            held = dtype if training and one.ndim > 1 else one.dtype  # as `flat.WorkingWeights` holds them
            tensors[name] = torch.empty_like(one, dtype=held, device="cpu", requires_grad=one.requires_grad)
        with LiveBytes() as live, torch.set_grad_enabled(training):
            inputs, targets = repeated(sample, count)
            with torch.autocast("cpu", dtype, enabled=training and dtype != torch.float32, cache_enabled=False):
                outputs = torch.func.functional_call(model, tensors, *arguments_of(inputs))
            found = loss.mean(outputs, targets)
            if training:
                found.backward()
    return live.peak


def _speeds(session: Session, speed: float | None, *, fits: bool) -> tuple[float | None, float | None, str]:
    """Images per second, seconds of matching a source (None: not known), and what they are from."""
    settings, samples, matching = session.settings, session.data.samples, None
    if speed is not None:
        rates = f"{speed:,.6g} {samples}/s stated, for evaluation too"
    elif settings.gpu_memory is not None and session.device.type == "cpu":
        rates = "give --images-per-second: the GPU's speed cannot be measured here"
    elif not fits:
        rates = "give --images-per-second: a run that does not fit is not timed"
    else:
        session.progress.line("planning: timing some steps")
        speed = images_per_second(session)
        rates = f"{speed:,.0f} {samples}/s of training measured here, for evaluation too; loading is not counted"
    if settings.star_matched_every and settings.matching.method in ("weight", "activation"):
        session.progress.line("planning: timing a matching")
        matching = matching_seconds(session)
        rates += f"; matching measured on {session.device}"
    return speed, matching, rates


def images_per_second(session: Session) -> float:
    """The speed of regular steps on `made` samples, on the run's device; loading is not timed."""
    from torch.utils.benchmark import Timer  # takes a third of a second to import

    device, train = session.device, session.settings.train
    batch = train.batch_size
    if device.type == "cpu":
        values = sum(one.numel() for one in tree_leaves(session.data.made(1)[0]) if isinstance(one, Tensor))
        batch = min(batch, max(2, CPU_VALUES // max(1, values)))
    inputs, targets = session.data.made(batch)
    lr = torch.zeros((), dtype=torch.float32, device=device)
    with threads(session), within_memory("timing steps", "give --images-per-second"):
        plain = train.model_copy(update={"graph": False, "compile": False})
        step = RegularStep(session.network.build(seed=0), plain, loss=session.loss)
        given = {"step": step, "inputs": inputs, "targets": targets, "lr": lr}
        timer = Timer("step(inputs, targets, lr)", globals=given, num_threads=torch.get_num_threads())
        speed = batch / float(timer.timeit(STEPS).mean)
    # Epochs on smaller images take less, by as much.
    sides, full = sizes.training_sides(session.settings), session.settings.dataset.side
    return speed * full**2 * len(sides) / sum(side**2 for side in sides) if sides else speed


def matching_seconds(session: Session) -> float:
    """Seconds of matching a source that few sweeps match, as in all epochs but the first ones."""
    network, symmetry, settings = session.network, session.network.symmetry, session.settings
    theta = network.build(seed=0).state_dict()
    moved = symmetry.apply(symmetry.random(0), theta)
    sources = {name: moved[name][None] for name in symmetry.parameters}

    def examples() -> Examples:
        batch = session.data.made(min(settings.train.batch_size, LOOKED_AT))
        return Examples(network.build(seed=0), [batch] * EXAMPLE_BATCHES, session.loss)

    matched = functools.partial(match, settings.matching, symmetry, theta, sources, threads=settings.workers)
    first = matched(examples=examples).seconds  # the start of the device, or of a library, may take its time
    return first if session.device.type == "cpu" and first > 1 else min(first, matched(examples=examples).seconds)


def work_of(
    session: Session, counts: DataCounts, speed: float | None, matching: float | None, processes: int = 1
) -> list[dict[str, Any]]:
    """All parts of the run, in order: what, how many times, how many of these one after the other (`rounds`), and
    seconds of each time (None: no speed is known).

    Args:
        speed: images per second, of training and of evaluation.
        matching: seconds of matching a source.
        processes: that share regular models, and points that are measured; the star is one's.
    """
    settings, train, evaluation = session.settings, session.settings.train, session.settings.evaluation
    regular = settings.sources.heldout + (settings.sources.number if settings.sources.folder is None else 0)
    epochs, every = settings.star_epochs, settings.star_matched_every
    limits = (evaluation.limit, evaluation.limit, evaluation.test_limit)
    splits = (counts.train, counts.validation, counts.test)
    measured = sum(min(n, limit or n) for n, limit in zip(splits, limits, strict=True))
    if session.network.has_batch_norm:
        batches = evaluation.bn_batches
        measured += counts.train if batches is None else min(counts.train, batches * train.batch_size)
    epoch, model = (None if speed is None else images / speed for images in (counts.train, measured))
    longest, points = -(-regular // processes) * train.epochs, regular + 1 + sizes.evaluated_models(settings)
    parts = [("epoch of a regular model", regular * train.epochs, longest, epoch)]
    parts.append(("epoch of the star", epochs, epochs, epoch))
    if every:
        times = settings.sources.number * (-(-epochs // every) + (settings.star.start == "mean"))
        parts.append((MATCHING, times, times, matching))
    parts.append(("model or point of a path measured", points, -(-points // processes), model))
    return [dict(zip(("what", "times", "rounds", "seconds"), part, strict=True)) for part in parts]


def _remedy(settings: Settings, items_of: Callable[[Settings], list[Item]], memory: dict[str, int]) -> str:
    """The first settings with which `memory` is enough: sources elsewhere, then smaller batches of evaluation, and last
    of training, which change the result."""
    old, keys = flatten(settings.model_dump()), ("train.batch_size", "evaluation.batch_size", "sources.store")
    halved = [[old[key] >> times for times in range(max(1, old[key].bit_length() - 1))] for key in keys[:2]]
    for values in itertools.product(*halved, (old["sources.store"], "host", "file")):
        changed = dict(zip(keys, values, strict=True))
        if not sizes.shortages(items_of(validate(nested({**old, **changed}))), memory):
            said = [as_override(key, changed[key]) for key in reversed(keys) if changed[key] != old[key]]
            return f"{' '.join(said)} makes it fit"
    return "use a smaller network (model.width), or more memory"
