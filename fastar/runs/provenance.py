"""The versions and the commit that results come from."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from fastar._version import __version__


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of fastar (with its commit, where known) and of the packages that results depend on."""
    found = {"fastar": __version__, "commit": commit(), "python": platform.python_version()}
    for package in ("torch", "numpy", "scipy", "ffcv", "lapjv", "triton", "numba"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


@lru_cache(maxsize=1)
def commit() -> str:
    """The checkout's commit, with `+changes` if it is not clean; outside a checkout FASTAR_COMMIT or `unknown`."""
    elsewhere = os.environ.get("FASTAR_COMMIT") or "unknown"  # of a copy that travelled without its .git
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    describe = [*git, "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+changes"]
    try:  # the first fails in a checkout of something else around an installed fastar
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10, check=True)
        return subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return elsewhere
