"""Checks that several ranks do together: `torchrun ... rank_checks.py FILE`. Each is done by all ranks and by the first
one alone, in float64, and FILE is given both.

fastar computes in float32, so float32 is another name of float64 here: what is left between two ways to sum is rounding
at 1e-16.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch

torch.float32 = torch.float64
torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
torch.set_default_dtype(torch.float64)

from training_cases import CPU, PlainConvNet, PlainMlp, dataset, network, store  # noqa: E402

from fastar.config import MatchingSettings, StarSettings, TrainSettings  # noqa: E402
from fastar.data.user_data import TensorData  # noqa: E402
from fastar.errors import FastarError  # noqa: E402
from fastar.flat import FlatLayout  # noqa: E402
from fastar.runtime import ranks  # noqa: E402
from fastar.runtime.ranks import group  # noqa: E402
from fastar.symmetry import PermutationSpec  # noqa: E402
from fastar.training import Matcher, RegularStep, SourcesStore, StarStep, fit  # noqa: E402
from fastar.training.source_shares import SourceShares  # noqa: E402
from fastar.training.star import EpochDraws  # noqa: E402

# Written by hand: to derive it takes seconds of imports.
GROUPS: dict[str, tuple[str | None, ...]] = {
    "conv.weight": ("conv", None, None, None),
    **{f"norm.{leaf}": ("conv",) for leaf in ("weight", "bias", "running_mean", "running_var")},
    "out.weight": (None, "conv"),
    "out.bias": (None,),
}
RECIPE: dict[str, Any] = {"lr": 0.05, "precision": "fp32", "drop_last": False, "weight_decay": 0.01}
SOURCES = 5


def rank_now() -> int:
    """The number of this rank among those that take part."""
    return ranks.rank() if ranks.world() > 1 else 0


def star_of(settings: TrainSettings, star: StarSettings) -> StarStep:
    """A star step on a batch-normed network, matched by weights, and by this rank's share of the sources."""
    model, sources = network(PlainConvNet, 0), [network(PlainConvNet, 1 + n) for n in range(SOURCES)]
    shares = SourceShares.here(SOURCES, star)
    rows: SourcesStore = store([sources[n] for n in shares.held], FlatLayout.from_module(model))
    symmetry = PermutationSpec(GROUPS).symmetry(network(PlainConvNet, 0), (torch.zeros(2, 3, 8, 8),), verify=False)
    matcher = Matcher(symmetry, rows, MatchingSettings(), seed=0, shares=shares)
    return StarStep(model, settings, star, rows, seed=3, match=matcher, shares=shares)


def shared_draws(*, sync: bool = True) -> dict[str, Any]:
    """24 steps of a star with synchronised batch norm, in batches that do not divide."""
    settings = TrainSettings(batch_size=17, sync_batch_norm=sync, **RECIPE)
    step = star_of(settings, StarSettings(mu=0.5, start="mean"))
    history = fit(step, dataset(88, pad=0), settings, name="star", seed=5, epochs=4)
    losses = [epoch.loss for epoch in history]
    return {**step.state(), "losses": torch.tensor(losses), "images": [epoch.images for epoch in history]} | {
        f"moved.{name}": index for name, index in step.permutations().items()
    }


def norms_of_ranks() -> dict[str, Any]:
    """The same, where each rank normalises by its own samples: another star."""
    return shared_draws(sync=False)


def dropout() -> dict[str, Any]:
    """A regular model with dropout and clipping; the last batch has one sample: the other ranks have none."""
    settings = TrainSettings(batch_size=16, gradient_clip=0.5, **RECIPE)
    model = torch.nn.Sequential(network(PlainMlp, 0), torch.nn.Dropout(0.3), torch.nn.Linear(4, 4))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.nn.init.normal_(model[2].weight)
        torch.nn.init.normal_(model[2].bias)
    step = RegularStep(model, settings)
    data = dataset(33, channels=3, size=2, pad=0)
    history = fit(step, data, settings, name="model", seed=5, epochs=7)
    return {**step.state(), "losses": torch.tensor([epoch.loss for epoch in history])}


def ignored_targets() -> dict[str, Any]:
    """The mean is over terms: most targets are ignored, and all of some rank's."""
    settings = TrainSettings(batch_size=6, label_smoothing=0.1, **RECIPE)
    generator = torch.Generator().manual_seed(2)
    inputs, targets = torch.randn(24, 12, generator=generator), torch.randint(4, (24,), generator=generator)
    targets[torch.rand(24, generator=generator) < 0.6] = -100
    targets[0] = 1
    step = RegularStep(network(PlainMlp, 3), settings)
    step_losses = [
        step(*(one[share.start : share.stop] for one in (inputs, targets)), torch.tensor(0.1))
        for share in [ranks.share(24, rank_now(), ranks.world())] * 5
    ]
    data = TensorData("data", (inputs, targets.clamp(min=0)), CPU)
    history = fit(step, data, settings, name="model", seed=5, epochs=2)
    return {**step.state(), "losses": torch.stack(step_losses), "epochs": torch.tensor([e.loss for e in history])}


def each_draws() -> dict[str, Any]:
    """The gradient's mean over all draws, of a batch whose shares are alike; and what a matched start comes to."""
    settings = TrainSettings(batch_size=6, lr=1.0, momentum=0, nesterov=False, weight_decay=0, precision="fp32")
    star = StarSettings(draws="each", start="mean")
    step = star_of(settings, star)
    step.begin_epoch(0, 1)
    begin, held = step.theta.clone(), step.sources
    images, labels = next(dataset(3, pad=0).sequential(3))
    if ranks.world() == 1:
        images, labels = images.repeat(2, 1, 1, 1), labels.repeat(2)
    shares = [ranks.share(SOURCES, rank, ranks.world()) for rank in range(ranks.world())]
    mean, ts = torch.zeros_like(begin), [0.1, 0.4, 0.6, 0.8, 0.3]
    combinations = list(itertools.product(*shares))
    for chosen in combinations:
        step.theta.copy_(begin)
        n = chosen[rank_now()]
        step._draws = EpochDraws([n - step._shares.held.start], [ts[n]], held, 0)
        step(images, labels, torch.tensor(1.0))
        mean += (begin - step.theta) / len(combinations)
    names = step.permutations()
    return {"mean": mean, "begin": begin, **{f"moved.{name}": index for name, index in names.items()}}


def agreement() -> dict[str, Any]:
    """What one rank asks for at its second step is known to all at their third."""
    ask = ranks.Agreement()
    asked = [int(ranks.world() == 1 or ranks.rank() == 1) * number for number in (0, 5, 0, 0)]
    found = [ask(number) for number in asked]
    return {"found": ranks.gathered(found), "now": ranks.gathered(ask.now(7 if ranks.is_first() else 0))}


def versions() -> dict[str, Any]:
    """One rank has another version."""
    try:
        group._check_versions(("1.0" if ranks.is_first() else "2.0", "2.11"))
    except FastarError as error:
        return {"said": ranks.gathered(str(error))}
    return {"said": []}


CHECKS: list[Callable[[], dict[str, Any]]] = [
    shared_draws,
    norms_of_ranks,
    dropout,
    ignored_targets,
    each_draws,
    agreement,
    versions,
]

if __name__ == "__main__":
    with ranks.joined():
        found = {}
        for check in CHECKS:
            together = check()
            found[check.__name__] = {"ranks": ranks.gathered(together), "alone": ranks.by_first(check)}
        if ranks.is_first():
            torch.save(found, sys.argv[1])
