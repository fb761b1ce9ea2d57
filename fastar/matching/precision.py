"""Matching's products in full float32, whatever training allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastar.precision import full_precision


@contextmanager
def exact_products() -> Iterator[None]:
    """No TF32 inside: gains are far smaller than the inner products they are read off."""
    with full_precision():
        yield
