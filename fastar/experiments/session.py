"""What every part of an experiment needs: settings, data on the device, a run folder, the architecture's symmetry."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fastar import data
from fastar.config import Settings
from fastar.errors import FastarError
from fastar.evaluation.batch_norm import batch_norm_layers, layer_of_single_values
from fastar.flat import FlatLayout
from fastar.matching import Examples
from fastar.models import build_model
from fastar.runs import RunFolder
from fastar.runs.live_metrics import LiveFigures
from fastar.runs.model_files import Checkpoint
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.seeds import derive_seed
from fastar.symmetry import Symmetry, symmetry_by_settings
from fastar.training import suitable_threads

# Training batches that methods of matching which look at data are shown, and images of each that activations are
# compared on.
EXAMPLE_BATCHES, LOOKED_AT = 4, 256
MEASURE_WITH_LESS = "lower evaluation.batch_size, or train.batch_size, in which statistics are taken"


def resolve_device(name: str) -> torch.device:
    """The device called `name`; auto is the GPU where there is one.

    Raises:
        FastarError: unknown name, or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise FastarError(f"device={name!r} is not a device; use auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise FastarError(f"device={name!r}: fastar runs on cpu or cuda")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise FastarError(f"device={name!r}: no such GPU here; use device=cpu or see `fastar doctor`")
    if device.type == "cuda":
        # Streams, events and graphs are made on the current device. The first one is that, and is not touched yet: the
        # writers of data sets are forked first.
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
        if device.index not in (None, index):
            torch.cuda.set_device(device)
            index = device.index
        device = torch.device("cuda", index)
    return device


@dataclass(frozen=True)
class Shape:
    """What a network must fit: (channels, height, width) of its images, and the number of classes."""

    image: tuple[int, int, int]
    classes: int


DATA_KEYS = {"called": "own_name", "crop": "crop", "limit": "limit", "order": "order", "validation": "validation"}
"""Settings of the dataset, each by its name in a model's metadata."""


@dataclass
class Context:
    """One experiment's surroundings. Data are loaded, and the symmetry derived, when first asked for."""

    settings: Settings
    run: RunFolder
    progress: Progress = SILENT
    figures: LiveFigures | None = None
    """Where the figures of trainings are shown, if anywhere."""
    known: Shape | None = None
    """Of a model at hand, so that images of any size need not be there to say it."""

    @cached_property
    def device(self) -> torch.device:
        return resolve_device(self.settings.device)

    @cached_property
    def files(self) -> data.Files:
        chosen = self.settings.dataset
        root, directory = chosen.root.expanduser() if chosen.root else None, chosen.directory.expanduser()
        more: dict[str, Any] = {"workers": self.settings.workers, "progress": self.progress}
        if not chosen.spec.variable_size:
            return data.prepare(chosen.name, data_root=root, directory=directory, **more)
        if self.known is None:  # a conversion takes hours: what is wrong with the network is said before
            build_model(self.settings.model.arch, input_shape=self.image, classes=2, **self.settings.model.options)
        encoding = data.PRESETS[chosen.encoding] if chosen.encoding is not None else None
        more |= {"encoding": encoding, "val_share": chosen.val_share, "exif": chosen.exif}
        return data.prepare_images(chosen.label, data_root=root, directory=directory, **more)

    @property
    def image(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images."""
        chosen = self.settings.dataset
        if chosen.spec.variable_size:
            return 3, chosen.side, chosen.side
        spec = chosen.spec
        return spec.channels, spec.height, spec.width

    @cached_property
    def shape(self) -> Shape:
        """Of the data: of images of any size, the resolution that is set, and the classes that the files hold."""
        if self.known is not None:
            return self.known
        chosen = self.settings.dataset
        return Shape(self.image, len(self.files.classes if chosen.spec.variable_size else chosen.spec.classes))

    @cached_property
    def train(self) -> data.Dataset:
        return self._load("train", self.settings.dataset.limit)

    @cached_property
    def test(self) -> data.Dataset:
        return self._load("test", None)

    def _load(self, split: str, limit: int | None) -> data.Dataset:
        files, chosen = self.files, self.settings.dataset
        if isinstance(files, data.DatasetFiles):
            return data.load(
                files, split, self.device, limit=limit, validation=chosen.validation, progress=self.progress
            )
        assert isinstance(files, data.ImageFiles)
        return data.StreamingDataset(
            files,
            split,
            self.device,
            size=chosen.side,
            crop=chosen.crop,
            order=chosen.order if split == "train" else "random",
            threads=chosen.threads,
            limit=limit,
            validation=chosen.validation,
            progress=self.progress,
        )

    @cached_property
    def measured_train(self) -> data.Dataset:
        """The training images that train losses are measured on."""
        limit = self.settings.evaluation.limit
        return self.train if limit is None or limit >= len(self.train) else self._load("train", limit)

    @cached_property
    def measured_validation(self) -> data.Dataset:
        """The training images kept out of training that validation losses are measured on."""
        limit, files = self.settings.evaluation.limit, self.files
        kept = data.held_out(files.count("train"), self.settings.dataset.validation, files.name)
        return self._load("validation", None if limit is None or limit >= kept else limit)

    @cached_property
    def measured_test(self) -> data.Dataset:
        """The test images that test losses are measured on."""
        limit = self.settings.evaluation.test_limit
        return self.test if limit is None or limit >= len(self.test) else self._load("test", limit)

    def splits(self) -> dict[str, Any]:
        """Train, validation (where images are kept for it) and test as evaluation reads them: in order, whole, not
        augmented."""
        size = self.settings.evaluation.batch_size
        found: dict[str, Any] = {"train": lambda: whole_batches(self.measured_train, size)}
        if self.settings.dataset.validation:
            found["validation"] = lambda: whole_batches(self.measured_validation, size)
        return {**found, "test": lambda: whole_batches(self.measured_test, size)}

    def statistics_batches(self, times: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The train set as batch-norm statistics are re-estimated from: every image once, augmented and in batches as
        in training, in one fixed shuffled order (files may be sorted by class, and batches must not be); or `times`
        `evaluation.bn_batches` of it."""
        wanted, batches = self.settings.evaluation.bn_batches, self._shuffled()
        return batches if wanted is None else islice(batches, wanted * times)

    def _shuffled(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, seed = self._statistics_size(), derive_seed(0, "statistics")
        return self.train.batches(size, seed=seed, epoch=0, augment=True, drop_last=False)

    def whole_statistics(self) -> int:
        """How many batches of `statistics_batches` hold the whole train set."""
        return self.train.batch_count(self._statistics_size(), drop_last=False)

    def _statistics_size(self) -> int:
        count = len(self.train)
        size = _leaving_no_single(count, self.settings.train.batch_size)
        if size == 2 and count % size == 1 and self.layer_of_single_values():
            return next(larger for larger in itertools.count(size) if count % larger != 1)
        return size

    def layer_of_single_values(self, side: int | None = None) -> str | None:
        """The first batch-norm layer that takes no variance of one image, of `side` x `side` pixels (None: of the
        data's); None: there is none."""
        channels, height, width = self.image
        shape = (channels, height, width) if side is None else (channels, side, side)
        pair = torch.zeros(2, *shape, dtype=torch.float32, device="cpu")
        return layer_of_single_values(self.build(seed=0, device="cpu"), pair, len(pair))

    def build(self, seed: int | None = None, *, device: torch.device | str | None = None) -> nn.Module:
        """A fresh network of the run's architecture, on `device` (None: the run's)."""
        arch = self.settings.model.arch
        shape = self.shape
        model = build_model(
            arch, input_shape=shape.image, classes=shape.classes, seed=seed, **self.settings.model.options
        )
        return model.to(self.device if device is None else device)

    @property
    def has_batch_norm(self) -> bool:
        """Whether the networks keep batch-norm statistics."""
        return bool(batch_norm_layers(self.build(seed=0, device="cpu")))

    @cached_property
    def layout(self) -> FlatLayout:
        return FlatLayout.from_module(self.build(seed=0))

    @cached_property
    def symmetry(self) -> Symmetry:
        """The architecture's permutation groups, proven on a random network before they are used; none are derived
        for `matching.method=none`."""
        model = self.build(seed=0, device="cpu")
        chosen = self.settings.model
        name = [chosen.arch, chosen.options, list(self.shape.image), self.shape.classes]
        example = (torch.zeros(2, *self.shape.image, dtype=torch.float32, device="cpu"),)
        return symmetry_by_settings(self.settings.matching, model, example, name=name)

    def examples(self) -> Examples:
        """What methods of matching that look at data see: the first training batches, however few statistics take."""
        most = LOOKED_AT if self.settings.matching.by_activations else None
        batches = islice(self._shuffled(), EXAMPLE_BATCHES)
        return Examples(
            self.build(seed=0), [(images[:most].clone(), labels[:most].clone()) for images, labels in batches]
        )

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Inside, CPU work uses as many threads as a training batch of this network is worth."""
        # On a GPU there is nothing to choose, and its memory is not held by what would be counted. A network for images
        # of any size is worth all there are, and counting is worth seconds.
        if self.device.type == "cuda" or self.settings.dataset.spec.variable_size:
            yield
            return
        images = torch.zeros(self.settings.train.batch_size, *self.shape.image, device=self.device, dtype=torch.float32)
        with suitable_threads(self.build(seed=0), images):
            yield

    def architecture(self) -> dict[str, Any]:
        """What makes two checkpoints' networks the same: for their metadata."""
        return {
            "arch": self.settings.model.arch,
            "model": self.settings.model.options,
            "input_shape": list(self.shape.image),
            "classes": self.shape.classes,
        }

    def data_recipe(self) -> dict[str, Any]:
        """What determines the images that a model is trained on, and how they are cut: for its metadata."""
        chosen = self.settings.dataset
        found: dict[str, Any] = {"dataset": chosen.name, "dataset_digest": self.files.digest, "limit": chosen.limit}
        if chosen.validation:  # without, models are what they were before there was such a setting
            found["validation"] = chosen.validation
        if chosen.spec.variable_size:
            found |= {"called": chosen.own_name, "crop": chosen.crop, "order": chosen.order}
        return found

    def row(self, checkpoint: Checkpoint) -> Tensor:
        """A checkpoint's parameters as a flat row [P] on the device."""
        return self.layout.flatten(checkpoint.state).to(self.device)


@contextmanager
def within_memory(what: str, remedy: str) -> Iterator[None]:
    """Inside, memory of a GPU that runs out is an error for users."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise FastarError(f"{what}: out of memory ({reason}); {remedy}") from error


def whole_batches(dataset: data.Dataset, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every sample once, in file order, not augmented."""
    return dataset.sequential(_leaving_no_single(len(dataset), batch_size))


def _leaving_no_single(count: int, batch_size: int) -> int:
    """`batch_size`, lowered where a last batch of one sample would be left: batch-norm after a global pooling cannot
    take the statistics of a single sample."""
    while batch_size > 2 and count % batch_size == 1:
        batch_size -= 1
    return batch_size
