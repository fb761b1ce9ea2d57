"""What is known of a run's data and work before anything runs: from files that are there, or from what is published."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from fastar import data
from fastar.config import Settings, dataset_spec
from fastar.data.ffcv.read import BATCH as READ_AT_ONCE
from fastar.data.ffcv.read import BUFFERS
from fastar.data.in_memory import BLOCK_BYTES, NORMALISED_BYTES
from fastar.errors import FastarError
from fastar.evaluation.forward import Pass, Shown
from fastar.experiments.session import Session
from fastar.training import resolution

# Of an image in a set that is held: its label and place (int64), and in an epoch its place in the order and its draws.
HELD_BESIDE, DRAWN_BESIDE = 16, 33
# Of a number of the next images, while the last ones are still there: in fp32; as gathered bytes, if they are not held
# normalised; of those that stream the bytes that came, mirrored, and those that are chosen.
COMING_NORMALISED, COMING_HELD, COMING_STREAMED = 4, 5, 7


@dataclass(frozen=True)
class DataFacts:
    """What is known of a data set.

    Args:
        train: images that are trained on.
        validation: training images that are kept out of it.
        test: images of the split.
        disk: bytes of the files; None: not known until they are written.
        written: whether the files are there.
        resident: bytes on the device, of a set that is held there; 0: it streams.
        reading: bytes on the host while a split is read.
        normalised: whether the training images are held normalised too.
        coming: bytes that a number of the next training images takes, while the last ones are still there.
    """

    train: int
    validation: int
    test: int
    classes: int
    disk: int | None
    written: bool
    resident: int
    reading: int
    normalised: bool
    coming: int

    @property
    def streams(self) -> bool:
        return self.resident == 0


def data_facts(context: Session) -> DataFacts:
    """What is known of the data: from their files, from the names of raw images, or of what is published.

    Raises:
        FastarError: a set of the user's own whose files are not written yet.
    """
    chosen = context.settings.dataset
    spec = chosen.spec
    folder = chosen.directory.expanduser() / chosen.label
    files: data.DatasetFiles | None = None
    listed = None
    if data.is_finished(folder):
        files = data.open_files(folder)
    elif spec.variable_size and chosen.root is not None:
        listed = data.count_images(chosen.root.expanduser(), val_share=chosen.val_share)
    if files is not None:
        train, test, classes = files.count("train"), files.count("test"), len(files.classes)
        disk = sum(files.path(split).stat().st_size for split in ("train", "test"))
    elif listed is not None:
        (train, test, classes), disk = listed, None
    elif spec.train is not None and spec.test is not None and spec.class_count is not None:
        train, test, classes, disk = spec.train, spec.test, spec.class_count, None
    else:
        raise FastarError(
            f"{folder}: not written yet; `python tools/write_ffcv.py --dataset {chosen.name} "
            f"--name {shlex.quote(chosen.label)} --source FOLDER --out {shlex.quote(str(chosen.directory))}` writes it"
        )
    validation = data.held_out(train, chosen.validation, chosen.label)
    train -= validation
    data.check_limit(
        chosen.limit, count=train, classes=classes, split="train", name=chosen.label, validation=chosen.validation
    )
    train = min(train, chosen.limit or train)
    resident = reading = 0
    normalised, coming = False, COMING_STREAMED
    if not spec.variable_size:
        pixels = spec.channels * spec.height * spec.width
        whole = {"train": (spec.train or train) * pixels, "test": (spec.test or test) * pixels}
        if files is None:
            disk = sum(whole.values())
        else:
            whole = {split: files.path(split).stat().st_size for split in whole}
        normalised = kept_normalised(train, pixels)
        coming = COMING_NORMALISED if normalised and not spec.augmentation else COMING_HELD
        on_host = 0
        for split, count in _splits_held(context.settings, train, validation, test):
            # Bytes, and beside them normalised floats where those are few; the file they come from is mapped meanwhile.
            held = count * (pixels * (5 if kept_normalised(count, pixels) else 1) + HELD_BESIDE)
            resident += held
            on_host = held + (on_host if context.device.type == "cpu" and context.settings.gpu_memory is None else 0)
            reading = max(reading, on_host + whole[split])
        reading += BUFFERS * READ_AT_ONCE * pixels
    return DataFacts(train, validation, test, classes, disk, files is not None, resident, reading, normalised, coming)


def published_gigabytes(encoding: data.Encoding) -> float | None:
    """Of ImageNet's training set as `encoding` writes it: on a straight line between the published sizes. None for
    another quality or side.

    >>> round(published_gigabytes(data.Encoding(512, 1.0, 90)), 2)
    65.47
    """
    side, published = encoding.max_resolution, dataset_spec("imagenet").gigabytes
    sides = sorted(published)
    if side is None or encoding.jpeg_quality != 90 or not sides[0] <= side <= sides[-1]:
        return None
    above = next(i for i, other in enumerate(sides) if other >= side) or 1
    low, high = sides[above - 1], sides[above]
    share = (side - low) / (high - low)
    raw, jpeg = (a + share * (b - a) for a, b in zip(published[low], published[high], strict=True))
    return raw + encoding.compress_probability * (jpeg - raw)


def kept_normalised(count: int, pixels: int) -> bool:
    """Whether so many images of so many numbers are held normalised, as `DeviceDataset` does."""
    return 4 * count * pixels <= NORMALISED_BYTES


def _splits_held(settings: Settings, train: int, validation: int, test: int) -> Iterator[tuple[str, int]]:
    """(file, images) of each data set that a run holds on the device, in the order in which they are read."""
    evaluation = settings.evaluation
    yield "train", train
    yield "test", test
    if validation:
        yield "train", min(validation, evaluation.limit or validation)
    if evaluation.limit is not None and evaluation.limit < train:
        yield "train", evaluation.limit
    if evaluation.test_limit is not None and evaluation.test_limit < test:
        yield "test", evaluation.test_limit


def evaluated_models(context: Session) -> int:
    """Models that evaluation looks at: the inner points of all paths, and the ends."""
    settings = context.settings
    sources, heldouts, wanted = settings.sources.number, settings.sources.heldout, settings.evaluation.star_sources
    regular = sources + heldouts
    pairs = min(settings.evaluation.regular_pairs, regular * (regular - 1) // 2)
    stars = heldouts + (sources if wanted is None else min(sources, wanted))
    paths = stars + pairs * (2 if settings.ends_matched else 1)
    return paths * (settings.evaluation.points - 2) + 1 + stars + min(2 * pairs * 2, regular + pairs)


def training_sides(context: Session) -> list[int]:
    """The side of the images of each epoch of training."""
    train, star = context.settings.train, context.settings.star
    epochs = max(train.epochs, star.epochs or 0)
    return [resolution(train, epoch) or max(context.data.image[1:]) for epoch in range(epochs)]


def gathered(facts: DataFacts, pixels: int, batch: int, count: int, device: str) -> int:
    """Images that are on the device in fp32 at a time: a batch, or of a set that is held there a block of batches, as
    `DeviceDataset` makes them."""
    if facts.streams:
        return batch
    return min(max(1, BLOCK_BYTES[device] // (4 * pixels * batch)) * batch, count)


def shown_bytes(
    facts: DataFacts, image: tuple[int, int, int], measured_batch: int, batch: int | None, device: str
) -> Shown:
    """What evaluation is shown of a data set, in batches of `measured_batch`, and for batch-norm statistics of `batch`
    (None: there is no batch-norm)."""
    pixels, passes = math.prod(image), []
    for size, free in ((measured_batch, facts.normalised), (batch, False)):  # what is held normalised is shown as it is
        if size is not None:
            images = 0 if free else gathered(facts, pixels, size, facts.train, device)
            passes.append(Pass(size, 4 * pixels * images, facts.coming * pixels * images))
    return Shown(image, tuple(passes))


def shown(context: Session) -> Shown:
    """What evaluation is shown in a run."""
    settings = context.settings
    batch = settings.train.batch_size if context.network.has_batch_norm else None
    return shown_bytes(
        data_facts(context), context.data.image, settings.evaluation.batch_size, batch, context.device.type
    )


def short_batch(count: int, batch: int) -> int:
    """Images of the last batch of a pass, where that is a short one; else 0."""
    return count % batch if count > batch else 0
