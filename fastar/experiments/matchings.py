"""Permutations that reported barriers were measured with, or a star was trained with, as they are on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastar.errors import FastarError
from fastar.runs.model_files import Checkpoint, load_checkpoint, save_checkpoint, state_digest
from fastar.symmetry import Permutations

KIND = "matchings"


def star_permutations(path: Path) -> Permutations:
    """The permutations of the sources that a star was trained with; empty where they were never matched.

    Raises:
        FastarError: missing or damaged, or a file that holds something else.
    """
    indices = dict(load_checkpoint(path, own=True).state)
    if indices.pop("matched", None) is None:
        raise FastarError(f"{path}: holds no permutations; delete it and run it again")
    try:
        return Permutations.from_dict(indices) if indices else Permutations({})
    except FastarError as error:
        raise FastarError(f"{path}: an index is no permutation of its units ({error}); restore it") from error


class Matchings:
    """Permutations of networks, each bound to two models by their digests: the second is permuted to match the first.

    In the file they are one index int32 [pairs, size] for each group, with the digests in the metadata.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._found: dict[tuple[str, str], Permutations] = {}

    def add(self, first: Checkpoint, others: Sequence[Checkpoint], permutations: Sequence[Permutations]) -> None:
        """Keep the permutations of `others` that match them to `first`."""
        digest = state_digest(first)
        for other, permutation in zip(others, permutations, strict=True):
            if permutation:  # a network without groups has none
                self._found[digest, state_digest(other)] = permutation

    def has(self, first: Checkpoint, second: Checkpoint) -> bool:
        """Tell whether there are permutations of `second` that match it to `first`."""
        return (state_digest(first), state_digest(second)) in self._found

    def between(self, first: Checkpoint, second: Checkpoint) -> Permutations:
        """The permutations of `second` that match it to `first`.

        Raises:
            FastarError: there are none of these two models.
        """
        pair = state_digest(first), state_digest(second)
        if pair not in self._found:
            order = "; it has them the other way round: swap the two" if pair[::-1] in self._found else ""
            raise FastarError(
                f"{self._path}: holds no permutations of {second.path} to {first.path}, as these files are now{order}; "
                "leave out --permutations to match them"
            )
        return self._found[pair]

    def save(self, path: Path) -> bool:
        """Write them to `path` (.safetensors), atomically; False: there are none, and nothing is written."""
        if not self._found:
            return False
        stacked = {name: index.int() for name, index in Permutations.stack(list(self._found.values())).items()}
        save_checkpoint(path, stacked, {"kind": KIND, "pairs": [list(pair) for pair in self._found]})
        return True

    @classmethod
    def load(cls, path: Path) -> Matchings:
        """Read them from a file.

        Raises:
            FastarError: missing or damaged, or a file that holds something else.
        """
        stored, found = load_checkpoint(path, own=True), cls(path)
        pairs: Any = stored.metadata.get("pairs")
        if stored.metadata.get("kind") != KIND or not isinstance(pairs, list):
            raise FastarError(f"{path}: holds no matchings; give the matchings.safetensors of a run")
        try:
            indices = Permutations.from_dict(dict(stored.state))
            if indices.count != len(pairs):
                raise FastarError(f"{indices.count} permutations for {len(pairs)} pairs")
            found._found = {(first, second): indices.select(n) for n, (first, second) in enumerate(pairs)}
        except (FastarError, TypeError, ValueError) as error:
            raise FastarError(f"{path}: an index is no permutation of its units ({error}); restore it") from error
        return found
