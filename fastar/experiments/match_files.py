"""Matching of checkpoints, whoever trained them: of fastar's architectures, or of a network of the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastar.config import MatchingSettings, Settings, load_settings
from fastar.errors import FastarError
from fastar.experiments.barrier_files import context_of, load_whole
from fastar.experiments.regular import tell
from fastar.experiments.statistics_batches import examples as first_batches
from fastar.experiments.task import DATA_KEYS
from fastar.flat import FlatLayout
from fastar.flat.state_check import REAL
from fastar.matching import Examples, ManyResult, match, match_many, matching_threads
from fastar.matching import average as mean_of
from fastar.models.user_network import own_model
from fastar.runs import checkpoint_files, stem_of
from fastar.runs.model_files import Checkpoint, load_checkpoint, load_whole_into, save_checkpoint
from fastar.runtime.device import resolve_device
from fastar.runtime.progress import SILENT, Progress
from fastar.symmetry import Symmetry, symmetry_by_settings


@dataclass(frozen=True)
class Network:
    """What matching needs to know of the architecture of some checkpoints."""

    symmetry: Symmetry
    layout: FlatLayout
    settings: Settings
    device: torch.device
    first: Checkpoint
    """The checkpoint that it was found from, as a whole state of the architecture, on the CPU."""
    load: Callable[[Path], Checkpoint]
    """Another one, likewise."""
    examples: Callable[[], Examples]

    @property
    def matching(self) -> MatchingSettings:
        return self.settings.matching


@dataclass(frozen=True)
class Named:
    """How the command line says what checkpoints are of, beyond what they say themselves."""

    dataset: str | None = None
    arch: str | None = None
    model: str | None = None
    """`module:function` (see `own_model`)."""
    input_shape: str | None = None
    allow_partial: bool = False
    changes: Mapping[str, object] = field(default_factory=dict)
    """Settings by their dotted keys."""


def network_of(first: Path, named: Named, progress: Progress = SILENT) -> Network:
    """The network that the checkpoint `first` is of.

    Raises:
        FastarError: nothing says what it is, contradicting options, or a network that cannot be matched.
    """
    if named.model is None:
        if named.input_shape is not None or named.allow_partial:
            option = "--input-shape" if named.input_shape is not None else "--allow-partial"
            raise FastarError(f"{option} belongs to --model; fastar's own architectures need none")
        checkpoint = load_checkpoint(first)
        session = context_of(
            checkpoint, dataset=named.dataset, arch=named.arch, changes=named.changes, progress=progress
        )
        whole = load_whole(session, first, checkpoint, same_data=False)  # before its symmetry is derived, which is slow
        return Network(
            first=whole,
            symmetry=session.network.symmetry,
            layout=session.network.layout,
            settings=session.settings,
            device=session.device,
            load=lambda path: load_whole(session, path, same_data=False),
            examples=lambda: first_batches(session),
        )
    if named.dataset is not None or named.arch is not None:
        raise FastarError("--model says what the checkpoints are of: leave out --dataset and --arch")
    settings = _own_settings(named.changes)
    model, example = own_model(named.model, named.input_shape)
    whole = _load_own(model, first, progress)  # before its symmetry is derived, which is slow
    symmetry = symmetry_by_settings(settings.matching, model, example, allow_partial=named.allow_partial)

    def examples() -> Examples:
        raise FastarError("with --model there are no data to look at: match by weights, or use fastar.match in Python")

    return Network(
        first=whole,
        symmetry=symmetry,
        layout=FlatLayout.from_module(model),
        settings=settings,
        device=resolve_device(settings.device),
        load=lambda path: _load_own(model, path, progress),
        examples=examples,
    )


def _own_settings(changes: Mapping[str, object]) -> Settings:
    for key, value in changes.items():
        if not key.startswith("matching.") and key not in ("seed", "workers", "device", "gpu_memory"):
            raise FastarError(f"{key}={value}: with --model, only matching.*, seed, workers and device mean anything")
    return load_settings(dataset="digits", values=changes)  # any dataset: it is not used


def _load_own(model: nn.Module, path: Path, progress: Progress) -> Checkpoint:
    whole = load_whole_into(model, load_checkpoint(path))
    tell(whole, progress)
    return whole


def match_files(
    first: Path,
    others: Sequence[Path],
    *,
    out: Path | None,
    named: Named,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """Match each checkpoint of `others` to `first`; write them, permuted, to `out`: a file, or a folder for several.

    Returns:
        For each: its file, the one written, groups (name to size), objective before and after, with and without 1-D
        parameters, L2 distance before and after, how many hidden units moved, sweeps, the permutations.
    """
    if not others:
        raise FastarError("there is nothing to match: give a second checkpoint")
    written = _written(others, out)
    _keep_inputs([first, *others], written)
    network = network_of(first, named, progress)
    theta = network.first
    found = []
    shown = progress if len(others) > 1 else SILENT
    with shown.task("matching files", total=len(others), unit="files") as advance:
        for path, target in zip(others, written, strict=True):
            result, state, metadata = _match_file(network, theta, path)
            if target is not None:
                save_checkpoint(target, state, {**metadata, "matched_to": first.name})
            found.append({"file": str(path), "written": None if target is None else str(target), **result})
            advance()
    return found


def _written(others: Sequence[Path], out: Path | None) -> list[Path | None]:
    """Where each permuted checkpoint goes; checked before any work."""
    if out is None:
        return [None] * len(others)
    if len(others) == 1:
        if out.suffix != ".safetensors":
            raise FastarError(f"--out {out}: the permuted checkpoint is written as .safetensors; name it so")
        return [out]
    if out.suffix == ".safetensors" or out.is_file():
        raise FastarError(f"--out {out}: {len(others)} checkpoints are written into a folder; name one")
    targets = [out / f"{stem_of(path)}.safetensors" for path in others]
    twice = sorted({str(target) for target in targets if targets.count(target) > 1})
    if twice:
        raise FastarError(f"--out {out}: several checkpoints would be written to {twice[0]}; match them one by one")
    return list(targets)


def _keep_inputs(read: Sequence[Path], written: Sequence[Path | None]) -> None:
    """A FastarError where a file would be written over one that is read, or two to one place."""
    inputs = {file.resolve(): file for path in read if path.exists() for file in checkpoint_files(path)}
    seen = set()
    for target in written:
        if target is None:
            continue
        place = target.resolve()
        if place in inputs:
            raise FastarError(f"{target} would be written over {inputs[place]}, which is read: name another place")
        if place in seen:
            raise FastarError(
                f"{target} would be written twice, as permuted checkpoint and as average: name another place"
            )
        seen.add(place)


def _match_file(
    network: Network, theta: Checkpoint, path: Path
) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """What matching the checkpoint `path` to `theta` gave; its permuted state, and its metadata."""
    source = network.load(path)
    symmetry, layout = network.symmetry, network.layout
    row, other = (layout.flatten(one.state).to(network.device) for one in (theta, source))
    result = match(
        network.matching,
        symmetry,
        {**layout.views(row), **_permuted_buffers(symmetry, theta, row.device)},
        {
            **layout.views(other[None]),
            **{k: v[None] for k, v in _permuted_buffers(symmetry, source, row.device).items()},
        },
        examples=network.examples,
        seed=network.settings.seed,
        threads=matching_threads(network.device, network.settings.workers),
    )
    permutations = result.permutations.select(0).to("cpu")
    state = symmetry.apply(permutations, source.state)
    matched = layout.flatten(state).to(row.device)
    moved = sum(int((index != torch.arange(len(index), device="cpu")).sum()) for index in permutations.values())
    figures = {
        "groups": {group.name: group.size for group in symmetry.groups},
        "objective_start": float(result.objective_start[0]),
        "objective": float(result.objective[0]),
        "objective_weights": float(result.objective_weights[0]),
        "distance_start": float((row - other).norm()),
        "distance": float((row - matched).norm()),
        "moved": moved,
        "units": sum(group.size for group in symmetry.groups),
        "sweeps": int(result.sweeps[0]),
        "left": [*symmetry.frozen, *(f"group {name}: not observed, stays" for name in result.left)],
        "permutations": permutations.as_dict(),
    }
    return figures, state, dict(source.metadata)


def _permuted_buffers(symmetry: Symmetry, one: Checkpoint, device: torch.device) -> dict[str, torch.Tensor]:
    """The buffers of a network that groups permute."""
    return {name: one.state[name].to(device) for name in symmetry.moved if name in symmetry.buffers}


# What an average of checkpoints is of, as they all are.
_SAME = ("arch", "model", "input_shape", "classes", "dataset", "dataset_digest", *DATA_KEYS)


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
    if not paths:
        raise FastarError("there is nothing to match: give checkpoints")
    if to == "pairwise" and (out is not None or average is not None):
        raise FastarError(
            f"{'--out' if out is not None else '--average'}: each pair is matched in its own way, there is no one set "
            "to write; --json has the permutations"
        )
    written = _written_into(paths, out)
    if average is not None and average.suffix != ".safetensors":
        raise FastarError(f"--average {average}: the average is written as .safetensors; name it so")
    _keep_inputs([*paths, *([] if centre is None else [centre])], [*written, average])
    network = network_of(paths[0] if centre is None else centre, named, progress)
    rest = paths[1:] if centre is None else paths
    loaded = [*([network.first] if centre is None else []), *(network.load(path) for path in rest)]
    if average is not None:
        _check_mean(loaded)
    states = [_computed(one.state, network.device) for one in loaded]
    middle = None if centre is None else network.first.state
    result = match_many(
        network.symmetry,
        states,
        to=to,  # type: ignore[arg-type]  # match_many refuses others
        centre=None if middle is None else _computed(middle, network.device),
        settings=network.matching,
        examples=network.examples,
        rounds=rounds,
        seed=network.settings.seed,
        threads=matching_threads(network.device, network.settings.workers),
        progress=progress,
    )
    figures = {
        "to": to,
        "groups": {group.name: group.size for group in network.symmetry.groups},
        "left": [*network.symmetry.frozen, *(f"group {name}: not observed, stays" for name in result.left)],
        "average": None if average is None else str(average),
        "rounds": result.rounds,
        "converged": result.converged,
        "history": list(result.history),
    }
    rows = [network.layout.flatten(state) for state in states]
    if result.permutations is None:
        return {**figures, "pairs": _pair_figures(network, paths, states, rows, result)}
    assert result.mean is not None
    around = result.mean if middle is None else middle
    middle_row = network.layout.flatten(around).to(network.device)
    files = []
    for n, (path, target) in enumerate(zip(paths, written, strict=True)):
        state = network.symmetry.apply(result.permutations.select(n).to("cpu"), loaded[n].state)
        if target is not None:
            save_checkpoint(target, state, {**loaded[n].metadata, "matched_to": to if centre is None else centre.name})
        files.append(
            {
                "file": str(path),
                "written": None if target is None else str(target),
                "objective": float(result.objective[n]),
                "objective_weights": _weights_product(network, around, state),
                "distance_start": float((middle_row - rows[n]).norm()),
                "distance": float((middle_row - network.layout.flatten(state).to(network.device)).norm()),
            }
        )
    if average is not None:
        first, *others = (one.metadata for one in loaded)
        known = {key: first[key] for key in _SAME if key in first and all(o.get(key) == first[key] for o in others)}
        metadata = {"kind": "average", "of": [path.name for path in paths]}
        # The mean of the files' own numbers, in their type: they may have been matched in another.
        mean = mean_of(network.symmetry, [one.state for one in loaded], result.permutations.to("cpu"))
        save_checkpoint(average, mean, {**known, **metadata})
    return {**figures, "files": files}


def _computed(state: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A network's state as matching computes with it: real floating-point numbers in float32."""
    return {n: v.to(device, torch.float32) if v.is_floating_point() else v.to(device) for n, v in state.items()}


def _check_mean(loaded: Sequence[Checkpoint]) -> None:
    """A FastarError where there is something that has no mean."""
    for one in loaded:
        for name, value in one.state.items():
            if value.is_floating_point() and value.dtype not in REAL:
                kind = str(value.dtype).removeprefix("torch.")
                raise FastarError(f"{one.path}: {name} is {kind}, of which no average is made; leave out --average")


def _written_into(paths: Sequence[Path], out: Path | None) -> list[Path | None]:
    """Where each of a set goes: always into a folder."""
    if out is not None and out.suffix == ".safetensors":
        raise FastarError(f"--out {out}: the permuted checkpoints are written into a folder; name one")
    if out is None or len(paths) != 1:
        return _written(paths, out)
    return [out / f"{stem_of(paths[0])}.safetensors"]


def _weights_product(network: Network, one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """The inner product of two states over the parameters that matching counts, without 1-D ones."""
    names = [name for name in network.symmetry.counted(one, other) if one[name].ndim > 1]
    return math.fsum(float((one[name].cpu().double() * other[name].cpu().double()).sum()) for name in names)


def _pair_figures(
    network: Network,
    paths: Sequence[Path],
    states: Sequence[dict[str, torch.Tensor]],
    rows: Sequence[torch.Tensor],
    result: ManyResult,
) -> list[dict[str, Any]]:
    found = []
    for ((i, j), permutations), objective in zip(result.pairs.items(), result.objective.tolist(), strict=True):
        state = network.symmetry.apply(permutations, states[j])
        matched = network.layout.flatten(state)
        found.append(
            {
                "first": str(paths[i]),
                "second": str(paths[j]),
                "objective": objective,
                "objective_weights": _weights_product(network, states[i], state),
                "distance_start": float((rows[i] - rows[j]).norm()),
                "distance": float((rows[i] - matched).norm()),
                "permutations": permutations.as_dict(),
            }
        )
    return found
