"""Shares of things that are in an order: of a batch's samples, of the sources."""

from __future__ import annotations


def share(count: int, rank: int, world: int) -> range:
    """The places, of `count` in all, that belong to a rank: one run of them, as long as others' or one longer.

    The first ranks have the longer ones; where there are fewer things than ranks, the last ranks have none.

    >>> [share(5, rank, 3) for rank in range(3)]
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    each, more = divmod(count, world)
    begin = rank * each + min(rank, more)
    return range(begin, begin + each + (rank < more))
