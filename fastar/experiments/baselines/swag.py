"""SWA and SWAG (Maddox and others 2019): a posterior of one training alone, the cheap rival of star and ensemble."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.regular import check_recipe, recipe
from fastar.experiments.resumable import Subject, trained
from fastar.runs.model_files import load_checkpoint, load_into, save_checkpoint, state_digest
from fastar.runtime.seeds import derive_seed
from fastar.training.moments import MomentsStep

RANK = 20
"""Deviations that are kept."""
SCALE = 0.5
"""Of the covariance of what is drawn."""
SHARE = 0.2
"""Of `train.lr`: the constant learning rate; 0.01 for 0.05 in its authors' training of VGG16."""


@dataclass(frozen=True)
class Moments:
    """Moments of the parameters along one training.

    Args:
        mean: [P]: SWA.
        variance: [P].
        deviations: [K, P] of the last K epochs, K <= `RANK`.
    """

    mean: Tensor
    variance: Tensor
    deviations: Tensor

    def drawn(self, seed: int) -> Tensor:
        """A draw [P] from the Gaussian of this mean and `SCALE` times the diagonal and the low-rank covariance."""
        numbers = torch.Generator().manual_seed(seed)

        def normal(size: int) -> Tensor:
            return torch.randn(size, generator=numbers, dtype=torch.float32, device="cpu")

        rank, parameters = self.deviations.shape
        step = self.variance.sqrt() * normal(parameters)
        step += normal(rank) @ self.deviations / math.sqrt(max(rank - 1, 1))
        return self.mean + math.sqrt(SCALE) * step


def swag_epochs(epochs: int) -> int:
    """Epochs of the further training: half of a regular one's, and enough for all deviations."""
    return max(epochs // 2, 2 * RANK)


def swag_moments(run: FinishedRun) -> Moments:
    """The moments of source 0 trained on at a constant learning rate, one collection an epoch; `swag.safetensors` in
    the run folder, trained where it is missing.

    Raises:
        FastarError: one that is there was made otherwise; see `fastar.experiments.resumable.trained`.
    """
    settings = run.session.settings
    constant = {"schedule": "constant", "warmup_epochs": 0.0, "milestones": (), "resolutions": ()}
    more = {"epochs": swag_epochs(settings.train.epochs), "lr": SHARE * settings.train.lr}
    train = settings.train.model_copy(update={**constant, **more})
    session = replace(run.session, settings=settings.model_copy(update={"train": train}))
    path, source = session.run.swag, run.sources[0]
    wanted = {**recipe(session, "swag", 0), "rank": RANK, "source": state_digest(source)}
    seed = derive_seed(settings.seed, "swag")

    def make(attempt: int) -> MomentsStep:
        model = session.network.build(seed=seed)
        load_into(model, source)
        return MomentsStep(model, session.train, rank=RANK, loss=session.loss)

    if not path.is_file():
        with trained(session, Subject(wanted), make, seed=derive_seed(seed, "data")) as done:
            moments = done.step.moments()
            done.step.release()
            known = {"kind": "swag", "index": 0, "recipe": wanted, "epochs": len(done.history)}
            save_checkpoint(path, moments, known)
    found = load_checkpoint(path, own=True)
    check_recipe(path, found.metadata.get("recipe", {}), wanted)
    state = found.state
    return Moments(state["mean"], state["variance"], state["deviations"][: int(state["count"])])
