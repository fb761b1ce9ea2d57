"""Checkpoints of a model in training, and the choice of the one that it goes on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastar.config import CheckpointSettings
from fastar.errors import FastarError, refusal
from fastar.runs import CHECKPOINT, RETRY, delete, read_metadata, write_atomically
from fastar.runs.model_files import load_checkpoint, save_checkpoint
from fastar.runtime import ranks
from fastar.runtime.json_files import read_object, sealed, unsealed

FORMAT = 1
# Beside the best: the newest may be damaged.
KEPT = 2


class Resumable(Protocol):
    """Something whose state belongs to a training."""

    def save(self) -> dict[str, Tensor]:
        """Its state; the tensors may go on changing afterwards."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Become what was saved."""
        ...


@dataclass(frozen=True)
class Saved:
    """A training after `epoch` whole epochs and `step` steps of the next one.

    Args:
        recipe: of the model; only the same one may go on from here.
        attempt: times that the training has gone back because of losses that were not finite: part of its seeds.
        history: records of the whole epochs.
        so_far: record of the epoch that is not whole.
        tensors: by name: a part's own names after the part's and a slash; losses [step]; random generators' states.
    """

    path: Path
    recipe: dict[str, Any]
    attempt: int
    epoch: int
    step: int
    history: list[dict[str, Any]]
    so_far: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def place(self) -> str:
        """The epoch and step that come next, for users."""
        return f"epoch {self.epoch + 1}" + (f", step {self.step + 1}" if self.step else "")

    def of(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part."""
        return {name.partition("/")[2]: value for name, value in self.tensors.items() if name.startswith(f"{part}/")}


class TrainingCheckpoints:
    """The checkpoints of one model in training: files `epoch-..-step-...safetensors` in a folder of its own.

    The last two are kept, and that with the lowest loss over an epoch. `attempt` is of the training that is saved, and
    `back_to` the checkpoint that it last went back to (None: to the beginning, or never); `remember` keeps both, since
    no checkpoint may follow. On several ranks the first one reads and writes, and tells the others.

    Args:
        folder: made with the first checkpoint.
        recipe: of the model.
        settings: when to save.
        say: told of damaged checkpoints.
        clock: seconds.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Mapping[str, Any],
        settings: CheckpointSettings,
        *,
        say: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder = folder
        self.attempt = 0
        self.back_to: str | None = None
        self._recipe = dict(recipe)
        self._settings = settings
        self._say = say
        self._clock = clock
        self._last = clock()

    def paths(self) -> list[Path]:
        """The checkpoints that are there, the oldest first."""
        return sorted(path for path in self.folder.glob("epoch-*") if CHECKPOINT.fullmatch(path.name))

    def newest(self) -> Saved | None:
        """The newest whole checkpoint; damaged ones after it are deleted. None: there is none.

        Raises:
            FastarError: one that may be whole, but is of another version of fastar or cannot be read now.
        """
        found: list[Saved] = []

        def look() -> Path | None:
            found.extend(one for one in [self._newest()] if one is not None)
            return found[0].path if found else None

        path = ranks.by_first(look)
        if path is not None and not found:
            found.extend(one for one in [_read(path)] if one is not None)
        return found[0] if found else None

    def _newest(self) -> Saved | None:
        for path in reversed(self.paths()):
            _check_readable(path)
            try:
                saved = _read(path)
                if saved is None:
                    break
                return saved
            except (FastarError, TypeError) as error:
                self._say(f"{error}; going on from the one before")
                delete(path)
        else:
            return None
        what = "saved by another version of fastar; go on with that one"
        raise FastarError(f"{path}: {what}, or delete the file to go on from the one before")

    def go_back(self) -> Saved | None:
        """Count an attempt as failed; the checkpoint that the next one goes on from (None: from the beginning).

        The one that the failed attempt went back to is deleted: it was no better from there.

        Raises:
            FastarError: what is to be known of it cannot be written, or a checkpoint cannot be read now.
        """
        self.attempt += 1
        self.remember()  # before all else: a training that is killed now must not go on with the same draws
        saved = self.newest()
        if saved is not None and saved.path.name == self.back_to:
            ranks.by_first(partial(delete, saved.path))
            saved = self.newest()
        self.back_to = saved.path.name if saved is not None else None
        self.remember()
        return saved

    def remember(self) -> None:
        """Write down `attempt` and `back_to`: a process that is killed before the next checkpoint goes on with them.

        Raises:
            FastarError: the file cannot be written.
        """
        content = {"recipe": self._recipe, "attempt": self.attempt, "back_to": self.back_to}
        text = (json.dumps(sealed(content)) + "\n").encode()
        ranks.by_first(partial(write_atomically, self.folder / RETRY, text))

    def recall(self, saved: Saved | None) -> None:
        """Take `attempt` and `back_to` from what was written down for this recipe, or from `saved` if that is later."""
        self.attempt, self.back_to = ranks.by_first(partial(self._recalled, 0 if saved is None else saved.attempt))

    def _recalled(self, saved: int) -> tuple[int, str | None]:
        """`attempt` and `back_to` as they were written down; attempt `saved` where that is later."""
        try:
            content, _ = unsealed(read_object(self.folder / RETRY))
            attempt, back_to, of = content["attempt"], content["back_to"], content["recipe"]
            if type(attempt) is not int or not isinstance(back_to, str | None):
                raise TypeError("attempt is to be a number, back_to a name")
        except FileNotFoundError:
            return saved, None
        except (OSError, ValueError, TypeError, KeyError) as error:
            self._say(f"{self.folder / RETRY}: damaged ({error}); going on without it")
            return saved, None
        same = of == json.loads(json.dumps(self._recipe))
        return (attempt, back_to) if same and attempt >= saved else (saved, None)

    def due_within(self) -> bool:
        """True when it is time to save within an epoch."""
        minutes = self._settings.minutes
        return minutes > 0 and self._clock() - self._last >= 60 * minutes

    def due_after(self, epochs: int) -> bool:
        """True when it is time to save after so many whole epochs."""
        every = self._settings.epochs
        return every > 0 and epochs % every == 0 and self._clock() - self._last >= self._settings.seconds

    def save(
        self,
        parts: Mapping[str, Resumable],
        device: torch.device,
        *,
        epoch: int,
        steps: int,
        history: Sequence[Mapping[str, Any]],
        so_far: Mapping[str, Any],
        losses: Tensor,
        loss: float = math.inf,
    ) -> bool:
        """Save the training after `epoch` whole epochs and `steps` steps of the next; whether it was worth it.

        A state that is not finite is not: the next loss will tell.

        Args:
            parts: what belongs to the training, by name.
            device: whose random generators belong to it.
            losses: [steps], of these steps.
            loss: mean over the epoch that has just become whole.

        Raises:
            FastarError: the file cannot be written; those before it are kept.
        """
        metadata = {
            "format": FORMAT,
            "recipe": self._recipe,
            "attempt": self.attempt,
            "epoch": epoch,
            "step": steps,
            "history": [dict(entry) for entry in history],
            "so_far": dict(so_far),
            "loss": None if math.isinf(loss) else loss,
        }
        written = ranks.by_first(lambda: self._write(_state_of(parts, device, losses), metadata))
        self._last = self._clock()
        return written

    def _write(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> bool:
        """Write a checkpoint where it is finite, and delete those that are not kept; tell whether it was."""
        if not all(bool(torch.isfinite(value).all()) for value in tensors.values() if value.is_floating_point()):
            return False
        path = self.folder / f"epoch-{metadata['epoch']:05d}-step-{metadata['step']:08d}.safetensors"
        save_checkpoint(path, tensors, metadata)
        of_all = {one: _loss_of(one) for one in self.paths()}
        best = min(of_all, key=lambda one: of_all[one])
        for old in list(of_all)[:-KEPT]:
            if old != best or math.isinf(of_all[best]):
                delete(old)
        return True

    def restore(self, saved: Saved, parts: Mapping[str, Resumable], device: torch.device) -> None:
        """Bring the parts and torch's random generators back to what was saved."""
        for part, of in parts.items():
            of.load(saved.of(part))
        generators = saved.of("random")
        torch.set_rng_state(generators["cpu"])
        if device.type == "cuda" and "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"], device)
        self._last = self._clock()


def _state_of(parts: Mapping[str, Resumable], device: torch.device, losses: Tensor) -> dict[str, Tensor]:
    """The state of a training's parts and random generators, and its losses, on the CPU."""
    tensors = {"losses": losses, "random/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    for part, of in parts.items():
        tensors |= {f"{part}/{name}": value for name, value in of.save().items()}
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def _loss_of(path: Path) -> float:
    """The loss that a checkpoint was saved with; infinite where it is within an epoch or damaged: never the best."""
    try:
        loss = read_metadata(path, own=True).get("loss")
    except FastarError:
        return math.inf
    return math.inf if loss is None else float(loss)


def _read(path: Path) -> Saved | None:
    """A checkpoint; None: of another version of fastar.

    Raises:
        FastarError: damaged.
    """
    found = load_checkpoint(path, own=True)
    metadata = found.metadata
    if metadata.get("format") != FORMAT:
        return None
    saved = Saved(path, **{k: v for k, v in metadata.items() if k in _SAVED}, tensors=dict(found.state))
    losses = saved.tensors.get("losses")
    if losses is None or len(losses) != saved.step or len(saved.history) != saved.epoch:
        raise FastarError(f"{path}: its epochs and steps are not those that its losses are of (damaged)")
    return saved


_SAVED = {"recipe", "attempt", "epoch", "step", "history", "so_far"}


def _check_readable(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise FastarError(f"{path}: is not a file, and has the name of a checkpoint; move it away")
    remedy = "make it readable, or delete it to go on from the one before"
    with refusal(f"{path}: cannot be read", remedy), path.open("rb") as file:
        file.read(1)


def copy_into(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `tensors` of the same names and shapes, in place.

    Raises:
        FastarError: names or shapes differ.
    """
    if tensors.keys() != state.keys() or any(state[name].shape != value.shape for name, value in tensors.items()):
        raise FastarError("a checkpoint of a training does not fit it; delete it to begin this model anew")
    with torch.no_grad():
        for name, value in tensors.items():
            value.copy_(state[name])
