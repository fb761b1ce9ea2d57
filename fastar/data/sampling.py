"""Random choices about samples, as counter-based hashes: each is a function of its key and the sample's index alone.

The arithmetic stays inside 63 bits of int64, so NumPy, and PyTorch on any device, give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from fastar.runtime.seeds import derive_seed

if TYPE_CHECKING:
    import torch

Integers = TypeVar("Integers", np.ndarray, "torch.Tensor")

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads the stream numbers
_MIRROR = 2  # the stream of mirroring


def _mix(x: Integers) -> Integers:
    """A bijection of 32-bit words that flips about half of the output bits for any change of the input."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _WORD
    return x ^ (x >> 15)


def draw(key: int | Integers, index: Integers, stream: int = 0) -> Integers:
    """Uniform 32-bit words (int64, same shape as `index`) for the samples `index` (int64, in 0..2^32-1).

    `key` is a 63-bit seed, or several that broadcast with `index`; `stream` separates several draws for one sample.
    Distinct indices give distinct words.
    """
    first = _mix(index ^ (key & _WORD))
    return _mix((first + ((key >> 32) + stream * _GOLDEN & _WORD)) & _WORD)


def draw_below(bound: int | Integers, key: int, index: Integers, stream: int = 0) -> Integers:
    """Uniform integers in 0..bound-1 (bound < 2^31, one or one for each), int64, same shape as `index`."""
    return (draw(key, index, stream) * bound) >> 32


class AugmentationKeys(NamedTuple):
    """Keys of an epoch's augmentation: of its crops, and of its mirroring, whose draws are turned round where
    `opposite`."""

    crop: int
    mirror: int
    opposite: bool


def augmentation_keys(seed: int, epoch: int, *, alternate: bool = False) -> AugmentationKeys:
    """The keys of epoch number `epoch` (from 0).

    Args:
        alternate: mirrorings are drawn for the first epoch alone; each later one mirrors the samples that the one
            before did not (Jordan, arXiv:2404.00498, section 3.6). false: each epoch draws its own.
    """
    key = derive_seed(seed, "augmentation", epoch)
    if not alternate:
        return AugmentationKeys(key, key, False)
    return AugmentationKeys(key, derive_seed(seed, "augmentation", 0), epoch % 2 == 1)


def draw_mirrored(keys: AugmentationKeys, index: Integers) -> Integers:
    """Which of the samples `index` (int64) are mirrored: bool, same shape; each with probability 1/2."""
    return (draw(keys.mirror, index, _MIRROR) >> 31 == 1) ^ keys.opposite


def epoch_order(count: int, seed: int, epoch: int, device: torch.device) -> torch.Tensor:
    """A permutation of 0..count-1 (int64 [count], on `device`), fresh for every (seed, epoch)."""
    import torch  # only here: processes that encode images import this module

    index = torch.arange(count, device=device)
    return torch.argsort(draw(derive_seed(seed, "order", epoch), index))


def epoch_orders(count: int, seeds: Sequence[int], epoch: int, device: torch.device) -> torch.Tensor:
    """`epoch_order` of each of some seeds: int64 [seeds, count]."""
    import torch

    keys = torch.tensor([[derive_seed(seed, "order", epoch)] for seed in seeds], dtype=torch.int64, device=device)
    return torch.argsort(draw(keys, torch.arange(count, device=device)[None]), dim=1)


def paged_order(pages: np.ndarray, window: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..len(pages)-1 (int64), fresh for every (seed, epoch), that reads a file page by page.

    `pages` (int64 [n]) is where each sample lies. The pages come in a random order, `window` of them at a time, and
    the samples of those are shuffled: so many pages in memory are enough, and each is read once an epoch.
    """
    names, page = np.unique(pages, return_inverse=True)
    numbers = np.arange(len(names), dtype=np.int64)
    place = np.argsort(np.argsort(draw(derive_seed(seed, "pages", epoch), numbers), kind="stable"), kind="stable")
    samples = np.arange(len(pages), dtype=np.int64)
    shuffled = draw(derive_seed(seed, "order", epoch), samples)
    return np.lexsort((shuffled, place[page] // window))


def file_order(count: int, split: str) -> np.ndarray:
    """The fixed permutation of 0..count-1 (int64) in which images of any size are written into a split's file."""
    return np.argsort(draw(derive_seed(0, "file order", split), np.arange(count, dtype=np.int64)), kind="stable")


def balanced_subset(labels: np.ndarray, count: int, *names: str) -> np.ndarray:
    """Positions (sorted, int64) of the first `count` samples of a fixed shuffle that takes the classes in turn.

    Counts per class differ by at most 1 while every class lasts; a smaller subset lies inside a larger one.
    `names` keep the shuffles of different splits apart.
    """
    index = np.arange(len(labels), dtype=np.int64)
    shuffled = np.argsort(draw(derive_seed(0, "subset", *names), index), kind="stable")
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    sorted_labels = labels[by_class]
    first = np.searchsorted(sorted_labels, sorted_labels, side="left")
    rank = np.arange(len(labels)) - first
    in_turn = by_class[np.lexsort((sorted_labels, rank))]
    return np.sort(in_turn[:count])


def stratified_split(labels: np.ndarray, held: int, *names: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions (rest, held out), both sorted: `held` samples drawn so that each class keeps its share.

    Shares are rounded by largest remainder; the draw is fixed by `names`.
    """
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * held / len(labels)
    take = np.floor(exact).astype(np.int64)
    take[np.argsort(take - exact, kind="stable")[: held - take.sum()]] += 1
    key = derive_seed(0, "split", *names)
    chosen = []
    for label, amount in zip(classes, take, strict=True):
        members = np.flatnonzero(labels == label)
        chosen.append(members[np.argsort(draw(key, members), kind="stable")[:amount]])
    test = np.sort(np.concatenate(chosen))
    return np.setdiff1d(np.arange(len(labels)), test), test
