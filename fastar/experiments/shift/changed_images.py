"""Splits of a run's test images that are changed, or replaced: what networks see of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastar.config import dataset_spec
from fastar.data.augment import Normalisation
from fastar.data.corruptions import CORRUPTIONS, LEVELS, SEVERITIES, corrupted
from fastar.data.made_images import MADE, made
from fastar.errors import FastarError
from fastar.evaluation.losses import Batches
from fastar.experiments.look import Split
from fastar.experiments.session import Session
from fastar.experiments.task import RunData

# Changed images are kept, 8 bits a value, up to so many bytes in all; else they are made anew in each pass.
KEPT = 2**30
Change = Callable[..., Tensor]
"""(images float64 [n, C, H, W] in [0, 1], index=their numbers) -> the same, changed."""
LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in a grey image (ITU-R BT.601)."""


class Pixels:
    """What the inputs of a run's networks are as images: their pixels, and back.

    A data set's inputs are normalised pixels. A user's are taken as they are: numbers in [0, 1], or bytes.

    Raises:
        FastarError: the first of the run's test inputs are no images.
    """

    def __init__(self, session: Session):
        self._session, self.split = session, session.data.names()[-1]
        inputs, _ = next(iter(session.data.splits()[self.split]()))
        shape = list(inputs.shape[1:]) if isinstance(inputs, Tensor) else type(inputs).__name__
        if not isinstance(inputs, Tensor) or inputs.ndim != 4 or not (inputs.is_floating_point() or _is_bytes(inputs)):
            raise FastarError(
                f"{session.run.path}: its inputs are {shape}, no images [channels, height, width]: corruptions and "
                "other images are for images alone"
            )
        self.shape = (int(inputs.shape[1]), int(inputs.shape[2]), int(inputs.shape[3]))
        self.values, self._bytes = inputs[0].numel(), _is_bytes(inputs)
        self._files = session.data.files if isinstance(session.data, RunData) else None
        if self._files is not None:
            self._normalise = Normalisation(self._files.mean, self._files.std, *self.shape[1:], session.device)

    def of(self, inputs: Tensor) -> Tensor:
        """Inputs as pixels: float64 [n, C, H, W] in [0, 1]."""
        if self._files is not None:
            mean, std = (
                torch.tensor(one, dtype=torch.float64, device=inputs.device)[:, None, None]
                for one in (self._files.mean, self._files.std)
            )
            return ((inputs.double() * std + mean) * LEVELS).round().clamp(0, LEVELS) / LEVELS
        if _is_bytes(inputs):
            return inputs.double() / LEVELS
        low, high = float(inputs.min()), float(inputs.max())
        if low < 0 or high > 1:
            raise FastarError(
                f"{self._session.run.path}: its {self.split} images have values from {low:g} to {high:g}: give images "
                "in [0, 1] and let the network normalise them, so that they can be changed"
            )
        return inputs.double()

    def inputs(self, levels: Tensor) -> Tensor:
        """What the network takes of pixels: uint8 [n, C, H, W]."""
        if self._files is not None:
            return self._normalise(levels.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return levels if self._bytes else levels.float() / LEVELS


class ChangedSplit:
    """The test images, each changed; an image's number is its place among them.

    Args:
        change: of images.
        keep: hold what was made, 8 bits a value.
    """

    def __init__(self, session: Session, pixels: Pixels, change: Change, *, keep: bool):
        self.samples = session.data.size(pixels.split)
        self._batches: Batches = session.data.splits()[pixels.split]
        self._pixels, self._change, self._keep = pixels, change, keep
        self._made: list[Tensor] = []

    def __call__(self) -> Iterator[tuple[Any, Any]]:
        place = 0
        for number, (inputs, targets) in enumerate(self._batches()):
            if number < len(self._made):
                levels = self._made[number]
            else:
                index = torch.arange(place, place + len(inputs), dtype=torch.int64, device=inputs.device)
                levels = _levels(self._change(self._pixels.of(inputs), index=index))
                if self._keep:
                    self._made.append(levels)
            place += len(inputs)
            yield self._pixels.inputs(levels), targets


class OtherImages:
    """Images of another data set: greyed or of three equal channels, and resized to the run's.

    Args:
        levels: uint8 [n, C, H, W].
        whole: targets are whole batches, as a user's metric takes them.
    """

    def __init__(self, pixels: Pixels, levels: Tensor, batch_size: int, *, whole: bool):
        self.samples, self._levels = len(levels), levels
        self._pixels, self._batch_size, self._whole = pixels, batch_size, whole

    def __call__(self) -> Iterator[tuple[Any, Any]]:
        for some in self._levels.split(self._batch_size):
            inputs = self._pixels.inputs(some)
            labels = torch.zeros(len(some), dtype=torch.int64, device=some.device)  # they have none of the run's
            yield inputs, (inputs, labels) if self._whole else labels


def corrupted_splits(session: Session, pixels: Pixels) -> dict[str, Split]:
    """Every kind of corruption at every severity, named "kind severity"."""
    seed, keep = session.settings.seed, _fits(session, pixels, len(CORRUPTIONS) * SEVERITIES)
    return {
        f"{kind} {severity}": ChangedSplit(
            session, pixels, partial(corrupted, kind=kind, severity=severity, seed=seed), keep=keep
        )
        for kind in CORRUPTIONS
        for severity in range(1, SEVERITIES + 1)
    }


def other_splits(session: Session, pixels: Pixels, names: Sequence[str]) -> dict[str, Split]:
    """Images of no class of the run's data set: other data sets' test images, or made ones, by their names.

    Raises:
        FastarError: a name that is no data set's and of no made images, the run's own, or one of images of any size.
    """
    found: dict[str, Split] = {}
    for name in names:
        if name in MADE:
            change = partial(made, kind=name, seed=session.settings.seed)
            found[name] = ChangedSplit(session, pixels, change, keep=_fits(session, pixels, len(names)))
        else:
            size = session.settings.evaluation.batch_size
            found[name] = OtherImages(pixels, _images_of(session, pixels, name), size, whole=session.loss.whole)
    return found


def _images_of(session: Session, pixels: Pixels, name: str) -> Tensor:
    """The test images of a data set in the run's form: uint8 [n, C, H, W] on the device."""
    settings = session.settings
    try:
        spec = dataset_spec(name)
    except FastarError as error:
        raise FastarError(f"{error}; or of the made images: {', '.join(MADE)}") from error
    if name == settings.dataset.name:
        raise FastarError(f"ood={name}: is the run's own data set; name another")
    if spec.variable_size or not spec.reader:
        raise FastarError(f"ood={name}: its images are of any size; name a data set of one size, or made images")
    other = settings.dataset.model_copy(update={"name": name, "limit": None, "own_name": None, "encoding": None})
    data = RunData(settings.model_copy(update={"dataset": other}), session.device, session.progress)
    levels, _, _ = data.files.read("test", lambda labels: np.arange(len(labels)), session.progress, name)
    images = torch.from_numpy(levels).to(session.device).permute(0, 3, 1, 2)
    return torch.cat([_levels(as_images_of(some.double() / LEVELS, pixels.shape)) for some in images.split(1000)])


def as_images_of(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images [n, C, H, W] with channels and size of others: grey is the luma of three channels, any other number of
    channels their mean, repeated; resized bilinearly, with a filter where they become smaller."""
    if images.shape[1] != shape[0]:
        weights = torch.tensor(LUMA, dtype=images.dtype, device=images.device)[:, None, None]
        grey = (images * weights).sum(1, keepdim=True) if images.shape[1] == 3 else images.mean(1, keepdim=True)
        images = grey.expand(-1, shape[0], -1, -1)
    return F.interpolate(images, shape[1:], mode="bilinear", antialias=True)


def _levels(images: Tensor) -> Tensor:
    """Images in [0, 1] as bytes, as files have them: so rounding of other batches or devices moves nothing."""
    return (images * LEVELS).round().clamp(0, LEVELS).byte()


def _is_bytes(inputs: Tensor) -> bool:
    return inputs.dtype == torch.uint8


def _fits(session: Session, pixels: Pixels, splits: int) -> bool:
    return splits * session.data.size(pixels.split) * pixels.values <= KEPT
