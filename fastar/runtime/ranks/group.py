"""The process group: who this process is among the ranks, and what they tell each other.

torchrun starts the ranks, says by environment variables who is who, and ends all when one ends badly. What they say
goes by Gloo where it lies on a host, by NCCL where it lies on a GPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from fastar._version import __version__
from fastar.errors import FastarError

if TYPE_CHECKING:
    from torch import Tensor

Found = TypeVar("Found")

# How long ranks wait for each other: to begin; for a sum, in which all take part at about the same time; and for what
# the first one does alone, or each its share of. A rank that ends is noticed at once, whatever these are.
JOINING, SUMMING, WORKING = timedelta(minutes=5), timedelta(minutes=10), timedelta(days=30)
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class _Group:
    """The ranks that this process has joined.

    Args:
        local, on_host: this one's number among those of its host, and how many these are.
        hosts: the process group of what lies in hosts' memory, with patience.
        store: where words are left that outlast a rank.
    """

    rank: int
    world: int
    local: int
    on_host: int
    hosts: Any
    store: Any


_group: _Group | None = None
_alone = False


def launched() -> bool:
    """Tell whether torchrun has started several processes, and this is one of them; imports nothing."""
    return all(os.environ.get(name) for name in _VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def started() -> int:
    """The number of ranks of this command, whatever is done by how many of them now."""
    return 1 if _group is None else _group.world


def world() -> int:
    """The number of ranks that take part in what is done now: 1 without torchrun, and inside `by_first`."""
    return 1 if _group is None or _alone else _group.world


def rank() -> int:
    """The number of this one."""
    return 0 if _group is None else _group.rank


def is_first() -> bool:
    """True for the rank that writes, measures and speaks."""
    return rank() == 0


def local_rank() -> int:
    """The number of this rank among those of its host: of its GPU."""
    return 0 if _group is None else _group.local


def on_this_host() -> int:
    """The number of ranks on this host."""
    return 1 if _group is None else _group.on_host


@contextmanager
def joined() -> Iterator[None]:
    """Inside, this process is one of the ranks that torchrun has started; without torchrun nothing changes.

    Raises:
        FastarError: the ranks do not find each other, or are of several versions of fastar or torch.
    """
    global _group
    if not launched():
        yield
        return
    import torch
    from torch import distributed

    nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    try:
        number, count, local, on_host = (int(os.environ[name]) for name in _VARIABLES[:4])
        store, _, _ = next(distributed.rendezvous("env://", timeout=JOINING))
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=SUMMING)
        _group = _Group(number, count, local, on_host, distributed.new_group(backend="gloo", timeout=WORKING), store)
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise FastarError(
            f"the ranks did not find each other at {address} ({_in_a_line(error)}); start them all by one torchrun"
        ) from error
    _check_versions((__version__, torch.__version__))
    yield
    _group = None
    distributed.destroy_process_group()


def _check_versions(own: tuple[str, str]) -> None:
    first, *others = gathered(own)
    for number, other in enumerate(others, start=1):
        if other != first:
            raise FastarError(
                f"rank {number} has fastar {other[0]} and torch {other[1]}, rank 0 has fastar {first[0]} and torch "
                f"{first[1]}: install the same for all"
            )


def speaks() -> bool:
    """True for one rank alone: the first that is about to say why the command ends. The others end without a word."""
    if _group is None:
        return True
    try:
        return bool(_group.store.add("fastar/said", 1) == 1)
    except RuntimeError:  # torchrun is gone, and the store with it
        return _group.rank == 0


@contextmanager
def _together() -> Iterator[None]:
    """Inside, all ranks take part; one that is gone is an error for users."""
    try:
        yield
    except RuntimeError as error:
        raise FastarError(
            f"rank {rank()} of {started()}: another rank has ended, or does not answer ({_in_a_line(error)}); give the "
            "same command again to go on from what was saved"
        ) from error


def _in_a_line(error: BaseException) -> str:
    """What an error of the libraries says, without the place in their source, and without advice."""
    text = re.sub(r"\[/[^\]]*\] ?", "", " ".join(str(error).split()))
    return text.partition(". ")[0][:200]


def sum_(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the ranks, the same bits on all. Of one rank nothing changes.

    On a GPU the sums are launched, and not waited for.
    """
    if world() == 1:
        return
    from torch import distributed

    with _together():
        for work in [distributed.all_reduce(one, async_op=True) for one in tensors]:
            work.wait()


def gathered(value: Any) -> list[Any]:
    """What each rank gives, in their order: small things, and index tensors on the CPU."""
    if world() == 1:
        return [value]
    assert _group is not None
    from torch import distributed

    found: list[Any] = [None] * _group.world
    with _together():
        distributed.all_gather_object(found, value, group=_group.hosts)
    return found


def by_first(act: Callable[[], Found]) -> Found:
    """Let the first rank do something alone, as if there were no others, which wait; all are given what it returns."""
    global _alone
    if world() == 1:
        return act()
    assert _group is not None
    from torch import distributed

    found: list[Any] = [None]
    if _group.rank == 0:
        _alone = True
        try:
            found = [act()]
        finally:
            _alone = False
    with _together():
        distributed.broadcast_object_list(found, src=0, group=_group.hosts)
    result: Found = found[0]
    return result


class Agreement:
    """What any rank asks for at a step, known to all of them at the same later one: as a number, the largest counts.

    Hosts tell each other while the step's work goes on, so that no device is waited for.
    """

    def __init__(self) -> None:
        self._coming: tuple[Tensor, Any] | None = None

    def __call__(self, asked: int) -> int:
        """Ask; the largest number that was asked for at the call before (of one rank: at this one)."""
        if world() == 1:
            return asked
        found = self._come()
        self._coming = self._sent(asked)
        return found

    def now(self, asked: int) -> int:
        """Ask, and wait for the answer; what was asked for before counts too."""
        if world() == 1:
            return asked
        before = self._come()
        self._coming = self._sent(asked)
        return max(before, self._come())

    def _sent(self, asked: int) -> tuple[Tensor, Any]:
        import torch
        from torch import distributed

        assert _group is not None
        number = torch.tensor([asked], dtype=torch.int64, device="cpu")
        with _together():
            work = distributed.all_reduce(number, distributed.ReduceOp.MAX, group=_group.hosts, async_op=True)
        return number, work

    def _come(self) -> int:
        if self._coming is None:
            return 0
        (number, work), self._coming = self._coming, None
        with _together():
            work.wait()
        return int(number)
