"""float32 that means float32, whatever the process allows elsewhere: small losses and gains of matching need it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

Setting = TypeVar("Setting")


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 and no bf16 in products and convolutions of float32 inside, and no autocast of the caller's; afterwards
    all is set as it was."""
    places = _places()
    kept = [place.fp32_precision for place in places]
    # Torch tells a place what is said of all; given back as its own, it would outlast that.
    all_of = [above.fp32_precision for above in _above()]
    # Torch has two kinds of settings for this, of which the older ones must not say otherwise.
    matmul, cudnn = _unless_at_odds(torch.get_float32_matmul_precision), _unless_at_odds(_cudnn_tf32)
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        for place in places:
            place.fp32_precision = "ieee"
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if cudnn is not None:
            torch.backends.cudnn.allow_tf32 = cudnn
        for place, precision, of_all in zip(places, kept, all_of, strict=True):
            place.fp32_precision = "none" if precision == of_all else precision


def _places() -> list[Any]:
    """Where torch keeps what float32 may be computed in, operation by operation: what is said of one goes before what
    is said of all."""
    backends: Any = torch.backends
    gpu = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    return [*gpu, backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn]


def _above() -> list[Any]:
    """What a place without a setting of its own follows."""
    return [torch.backends.cudnn] * 3 + [torch.backends.mkldnn] * 3


def _cudnn_tf32() -> bool:
    return torch.backends.cudnn.allow_tf32


def _unless_at_odds(read: Callable[[], Setting]) -> Setting | None:
    """An older setting; None where the newer ones say otherwise, of which torch makes an error."""
    try:
        return read()
    except RuntimeError:
        return None
