"""A network compiled by torch.compile, for batches of one shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastar.errors import FastarError


class CompiledNetwork:
    """`model` compiled for the first batch's shape; shorter batches (an epoch's last) go to it uncompiled.

    Images of another side, as progressive resizing has them, are compiled for anew.

    Raises:
        FastarError: the first call could not be compiled.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._compiled: Any = None
        self._shape: torch.Size | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self._shape is None or images.shape[1:] != self._shape[1:]:
            self._shape = images.shape
            return self._compile(images)
        logits: Tensor = (self._compiled if images.shape == self._shape else self._model)(images)
        return logits

    def _compile(self, images: Tensor) -> Tensor:
        self._compiled = torch.compile(self._model, dynamic=False)
        try:
            logits: Tensor = self._compiled(images)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            reason = " ".join(str(error).split())[:300]
            what = f"train.compile=true: torch.compile failed ({reason})"
            raise FastarError(f"{what}; install a C++ compiler or set train.compile=false") from error
        return logits
