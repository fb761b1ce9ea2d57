"""L2 distances, cosines and norms of a run's models, with and without permutation (table 1 of arXiv version 1)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fastar.experiments.families import mean_of
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.matchings import star_permutations
from fastar.experiments.measure import permuted_row, regular_pairs, spread
from fastar.experiments.session import Session, measuring, threads
from fastar.runs import versions, write_json
from fastar.runs.model_files import Checkpoint
from fastar.symmetry import Permutations

KINDS = ("regular_regular", "star_heldout", "star_source", "mean_star", "mean_heldout", "mean_source")


def distances(run: FinishedRun) -> dict[str, Any]:
    """Compare the parameters (no buffers) of a run's models: pairs of regular ones (those that it measures), the star,
    and the mean of the sources matched to it, with each. The second of a pair is permuted to match the first: as it was
    for the run's barriers, or anew where it was not. Written to `distances.json` in the run folder.

    Returns:
        dataset, arch, sources, heldout, seed, versions; norms of the models; for each of `KINDS` the spreads of
        distance and cosine, `unmatched` and `matched`; pairs, with the same for each, and layers, of each parameter
        tensor.

    Raises:
        FastarError: a run without a star, models that are missing or damaged, or units that cannot be matched.
    """
    session, settings = run.session, run.session.settings
    with threads(session), measuring("distances"):
        pairs, norms = _compared_pairs(run)
    found = {
        "dataset": settings.dataset.label,
        "arch": settings.model.arch,
        "sources": settings.sources.number,
        "heldout": settings.sources.heldout,
        "seed": settings.seed,
        "norms": norms,
        **{kind: _spreads([pair for pair in pairs if pair["kind"] == kind]) for kind in KINDS},
        "pairs": pairs,
        "versions": versions(),
    }
    write_json(session.run.distances, found)
    return found


def _compared_pairs(run: FinishedRun) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All pairs, compared, and the norms of sources, heldouts, star and mean."""
    session, settings = run.session, run.session.settings
    sources = {f"source {i}": one for i, one in enumerate(run.sources)}
    heldouts = {f"heldout {i}": one for i, one in enumerate(run.heldouts)}
    star, regular = {"star": run.star}, list((sources | heldouts).items())
    chosen = regular_pairs(settings, len(sources), len(heldouts))
    pairs: list[dict[str, Any]] = []

    def compare(
        kind: str, first: Mapping[str, Checkpoint], others: Mapping[str, Checkpoint], start: Permutations | None = None
    ) -> list[Permutations]:
        """Add the pairs of `first`, one model, with each of the others; the permutations of these."""
        (name, checkpoint), *_ = first.items()
        row, matched = permuted_row(session, checkpoint), run.matched(checkpoint, list(others.values()), start=start)
        for (other, one), permutation in zip(others.items(), matched, strict=True):
            figures = _figures(session, row, permuted_row(session, one), permuted_row(session, one, permutation))
            pairs.append({"kind": kind, "first": name, "second": other, **figures})
            advance(1)
        return matched

    total = len(chosen) + 2 * len(regular) + 1
    with session.progress.task("comparing", total=total, unit="pairs") as advance:
        for first, group in itertools.groupby(chosen, key=lambda pair: pair[0]):
            compare("regular_regular", dict([regular[first]]), dict(regular[second] for _, second in group))
        compare("star_heldout", star, heldouts)
        matched = compare("star_source", star, sources, star_permutations(session.run.permutations) or None)
        mean = {"mean": Checkpoint(session.network.layout.unflatten(mean_of(session, run.sources, matched)))}
        for kind, others in (("mean_star", star), ("mean_heldout", heldouts), ("mean_source", sources)):
            compare(kind, mean, others)

    def norms(of: Mapping[str, Checkpoint]) -> list[float]:
        return [float(permuted_row(session, one).double().norm()) for one in of.values()]

    return pairs, {
        "source": spread(norms(sources)),
        "heldout": spread(norms(heldouts)),
        "star": norms(star)[0],
        "mean": norms(mean)[0],
    }


def _figures(session: Session, first: Tensor, second: Tensor, moved: Tensor) -> dict[str, Any]:
    """The figures of a pair of rows [P], and of each parameter tensor in them; `moved`: the second, permuted."""
    layers = {}
    for entry in session.network.layout.entries:
        here = slice(entry.offset, entry.offset + entry.numel)
        layers[entry.name] = _of_tensors(*(row[here].double() for row in (first, second, moved)))
    return {**_of_tensors(first.double(), second.double(), moved.double()), "layers": layers}


def _of_tensors(first: Tensor, second: Tensor, moved: Tensor) -> dict[str, Any]:
    """Norms of two vectors in float64, and their distance, inner product and cosine (null where a norm is 0)."""
    norms = [float(first.norm()), float(second.norm())]
    both = norms[0] * norms[1]
    found: dict[str, Any] = {"norms": norms}
    for name, other in (("unmatched", second), ("matched", moved)):
        inner = float(first @ other)
        cosine = inner / both if both else None
        found[name] = {"distance": float((first - other).norm()), "inner_product": inner, "cosine": cosine}
    return found


def _spreads(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The spreads of distance and cosine over pairs, without and with permutation."""
    return {
        way: {
            key: spread([pair[way][key] for pair in pairs if pair[way][key] is not None])
            for key in ("distance", "cosine")
        }
        for way in ("unmatched", "matched")
    }
