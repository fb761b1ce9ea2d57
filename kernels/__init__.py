"""Fused operations over flat parameter buffers: Triton on CUDA, plain torch (`reference.py`) elsewhere.

`operations` holds the public functions, which check their arguments and pick the path; `interpolation`,
`star_update` and `adam` hold the Triton kernels and are imported only when that path is taken.
`FASTAR_KERNELS=auto|reference|triton` forces one.
"""

from .dispatch import Backend, backend
from .operations import adam_update, find_nonfinite, interpolate, sgd_update

__all__ = ["Backend", "adam_update", "backend", "find_nonfinite", "interpolate", "sgd_update"]
