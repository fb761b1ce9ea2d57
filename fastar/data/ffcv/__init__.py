""".beton files: the only importer of FFCV, which is imported here once and with care."""

from unittest.mock import patch

import torch

from fastar.errors import FastarError

try:
    import numba.typed

    # FFCV makes a typed dictionary when it is imported (`IMAGE_MODES`, the numbers of "jpg" and "raw"), which compiles
    # for 4 s in every process. Only plain Python looks anything up in it: compiled loops are given the numbers.
    plain_dict = patch.object(numba.typed, "Dict", dict)
    # When it is imported, FFCV sets the number of threads of numba and of torch for the whole process. For numba that
    # starts a thread pool, though nothing runs in it: loaders have one worker here. With that pool a process of one CPU
    # that forks (as a user's own loader does) may wait for ever at its end.
    no_threads = patch.object(numba, "set_num_threads"), patch.object(torch, "set_num_threads")
    with plain_dict, no_threads[0], no_threads[1]:
        import ffcv.fields.rgb_image
        import ffcv.libffcv
        import ffcv.loader.epoch_iterator
        import ffcv.pipeline.compiler
except ImportError as error:
    raise FastarError(
        f"images of any size, and .beton files, need FFCV, which cannot be imported ({error}): run `make install` in a "
        "checkout, or `pip install 'fastar[ffcv]'` where it can be compiled (docs/install.md)"
    ) from error

# So does every loader, and every epoch.
ffcv.pipeline.compiler.Compiler.set_num_threads = lambda n: None
# Batches go to the GPU by our own hands. FFCV's streams, a new set every epoch, would come from the few that torch
# hands out in turn, and so be the same as those of fastar: a copy would wait for foreign work.
ffcv.loader.epoch_iterator.IS_CUDA = False
