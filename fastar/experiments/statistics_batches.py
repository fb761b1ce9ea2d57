"""Training batches that networks of a run are shown: for batch-norm statistics, and for matching by data."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastar.data.splits import leaving_no_single
from fastar.experiments.session import Session
from fastar.matching import EXAMPLE_BATCHES, Examples
from fastar.runtime.seeds import derive_seed

# Images of each example batch that activations are compared on.
LOOKED_AT = 256


def statistics_batches(session: Session, times: int = 1) -> Iterator[tuple[Any, Any]]:
    """The train set as batch-norm statistics are re-estimated from: every image once, augmented and in batches as in
    training, in one fixed shuffled order (files may be sorted by class, and batches must not be); or `times`
    `evaluation.bn_batches` of it."""
    wanted, batches = session.settings.evaluation.bn_batches, _shuffled(session)
    return batches if wanted is None else itertools.islice(batches, wanted * times)


def whole_statistics(session: Session) -> int:
    """The number of batches of `statistics_batches` that hold the whole train set."""
    return session.data.train.batch_count(statistics_size(session), drop_last=False)


def examples(session: Session) -> Examples:
    """Example inputs for methods of matching that look at data: the first training batches, however few statistics
    take."""
    most = LOOKED_AT if session.settings.matching.by_activations else None
    batches = itertools.islice(_shuffled(session), EXAMPLE_BATCHES)
    some = [tree_map_only(Tensor, lambda one: one[:most].clone(), batch) for batch in batches]
    return Examples(session.network.build(seed=0), some, session.loss)


def statistics_size(session: Session) -> int:
    """Images in a batch for statistics: `train.batch_size`, or another that leaves no image alone."""
    count = len(session.data.train)
    size = leaving_no_single(count, session.settings.train.batch_size)
    if size == 2 and count % size == 1 and session.network.layer_of_single_values():
        return next(larger for larger in itertools.count(size) if count % larger != 1)
    return size


def _shuffled(session: Session) -> Iterator[tuple[Any, Any]]:
    size, seed = statistics_size(session), derive_seed(0, "statistics")
    return session.data.train.batches(size, seed=seed, epoch=0, augment=True, drop_last=False)
