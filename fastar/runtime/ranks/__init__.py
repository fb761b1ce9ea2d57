"""Several processes (ranks) that torchrun has started for one command; without it there is one, and nothing to say."""

from fastar.runtime.ranks.group import (
    Agreement,
    by_first,
    gathered,
    is_first,
    joined,
    launched,
    local_rank,
    on_this_host,
    rank,
    speaks,
    started,
    sum_,
    world,
)
from fastar.runtime.ranks.shares import share

__all__ = [
    "Agreement",
    "by_first",
    "gathered",
    "is_first",
    "joined",
    "launched",
    "local_rank",
    "on_this_host",
    "rank",
    "share",
    "speaks",
    "started",
    "sum_",
    "world",
]
