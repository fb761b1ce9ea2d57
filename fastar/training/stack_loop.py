"""The training loop of several models whose steps are done at once, each with its own seed, records and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fastar.config import TrainSettings
from fastar.data.dataset import Dataset
from fastar.losses import sample_count
from fastar.losses.side_by_side import of_network
from fastar.runtime.device import synchronize
from fastar.runtime.progress import SILENT, Progress
from fastar.runtime.signals import deferred, requested
from fastar.runtime.timing import SpanClock
from fastar.training.epochs import Epoch, NonFiniteLoss, SoFar
from fastar.training.loop import ModelTraining, learning_rates, stop_if_asked, timed_batches
from fastar.training.resume import Saved, TrainingCheckpoints
from fastar.training.stacked import StackedStep


def fit_together(
    step: StackedStep,
    data: Dataset,
    settings: TrainSettings,
    *,
    names: Sequence[str],
    seeds: Sequence[int],
    checkpoints: Sequence[TrainingCheckpoints],
    saved: Sequence[Saved | None],
    on_epoch: Callable[[Mapping[int, Epoch]], None],
    progress: Progress = SILENT,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[Epoch] | None]:
    """Train the models of `step`, as `fit` trains each of them; the records of their epochs.

    Seconds of a record are the model's share of all models'. One whose loss, or what its steps move, is no longer
    finite is None, and the others go on: trained alone it will say so. Long, as `fit` is.

    Args:
        data: what is trained on, `in_memory`.
        names, seeds, checkpoints: of each model, as of `fit`.
        saved: what each goes on from, all at the same place, or all None.
        on_epoch: told the record of each model, by its number.

    Raises:
        FastarError: a disk that is full.
        Stopped: on request, after everything was saved.
    """
    count, device = step.count, data.device
    trainings = {
        k: ModelTraining(
            step.of(k), data, settings, names[k], seeds[k], checkpoints[k], settings.epochs, "", clock, share=count
        )
        for k in range(count)
    }
    steps, epochs = trainings[0].steps, settings.epochs
    losses = torch.zeros(count, steps, device=device, dtype=torch.float32)
    lr_now = torch.zeros((), device=device, dtype=torch.float32)
    begin = 0
    for k, training in trainings.items():
        training.losses = losses[k]
        found = saved[k]
        begin = 0 if found is None else training.go_on(found)
    done = len(trainings[0].history)

    def each(act: Callable[[ModelTraining], Any]) -> dict[int, Any]:
        """The results of `act` by model; models for which it finds numbers that are not finite go."""
        results = {}
        for k, training in list(trainings.items()):
            try:
                results[k] = act(training)
            except NonFiniteLoss:
                del trainings[k]
        return results

    def due(ask: Callable[[TrainingCheckpoints], bool]) -> bool:
        """Tell whether the models that are left are to be saved; they were saved last at one time."""
        return any(ask(checkpoints[k]) for k in list(trainings)[:1])

    def saved_last(places: dict[int, str]) -> str:
        place = next((one for one in places.values() if one), "")
        return f"{place}, and of {len(places) - 1} others" if place else ""

    what = f"training {count} models together"
    with progress.task(what, total=epochs, unit="epochs") as advance, deferred():
        if done:
            advance(done)
        for epoch in range(done, epochs):
            if not begin:
                for training in trainings.values():
                    training.so_far = SoFar()
            rates = learning_rates(settings, epoch, steps, epochs, settings.lr).to(device)
            spans = SpanClock(device)
            for training in trainings.values():
                training.clock_steps(spans)
            batches = data.side_by_side(
                settings.batch_size, seeds=seeds, epoch=epoch, drop_last=settings.drop_last, begin=begin
            )
            for i, (inputs, targets) in enumerate(timed_batches(batches, spans), start=begin):
                with spans:
                    lr_now.copy_(rates[i])
                    losses[:, i] = step(inputs, targets, lr_now)
                images = sample_count(of_network(inputs, 0))
                for training in trainings.values():
                    training.so_far.images += images
                if i + 1 < steps and (requested() or due(TrainingCheckpoints.due_within)):
                    synchronize(device)
                    now = clock()
                    places = each(partial(ModelTraining.save_within, steps=i + 1))
                    for training in trainings.values():
                        training.saving += clock() - now
                    stop_if_asked(saved_last(places))
            begin = 0
            for k in (~step.finite()).nonzero().flatten().tolist():
                trainings.pop(k, None)
            ended = each(partial(ModelTraining.end_epoch, lr=float(rates[-1])))
            if not ended:
                break
            on_epoch(ended)
            if requested() or due(partial(TrainingCheckpoints.due_after, epochs=epoch + 1)):
                stop_if_asked(saved_last(each(ModelTraining.save_after)))
            advance(1, note=next(iter(ended.values())).note())
    return [trainings[k].history if k in trainings else None for k in range(count)]
