"""FFCV, imported once and with care. The modules beside it take its names from here.

Importing FFCV, and every loader of it, sets torch's thread count for the whole process (to 1, or to its workers).
"""

from collections.abc import Iterator
from contextlib import contextmanager

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
def plain_dict() -> Iterator[None]:
    """Inside, numba's typed dictionary is Python's own.

    FFCV makes one when it is imported (`IMAGE_MODES`, the numbers of "jpg" and "raw"), and making one compiles for 4 s
    in every process. Only plain Python looks anything up in it: the loops that FFCV compiles are given the numbers.
    """
    import numba.typed

    typed = numba.typed.Dict
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = typed


@contextmanager
def no_thread_pool() -> Iterator[None]:
    """Inside, numba's `set_num_threads` does nothing, and FFCV keeps that one.

    FFCV calls it when it is imported and for every loader, which starts numba's thread pool, though nothing runs in it:
    loaders have one worker here. With that pool a process of one CPU that forks (as a user's own loader does) may wait
    for ever at its end.
    """
    import numba

    start = numba.set_num_threads
    numba.set_num_threads = lambda n: None
    try:
        yield
    finally:
        numba.set_num_threads = start


try:
    with torch_threads_kept(), plain_dict(), no_thread_pool():
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
