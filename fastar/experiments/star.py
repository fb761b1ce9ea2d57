"""The star model of a run: trained against its sources (Algorithm 1), or reused where it matches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastar.config import MatchingSettings
from fastar.config.renamed import with_old_names
from fastar.errors import FastarError
from fastar.evaluation import evaluate_rows, re_estimate
from fastar.evaluation.batch_norm import set_statistics
from fastar.experiments.regular import check_recipe, recipe, save_model
from fastar.experiments.resumable import Prepared, Subject, attempt_seed, trained
from fastar.experiments.reuse import check_permutations
from fastar.experiments.session import MEASURE_WITH_LESS, Context, within_memory
from fastar.flat.forward import on_device
from fastar.matching import (
    GiveExamples,
    KeptActivations,
    SeenSources,
    UnitActivations,
    kept_bytes,
    match_by_settings,
    matching_threads,
)
from fastar.runs import delete, read_metadata, write_atomically
from fastar.runs.model_files import (
    Checkpoint,
    load_checkpoint,
    load_into,
    save_checkpoint,
    state_digest,
    tensors_digest,
)
from fastar.runtime.full_precision import full_precision
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.seeds import derive_seed
from fastar.symmetry import Permutations, Symmetry
from fastar.training import Recording, SourcesStore, StarStep, StepsProfile


def star_recipe(context: Context, sources: Sequence[Checkpoint]) -> dict[str, Any]:
    """Everything that determines a star model."""
    settings = context.settings
    return {
        **recipe(context, "star", 0),
        "star": settings.star.model_dump(mode="json"),
        "matching": with_old_names("matching", settings.matching.model_dump(mode="json", exclude={"chunk"})),
        "sources": [state_digest(source) for source in sources],
    }


def match_store(
    symmetry: Symmetry,
    theta: Tensor,
    sources: SourcesStore,
    settings: MatchingSettings,
    *,
    start: Permutations | None,
    seed: int,
    threads: int,
    examples: GiveExamples | None = None,
    seen: SeenSources | None = None,
    progress: Progress = SILENT,
) -> tuple[Permutations, Tensor, Tensor]:
    """Algorithm 1, step 1: theta_n <- pi(theta_n) for all rows of the store, wherever they live.

    Returns:
        The permutations, and the objective [N] float64 that they reach: of all parameters, and without 1-D ones, which
        hardly depend on them.
    """
    found, objectives, weights = [], [], []
    centre = sources.layout.views(theta)
    remaining = None if seen is None else seen.beside(centre)
    for views in sources.parts():
        count = len(next(iter(views.values())))
        result = match_by_settings(
            settings,
            symmetry,
            centre,
            views,
            start=start,
            examples=examples,
            seed=seed,
            threads=threads,
            seen=None if remaining is None else remaining.some(0, count),
            progress=progress,
        )
        symmetry.apply_rows(result.permutations, views)
        remaining = None if remaining is None else remaining.some(count)
        found.append(result.permutations.to("cpu"))
        objectives.append(result.objective.cpu())
        weights.append(result.objective_weights.cpu())
    permutations = Permutations({name: torch.cat([part[name] for part in found]) for name in found[0]})
    return permutations, torch.cat(objectives), torch.cat(weights)


class Matcher:
    """Makes a store's rows match theta, and remembers the permutations since the files.

    Args:
        kept: what the sources' units do, as the sources are in the files.
    """

    def __init__(self, context: Context, sources: SourcesStore, kept: KeptActivations | None = None):
        self._context = context
        self._sources = sources
        self._kept = kept
        self.permutations = context.symmetry.identity(len(sources))
        self._matched = False
        self._found: dict[str, float] = {}

    def __call__(self, theta: Tensor, sources: SourcesStore, epoch: int) -> None:
        settings, symmetry = self._context.settings, self._context.symmetry
        moves, objective, weights = match_store(
            symmetry,
            theta,
            sources,
            settings.matching,
            # The rows are kept as permuted last: what matched then is where to start now.
            start=symmetry.identity() if self._matched else None,
            seed=derive_seed(settings.seed, "star", "matching", epoch),
            threads=matching_threads(self._context.device, settings.workers),
            examples=self._context.examples,
            seen=None if self._kept is None else SeenSources.all_of(self._kept, self.permutations),
            progress=self._context.progress,
        )
        self.permutations = self.permutations.then(moves)
        self._matched = True
        self._found = {
            "matching_objective": float(objective.mean()),
            "matching_objective_weights": float(weights.mean()),
            "matching_changed": share_changed(moves),
        }

    def release(self) -> None:
        """Give back what was kept of the sources' units; nothing can be matched any more."""
        self._kept = None

    def figures(self) -> dict[str, float]:
        """Of the epoch that has begun, if it began with a matching: the mean objective (of all parameters, and without
        1-D ones), and the share of the sources' hidden units that moved."""
        found, self._found = self._found, {}
        return found

    def save(self) -> dict[str, Tensor]:
        """The permutations; the rows follow from them and the sources' files."""
        return {
            "matched": torch.tensor(int(self._matched), dtype=torch.int64, device="cpu"),
            **{name: p.int() for name, p in self.permutations.items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Permute the rows, which are as in the sources' files, as they were: gathers alone, the same bits."""
        indices = {name: index.long() for name, index in state.items() if name != "matched"}
        self._matched = bool(state["matched"])
        self.permutations = Permutations(indices)
        begin = 0
        for views in self._sources.parts():
            count = len(next(iter(views.values())))
            part = {name: index[begin : begin + count].to(self._sources.device) for name, index in indices.items()}
            self._context.symmetry.apply_rows(Permutations(part), views)
            begin += count


def share_changed(moves: Permutations) -> float:
    """The share of hidden units, of all networks, that `moves` moves."""
    moved = sum(int((index != torch.arange(index.shape[-1], device="cpu")).sum()) for index in moves.values())
    return moved / max(1, sum(index.numel() for index in moves.values()))


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
    permutations_file = run.permutations
    wanted = star_recipe(context, sources)
    if run.star.is_file():
        check_recipe(run.star, read_metadata(run.star, own=True).get("recipe", {}), wanted)
    if not run.finished("star", 0):
        if run.star.is_file():
            context.progress.line(f"{permutations_file}: missing, and the star is of no use without; training it again")
        _train(context, sources, wanted, profile)
    star = load_checkpoint(run.star, own=True)
    stored = dict(load_checkpoint(permutations_file, own=True).state)
    if stored.pop("matched", None) is None:
        raise FastarError(f"{permutations_file}: holds no permutations; delete it and run the same command again")
    check_permutations(run, star.metadata)
    return star, Permutations.from_dict(stored) if stored else None


def _store(
    context: Context, sources: Sequence[Checkpoint], by_activations: bool
) -> tuple[SourcesStore, KeptActivations | None]:
    """The sources as they are in the files, and, where they are matched by it, what their units do."""
    given = context.examples() if by_activations else None
    # Kept for all epochs, so not on the device.
    inputs = [on_device(batch, torch.device("cpu")) for batch in given.inputs] if given else []
    store = SourcesStore(
        context.layout,
        [source.state for source in sources],
        [str(source.path and source.path.name) for source in sources],
        context.device,
        store=context.settings.sources.store,
        folder=context.run.path,
        beside=kept_bytes(given.model, context.symmetry, inputs) if given else 0,
    )
    if given is None:
        return store, None
    look = UnitActivations(given.model, context.symmetry, inputs, context.device)
    views = store.views()
    rows = ({name: value[n] for name, value in views.items()} for n in range(len(store)))
    names = [f"source {name}" for name in store.names]
    return store, KeptActivations(look, rows, names, place=store.make_beside, progress=context.progress)


def _train(
    context: Context, sources: Sequence[Checkpoint], wanted: dict[str, Any], profile: StepsProfile | None
) -> None:
    settings, run = context.settings, context.run
    seed = derive_seed(settings.seed, "star", 0)
    matched = settings.star_matched_every > 0

    by_activations = matched and settings.matching.by_activations and bool(context.symmetry.groups)

    def make(attempt: int) -> Prepared:
        store, kept = _store(context, sources, by_activations)
        matcher = Matcher(context, store, kept) if matched else None
        step = StarStep(
            context.build(seed=seed),
            settings.train,
            settings.star,
            store,
            seed=attempt_seed(derive_seed(seed, "star"), attempt),
            match=matcher if matcher else lambda theta, sources, epoch: None,
        )
        if matcher is None:
            return Prepared(step)
        return Prepared(step, {"matching": matcher}, matcher.figures)

    subject = Subject("star", 0, wanted)
    with trained(
        context,
        subject,
        make,
        seed=derive_seed(seed, "data"),
        epochs=settings.star.epochs,
        lr=settings.star.lr,
        profile=profile,
    ) as done:
        if profile is not None:
            found = profile.result
            if found is None:  # it was long enough, but went back to where too few steps were left
                context.progress.line(f"--profile {profile.steps}: not seen, as the training had to go back")
            else:
                write_atomically(run.profile("parts.txt"), (found.table(profile.steps) + "\n").encode())
                write_atomically(run.profile("operations.txt"), (found.operations + "\n").encode())
        step, matcher = done.prepared.step, done.prepared.parts.get("matching")
        assert isinstance(step, StarStep)
        trained_state = step.state()
        permutations = {}
        if isinstance(matcher, Matcher):
            permutations = dict(matcher.permutations)
            matcher.release()
        step.release()  # Z, the optimizer and all: the memory is measuring's now
        # The running statistics so far are of interpolated networks: the star gets its own.
        model = context.build(seed=seed)
        load_into(model, Checkpoint(trained_state))
        with within_memory("measuring the star", MEASURE_WITH_LESS):
            with full_precision():
                statistics = re_estimate(model, context.statistics_batches())
            set_statistics(model, statistics)
            row = context.row(Checkpoint(model.state_dict()))
            own, called = [statistics] if statistics else None, ["the star"]
            measured = evaluate_rows(model, context.layout, row[None], context.splits(), statistics=own, called=called)
        delete(run.star)  # one whose permutations are missing: it is not to be found with these
        # Written first: a star without its permutations would be measured against other ones than it was trained with.
        save_checkpoint(
            run.permutations,
            {**permutations, "matched": torch.tensor(int(matched), dtype=torch.int64, device="cpu")},
            {"kind": "matching", "star": tensors_digest(model.state_dict()), "sources": wanted["sources"]},
        )
        save_model(context, subject, model.state_dict(), measured, done)


def steps_profile(context: Context, steps: int) -> StepsProfile:
    """A look at `steps` steps of the star's training; trace (and memory, on a GPU) go into the run folder.

    Raises:
        FastarError: the star is trained already, too short a training, or a folder that cannot be written.
    """
    run, train, star = context.run, context.settings.train, context.settings.star
    if run.star.is_file():
        raise FastarError(f"--profile: {run.star} is trained already; choose another --out to train one")
    if run.in_training("star", 0).exists():  # too few steps may be left
        raise FastarError(f"--profile: {run.star} is in training already; finish it without, or choose another --out")
    memory = run.profile("memory.pickle") if context.device.type == "cuda" else None
    found = StepsProfile(steps, Recording(context.device, trace=run.profile("trace.json"), memory=memory))
    found.check(star.epochs or train.epochs, context.train.batch_count(train.batch_size, train.drop_last))
    try:
        run.profile("").mkdir(exist_ok=True)
    except OSError as error:
        raise FastarError(f"{run.profile('')}: cannot be made ({error.strerror}); choose another --out") from error
    return found
