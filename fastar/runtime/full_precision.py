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
    sites = _sites()
    kept = [(site.fp32_precision, of_all.fp32_precision) for site, of_all in sites]
    # Torch has two kinds of settings for this, of which the older ones must not say otherwise.
    matmul, cudnn = _unless_at_odds(torch.get_float32_matmul_precision), _unless_at_odds(_cudnn_tf32)
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        for site, _ in sites:
            site.fp32_precision = "ieee"
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
        # A site follows the setting of all operations; given back as its own, that would outlast it.
        for (site, _), (precision, of_all) in zip(sites, kept, strict=True):
            site.fp32_precision = "none" if precision == of_all else precision


def _sites() -> list[tuple[Any, Any]]:
    """Torch's settings of what float32 may be computed in, for one operation each, and the one that it follows."""
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    operations = [backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    return list(zip(operations, [cudnn] * 3 + [mkldnn] * 3, strict=True))


def _cudnn_tf32() -> bool:
    return torch.backends.cudnn.allow_tf32


def _unless_at_odds(read: Callable[[], Setting]) -> Setting | None:
    """An older setting; None where the newer ones say otherwise, of which torch makes an error."""
    try:
        return read()
    except RuntimeError:
        return None
