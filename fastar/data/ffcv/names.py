"""FFCV, imported once and with care. The modules beside it take its names from here.

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
        import ffcv.loader.epoch_iterator
        from ffcv.fields import IntField as IntField
        from ffcv.fields import NDArrayField as NDArrayField
        from ffcv.fields import RGBImageField as RGBImageField
        from ffcv.fields.base import Field as Field
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder as SimpleRGBImageDecoder
        from ffcv.libffcv import imdecode as imdecode
        from ffcv.libffcv import resize_crop as resize_crop
        from ffcv.loader import Loader as Loader
        from ffcv.loader import OrderOption as OrderOption
        from ffcv.loader.epoch_iterator import EpochIterator as EpochIterator
        from ffcv.pipeline.compiler import Compiler as Compiler
        from ffcv.types import ALLOC_TABLE_TYPE as ALLOC_TABLE_TYPE
        from ffcv.types import CURRENT_VERSION as CURRENT_VERSION
        from ffcv.types import TYPE_ID_HANDLER as TYPE_ID_HANDLER
        from ffcv.types import FieldDescType as FieldDescType
        from ffcv.types import HeaderType as HeaderType
        from ffcv.types import get_metadata_type as get_metadata_type
except ImportError as error:
    raise FastarError(f"FFCV cannot be imported ({error}); run `make install` or see `fastar doctor`") from error

# Batches go to the GPU by our own hands. FFCV's streams, a new set every epoch, would come from the few that torch
# hands out in turn, and so be the same as those of fastar: a copy would wait for foreign work.
ffcv.loader.epoch_iterator.IS_CUDA = False
