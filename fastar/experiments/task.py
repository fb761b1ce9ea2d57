"""The data and the network of a run, made when first asked for: those that have names; `user_task` has others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastar.config import Settings
from fastar.data.counts import DataCounts, data_counts
from fastar.data.dataset import Dataset, Taken
from fastar.data.in_memory import load
from fastar.data.raw_arrays import RawArrays, read_raw, stands_in
from fastar.data.splits import held_out, leaving_no_single
from fastar.errors import FastarError
from fastar.evaluation.batch_norm import batch_norm_layers, layer_of_single_values
from fastar.flat import FlatLayout
from fastar.flat.forward import Batch, in_float32
from fastar.losses import repeated, sample_count
from fastar.models import build_model
from fastar.runs.model_files import Checkpoint
from fastar.runtime import ranks
from fastar.runtime.progress import Progress
from fastar.symmetry import Symmetry, symmetry_by_settings

if TYPE_CHECKING:
    from fastar.data.ffcv.folder import DatasetFiles

DATA_KEYS = {
    **{"called": "own_name", "crop": "crop", "flip": "flip"},
    **{"limit": "limit", "order": "order", "validation": "validation"},
}
"""Settings of the dataset, each by its name in a model's metadata."""


@dataclass(frozen=True)
class Shape:
    """The (channels, height, width) of images, and the number of classes, that a network is built for."""

    image: tuple[int, int, int]
    classes: int


class TaskData(ABC):
    """Named splits of data on the device, whose batches are (inputs, targets).

    Args:
        whole: targets are to be whole batches, as a user's loss takes them.
    """

    def __init__(self, settings: Settings, device: torch.device, progress: Progress, *, whole: bool = False):
        self._settings, self._chosen = settings, settings.dataset
        self._device, self._progress, self._whole = device, progress, whole

    samples = "samples"
    """What samples are called."""

    @abstractmethod
    def _load(self, split: str, limit: int | None) -> Dataset:
        """A split, with so many of its samples (None: all)."""

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Images and classes, for networks that are built by them."""

    @property
    def image(self) -> tuple[int, int, int]:
        """(channels, height, width) of images."""
        return self.shape.image

    @abstractmethod
    def recipe(self) -> dict[str, Any]:
        """All that determines the data that a model is trained on: for its metadata."""

    def digests(self) -> dict[str, str]:
        """Of the splits that `recipe` does not tell of."""
        return {}

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The splits that are measured, the training data first."""

    @abstractmethod
    def size(self, split: str) -> int:
        """The number of samples of a split."""

    def example(self, samples: int, side: int | None = None) -> Batch:
        """Inputs of so many samples on the CPU, which networks are traced with.

        Args:
            side: of images of any size; None: the one that is set.
        """
        inputs, _ = next(iter(self.train.sequential(samples)))
        return tree_map_only(Tensor, lambda one: in_float32(one.detach()).cpu(), inputs)

    def trials(self) -> Iterator[tuple[str, tuple[Any, Any], str]]:
        """Each split that is measured, with a batch of two of its samples, and a line on what is doubtful in them."""
        for split in self.names():
            yield split, next(iter(getattr(self, f"measured_{split}").sequential(2))), ""

    def check_classes(self, split: str, classes: int) -> None:
        """Raise FastarError where targets are not of so many classes; where samples are read one by one, then."""
        raise NotImplementedError(split, classes)

    def held_bytes(self) -> int:
        """Bytes of tensors that a user gave, and that are held."""
        return 0

    def counts(self, *, written: bool = False) -> DataCounts | None:
        """The numbers of samples; None: nobody knows before the files are written.

        Args:
            written: write the files first, where they are not there.

        Raises:
            FastarError: a limit that is more than there are images, or fewer than classes.
        """
        sizes = {split: self.size(split) for split in self.names()}
        return DataCounts(sizes["train"], sizes.get("validation", 0), sizes.get("test", 0), self.held_bytes())

    def made(self, samples: int, side: int | None = None) -> tuple[Any, Any]:
        """A batch of so many samples on the device, which steps are planned with: the first ones, again and again."""
        return repeated(next(iter(self.train.sequential(samples))), samples)

    @cached_property
    def train(self) -> Dataset:
        return self._load("train", self._chosen.limit)

    @cached_property
    def test(self) -> Dataset:
        return self._load("test", None)

    def splits(self) -> dict[str, Callable[[], Iterator[tuple[Any, Any]]]]:
        """The splits as evaluation reads them: in order, whole, not augmented; as many samples of each as
        `evaluation.limit` and `evaluation.test_limit` let be measured."""
        size = self._settings.evaluation.batch_size
        return {name: partial(self._in_order, name, size) for name in self.names()}

    def _in_order(self, split: str, size: int) -> Iterator[tuple[Any, Any]]:
        dataset = getattr(self, f"measured_{split}")
        return dataset.sequential(leaving_no_single(len(dataset), size))

    @cached_property
    def measured_train(self) -> Dataset:
        """The training samples that train losses are measured on."""
        limit = self._settings.evaluation.limit
        return self.train if limit is None or limit >= len(self.train) else self._load("train", limit)

    @cached_property
    def measured_validation(self) -> Dataset:
        """The training samples kept out of training that validation losses are measured on."""
        limit = self._settings.evaluation.limit
        return self._load("validation", None if limit is None or limit >= self.size("validation") else limit)

    @cached_property
    def measured_test(self) -> Dataset:
        """The test samples that test losses are measured on."""
        limit = self._settings.evaluation.test_limit
        return self.test if limit is None or limit >= len(self.test) else self._load("test", limit)


class RunData(TaskData):
    """The data set of a name: its files, written where they are missing (without FFCV its raw arrays), and its splits,
    loaded onto the device.

    Args:
        classes: their number, so that images of any size need not be there to say it.
    """

    samples = "images"

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        progress: Progress,
        classes: int | None = None,
        *,
        whole: bool = False,
    ):
        super().__init__(settings, device, progress, whole=whole)
        self._classes = classes

    @cached_property
    def files(self) -> DatasetFiles | RawArrays:
        chosen = self._chosen
        root, directory = chosen.root.expanduser() if chosen.root else None, chosen.directory.expanduser()
        if stands_in(chosen.spec):
            return read_raw(chosen.spec, root, self._progress)
        from fastar.data.convert import Form, prepare  # only here: FFCV takes seconds
        from fastar.data.encode import PRESETS

        encoding = PRESETS[chosen.encoding] if chosen.encoding is not None else None
        return prepare(
            chosen.name,
            directory=directory,
            raw=root,
            own_name=chosen.own_name,
            form=Form(encoding, val_share=chosen.val_share, exif=chosen.exif),
            workers=self._settings.workers,
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
        if self._classes is not None:
            return Shape(self.image, self._classes)
        known = self.files if self._chosen.spec.variable_size else self._chosen.spec
        return Shape(self.image, len(known.classes))

    def example(self, samples: int, side: int | None = None) -> Batch:
        """Zeros: the images need not be there."""
        return torch.zeros(samples, *self._sized(side), dtype=torch.float32, device="cpu")

    def made(self, samples: int, side: int | None = None) -> tuple[Any, Any]:
        """Random images: they need not be there."""
        generator = torch.Generator(self._device).manual_seed(0)
        size, device = (samples, *self._sized(side)), self._device
        images = torch.randn(size, device=device, dtype=torch.float32, generator=generator)
        labels = torch.zeros(samples, dtype=torch.int64, device=device)
        return self._parts((images.to(memory_format=torch.channels_last), labels))

    def trials(self) -> Iterator[tuple[str, tuple[Any, Any], str]]:
        """Made images: all splits are alike."""
        yield "train", self.made(2), ""

    def check_classes(self, split: str, classes: int) -> None:
        known = self._classes
        if known is not None and classes < known:
            raise FastarError(f"{self._chosen.label} has {known} classes, and the network's outputs are of {classes}")

    def counts(self, *, written: bool = False) -> DataCounts | None:
        return data_counts(self._settings, self.files if written else None)

    def _sized(self, side: int | None) -> tuple[int, int, int]:
        channels, height, width = self.image
        return (channels, height, width) if side is None else (channels, side, side)

    def _load(self, split: str, limit: int | None) -> Dataset:
        files, chosen = self.files, self._chosen
        more: dict[str, Any] = {"limit": limit, "validation": chosen.validation, "progress": self._progress}
        more["alternate"] = chosen.flip == "alternate"
        if isinstance(files, RawArrays) or not files.variable_size:
            return self._taken(load(files, split, self._device, **more))
        order = chosen.order if split == "train" else "random"
        more |= {"size": chosen.side, "crop": chosen.crop, "order": order, "threads": chosen.threads}
        from fastar.data.streaming import StreamingDataset

        return self._taken(StreamingDataset(files, split, self._device, **more))

    def _taken(self, dataset: Dataset) -> Dataset:
        return Taken(dataset, self._parts) if self._whole else dataset

    def _parts(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        return (batch[0], batch) if self._whole else batch

    def names(self) -> tuple[str, ...]:
        return ("train", *(("validation",) if self._chosen.validation else ()), "test")

    def size(self, split: str) -> int:
        if split == "validation":
            return held_out(self.files.count("train"), self._chosen.validation, self.files.name)
        return len(self.train if split == "train" else self.test)

    def recipe(self) -> dict[str, Any]:
        chosen = self._chosen
        found: dict[str, Any] = {"dataset": chosen.name, "dataset_digest": self.files.digest, "limit": chosen.limit}
        if chosen.validation:  # without, models are what they were before there was such a setting
            found["validation"] = chosen.validation
        if chosen.flip != "random":
            found["flip"] = chosen.flip
        if chosen.spec.variable_size:
            found |= {"called": chosen.own_name, "crop": chosen.crop, "order": chosen.order}
        return found


class Network:
    """The network of a run: how to build it, where its parameters lie in a row, which of its units are permuted.

    Args:
        data: says what images and how many classes it is for.
    """

    def __init__(self, settings: Settings, device: torch.device, data: TaskData):
        self._settings, self._device, self._data = settings, device, data

    def make(self, seed: int | None) -> nn.Module:
        """A fresh network on the CPU."""
        model, shape = self._settings.model, self._data.shape
        return build_model(model.arch, input_shape=shape.image, classes=shape.classes, seed=seed, **model.options)

    def example(self, samples: int, side: int | None = None) -> Batch:
        """Inputs that it is traced with: `TaskData.example`."""
        return self._data.example(samples, side)

    def architecture(self) -> dict[str, Any]:
        """All that makes two checkpoints' networks the same: for their metadata."""
        model, shape = self._settings.model, self._data.shape
        return {
            "arch": model.arch,
            "model": model.options,
            "input_shape": list(shape.image),
            "classes": shape.classes,
        }

    def build(self, seed: int | None = None, *, device: torch.device | str | None = None) -> nn.Module:
        """A fresh network of the run's architecture, on `device` (None: the run's)."""
        return self.make(seed).to(self._device if device is None else device)

    def check_seeded(self) -> None:
        """Raise FastarError where two seeds give the same network: sources would all begin alike."""

    @property
    def has_batch_norm(self) -> bool:
        """Tell whether the networks keep batch-norm statistics."""
        return bool(batch_norm_layers(self.build(seed=0, device="cpu")))

    def layer_of_single_values(self, side: int | None = None) -> str | None:
        """The first batch-norm layer that takes no variance of one sample, of an image of `side` x `side` pixels (None:
        of the data's); None: there is none."""
        pair = self.example(2, side)
        return layer_of_single_values(self.build(seed=0, device="cpu"), pair, sample_count(pair))

    @cached_property
    def layout(self) -> FlatLayout:
        return FlatLayout.from_module(self.build(seed=0))

    @cached_property
    def symmetry(self) -> Symmetry:
        """The architecture's permutation groups, proven on a random network before they are used; none are derived
        for `matching.method=none`."""
        model, matching, pair = self.build(seed=0, device="cpu"), self._settings.matching, self.example(2)
        example = pair if isinstance(pair, tuple | Mapping) else (pair,)
        name = self._proof_key()
        return symmetry_by_settings(matching, model, example, allow_partial=matching.allow_partial, name=name)

    def share_symmetry(self) -> None:
        """Derive the symmetry, on several ranks by the first, which the others take it from."""
        vars(self)["symmetry"] = ranks.by_first(lambda: self.symmetry)

    def _proof_key(self) -> object:
        """The key that proofs of its symmetry are kept by; None: they are not kept."""
        return list(self.architecture().values())

    def row(self, checkpoint: Checkpoint) -> Tensor:
        """A checkpoint's parameters as a flat row [P] on the device."""
        return self.layout.flatten(checkpoint.state).to(self._device)
