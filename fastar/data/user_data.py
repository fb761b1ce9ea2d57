"""Data of users: tensors, map-style datasets, and any other iterable of batches.

Tensors and datasets are exact: a batch is a function of (seed, epoch, its place), and what a dataset draws for a sample
of (seed, epoch, the sample's index). Other iterables are gone through as they come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate
from torch.utils.data import Dataset as SampleSet
from torch.utils.data.sampler import BatchSampler

from fastar.data.dataset import OrderedDataset, first_not_finite
from fastar.data.iterable_data import BatchCheck, IterableData, moved_to, passed
from fastar.data.sample_reading import BatchOrder, Collated, SeededSamples, WorkerBegins
from fastar.data.sampling import AugmentationKeys, epoch_order
from fastar.errors import FastarError, UserCodeError
from fastar.runtime.seeds import derive_seed
from fastar.runtime.user_code import users_code

# Samples that a map-style dataset is told by, beside its length.
DIGESTED = 8

_WANTED = "give tensors, a torch Dataset, a DataLoader, or a function that begins a pass over batches"


@dataclass(frozen=True)
class UserSplits:
    """A user's data: `fastar.Data`.

    Each split is tensors (one, a tuple whose last are the targets, or a mapping), a map-style torch Dataset, a
    DataLoader, another iterable of batches, or a function that begins a pass over batches.

    Args:
        train: trained on.
        test: measured on; None: losses are measured on the training data alone.
        validation: measured on too.
        workers: processes that read map-style datasets; a DataLoader has its own number.
        classes: their number, for `--arch`.

    Example:
        >>> import fastar, torch
        >>> x, y = torch.randn(60, 4), torch.randint(3, (60,))
        >>> data = fastar.Data((x[:40], y[:40]), test=(x[40:], y[40:]))
    """

    train: Any = field(repr=False)
    test: Any = field(default=None, repr=False)
    validation: Any = field(default=None, repr=False)
    workers: int = 0
    classes: int | None = None


class _Held(OrderedDataset):
    """A split of `count` samples, or of those of them that `index` names."""

    digest: str
    """A SHA-256 of the samples, or of some."""

    def __init__(self, name: str, count: int, device: torch.device, index: Tensor | None):
        if not count:
            raise FastarError(f"{name}: holds no sample")
        self.name, self.device = name, device
        self._index = torch.arange(count, device="cpu") if index is None else index

    def __len__(self) -> int:
        return len(self._index)

    def _check_size(self, size: int) -> None:
        raise FastarError(f"train.resolutions: the samples of {self.name} have the size they have; leave it out")

    def _order(self, seed: int, epoch: int) -> Tensor:
        return epoch_order(len(self), seed, epoch, self._index.device)

    def sample_number(self, seed: int, epoch: int, place: int) -> int:
        return int(self._index[super().sample_number(seed, epoch, place)])


class TensorData(_Held):
    """Tensors, each of one length, on the device.

    Args:
        tensors: a tensor, or a tuple or mapping of tensors [n, ...].
        index: of the samples that belong to it; None: all.

    Raises:
        FastarError: tensors of several lengths, or none.
    """

    in_memory = True

    def __init__(self, name: str, tensors: Any, device: torch.device, index: Tensor | None = None):
        leaves = tree_leaves(tensors)
        lengths = {len(one) if one.ndim else 0 for one in leaves}
        if len(lengths) != 1:
            found = ", ".join(str(list(one.shape)) for one in leaves)
            raise FastarError(f"{name}: its tensors have the shapes {found}: give one entry for each sample in all")
        super().__init__(name, lengths.pop(), device, None if index is None else index.to(device))
        self._tensors = tree_map(lambda one: one.detach().to(device), tensors)
        self._index = self._index.to(device)
        self.digest = _tensors_digest(leaves)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(one.nbytes for one in tree_leaves(self._tensors))

    def check_batches(self, check: BatchCheck) -> None:
        """Check all samples at once."""
        check(self._tensors, None)

    def doubtful(self) -> tuple[Any, str] | None:
        """A batch of the first sample with a number that is not finite, and a line on it; None: there is none."""
        found = first_not_finite(self._tensors)
        if found is None:
            return None
        place, index, value = found
        batch = tree_map(lambda one: one[index[0] : index[0] + 1].expand(2, *one.shape[1:]), self._tensors)
        return batch, f"{self.name}: tensor {place} holds {value} at {index}"

    def _made(
        self, order: Any | None, batch_size: int, keys: AugmentationKeys | None, size: int | None
    ) -> Iterator[Any]:
        chosen = self._index if order is None else self._index[order]
        for some in chosen.split(batch_size) if len(chosen) else ():
            yield tree_map(lambda one, some=some: one.index_select(0, some), self._tensors)


class SampleData(_Held):
    """A map-style dataset, read by a DataLoader of as many workers as are asked for.

    Whatever the dataset draws for a sample (with torch, NumPy or `random`) follows from the training's seed, the epoch
    and the sample's index; generators are left as they were.

    Args:
        samples: has a length and gives a sample by its index.
        loader: the DataLoader that it was given in: its workers, `collate_fn` and pinning are used.
        workers: processes that read, where there is no loader.

    Raises:
        FastarError: later, where its length changes or it raises.
    """

    def __init__(
        self,
        name: str,
        samples: SampleSet[Any],
        device: torch.device,
        index: Tensor | None = None,
        *,
        loader: DataLoader[Any] | None = None,
        workers: int = 0,
    ):
        count = _length(samples, name)
        super().__init__(name, count, device, index)
        self._samples, self._whole, self._order_now = samples, count, BatchOrder()
        self._checks = list[BatchCheck]()  # one list for all twins of `some_of`
        workers = workers if loader is None else loader.num_workers
        self._loader: DataLoader[Any] = DataLoader(
            SeededSamples(samples, name),  # type: ignore[arg-type]
            batch_sampler=self._order_now,
            num_workers=workers,
            collate_fn=Collated(default_collate if loader is None else loader.collate_fn, name),
            pin_memory=device.type == "cuda" if loader is None else loader.pin_memory,
            worker_init_fn=WorkerBegins(None if loader is None else loader.worker_init_fn),
            multiprocessing_context=None if loader is None else loader.multiprocessing_context,
            prefetch_factor=None if loader is None else loader.prefetch_factor,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # the base seed of workers is not to be taken from torch's own
        )
        self.digest = self._digest()

    def _digest(self) -> str:
        """A digest of its type, its length and some of its samples: all of them may be too many to read."""
        places = sorted({round(i * (self._whole - 1) / (DIGESTED - 1)) for i in range(DIGESTED)})
        digest = hashlib.sha256(f"{type(self._samples).__qualname__} {self._whole}".encode())
        for sample in SeededSamples(self._samples, self.name).__getitems__([(place, 0) for place in places]):
            digest.update(_tensors_digest(tree_leaves(sample)).encode())
        return digest.hexdigest()

    def check_batches(self, check: BatchCheck) -> None:
        """Check each batch from now on, when it is read."""
        self._checks[:] = [check]

    def _made(
        self, order: Any | None, batch_size: int, keys: AugmentationKeys | None, size: int | None
    ) -> Iterator[Any]:
        now = _length(self._samples, self.name)
        if now != self._whole:
            raise FastarError(f"{self.name}: had {self._whole} samples and has {now} now: its length must not change")
        chosen = (self._index if order is None else self._index[order]).tolist()
        seeds = [(place, derive_seed(keys.crop if keys else 0, "sample", place)) for place in chosen]
        return self._read([seeds[i : i + batch_size] for i in range(0, len(seeds), batch_size)])

    def _read(self, batches: list[list[tuple[int, int]]]) -> Iterator[Any]:
        self._order_now.batches = batches
        try:
            with users_code(f"reading {self.name}"):
                for batch, asked in zip(self._loader, batches, strict=True):
                    for check in self._checks:
                        check(batch, [place for place, _ in asked])
                    yield moved_to(batch, self.device)
        except UserCodeError as error:
            if error.__cause__ is not None:
                raise
            # From a worker there is but a text: the traceback, whose last line is ours.
            text, _, line = str(error).strip().rpartition(f"{UserCodeError.__name__}: ")
            raise UserCodeError(" ".join(line.split())) from RuntimeError(f"in a worker\n{text}")


UserDataset = TensorData | SampleData | IterableData


def user_data(
    name: str,
    given: Any,
    device: torch.device,
    batch_size: int,
    *,
    workers: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> UserDataset:
    """A split of what a user gives.

    Args:
        name: of it, for errors.
        given: tensors (one, a tuple, a mapping); a map-style Dataset; a DataLoader (of one with an ordinary sampler,
            the dataset is taken); or an iterable of batches that has a length, or a function that begins a pass.
        batch_size: of the recipe.
        workers: processes that read a map-style dataset.
        say: is told what is done otherwise than the user may think.

    Raises:
        FastarError: none of these, or one that can be gone through once only.
    """
    if is_tensors(given):
        return TensorData(name, given, device)
    pair = isinstance(given, list) and len(given) == 2 and all(isinstance(one, Tensor) and one.ndim for one in given)
    if pair and len(given[0]) == len(given[1]):
        raise FastarError(f"{name} is a list of two tensors: give a tuple, (inputs, targets)")
    if isinstance(given, DataLoader):
        ordinary = type(given.batch_sampler) is BatchSampler
        if ordinary and type(given.sampler) in (RandomSampler, SequentialSampler):
            if given.batch_size != batch_size:
                own = given.batch_size
                say(f"{name}: batches of {batch_size} samples (train.batch_size); the loader's own are of {own}")
            return SampleData(name, given.dataset, device, loader=given)
    elif isinstance(given, SampleSet) and not isinstance(given, IterableDataset):
        return SampleData(name, given, device, workers=workers)
    _check_batches(given, name)
    say(f"{name}: its batches come as they are, so a training that was stopped goes on at the end of an epoch")
    again = given if callable(given) else lambda: given
    try:
        count = len(given)
    except TypeError:
        count = sum(1 for _ in passed(again, name, 0))
    return IterableData(name, again, count, batch_size, device)


def _check_batches(given: object, name: str) -> None:
    if isinstance(given, Iterator):
        raise FastarError(
            f"{name} can be gone through once only; give a list, a DataLoader, or a function that begins a new pass"
        )
    if any(isinstance(one, np.ndarray) for one in tree_leaves(given)):
        raise FastarError(f"{name} holds arrays of NumPy: make tensors of them, torch.from_numpy(...)")
    no_batches = isinstance(given, Mapping | str | bytes | torch.nn.Module | type) or given is None
    if no_batches or not (callable(given) or isinstance(given, Iterable)):
        raise FastarError(f"{name} is a {type(given).__name__}: {_WANTED}")


def is_tensors(given: Any) -> bool:
    """Tell whether `given` is a tensor, or a tuple or mapping of tensors alone: all samples at once."""
    if isinstance(given, tuple | Mapping):
        leaves = tree_leaves(given)
        return bool(leaves) and all(isinstance(one, Tensor) for one in leaves)
    return isinstance(given, Tensor)


def some_of(data: UserDataset, count: int | None, *, begin: int = 0, seed: str = "limit") -> UserDataset:
    """The same split with `count` of its samples, drawn once and for all, after the first `begin` drawn."""
    if count is None:
        return data
    if isinstance(data, IterableData):
        raise FastarError("a limit or a share for validation needs tensors or a map-style dataset")
    if begin + count > len(data):
        raise FastarError(f"{data.name}: {begin + count} samples are asked for and {len(data)} there; lower the limit")
    generator = torch.Generator().manual_seed(derive_seed(0, seed))
    order = torch.argsort(torch.rand(len(data), generator=generator, dtype=torch.float32, device="cpu"))
    chosen = order[begin : begin + count].sort().values
    twin = object.__new__(type(data))
    twin.__dict__.update(data.__dict__)
    twin._index = data._index[chosen.to(data._index.device)]
    return twin


def _length(samples: Any, name: str) -> int:
    with users_code(f"len({name}) ({type(samples).__name__})"):
        return len(samples)


def _tensors_digest(leaves: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for one in leaves:
        if isinstance(one, Tensor):
            values = one.detach().cpu().contiguous()
            digest.update(f"{values.dtype} {list(values.shape)}".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(one, np.ndarray) and not one.dtype.hasobject:
            digest.update(f"{one.dtype} {one.shape}".encode() + one.tobytes())
        else:  # an object's text may hold its address
            digest.update((repr(one) if isinstance(one, int | float | str | bytes) else type(one).__name__).encode())
    return digest.hexdigest()
