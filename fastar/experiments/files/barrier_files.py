"""Barriers of single checkpoints, whoever trained them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastar.errors import FastarError
from fastar.evaluation import PathLosses, Segment
from fastar.experiments.files.given_files import Named, load_whole, open_first
from fastar.experiments.matchings import Matchings
from fastar.experiments.measure import check_endpoint, endpoint, evaluated, match_to, path_result
from fastar.experiments.regular import device_name
from fastar.experiments.session import measuring, threads
from fastar.runs import versions
from fastar.runtime.progress import SILENT, Progress
from fastar.symmetry import Permutations


def barriers_of_files(
    first: Path,
    others: Sequence[Path],
    *,
    named: Named,
    matching: bool = True,
    permutations: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Barriers from the checkpoint `first` to each of `others` on train, test and, where `first` was trained without
    them (`dataset.validation`), validation images.

    Args:
        matching: permute the others to match `first`.
        permutations: a run's `matchings.safetensors`, whose permutations are taken instead of matching.

    Returns:
        dataset, arch, t, paths (as in `results.json`, each with train_barrier, train_largest_loss and, where accuracy
        is measured, train_accuracy_barrier, and those of the other splits), versions, device.

    Raises:
        FastarError: files that cannot be read or are not of one network, or permutations of other models.
    """
    if not others:
        raise FastarError("a barrier needs a second checkpoint")
    if permutations is not None and not matching:
        raise FastarError("--permutations and --no-match exclude each other; leave one out")
    kept = None if permutations is None else Matchings.load(permutations)
    session, start = open_first(first, named, progress, same_data=True)
    with threads(session), measuring("barriers"):
        ends = [load_whole(session, path, same_data=True) for path in others]
        matched: list[Permutations] | list[None] = [None] * len(ends)
        if kept is not None:
            matched = [kept.between(start, end) for end in ends]
        check_endpoint(session, str(first), start, None)
        if kept is None and matching:
            matched = match_to(session, start, ends, progress=progress)
        centre, segments = endpoint(session, str(first), start), []
        for path, end, permutation in zip(others, ends, matched, strict=True):
            check_endpoint(session, str(path), end, permutation)
            segments.append(Segment("path", centre, endpoint(session, str(path), end, permutation)))
        measured, error = evaluated(session, segments)
    return {
        "dataset": session.settings.dataset.label,
        "arch": session.settings.model.arch,
        "matched": matching,
        "t": measured[0].t,
        "paths": [{**path_result(path), **_beside(path)} for path in measured],
        "versions": versions(),
        "device": device_name(session.device),
        "batch_norm_error": error,
    }


def _beside(path: PathLosses) -> dict[str, float]:
    """The barrier of a path on each split, and what is said beside it."""
    found = {f"{split}_barrier": path.barrier(split) for split in path.loss}
    found |= {f"{split}_largest_loss": path.largest_loss(split) for split in path.loss}
    gaps = {f"{split}_accuracy_barrier": path.accuracy_barrier(split) for split in path.loss}
    return found | {key: gap for key, gap in gaps.items() if gap is not None}
