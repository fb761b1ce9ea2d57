"""Checks made before the data set is converted and models are trained, which can take hours: arithmetic alone."""

from __future__ import annotations

import itertools
from functools import partial

from fastar.config import Settings, changes, parse_bytes
from fastar.data.counts import DataCounts
from fastar.errors import FastarError
from fastar.experiments.plan.sizes import exact_items, limits_of, shortages, training_sides
from fastar.experiments.plan.trial import check_task
from fastar.experiments.session import Session, new_session
from fastar.experiments.task import RunData
from fastar.flat import check_kernels
from fastar.runtime import ranks
from fastar.runtime.memory import cap_gpu
from fastar.training import check_batch, resolve_precision


def use_device(session: Session) -> None:
    """Make sure that the run's device can do what the settings ask for.

    Raises:
        FastarError: kernels or a precision that are not to be had.
    """
    settings = session.settings
    check_kernels(session.device)
    resolve_precision(settings.train.precision, session.device)
    if settings.gpu_memory is not None and session.device.type == "cuda":
        cap_gpu(session.device, parse_bytes(settings.gpu_memory))


def check_network(session: Session) -> None:
    """Build the run's network once, on the CPU and for any number of classes, which only the files may know.

    Raises:
        FastarError: an architecture that is not known, or does not take these images or settings.
    """
    of_classes(session, 2).network.build(seed=0, device="cpu")


def prepare_data(session: Session) -> None:
    """Write the data where they are not there yet, once `check_run` has passed; again, by the files' own counts, when
    they are. Network, data and loss are run together once before.

    Raises:
        FastarError: the run does not fit; data that cannot be had, or that do not go with the network or the loss.
    """
    for written in (False, True):
        counts = session.data.counts(written=written)
        if counts is None:
            said = "the images are not counted yet: whether the run fits is checked when they are written"
            session.progress.line(said)
        else:
            check_together(session, counts)
            check_run(session, counts)
            if counts.written:
                break
    settings = session.settings
    if settings.sources.folder is None and settings.sources.number + settings.sources.heldout > 1:
        session.network.check_seeded()


def prepare_ranks(session: Session, *, star: bool) -> None:
    """`prepare_data`, which the first rank does before the others; the ranks can share the training.

    Raises:
        FastarError: as `prepare_data`, or settings or batches that ranks cannot share.
    """
    check_rank_settings(session.settings, star=star)
    ranks.by_first(partial(prepare_data, session))
    if not ranks.is_first() and session.runs_user_code:  # samples of a user's data are checked where they are read
        prepare_data(session)
    check_ranks(session, star=star)


def check_together(session: Session, counts: DataCounts) -> None:
    """Raise FastarError unless a batch can be trained on, and network, data and loss go together: they are run once."""
    check_batches(session, counts.train)
    known = of_classes(session, counts.classes)
    data = known.data if counts.written else session.data  # published numbers may not be those of the files
    check_task(known.network, data, session.loss, session.device)


def check_run(session: Session, counts: DataCounts) -> None:
    """Compare rows, data set, store and files of the run, which are known exactly, with the memory and the disk.

    Raises:
        FastarError: they do not fit.
    """
    settings = session.settings
    if settings.gpu_memory is not None and session.device.type == "cpu":
        session.progress.line(f"gpu_memory={settings.gpu_memory}: this run is on the CPU, where it bounds nothing")
    model = of_classes(session, counts.classes).network.build(seed=0, device="cpu")
    dtype, limits = resolve_precision(settings.train.precision, session.device), limits_of(session, here=True)
    limits["host"] //= ranks.on_this_host()  # each rank takes what one alone would
    for line in shortages(exact_items(settings, counts, limits, model, dtype), limits):
        more = " (see `fastar plan`)" if session.given.build is None else ""
        raise FastarError(f"this run does not fit: {line}{more}")


def of_classes(session: Session, classes: int | None) -> Session:
    """The session for so many classes, which otherwise the files of named data must say."""
    if classes is None or not isinstance(session.data, RunData):
        return session
    return new_session(session.settings, session.run, session.progress, classes=classes, given=session.given)


def check_batches(session: Session, samples: int) -> None:
    """Raise FastarError unless so many training samples make a batch, and none of a single one where a layer takes no
    variance of that."""
    train = session.settings.train
    check_batch(train, samples)
    size = train.batch_size
    if size > 1 and (train.drop_last or samples % size != 1):
        return
    side = min(training_sides(session.settings), default=None)
    layer = of_classes(session, 2).network.layer_of_single_values(side)
    if layer is None:
        return
    none = f"batch-norm layer {layer} takes no variance of one sample"
    if size == 1:
        raise FastarError(f"train.batch_size=1: {none}; raise it")
    other = next(other for other in itertools.count(size + 1) if samples % other != 1)
    raise FastarError(
        f"train.drop_last=false: the last of {samples} {session.data.samples} in batches of {size} is alone, and "
        f"{none}; set train.batch_size={other} or train.drop_last=true"
    )


def check_rank_settings(settings: Settings, *, star: bool) -> None:
    """Raise FastarError unless several ranks have the same settings, and can train by them, whatever the data; of a
    star, unless each can have a source where it needs one."""
    train, count = settings.train, ranks.world()
    if count == 1:
        return
    first, *others = ranks.gathered(settings.model_dump(mode="json"))
    for number, other in enumerate(others, start=1):
        for key, (wanted, found) in changes(first, other).items():
            raise FastarError(f"{key} is {found!r} on rank {number}, {wanted!r} on rank 0: give all the same command")
    if train.graph is True:
        raise FastarError("train.graph=true: steps on several ranks are not captured; set it to false")
    if train.compile is True and train.sync_batch_norm:
        raise FastarError("train.compile=true: synchronised batch norm is not compiled; set train.compile=false")
    if train.batch_size < count:
        what = f"train.batch_size={train.batch_size}"
        raise FastarError(f"{what} is less than one sample for each of {count} ranks; raise it")
    if star and settings.star.draws == "each" and settings.sources.number < count:
        raise FastarError(f"star.draws=each: {settings.sources.number} sources for {count} ranks; give each rank one")


def check_ranks(session: Session, *, star: bool) -> None:
    """Raise FastarError unless several ranks can share the batches of the training data."""
    train, data, count = session.settings.train, session.data.train, ranks.world()
    if count == 1:
        return
    if not data.exact:
        raise FastarError(
            "the training data come in batches of their own, which ranks cannot share: give tensors or a map-style "
            "Dataset"
        )
    size = train.batch_size
    last = 0 if train.drop_last else len(data) % size
    each = star and session.settings.star.draws == "each"
    if 0 < last < count and (each or train.sync_batch_norm):
        why = "star.draws=each" if each else "train.sync_batch_norm=true"
        raise FastarError(
            f"train.drop_last=false: an epoch's last batch is of {last} for {count} ranks, {why} needs one for each; "
            "set train.drop_last=true, or another train.batch_size"
        )
    alone = any(len(ranks.share(one, rank, count)) == 1 for one in (size, last) for rank in range(count))
    if not alone or train.sync_batch_norm:
        return
    layer = session.network.layer_of_single_values(min(training_sides(session.settings), default=None))
    if layer is not None:
        raise FastarError(
            f"train.batch_size={size} on {count} ranks leaves one sample to a rank, and batch-norm layer {layer} takes "
            "no variance of one; raise it, or set train.sync_batch_norm=true"
        )
