"""The data and the network of a run, made from its settings when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastar.config import Settings
from fastar.data.dataset import Dataset
from fastar.data.in_memory import load
from fastar.data.raw_arrays import RawArrays, read_raw, stands_in
from fastar.data.splits import held_out
from fastar.evaluation.batch_norm import batch_norm_layers, layer_of_single_values
from fastar.flat import FlatLayout
from fastar.models import build_model
from fastar.runs.model_files import Checkpoint
from fastar.runtime.progress import Progress
from fastar.symmetry import Symmetry, symmetry_by_settings

if TYPE_CHECKING:
    from fastar.data.ffcv.folder import DatasetFiles

DATA_KEYS = {"called": "own_name", "crop": "crop", "limit": "limit", "order": "order", "validation": "validation"}
"""Settings of the dataset, each by its name in a model's metadata."""


@dataclass(frozen=True)
class Shape:
    """The (channels, height, width) of images, and the number of classes, that a network is built for."""

    image: tuple[int, int, int]
    classes: int


class RunData:
    """The data set of a run: its files, written where they are missing (without FFCV its raw arrays), and its splits,
    loaded onto the device.

    Args:
        shape: of a model at hand, so that images of any size need not be there to say it.
    """

    def __init__(self, settings: Settings, device: torch.device, progress: Progress, shape: Shape | None = None):
        self._settings, self._chosen = settings, settings.dataset
        self._device, self._progress, self._shape = device, progress, shape

    @cached_property
    def files(self) -> DatasetFiles | RawArrays:
        chosen = self._chosen
        root, directory = chosen.root.expanduser() if chosen.root else None, chosen.directory.expanduser()
        if stands_in(chosen.spec):
            return read_raw(chosen.spec, root, self._progress)
        from fastar.data.convert import prepare  # only here: FFCV takes seconds
        from fastar.data.encode import PRESETS

        return prepare(
            chosen.name,
            data_root=root,
            directory=directory,
            own_name=chosen.own_name,
            workers=self._settings.workers,
            encoding=PRESETS[chosen.encoding] if chosen.encoding is not None else None,
            val_share=chosen.val_share,
            exif=chosen.exif,
            progress=self._progress,
        )

    @property
    def image(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images: of any size, the resolution that is set."""
        if self._chosen.spec.variable_size:
            return 3, self._chosen.side, self._chosen.side
        spec = self._chosen.spec
        return spec.channels, spec.height, spec.width

    @cached_property
    def shape(self) -> Shape:
        """Images and classes; of images of any size, the classes that the files hold."""
        if self._shape is not None:
            return self._shape
        known = self.files if self._chosen.spec.variable_size else self._chosen.spec
        return Shape(self.image, len(known.classes))

    @cached_property
    def train(self) -> Dataset:
        return self._load("train", self._chosen.limit)

    @cached_property
    def test(self) -> Dataset:
        return self._load("test", None)

    def _load(self, split: str, limit: int | None) -> Dataset:
        files, chosen = self.files, self._chosen
        more: dict[str, Any] = {"limit": limit, "validation": chosen.validation, "progress": self._progress}
        if isinstance(files, RawArrays) or not files.variable_size:
            return load(files, split, self._device, **more)
        order = chosen.order if split == "train" else "random"
        more |= {"size": chosen.side, "crop": chosen.crop, "order": order, "threads": chosen.threads}
        from fastar.data.streaming import StreamingDataset

        return StreamingDataset(files, split, self._device, **more)

    def splits(self) -> dict[str, Callable[[], Iterator[tuple[Tensor, Tensor]]]]:
        """Train, validation (where images are kept for it) and test as evaluation reads them: in order, whole, not
        augmented; as many of each as `evaluation.limit` and `evaluation.test_limit` let be measured."""
        names = ("train", *(("validation",) if self._chosen.validation else ()), "test")
        size = self._settings.evaluation.batch_size
        return {name: partial(self._whole, name, size) for name in names}

    def _whole(self, split: str, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        dataset = getattr(self, f"measured_{split}")
        return dataset.sequential(leaving_no_single(len(dataset), size))

    @cached_property
    def measured_train(self) -> Dataset:
        """The training images that train losses are measured on."""
        limit = self._settings.evaluation.limit
        return self.train if limit is None or limit >= len(self.train) else self._load("train", limit)

    @cached_property
    def measured_validation(self) -> Dataset:
        """The training images kept out of training that validation losses are measured on."""
        limit, files = self._settings.evaluation.limit, self.files
        kept = held_out(files.count("train"), self._chosen.validation, files.name)
        return self._load("validation", None if limit is None or limit >= kept else limit)

    @cached_property
    def measured_test(self) -> Dataset:
        """The test images that test losses are measured on."""
        limit = self._settings.evaluation.test_limit
        return self.test if limit is None or limit >= len(self.test) else self._load("test", limit)

    def recipe(self) -> dict[str, Any]:
        """All that determines the images that a model is trained on, and how they are cut: for its metadata."""
        chosen = self._chosen
        found: dict[str, Any] = {"dataset": chosen.name, "dataset_digest": self.files.digest, "limit": chosen.limit}
        if chosen.validation:  # without, models are what they were before there was such a setting
            found["validation"] = chosen.validation
        if chosen.spec.variable_size:
            found |= {"called": chosen.own_name, "crop": chosen.crop, "order": chosen.order}
        return found


class Network:
    """The network of a run: how to build it, where its parameters lie in a row, which of its units are permuted.

    Args:
        data: says what images and how many classes it is for.
    """

    def __init__(self, settings: Settings, device: torch.device, data: RunData):
        self._settings, self._device, self._data = settings, device, data

    def build(self, seed: int | None = None, *, device: torch.device | str | None = None) -> nn.Module:
        """A fresh network of the run's architecture, on `device` (None: the run's)."""
        model, shape = self._settings.model, self._data.shape
        built = build_model(model.arch, input_shape=shape.image, classes=shape.classes, seed=seed, **model.options)
        return built.to(self._device if device is None else device)

    @property
    def has_batch_norm(self) -> bool:
        """Tell whether the networks keep batch-norm statistics."""
        return bool(batch_norm_layers(self.build(seed=0, device="cpu")))

    def layer_of_single_values(self, side: int | None = None) -> str | None:
        """The first batch-norm layer that takes no variance of one image, of `side` x `side` pixels (None: of the
        data's); None: there is none."""
        channels, height, width = self._data.image
        shape = (channels, height, width) if side is None else (channels, side, side)
        pair = torch.zeros(2, *shape, dtype=torch.float32, device="cpu")
        return layer_of_single_values(self.build(seed=0, device="cpu"), pair, len(pair))

    @cached_property
    def layout(self) -> FlatLayout:
        return FlatLayout.from_module(self.build(seed=0))

    @cached_property
    def symmetry(self) -> Symmetry:
        """The architecture's permutation groups, proven on a random network before they are used; none are derived
        for `matching.method=none`."""
        model, chosen, shape = self.build(seed=0, device="cpu"), self._settings.model, self._data.shape
        name = [chosen.arch, chosen.options, list(shape.image), shape.classes]
        example = (torch.zeros(2, *shape.image, dtype=torch.float32, device="cpu"),)
        return symmetry_by_settings(self._settings.matching, model, example, name=name)

    def architecture(self) -> dict[str, Any]:
        """All that makes two checkpoints' networks the same: for their metadata."""
        model, shape = self._settings.model, self._data.shape
        return {
            "arch": model.arch,
            "model": model.options,
            "input_shape": list(shape.image),
            "classes": shape.classes,
        }

    def row(self, checkpoint: Checkpoint) -> Tensor:
        """A checkpoint's parameters as a flat row [P] on the device."""
        return self.layout.flatten(checkpoint.state).to(self._device)


def leaving_no_single(count: int, batch_size: int) -> int:
    """`batch_size`, lowered where a last batch of one sample would be left: batch-norm after a global pooling cannot
    take the statistics of a single sample."""
    while batch_size > 2 and count % batch_size == 1:
        batch_size -= 1
    return batch_size
