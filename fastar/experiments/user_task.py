"""Tasks of users: a network, data and a loss of their own, given from Python or named as `module:function`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from fastar.config import Settings
from fastar.data.dataset import Dataset, Taken
from fastar.data.generators import generators_kept, seed_all
from fastar.data.splits import held_out
from fastar.data.user_data import TensorData, UserDataset, UserSplits, some_of, user_data
from fastar.errors import FastarError
from fastar.evaluation.batches import check_network
from fastar.experiments.task import Network, Shape, TaskData
from fastar.flat.forward import Batch, in_float32
from fastar.losses import Loss, LossChoice, MetricChoice, find_loss, split_of
from fastar.losses.targets import target_of
from fastar.losses.terms import IGNORED
from fastar.models.registry import seeded
from fastar.runtime.progress import Progress
from fastar.runtime.seeds import derive_seed
from fastar.runtime.user_code import find_function, is_reference, source_digest, users_code

PYTHON = "python:data"
"""The name of data that were given from Python."""


@dataclass(frozen=True)
class Given:
    """Parts of a task that are at hand; those that are None have the names that the settings say.

    Args:
        build: returns a fresh network.
        data: the splits.
        loss: see `fastar.losses.find_loss`.
        metrics: beside it.
        example: inputs that the network takes; None: some of the data.
        no_data: there are none, and none are needed.
    """

    build: Callable[..., nn.Module] | None = None
    data: UserSplits | None = None
    loss: LossChoice | None = None
    metrics: Sequence[MetricChoice] | None = None
    example: Batch | None = None
    no_data: bool = False


def task_loss(settings: Settings, given: Given) -> Loss:
    """The loss of a run, with its metrics.

    Raises:
        FastarError: one of a name that is not known.
    """
    chosen: LossChoice = settings.loss if given.loss is None else given.loss
    if isinstance(chosen, str) and is_reference(chosen):
        chosen = find_function(chosen, "loss")
    metrics: Sequence[MetricChoice] | None = settings.metrics if given.metrics is None else given.metrics
    if metrics is not None:
        metrics = [
            find_function(one, "metrics") if isinstance(one, str) and is_reference(one) else one for one in metrics
        ]
    return find_loss(chosen, metrics)


def metrics_digest(settings: Settings, given: Given) -> str:
    """A digest of the source of functions that metrics are; "": all have names."""
    chosen = settings.metrics if given.metrics is None else given.metrics
    found = [find_function(one, "metrics") if isinstance(one, str) else one for one in chosen or () if is_own(one)]
    return source_digest(found) if found else ""


def is_own(chosen: LossChoice) -> bool:
    """Tell whether a loss or a metric is a user's function."""
    return not isinstance(chosen, str) or is_reference(chosen)


def loss_recipe(settings: Settings, loss: Loss) -> dict[str, Any]:
    """The loss in a model's metadata; nothing of cross-entropy, which older versions knew alone."""
    if settings.loss == "cross_entropy":
        return {}
    source = {} if loss.function is None else {"loss_source": source_digest([loss.function])}
    return {"loss": settings.loss, **source}


def find_splits(reference: str) -> UserSplits:
    """The splits that the function `reference` returns.

    Raises:
        FastarError: no such function, or it returns something else.
    """
    function = find_function(reference, "--data")
    with users_code(f"--data {reference}: calling it, without arguments,"):
        made = function()
    if isinstance(made, UserSplits):
        return made
    if isinstance(made, Mapping) and "train" in made and set(made) <= {"train", "test", "validation"}:
        return UserSplits(**made)
    if isinstance(made, tuple | list) and len(made) == 2 and not any(isinstance(one, Tensor) for one in made):
        return UserSplits(*made)
    raise FastarError(
        f"--data {reference}: returns {type(made).__name__}; return (train, test), or a dict with 'train' and 'test', "
        "each tensors (inputs, targets), a torch Dataset or a DataLoader"
    )


class NoData(TaskData):
    """The data of a network that came without any."""

    def _load(self, split: str, limit: int | None) -> Dataset:
        raise FastarError("there are no data to look at: give --data module:function, or match by weights")

    def example(self, samples: int, side: int | None = None) -> Batch:
        raise FastarError(
            f"{self._settings.model.arch}: no example inputs to trace it with; give --input-shape, such as 2x3x32x32, "
            "or return (network, example inputs)"
        )

    @property
    def shape(self) -> Shape:
        raise FastarError("there are no data, so fastar's own architectures cannot be built: name their --dataset")

    def recipe(self) -> dict[str, Any]:
        return {"dataset": PYTHON}

    def names(self) -> tuple[str, ...]:
        return ("train",)

    def size(self, split: str) -> int:
        return len(self.train)


class UserData(TaskData):
    """The splits that a user gave.

    Args:
        given: makes them.
        network: of the run, which says what its forward takes.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        progress: Progress,
        given: Callable[[], UserSplits],
        network: Callable[[], nn.Module],
        *,
        whole: bool,
    ):
        super().__init__(settings, device, progress, whole=whole)
        self._given, self._network = given, network

    @cached_property
    def splits_given(self) -> UserSplits:
        return self._given()

    @cached_property
    def _split(self) -> Callable[[Any], tuple[Any, Any]]:
        split = split_of(self._network(), whole=self._whole)

        def in_float(batch: Any) -> tuple[Any, Any]:
            inputs, targets = split(batch)
            return tree_map_only(Tensor, in_float32, inputs), targets

        return in_float

    def _load(self, split: str, limit: int | None) -> Dataset:
        name, share = split, self._chosen.validation
        if split == "validation" and not self._gives("validation"):
            name = "train"
        found = self._whole_split(name)
        if share and name == "train":
            held = held_out(len(found), share, self._chosen.label)
            begin, count = (0, held) if split == "validation" else (held, len(found) - held)
            found = some_of(found, count, begin=begin, seed="validation")
        return Taken(some_of(found, limit), self._split)

    def _whole_split(self, name: str) -> UserDataset:
        if name not in self._loaded:
            given = getattr(self.splits_given, name)
            self._loaded[name] = user_data(
                f"the {name} data",
                given,
                self._device,
                self._settings.train.batch_size,
                workers=self.splits_given.workers,
                say=self._progress.line,
            )
        return self._loaded[name]

    @cached_property
    def _loaded(self) -> dict[str, UserDataset]:
        return {}

    def trials(self) -> Iterator[tuple[str, tuple[Any, Any], str]]:
        """Beside those of all data, a sample of tensors whose numbers are not all finite."""
        yield from super().trials()
        for name in filter(self._gives, self.names()):
            whole = self._whole_split(name)
            found = whole.doubtful() if isinstance(whole, TensorData) else None
            if found is not None:
                yield name, self._split(found[0]), found[1]

    def check_classes(self, split: str, classes: int) -> None:
        name = split if self._gives(split) else "train"
        self._whole_split(name).check_batches(partial(_check_classes, f"the {name} data", classes))

    def names(self) -> tuple[str, ...]:
        kept = ("validation",) if self._chosen.validation or self._gives("validation") else ()
        return ("train", *kept, *(("test",) if self._gives("test") else ()))

    def _gives(self, split: str) -> bool:
        return getattr(self.splits_given, split) is not None

    def size(self, split: str) -> int:
        return len(self._load(split, None))

    def held_bytes(self) -> int:
        """Bytes of its tensors, which are held on the device; of other forms nothing is."""
        found = (self._whole_split(name) for name in ("train", "validation", "test") if self._gives(name))
        return sum(one.nbytes for one in found if isinstance(one, TensorData))

    def recipe(self) -> dict[str, Any]:
        """As of named sets; the digest is of the training data alone, so that others may be given later."""
        chosen = self._chosen
        found = {"dataset": chosen.name, "dataset_digest": self._whole_split("train").digest, "limit": chosen.limit}
        return {**found, "validation": chosen.validation} if chosen.validation else found

    def digests(self) -> dict[str, str]:
        return {name: self._whole_split(name).digest for name in self.names() if self._gives(name)}

    @cached_property
    def shape(self) -> Shape:
        """Of image data whose targets are classes."""
        batch = next(iter(self._whole_split("train").sequential(2)))  # whole: it is taken apart by the network
        inputs = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(inputs, Tensor) or inputs.ndim != 4:
            raise FastarError(
                f"--arch {self._settings.model.arch} takes images [batch, channels, height, width]; give a network of "
                "your own for these data: --model module:function"
            )
        if self.splits_given.classes is None:
            raise FastarError(
                f"--arch {self._settings.model.arch} needs the number of classes: return fastar.Data(..., classes=N)"
            )
        _, channels, height, width = inputs.shape
        return Shape((channels, height, width), self.splits_given.classes)


def _check_classes(name: str, classes: int, batch: Any, samples: Sequence[int] | None) -> None:
    """Raise FastarError, naming the first sample, where a target is no class.

    Args:
        samples: their numbers; None: they are those of the batch.
    """
    targets = target_of(batch).long()
    wrong = (targets != IGNORED) & ((targets < 0) | (targets >= classes))
    if bool(wrong.any()):
        index = torch.unravel_index(wrong.flatten().byte().argmax(), wrong.shape)
        sample = int(index[0]) if samples is None else samples[int(index[0])]
        raise FastarError(
            f"{name}: sample {sample} has the class {int(targets[index])}, and the network's outputs are of {classes} "
            "classes, from 0"
        )


class UserNetwork(Network):
    """A network that a user's function builds.

    Args:
        function: called with the options of `model`; torch's, NumPy's and Python's generators are seeded before.
        example: inputs that it takes; None: some of the data.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        data: TaskData,
        function: Callable[..., Any],
        example: Batch | None = None,
    ):
        super().__init__(settings, device, data)
        self._function, self._example = function, example
        self._shapes: dict[str, torch.Size] | None = None

    @cached_property
    def _name(self) -> str:
        return self._settings.model.arch

    def make(self, seed: int | None) -> nn.Module:
        with seeded(seed), generators_kept():
            if seed is not None:
                seed_all(derive_seed(seed, "initialisation"))
            with users_code(f"{self._name}: calling it"):
                made = self._function(**self._settings.model.options)
        model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(model, nn.Module):
            raise FastarError(
                f"{self._name}: returned {type(model).__name__}, not a torch.nn.Module; return a network, or (network, "
                "example inputs)"
            )
        check_network(model, self._name)
        if type(model).__name__ == "OptimizedModule":
            raise FastarError(
                f"{self._name}: returned a compiled network; return it as it is, and set train.compile=true"
            )
        if any(is_lazy(value) for value in model.state_dict().values()):
            raise FastarError(
                f"{self._name}: returned a network with parameters without a shape yet; run one batch through its lazy "
                "modules first"
            )
        if example is not None and self._example is None:
            self._example = checked_example(example, self._name)
        shapes = {name: value.shape for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        if self._shapes is None:
            self._shapes = shapes
        changed = [name for name in {**self._shapes, **shapes} if self._shapes.get(name) != shapes.get(name)]
        if changed:
            was, now = (_listed(one.get(changed[0])) for one in (self._shapes, shapes))
            raise FastarError(
                f"{self._name}: builds another network at each call ({changed[0]} was {was}, is {now} now); let it "
                "build the same one"
            )
        return model.cpu().float().train()

    def check_seeded(self) -> None:
        one, two = (dict(self.make(seed).named_parameters()) for seed in (0, 1))
        if one and all(torch.equal(value, two[name]) for name, value in one.items()):
            raise FastarError(
                f"{self._name}: builds the same weights whatever the seed; draw them from torch's generator, and set "
                "no seed in it (fastar sets one before each call)"
            )

    def example(self, samples: int, side: int | None = None) -> Batch:
        if self._example is None:
            self.make(0)  # its function may return one
        return super().example(samples, side) if self._example is None else self._example

    def _proof_key(self) -> object:
        return None  # what it computes may change under one name

    def architecture(self) -> dict[str, Any]:
        return {"arch": self._name, "model": self._settings.model.options, "source": self._source}

    @cached_property
    def _source(self) -> str:
        model = self.make(0)
        classes = sorted(
            {type(module) for module in model.modules()}, key=lambda one: (one.__module__, one.__qualname__)
        )
        return source_digest([self._function, *classes])


def checked_example(example: Any, name: str) -> Batch:
    """Example inputs as a forward takes them.

    Raises:
        FastarError: they are no tensors.
    """
    if isinstance(example, Tensor):
        return example
    values = example.values() if isinstance(example, Mapping) else example
    if not isinstance(example, tuple | list | Mapping) or not all(isinstance(value, Tensor) for value in values):
        raise FastarError(
            f"{name}: example inputs must be a tensor, a tuple of tensors, or a mapping of keywords to tensors"
        )
    return example if isinstance(example, Mapping) else tuple(example)


def _listed(shape: torch.Size | None) -> str:
    return "not there" if shape is None else str(list(shape))
