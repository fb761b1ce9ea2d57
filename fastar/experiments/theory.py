"""The paper's experiments without data sets: the certificate of figure 5, the two-layer networks of tables 3 and 4."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from fastar.config.paper import parts_of
from fastar.errors import FastarError
from fastar.runs import versions
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.seeds import derive_seed
from fastar.theory import certificate, two_layer

LARGEST_WIDTH = 1024
MOST_DRAWS = 10_000
WIDE, FEWER_DRAWS = 128, 30
"""Above this width, the assignments of 100 x 100 pairs take many minutes."""
WIDTHS = (2, 4, 8, 32)
HELDOUT = 20
"""Networks that the star is not trained on."""
EPS = (1e-6, 1e-5, 1e-3, 1e-1)
TABLES = {"linear": "table3", "elu": "table4"}


def run_certificate(
    *,
    most: int = WIDE,
    draws: int | None = None,
    permutation: str = "matching",
    of: str = "gap",
    adversarial: bool = False,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Q(m, eps) of figure 5: the share of networks phi whose gap to each of N networks theta, squared, is at most eps.

    Args:
        most: the largest width; the others are the powers of two below it.
        draws: how many phi, and how many theta. Default: 100, and 30 where widths go beyond 128.
        permutation: see `certificate.gaps`.
        of: "gap", or "barrier": the largest barrier of each phi is compared with eps, which is sharper.
        adversarial: add the theta of `certificate.spiked` to those drawn.

    Returns:
        what the JSON file holds: `q[i][j]` is of `widths[i]` and `eps[j]`, `worst[i]` has each phi's largest squared
        gap (or barrier).
    """
    if permutation not in certificate.PERMUTATIONS:
        raise FastarError(f"--permutation {permutation}: choose one of {', '.join(certificate.PERMUTATIONS)}")
    if of not in ("gap", "barrier"):
        raise FastarError(f"--of {of}: choose one of gap, barrier")
    number = (100 if most <= WIDE else FEWER_DRAWS) if draws is None else draws
    _check(most, number)
    widths = [2**k for k in range(1, most.bit_length())]
    eps = np.linspace(0.01, 0.1, 50)
    worst, q = [], []
    for width in widths:
        phi, theta = (
            certificate.draw(number, width, np.random.default_rng(derive_seed(seed, "certificate", name, width)))
            for name in ("phi", "theta")
        )
        if adversarial:
            theta = np.concatenate([theta, certificate.spiked(width)[None]])
        gaps = certificate.gaps(phi, theta, permutation, progress)  # type: ignore[arg-type]  # checked above
        largest = gaps.max(axis=1) ** 2 / (certificate.BARRIER if of == "barrier" else 1)
        worst.append(largest.tolist())
        q.append(certificate.share_within(largest, eps).tolist())
    return {
        **{"kind": "certificate", "seed": seed, "draws": number, "permutation": permutation, "of": of},
        **{"adversarial": adversarial, "widths": widths, "eps": eps.tolist(), "q": q, "worst": worst},
        "versions": versions(),
    }


def run_two_layer(
    activation: str, *, most: int = 32, draws: int | None = None, seed: int = 0, progress: Progress = SILENT
) -> dict[str, Any]:
    """The share of empirical star models among two-layer networks, by width and tolerance (tables 3 and 4); and a star
    that Algorithm 1 makes of them, which the paper does not have here.

    Args:
        activation: "linear" or "elu".
        most: the largest width; of 2, 4, 8, 32 and the powers of two beyond.
        draws: how many networks are trained. Default: 100.

    Returns:
        what the JSON file holds: `share[i][j]`, `unmatched[i][j]` and `paper[i][j]` (None where it has none) are of
        `widths[i]` and `eps[j]`; `loss` has the networks' mean loss, `worst` each one's largest barrier, `star` the
        star's loss and its largest barrier to them, its sources, and to `heldout` more.
    """
    if activation not in get_args(two_layer.Activation):
        raise FastarError(f"{activation}: choose one of linear, elu")
    number = 100 if draws is None else draws
    _check(most, number)
    widths = [width for width in (*WIDTHS, *(2**k for k in range(6, 11))) if width <= most]
    eps = np.array(EPS)
    points, signs = two_layer.draw_points(np.random.default_rng(derive_seed(seed, "two-layer", "points")))
    given: tuple[two_layer.Floats, two_layer.Floats, Any] = (points, signs, activation)
    result: dict[str, Any] = {name: [] for name in ("share", "unmatched", "loss", "worst", "star")}
    for width in widths:
        generator = np.random.default_rng(derive_seed(seed, "two-layer", "networks", width))
        untrained = two_layer.draw_networks(number + HELDOUT, width, generator)
        trained = two_layer.train(untrained, *given, progress=progress)
        units, heldout = trained[:number], trained[number:]
        matched = two_layer.barrier_matrix(units, *given, matched=True, progress=progress)
        unmatched = two_layer.barrier_matrix(units, *given, matched=False, progress=progress)
        result["share"].append(two_layer.star_share(matched, eps).tolist())
        result["unmatched"].append(two_layer.star_share(unmatched, eps).tolist())
        result["loss"].append(float(two_layer.loss(two_layer.outputs(units, points, given[2]), signs).mean()))
        result["worst"].append(matched.max(axis=1).tolist())
        [start] = two_layer.draw_networks(1, width, generator)
        star = two_layer.train_star(start, units, *given, generator=generator, progress=progress)
        found = {"loss": float(two_layer.loss(two_layer.outputs(star, points, given[2]), signs))}
        for name, others in (("sources", units), ("heldout", heldout)):
            losses = two_layer.path_losses(star, two_layer.matched_to(star, others), *given)
            found[name] = float(two_layer.barriers(losses).max())
        result["star"].append(found)
    shares = parts_of(TABLES[activation], "full")[0]["rows"]
    paper = [list(shares[str(width)]["figures"].values()) if str(width) in shares else None for width in widths]
    return {
        **{"kind": activation, "seed": seed, "draws": number, "heldout": HELDOUT, "widths": widths, "eps": list(EPS)},
        **{**result, "paper": paper, "versions": versions()},
    }


def _check(most: int, draws: int) -> None:
    if not 2 <= most <= LARGEST_WIDTH:
        raise FastarError(f"--most {most}: the largest width is a number from 2 to {LARGEST_WIDTH}")
    if not 2 <= draws <= MOST_DRAWS:
        raise FastarError(f"--draws {draws}: give a number from 2 to {MOST_DRAWS}")
