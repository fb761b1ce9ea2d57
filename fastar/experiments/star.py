"""The star model of a run: trained against its sources (Algorithm 1), or reused where it matches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastar.config.renamed import with_old_names
from fastar.errors import FastarError, refusal
from fastar.evaluation import re_estimate
from fastar.evaluation.batch_norm import set_statistics
from fastar.experiments.matchings import star_permutations
from fastar.experiments.regular import check_recipe, measured_alone, recipe, save_model
from fastar.experiments.resumable import Subject, attempt_seed, trained, training
from fastar.experiments.reuse import check_permutations, model_paths
from fastar.experiments.session import Session, measuring
from fastar.experiments.statistics_batches import examples, statistics_batches
from fastar.flat.forward import on_device
from fastar.matching import ActivationCache, UnitActivations, cache_bytes
from fastar.runs import delete, read_metadata, write_atomically
from fastar.runs.model_files import (
    Checkpoint,
    load_checkpoint,
    load_into,
    save_checkpoint,
    state_digest,
    tensors_digest,
)
from fastar.runtime import ranks
from fastar.runtime.full_precision import full_precision
from fastar.runtime.seeds import derive_seed
from fastar.symmetry import Permutations
from fastar.training import Epoch, Matcher, Profile, SourceShares, SourcesStore, StarStep, StepsProfile

Filled = tuple[SourcesStore, ActivationCache | None]
"""Sources in their rows, and their activations where they are matched by them."""


def star_recipe(session: Session, sources: Sequence[Checkpoint]) -> dict[str, Any]:
    """Everything that determines a star model."""
    settings = session.settings
    return {
        **recipe(session, "star", 0),
        "star": settings.star.recorded(),
        "matching": with_old_names("matching", settings.matching.recorded()),
        "sources": [state_digest(source) for source in sources],
    }


def star_model(
    session: Session, sources: Iterable[Checkpoint], *, profile: StepsProfile | None = None
) -> tuple[Checkpoint, list[Checkpoint], Permutations | None]:
    """The star model of `sources`, these with their tensors left in the files, and their permutations that it was
    trained with (None: never matched).

    Args:
        sources: `sources.number` of them; each is asked for once, and let go before the next.
        profile: looks at some steps of its training.

    Raises:
        FastarError: a star that is there was made otherwise.
    """
    run, found, stores = session.run, list[Checkpoint](), list[Filled]()

    def states() -> Iterator[Mapping[str, Tensor]]:
        for source in sources:
            found.append(source.released())  # files that are no .safetensors stay in the host's memory
            yield source.state
            del source

    if run.finished("star", 0):
        for _ in states():
            pass
    else:  # what is read to be checked is what goes into the rows
        with training(session.settings, "star"):
            stores.append(_store(session, states()))
    wanted = star_recipe(session, found)
    if run.star.is_file():
        check_recipe(run.star, read_metadata(run.star, own=True).get("recipe", {}), wanted)
    if stores:
        if run.star.is_file():
            session.progress.line(f"{run.permutations}: missing, and the star is of no use without; training it again")
        _train(session, found, wanted, stores, profile)
    star = load_checkpoint(run.star, own=True)
    permutations = star_permutations(run.permutations)
    check_permutations(run, star.metadata)
    return star, found, permutations or None


def _store(session: Session, states: Iterable[Mapping[str, Tensor]]) -> Filled:
    """The sources as they are in the files, and, where they are matched by it, what their units do."""
    settings = session.settings
    by_activations = settings.star_matched_every > 0 and settings.matching.by_activations
    given = examples(session) if by_activations and session.network.symmetry.groups else None
    # Kept for all epochs, so not on the device.
    inputs = [on_device(batch, torch.device("cpu")) for batch in given.inputs] if given else []
    shares, every = SourceShares.here(settings.sources.number, settings.star), iter(states)
    names = [path.name for path in model_paths(settings, session.run, "source")]
    store = SourcesStore(
        session.network.layout,
        (state for n, state in enumerate(every) if n in shares.held),
        [names[n] for n in shares.held],
        session.device,
        store=settings.sources.store,
        folder=session.run.path,
        beside=cache_bytes(given.model, session.network.symmetry, inputs) if given else 0,
    )
    for _ in every:  # checked, though other ranks hold them
        pass
    if given is None:
        return store, None
    look = UnitActivations(given.model, session.network.symmetry, inputs, session.device)
    views = store.views()
    rows = ({name: value[n] for name, value in views.items()} for n in shares.matched_rows)
    called = [f"source {store.names[n]}" for n in shares.matched_rows]
    allocate = partial(store.make_beside, count=len(called))
    return store, ActivationCache(look, rows, called, allocate=allocate, progress=session.progress)


def _train(
    session: Session,
    sources: Sequence[Checkpoint],
    wanted: dict[str, Any],
    stores: list[Filled],
    profile: StepsProfile | None,
) -> None:
    """Train the star, measure it, and save it with its permutations. Long: each part frees memory that the next one
    needs.

    Args:
        stores: the sources in their rows, for the first attempt; for a later one the files are read again.
    """
    settings, run = session.settings, session.run
    seed = derive_seed(settings.seed, "star", settings.star.seed)
    matched = settings.star_matched_every > 0
    if matched and not session.network.symmetry.groups:
        session.progress.line(
            "nothing to match: no hidden unit can be permuted without a change of the network's outputs (all count: "
            "leave out hidden values that are returned beside the prediction)"
        )

    def make(attempt: int) -> StarStep:
        store, kept = stores.pop() if stores else _store(session, (source.state for source in sources))
        shares, matcher = SourceShares.here(settings.sources.number, settings.star), None
        if matched:
            matcher = Matcher(
                session.network.symmetry,
                store,
                settings.matching,
                seed=settings.seed,
                threads=settings.workers,
                examples=partial(examples, session),
                kept=kept,
                progress=session.progress,
                shares=shares,
            )
        return StarStep(
            session.network.build(seed=seed),
            session.train,
            settings.star,
            store,
            seed=attempt_seed(derive_seed(seed, "star"), attempt),
            match=matcher,
            match_every=settings.star_matched_every,
            loss=session.loss,
            shares=shares,
        )

    subject = Subject(wanted)
    with trained(
        session,
        subject,
        make,
        seed=derive_seed(seed, "data"),
        epochs=settings.star.epochs,
        lr=settings.star.lr,
        train=settings.star_train,
        profile=profile,
    ) as done:
        if profile is not None:
            found = profile.result
            if found is None:  # it was long enough, but went back to where too few steps were left
                session.progress.line(f"profile={profile.steps}: not seen, as the training had to go back")
            else:
                write_atomically(run.profile("parts.txt"), (found.table(profile.steps) + "\n").encode())
                write_atomically(run.profile("operations.txt"), (found.operations + "\n").encode())
        trained_state, permutations = done.step.state(), done.step.permutations()
        done.step.release()  # Z, the optimizer and all: the memory is measuring's now
        ranks.by_first(lambda: _finish(session, subject, trained_state, permutations, done.history, done.retries))


def _finish(
    session: Session,
    subject: Subject,
    trained_state: Mapping[str, Tensor],
    permutations: Permutations,
    history: Sequence[Epoch],
    retries: int,
) -> None:
    """Measure a trained star, and save it with the permutations of its sources."""
    settings, run, wanted = session.settings, session.run, subject.recipe
    seed = derive_seed(settings.seed, "star", settings.star.seed)
    # The running statistics so far are of interpolated networks: the star gets its own.
    model = session.network.build(seed=seed)
    load_into(model, Checkpoint(trained_state))
    with measuring("the star"):
        with full_precision():
            statistics = re_estimate(model, statistics_batches(session))
        set_statistics(model, statistics)
        measured = measured_alone(session, model, "the star")
    delete(run.star)  # one whose permutations are missing: it is not to be found with these
    # Written first: a star without its permutations would be measured against other ones than it was trained with.
    matched = torch.tensor(int(settings.star_matched_every > 0), dtype=torch.int64, device="cpu")
    save_checkpoint(
        run.permutations,
        {**permutations, "matched": matched},
        {"kind": "matching", "star": tensors_digest(model.state_dict()), "sources": wanted["sources"]},
    )
    save_model(session, subject, model.state_dict(), measured, history, retries)


def steps_profile(session: Session, steps: int) -> StepsProfile:
    """A look at `steps` steps of the star's training; trace (and memory, on a GPU) go into the run folder.

    Raises:
        FastarError: the star is trained already, too short a training, or a folder that cannot be written.
    """
    run, train = session.run, session.settings.train
    if run.star.is_file():
        raise FastarError(f"profile: {run.star} is trained already; choose another run folder (out) to train one")
    if run.in_training("star", 0).exists():  # too few steps may be left
        raise FastarError(
            f"profile: {run.star} is in training already; finish it without, or choose another run folder (out)"
        )
    found = StepsProfile(steps, Profile(session.device, trace=run.profile("trace.json")))
    found.check(session.settings.star_epochs, session.data.train.batch_count(train.batch_size, train.drop_last))
    with refusal(f"{run.profile('')}: cannot be made", "choose another run folder (out)"):
        run.profile("").mkdir(exist_ok=True)
    return found
