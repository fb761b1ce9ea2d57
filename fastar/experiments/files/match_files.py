"""Matching of checkpoints, whoever trained them: of fastar's architectures, or of a network of the user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastar.errors import FastarError
from fastar.experiments.files.given_files import Named, load_whole, open_first
from fastar.experiments.session import Session
from fastar.experiments.statistics_batches import examples
from fastar.experiments.task import DATA_KEYS
from fastar.flat.state_check import REAL
from fastar.matching import ManyResult, match, match_many
from fastar.matching import average as mean_of
from fastar.runs import checkpoint_files, stem_of
from fastar.runs.model_files import Checkpoint, save_checkpoint
from fastar.runtime.progress import SILENT, Progress
from fastar.symmetry import Permutations

# Metadata that an average of checkpoints has as they do, if all have the same.
_SAME = ("arch", "model", "input_shape", "classes", "dataset", "dataset_digest", *DATA_KEYS)


def match_files(
    first: Path, others: Sequence[Path], *, out: Path | None, named: Named, progress: Progress = SILENT
) -> list[dict[str, Any]]:
    """Match each checkpoint of `others` to `first`; write them, permuted, to `out`: a file, or a folder for several.

    Returns:
        For each: its file, the one written, groups (name to size), objective before and after, with and without 1-D
        parameters, L2 distance before and after, how many hidden units moved, sweeps, the permutations.
    """
    if not others:
        raise FastarError("there is nothing to match: give a second checkpoint")
    written = _written(others, out, alone=len(others) == 1)
    _keep_inputs([first, *others], written)
    session, theta = open_first(first, named, progress, same_data=False)
    found = []
    shown = progress if len(others) > 1 else SILENT
    with shown.task("matching files", total=len(others), unit="files") as advance:
        for path, target in zip(others, written, strict=True):
            source = load_whole(session, path, same_data=False)
            result, state = _match_file(session, theta, source)
            if target is not None:
                save_checkpoint(target, state, {**source.metadata, "matched_to": first.name})
            found.append({"file": str(path), "written": None if target is None else str(target), **result})
            advance()
    return found


def _written(paths: Sequence[Path], out: Path | None, *, alone: bool = False) -> list[Path | None]:
    """The file that each permuted checkpoint goes to: into the folder `out`, or one that is `alone` to `out` itself;
    checked before any work."""
    if out is None:
        return [None] * len(paths)
    if alone:
        if out.suffix != ".safetensors":
            raise FastarError(f"--out {out}: the permuted checkpoint is written as .safetensors; name it so")
        return [out]
    if out.suffix == ".safetensors" or out.is_file():
        raise FastarError(f"--out {out}: permuted checkpoints are written into a folder; name one")
    targets = [out / f"{stem_of(path)}.safetensors" for path in paths]
    twice = sorted({str(target) for target in targets if targets.count(target) > 1})
    if twice:
        raise FastarError(f"--out {out}: several checkpoints would be written to {twice[0]}; rename one of them")
    return list(targets)


def _keep_inputs(read: Sequence[Path], written: Sequence[Path | None]) -> None:
    """Raise FastarError where a file would be written over one that is read, or two to one place."""
    inputs = {file.resolve(): file for path in read if path.exists() for file in checkpoint_files(path)}
    taken = set()
    for target in written:
        if target is None:
            continue
        place = target.resolve()
        if place in inputs:
            raise FastarError(f"{target} would be written over {inputs[place]}, which is read: name another place")
        if place in taken:
            raise FastarError(
                f"{target} would be written twice, as permuted checkpoint and as average: name another place"
            )
        taken.add(place)


def _match_file(
    session: Session, theta: Checkpoint, source: Checkpoint
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The figures of matching a checkpoint to `theta`, and its permuted state."""
    symmetry, layout, device = session.network.symmetry, session.network.layout, session.device

    def permuted_buffers(one: Checkpoint) -> dict[str, torch.Tensor]:
        return {name: one.state[name].to(device) for name in symmetry.moved if name in symmetry.buffers}

    row, other = (session.network.row(one) for one in (theta, source))
    buffers = {name: value[None] for name, value in permuted_buffers(source).items()}
    result = match(
        session.settings.matching,
        symmetry,
        {**layout.views(row), **permuted_buffers(theta)},
        {**layout.views(other[None]), **buffers},
        examples=partial(examples, session),
        seed=session.settings.seed,
        threads=session.settings.workers,
    )
    permutations = result.permutations.select(0).to("cpu")
    state = symmetry.apply(permutations, source.state)
    moved = sum(int((index != torch.arange(len(index), device="cpu")).sum()) for index in permutations.values())
    figures = {
        **_groups(session, result.left),
        "objective_start": float(result.objective_start[0]),
        "objective": float(result.objective[0]),
        "objective_weights": float(result.objective_weights[0]),
        "distance_start": float((row - other).norm()),
        "distance": float((row - layout.flatten(state).to(device)).norm()),
        "moved": moved,
        "units": sum(group.size for group in symmetry.groups),
        "sweeps": int(result.sweeps[0]),
        "permutations": permutations.as_dict(),
    }
    return figures, state


def _groups(session: Session, left: Sequence[str]) -> dict[str, Any]:
    """The sizes of groups by name, and a line for each thing that stays in place."""
    symmetry = session.network.symmetry
    return {
        "groups": {group.name: group.size for group in symmetry.groups},
        "left": [*symmetry.frozen, *(f"group {name}: not observed, stays" for name in left)],
    }


def match_many_files(
    paths: Sequence[Path],
    *,
    to: str,
    centre: Path | None,
    out: Path | None,
    average: Path | None,
    rounds: int,
    named: Named,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Match a set of checkpoints to `centre` (to="star"), through their mean, or pairwise; write them, average them.

    Long for the three forms of its result.

    Args:
        out: folder for the permuted checkpoints; not of pairwise, where each pair has permutations of its own.
        average: file for the average of the permuted ones; not of pairwise.
        rounds: of mean, at most.

    Returns:
        groups (name to size); `files`: for each its file, the one written, objective with the centre or the mean (and
        without 1-D parameters), L2 distance from it before and after; of pairwise `pairs` instead: first, second,
        objective (both), distance before and after, permutations; average, rounds, converged, history
        (`fastar.matching.ManyResult`).
    """
    written = _written_of_many(paths, to, centre, out, average)
    session, first = open_first(paths[0] if centre is None else centre, named, progress, same_data=False)
    rest = [load_whole(session, path, same_data=False) for path in (paths[1:] if centre is None else paths)]
    loaded = [first, *rest] if centre is None else rest
    if average is not None:
        _check_mean(loaded)
    states = [_computed(one.state, session.device) for one in loaded]
    result = match_many(
        session.network.symmetry,
        states,
        to=to,  # type: ignore[arg-type]  # match_many refuses others
        centre=None if centre is None else _computed(first.state, session.device),
        settings=session.settings.matching,
        examples=partial(examples, session),
        rounds=rounds,
        seed=session.settings.seed,
        threads=session.settings.workers,
        progress=progress,
    )
    found = {
        **_groups(session, result.left),
        **{"rounds": result.rounds, "converged": result.converged, "history": list(result.history)},
        **{"to": to, "average": average and str(average)},
    }
    if result.permutations is None:
        return {**found, "pairs": _pairs(session, paths, states, result)}
    middle = result.mean if centre is None else first.state
    assert middle is not None
    files = []
    for n, (path, one, target) in enumerate(zip(paths, loaded, written, strict=True)):
        state = session.network.symmetry.apply(result.permutations.select(n).to("cpu"), one.state)
        if target is not None:
            save_checkpoint(target, state, {**one.metadata, "matched_to": to if centre is None else centre.name})
        figures = _nearness(session, middle, states[n], state)
        names = {"file": str(path), "written": target and str(target)}
        files.append({**names, "objective": float(result.objective[n]), **figures})
    if average is not None:
        _save_average(average, session, paths, loaded, result.permutations)
    return {**found, "files": files}


def _written_of_many(
    paths: Sequence[Path], to: str, centre: Path | None, out: Path | None, average: Path | None
) -> list[Path | None]:
    """The file that each permuted checkpoint of a set goes to; checked, as is `average`, before any work."""
    if not paths:
        raise FastarError("there is nothing to match: give checkpoints")
    if to == "pairwise" and (out is not None or average is not None):
        raise FastarError(
            f"{'--out' if out is not None else '--average'}: each pair is matched in its own way, there is no one set "
            "to write; --json has the permutations"
        )
    written = _written(paths, out)
    if average is not None and average.suffix != ".safetensors":
        raise FastarError(f"--average {average}: the average is written as .safetensors; name it so")
    _keep_inputs([*paths, *([] if centre is None else [centre])], [*written, average])
    return written


def _save_average(
    target: Path, session: Session, paths: Sequence[Path], loaded: Sequence[Checkpoint], permutations: Permutations
) -> None:
    """Write the mean of the permuted checkpoints: of the files' own numbers, in their type, whatever they were matched
    in."""
    first, *others = (one.metadata for one in loaded)
    known = {key: first[key] for key in _SAME if key in first and all(o.get(key) == first[key] for o in others)}
    mean = mean_of(session.network.symmetry, [one.state for one in loaded], permutations.to("cpu"))
    save_checkpoint(target, mean, {**known, "kind": "average", "of": [path.name for path in paths]})


def _computed(state: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A network's state as matching computes with it: real floating-point numbers in float32."""
    return {n: v.to(device, torch.float32) if v.is_floating_point() else v.to(device) for n, v in state.items()}


def _check_mean(loaded: Sequence[Checkpoint]) -> None:
    """Raise FastarError where there is something that has no mean."""
    for one in loaded:
        for name, value in one.state.items():
            if value.is_floating_point() and value.dtype not in REAL:
                kind = str(value.dtype).removeprefix("torch.")
                raise FastarError(f"{one.path}: {name} is {kind}, of which no average is made; leave out --average")


def _nearness(
    session: Session,
    middle: Mapping[str, torch.Tensor],
    before: Mapping[str, torch.Tensor],
    matched: Mapping[str, torch.Tensor],
) -> dict[str, float]:
    """The inner product of `middle` and `matched` over the parameters that matching counts, without 1-D ones, and the
    L2 distances of `middle` to the state before and after it was matched."""
    names = [name for name in session.network.symmetry.counted(middle, matched) if middle[name].ndim > 1]
    product = math.fsum(float((middle[n].cpu().double() * matched[n].cpu().double()).sum()) for n in names)
    row, *others = (session.network.layout.flatten(state).to(session.device) for state in (middle, before, matched))
    start, distance = (float((row - other).norm()) for other in others)
    return {"objective_weights": product, "distance_start": start, "distance": distance}


def _pairs(
    session: Session, paths: Sequence[Path], states: Sequence[dict[str, torch.Tensor]], result: ManyResult
) -> list[dict[str, Any]]:
    """The figures of each pair."""
    found = []
    for ((i, j), permutations), objective in zip(result.pairs.items(), result.objective.tolist(), strict=True):
        matched = session.network.symmetry.apply(permutations, states[j])
        found.append(
            {
                "first": str(paths[i]),
                "second": str(paths[j]),
                "objective": objective,
                **_nearness(session, states[i], states[j], matched),
                "permutations": permutations.as_dict(),
            }
        )
    return found
