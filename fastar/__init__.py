"""fastar finds star models of neural networks and measures linear mode connectivity.

From Python, a star of your own network, data and loss: `fastar.train_sources`, `fastar.train_star`, `fastar.load_run`;
several stars that differ in one setting: `fastar.sweep`.
For any two networks of one architecture: `fastar.match`, `fastar.apply`, `fastar.barrier`, and `fastar.match_many` for
a set of them. They are imported when first used: the command line is to be instant.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastar._version import __version__

if TYPE_CHECKING:
    from fastar.api import (
        Barrier,
        Curve,
        Data,
        FastarError,
        Fusion,
        Graph,
        ManyMatched,
        Matched,
        Perturbation,
        Plane,
        Recipe,
        Run,
        Star,
        TrainedModel,
        Uncertainty,
        apply,
        barrier,
        load_run,
        match,
        match_many,
        sweep,
        train_sources,
        train_star,
    )

__all__ = [
    "Barrier",
    "Curve",
    "Data",
    "FastarError",
    "Fusion",
    "Graph",
    "ManyMatched",
    "Matched",
    "Perturbation",
    "Plane",
    "Recipe",
    "Run",
    "Star",
    "TrainedModel",
    "Uncertainty",
    "__version__",
    "apply",
    "barrier",
    "load_run",
    "match",
    "match_many",
    "sweep",
    "train_sources",
    "train_star",
]


class _Kernels:
    """Finds `fastar.kernels` in a checkout that nobody has installed: the folder `kernels/` beside this one, which
    setup.py maps. First in line, so that kernels of another, installed fastar are not taken."""

    folder = Path(__file__).resolve().parent.parent / "kernels"

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "fastar.kernels":
            return None
        file = cls.folder / "__init__.py"
        return spec_from_file_location(name, file, submodule_search_locations=[str(cls.folder)])


if not (Path(__file__).parent / "kernels").is_dir() and _Kernels.folder.is_dir():
    sys.meta_path.insert(0, _Kernels)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastar' has no attribute {name!r}")
    from fastar import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__
