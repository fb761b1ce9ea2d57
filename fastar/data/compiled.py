"""Loops compiled by numba for CPUs, and kept on disk: compiling takes a second of CPU time in every process.

Machine code lies in `FASTAR_CACHE`/numba (`NUMBA_CACHE_DIR`, where that is set; FASTAR_CACHE=off keeps none), in a
folder for each source, types, CPU, versions of Python and numba, and numba's settings. So what one folder holds is
always the same, whoever writes it: processes that start at once, or hosts that share it.
"""

import inspect
import logging
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from fastar.config.settings import cache_folder
from fastar.runtime.json_files import content_digest

_log = logging.getLogger(__name__)


def compiled(function: Callable[..., Any], types: str) -> Callable[..., Any]:
    """`function` for arguments of these types, such as `void(uint8[:, ::1], int64)`, without numba's lock of Python.

    Where no folder can be written to, or what is in it is damaged, it is compiled anew.
    """
    import numba  # only here: it takes half a second

    # No fastmath: it would round differently.
    decorate: dict[str, Any] = {"signature_or_function": types, "nogil": True}
    config: Any = numba.config
    folder = _folder(function, types, config.CACHE_DIR)
    if folder is not None:
        configured = config.CACHE_DIR
        try:
            folder.mkdir(parents=True, exist_ok=True)
            config.CACHE_DIR = str(folder)
            return cast("Callable[..., Any]", numba.njit(**decorate, cache=True)(function))
        except Exception as why:  # noqa: BLE001  # whatever pickles raise; what is wrong with `function` is raised below
            shutil.rmtree(folder, ignore_errors=True)
            _log.warning("%s: not used (%s: %s); compiled again", folder, type(why).__name__, why)
        finally:
            config.CACHE_DIR = configured
    return cast("Callable[..., Any]", numba.njit(**decorate)(function))


def _folder(function: Callable[..., Any], types: str, configured: str) -> Path | None:
    """The folder for what is compiled here of `function`; None: nothing is kept.

    Args:
        configured: numba's own folder, "" where none is set.
    """
    import llvmlite.binding
    import numba

    kept = cache_folder()
    if kept is None or not Path(inspect.getfile(function)).is_file():  # numba keeps nothing of a zip file in a folder
        return None
    what = {
        "source": inspect.getsource(function),
        "types": types,
        "cpu": [llvmlite.binding.get_host_cpu_name(), llvmlite.binding.get_host_cpu_features().flatten()],
        "versions": [platform.python_version(), numba.__version__, llvmlite.__version__],
        "settings": {k: v for k, v in os.environ.items() if k.startswith("NUMBA_") and k != "NUMBA_CACHE_DIR"},
    }
    return (Path(configured) if configured else kept / "numba") / content_digest(what)
