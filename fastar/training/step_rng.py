"""Random numbers that a network draws in training (dropout), as a function of the seed, the epoch and the step."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from fastar.runtime.seeds import derive_seed


class StepDraws:
    """While entered, torch's generators are begun anew before each step; afterwards they are where they were.

    So a step draws the same whatever was drawn before it, and a training that goes on within an epoch comes to the same
    bits. Whether steps draw at all is seen at the first one; generators are left alone from then on if it did not.
    They are set on the host: nothing waits, and a CUDA graph reads its generator's seed at each replay. A compiled
    network draws other numbers than one that is not, likewise determined.

    Args:
        seed: of the training.
        device: of the network.
    """

    def __init__(self, seed: int, device: torch.device):
        self._seed = seed
        self._generators = [torch.default_generator]  # the CPU's alone: torch.manual_seed would move those of all GPUs
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generators.append(torch.cuda.default_generators[index])
        self._before: list[Tensor] = []
        self._begun: list[Tensor] | None = None
        self._needed = True

    def __enter__(self) -> StepDraws:
        self._before = self._states()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for generator, state in zip(self._generators, self._before, strict=True):
            generator.set_state(state)

    def begin(self, epoch: int, step: int) -> None:
        """Before step number `step` of epoch number `epoch` (both from 0)."""
        if not self._needed:
            return
        seed = derive_seed(self._seed, "network", epoch, step)
        for generator in self._generators:
            generator.manual_seed(seed)
        if self._begun is None:
            self._begun = self._states()

    def end(self) -> None:
        """After the step."""
        if self._begun:
            pairs = zip(self._begun, self._states(), strict=True)
            self._needed = not all(torch.equal(begun, now) for begun, now in pairs)
            self._begun = []

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]
