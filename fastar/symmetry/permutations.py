"""Permutations of the hidden units of a network, one index per group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastar.errors import FastarError


class Permutations(Mapping[str, Tensor]):
    """Group name -> int64 index, [size] for one network or [N, size] for N; new[i] = old[index[i]].

    >>> p = Permutations({"hidden": torch.tensor([2, 0, 1])})
    >>> p.inverse()["hidden"].tolist()
    [1, 2, 0]
    >>> p.then(p.inverse()).is_identity()
    True

    Raises:
        FastarError: an index is not a permutation, or the groups disagree on N.
    """

    def __init__(self, indices: Mapping[str, Tensor]):
        self._indices = {name: index.detach() for name, index in indices.items()}
        counts = set()
        for name, index in self._indices.items():
            if index.dtype != torch.int64 or index.ndim not in (1, 2):
                raise FastarError(
                    f"permutation of group {name!r} must be int64 of shape [size] or [N, size], "
                    f"it is {index.dtype} {list(index.shape)}"
                )
            expected = torch.arange(index.shape[-1], device=index.device)
            if not bool((index.sort(dim=-1).values == expected).all()):
                raise FastarError(f"permutation of group {name!r} is not a bijection of 0..{index.shape[-1] - 1}")
            counts.add(index.shape[0] if index.ndim == 2 else None)
        if len(counts) > 1:
            raise FastarError(f"groups of one Permutations must hold equally many networks, they hold {counts}")
        self.count: int | None = counts.pop() if counts else None

    def __getitem__(self, name: str) -> Tensor:
        return self._indices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Permutations):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(self[name].cpu(), other[name].cpu()) for name in self)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        networks = "" if self.count is None else f" of {self.count} networks"
        units = sum(index.shape[-1] for index in self.values())
        return f"{type(self).__name__}({len(self)} groups{networks}, {units} units)"

    def inverse(self) -> Permutations:
        """The permutations that undo these."""
        return Permutations({name: index.argsort(dim=-1) for name, index in self.items()})

    def then(self, other: Permutations) -> Permutations:
        """One step for these first and `other` afterwards. One of the two may be a single network's."""
        if self.keys() != other.keys():
            raise FastarError("permutations of different groups cannot be combined")
        out = {}
        for name in self:
            first, second = torch.broadcast_tensors(self[name], other[name])
            out[name] = first.gather(-1, second)
        return Permutations(out)

    def is_identity(self) -> bool:
        """Tell whether no unit of any network moves."""
        return all(bool((i == torch.arange(i.shape[-1], device=i.device)).all()) for i in self.values())

    def select(self, network: int) -> Permutations:
        """The permutations of one of the N networks; of no groups, none."""
        if not self._indices:
            return self
        if self.count is None:
            raise FastarError("these permutations are of a single network: nothing to select")
        return Permutations({name: index[network] for name, index in self.items()})

    def part(self, begin: int, end: int) -> Permutations:
        """The permutations of the networks `begin` to `end` - 1; of a single network, the same for all."""
        if self.count is None:
            return self
        return Permutations({name: index[begin:end] for name, index in self.items()})

    @staticmethod
    def stack(networks: Sequence[Permutations]) -> Permutations:
        """N single networks' permutations as one batched [N, size] set."""
        return Permutations({name: torch.stack([one[name] for one in networks]) for name in networks[0]})

    def to(self, device: torch.device | str) -> Permutations:
        """A copy on `device`."""
        return Permutations({name: index.to(device) for name, index in self.items()})

    def as_dict(self) -> dict[str, list[int] | list[list[int]]]:
        """Plain lists, for JSON; `from_dict` is the way back."""
        return {name: index.tolist() for name, index in self.items()}

    @classmethod
    def from_dict(cls, lists: Mapping[str, Sequence[int] | Sequence[Sequence[int]] | Tensor]) -> Permutations:
        """From `as_dict`'s lists, or from a mapping of tensors (such as a safetensors file's)."""
        return cls({name: torch.as_tensor(index, dtype=torch.int64, device="cpu") for name, index in lists.items()})
