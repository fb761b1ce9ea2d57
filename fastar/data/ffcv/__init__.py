""".beton files: the only importer of FFCV, which is imported here once and with care.

Importing FFCV, and every loader of it, sets torch's thread count for the whole process (to 1, or to its workers).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastar.errors import FastarError


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Give torch back its thread count afterwards."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, `place` has another value of that name."""
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


try:
    import numba.typed

    # FFCV makes a typed dictionary when it is imported (`IMAGE_MODES`, the numbers of "jpg" and "raw"), which compiles
    # for 4 s in every process. Only plain Python looks anything up in it: compiled loops are given the numbers.
    plain_dict = _replaced(numba.typed, "Dict", dict)
    # FFCV keeps numba's `set_num_threads` and calls it when it is imported and for every loader. That starts numba's
    # thread pool, though nothing runs in it: loaders have one worker here. With that pool a process of one CPU that
    # forks (as a user's own loader does) may wait for ever at its end.
    no_thread_pool = _replaced(numba, "set_num_threads", lambda n: None)
    with torch_threads_kept(), plain_dict, no_thread_pool:
        import ffcv.fields.rgb_image
        import ffcv.libffcv
        import ffcv.loader.epoch_iterator
except ImportError as error:
    raise FastarError(f"FFCV cannot be imported ({error}); run `make install` or see `fastar doctor`") from error

# Batches go to the GPU by our own hands. FFCV's streams, a new set every epoch, would come from the few that torch
# hands out in turn, and so be the same as those of fastar: a copy would wait for foreign work.
ffcv.loader.epoch_iterator.IS_CUDA = False
