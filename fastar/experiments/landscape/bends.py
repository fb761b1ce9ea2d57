"""Trained bends of curves between two networks of a run (Garipov et al., 2018), each trained once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from fastar.config import StarSettings, changes
from fastar.evaluation import re_estimate
from fastar.evaluation.batch_norm import set_statistics
from fastar.experiments.finished_run import FinishedRun
from fastar.experiments.landscape.named_networks import NamedNetworks
from fastar.experiments.measure import permuted_row
from fastar.experiments.regular import recipe
from fastar.experiments.resumable import difference, training
from fastar.experiments.session import Session
from fastar.experiments.statistics_batches import statistics_batches
from fastar.runs import read_metadata, versions
from fastar.runs.model_files import Checkpoint, load_checkpoint, load_into, save_checkpoint, tensors_digest
from fastar.runtime.full_precision import full_precision
from fastar.runtime.seeds import derive_seed
from fastar.runtime.user_code import users_code
from fastar.training import SourcesStore, StarStep, fit
from fastar.training.bezier import BezierStep

STEPS = {"chain": StarStep, "bezier": BezierStep}
"""Kinds of curves with one bend. A chain's bend is a star of its two ends."""


def bend_file(run: FinishedRun, names: Sequence[str], kind: str) -> Path:
    """The file of the bend between two networks of a run."""
    return run.session.run.curves / ("_".join([*names, kind]).replace(":", "-") + ".safetensors")


def trained_bend(
    run: FinishedRun, names: Sequence[str], ends: Sequence[Tensor], kind: str, *, epochs: int | None = None
) -> Tensor:
    """The bend [P], on the CPU, of a curve between two networks: trained by the run's recipe at uniform t, from half
    way between them; or as it was trained before, by the same recipe between the same ends.

    Args:
        names: of the two networks.
        ends: their rows [P], matched to each other.
        kind: chain or bezier.
        epochs: None: as the star's.

    Raises:
        FastarError: a loss that is not finite, or a damaged file.
    """
    session, path = run.session, bend_file(run, names, kind)
    settings = session.settings
    wanted = {
        **recipe(session, "bend", 0),
        "curve": kind,
        "ends": tensors_digest({"first": ends[0], "second": ends[1]}),
        "epochs": epochs or settings.star_epochs,
        "lr": settings.star_lr,
        **({} if settings.star.schedule is None else {"schedule": settings.star.schedule}),
    }
    if path.is_file():
        changed = changes(read_metadata(path, own=True).get("recipe", {}), wanted)
        if not changed:
            return permuted_row(session, load_checkpoint(path, own=True))
        session.progress.line(f"{path}: of another recipe ({difference(changed)}); training it anew")
    state = _trained(session, NamedNetworks(run)[names[0]], ends, wanted)
    save_checkpoint(path, state, {**wanted, "recipe": wanted, "between": list(names), "versions": versions()})
    return session.network.layout.flatten(state).cpu()


def _trained(session: Session, first: Checkpoint, ends: Sequence[Tensor], wanted: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict of a bend, with batch-norm statistics of its own.

    Args:
        first: gives the buffers.
    """
    settings, layout, kind = session.settings, session.network.layout, wanted["curve"]
    seed = derive_seed(settings.seed, "bend", kind)
    model = session.network.build(seed=seed)
    half = layout.unflatten((ends[0] + ends[1]) / 2)
    load_into(model, Checkpoint({**first.state, **half}))
    users = users_code("training a curve") if session.runs_user_code else nullcontext()
    with users, training(settings, "a curve"):
        store = SourcesStore(layout, map(layout.unflatten, ends), ("A", "B"), session.device, store="device")
        step = STEPS[kind](model, session.train, StarSettings(), store, seed=seed, loss=session.loss)
        fit(
            step,
            session.data.train,
            settings.star_train,
            name=f"the {kind}'s bend",
            seed=derive_seed(seed, "data"),
            epochs=wanted["epochs"],
            lr=wanted["lr"],
            rate="star.lr",
            progress=session.progress,
        )
    load_into(model := session.network.build(seed=seed), Checkpoint(step.state()))
    step.release()
    with full_precision():
        statistics = re_estimate(model, statistics_batches(session))
    set_statistics(model, statistics)
    return dict(model.state_dict())
