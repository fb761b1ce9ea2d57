"""The star model of a run: trained against its sources (Algorithm 1), or reused where it matches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastar import __version__
from fastar.checkpoints import Checkpoint, load_checkpoint, load_into, read_metadata, save_checkpoint
from fastar.config import MatchingSettings
from fastar.errors import FastarError
from fastar.evaluation import evaluate_rows, re_estimate
from fastar.evaluation.batch_norm import set_statistics
from fastar.evaluation.losses import full_precision
from fastar.experiments.context import Context
from fastar.experiments.regular import check_recipe, device_name, last_good_state, recipe
from fastar.matching import ByActivations, Permutations, Symmetry, match_by_settings
from fastar.progress import SILENT, Progress
from fastar.runs import commit, versions
from fastar.seeds import derive_seed
from fastar.training import Recording, SourcesStore, StarStep, StepsProfile, fit


def star_recipe(context: Context, sources: Sequence[Checkpoint]) -> dict[str, Any]:
    """Everything that determines a star model."""
    settings = context.settings
    return {
        **recipe(context, "star", 0),
        "star": settings.star.model_dump(mode="json"),
        "matching": settings.matching.model_dump(mode="json"),
        "sources": [state_digest(source) for source in sources],
    }


def state_digest(checkpoint: Checkpoint) -> str:
    """A digest of a model's tensors, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(checkpoint.state):
        value = checkpoint.state[name].detach().cpu().contiguous()
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()[:16]


def match_store(
    symmetry: Symmetry,
    theta: Tensor,
    sources: SourcesStore,
    settings: MatchingSettings,
    *,
    start: Permutations | None,
    seed: int,
    threads: int,
    activations: ByActivations | None = None,
    progress: Progress = SILENT,
) -> Permutations:
    """Algorithm 1, step 1: theta_n <- pi(theta_n) for all rows of the store, wherever they live; the permutations."""
    found = []
    for views in sources.parts():
        result = match_by_settings(
            settings,
            symmetry,
            sources.layout.views(theta),
            views,
            start=start,
            activations=activations,
            seed=seed,
            threads=threads,
            progress=progress,
        )
        symmetry.apply_rows(result.permutations, views)
        found.append(result.permutations.to("cpu"))
    return Permutations({name: torch.cat([part[name] for part in found]) for name in found[0]})


class Matcher:
    """Makes a store's rows match theta, and remembers the permutations since the files."""

    def __init__(self, context: Context, count: int):
        self._context = context
        self.permutations = context.symmetry.identity(count)
        self._matched = False

    def __call__(self, theta: Tensor, sources: SourcesStore, epoch: int) -> None:
        settings, symmetry = self._context.settings, self._context.symmetry
        moves = match_store(
            symmetry,
            theta,
            sources,
            settings.matching,
            # The rows are kept as permuted last: what matched then is where to start now.
            start=symmetry.identity() if self._matched else None,
            seed=derive_seed(settings.seed, "star", "matching", epoch),
            threads=settings.workers,
            activations=self._context.match_activations,
            progress=self._context.progress,
        )
        self.permutations = self.permutations.then(moves)
        self._matched = True


def star_model(
    context: Context, sources: Sequence[Checkpoint], *, profile: StepsProfile | None = None
) -> tuple[Checkpoint, Permutations | None]:
    """The star model of `sources`, and the sources' permutations that it was trained with (None: never matched).

    Args:
        profile: looks at some steps of its training.

    Raises:
        FastarError: a star that is there was made otherwise.
    """
    run = context.run
    permutations_file = run.path / "permutations.safetensors"
    wanted = star_recipe(context, sources)
    if run.star.is_file():
        check_recipe(run.star, read_metadata(run.star).get("recipe", {}), wanted)
    if not (run.star.is_file() and permutations_file.is_file()):
        _train(context, sources, wanted, profile)
    star = load_checkpoint(run.star)
    stored = load_checkpoint(permutations_file).state
    if stored.pop("matched", None) is None:
        raise FastarError(f"{permutations_file}: holds no permutations; delete it and run the same command again")
    return star, Permutations.from_dict(stored) if stored else None


def _train(
    context: Context, sources: Sequence[Checkpoint], wanted: dict[str, Any], profile: StepsProfile | None
) -> None:
    settings, run = context.settings, context.run
    seed = derive_seed(settings.seed, "star", 0)
    store = SourcesStore(
        context.layout,
        [s.state for s in sources],
        [str(s.path and s.path.name) for s in sources],
        context.device,
        store=settings.sources.store,
        folder=run.path,
    )
    matched = settings.star.match_every_epochs > 0
    matcher = Matcher(context, len(sources)) if matched else None
    model = context.build(seed=seed)
    step = StarStep(
        model,
        settings.train,
        settings.star,
        store,
        seed=derive_seed(seed, "star"),
        match=matcher if matcher else lambda theta, sources, epoch: None,
    )
    with last_good_state(context, "star", 0):
        history = fit(
            step,
            context.train,
            settings.train,
            name="star",
            seed=derive_seed(seed, "data"),
            epochs=settings.star.epochs,
            lr=settings.star.lr,
            on_epoch=lambda epoch: run.log(kind="star", model="star", **vars(epoch)),
            profile=profile,
            progress=context.progress,
        )
    if profile is not None:
        found = profile.result
        assert found is not None  # the training was long enough
        run.profile("parts.txt").write_text(found.table(profile.steps) + "\n", encoding="utf-8")
        run.profile("operations.txt").write_text(found.operations + "\n", encoding="utf-8")
    # The running statistics so far are of interpolated networks: the star gets its own.
    trained = Checkpoint(step.state())
    model = context.build(seed=seed)
    load_into(model, trained)
    with full_precision():
        statistics = re_estimate(model, context.statistics_batches())
    set_statistics(model, statistics)
    row = context.row(trained)
    measured = evaluate_rows(
        model, context.layout, row[None], context.splits(), statistics=[statistics] if statistics else None
    )
    # Written first: a star without its permutations would be measured against other ones than it was trained with.
    permutations = dict(matcher.permutations) if matcher else {}
    save_checkpoint(
        run.path / "permutations.safetensors",
        {**permutations, "matched": torch.tensor(int(matched))},
        {"kind": "matching"},
    )
    save_checkpoint(
        run.star,
        model.state_dict(),
        {
            **recipe(context, "star", 0),
            "recipe": wanted,
            "epochs": len(history),
            "training_loss": history[-1].loss,
            **{f"{split}_loss": float(m.loss[0]) for split, m in measured.items()},
            **{f"{split}_accuracy": float(m.accuracy[0]) for split, m in measured.items()},
            "device": device_name(context.device),
            "version": __version__,
            "commit": commit(),
            "versions": versions(),
        },
    )


def steps_profile(context: Context, steps: int) -> StepsProfile:
    """A look at `steps` steps of the star's training; trace (and memory, on a GPU) go into the run folder.

    Raises:
        FastarError: the star is trained already, too short a training, or a folder that cannot be written.
    """
    run, train, star = context.run, context.settings.train, context.settings.star
    if run.star.is_file():
        raise FastarError(f"--profile: {run.star} is trained already; choose another --out to train one")
    memory = run.profile("memory.pickle") if context.device.type == "cuda" else None
    found = StepsProfile(steps, Recording(context.device, trace=run.profile("trace.json"), memory=memory))
    found.check(star.epochs or train.epochs, context.train.batch_count(train.batch_size, train.drop_last))
    try:
        run.profile("").mkdir(exist_ok=True)
    except OSError as error:
        raise FastarError(f"{run.profile('')}: cannot be made ({error.strerror}); choose another --out") from error
    return found
