"""fastar finds star models of neural networks and measures linear mode connectivity.

From Python, for any two networks of one architecture: `fastar.match`, `fastar.apply`, `fastar.barrier`, and
`fastar.match_many` for a set of them. They are imported when first used: the command line is to be instant.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastar.api import Barrier, Matched, apply, barrier, match, match_many

__version__ = "0.1.0"
__all__ = ["Barrier", "Matched", "__version__", "apply", "barrier", "match", "match_many"]

# In a checkout that nobody has installed, `fastar.kernels` is the folder `kernels/` beside this one (setup.py maps it).
_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").exists() and (_HERE.parent / "kernels" / "dispatch.py").is_file():
    __path__.append(str(_HERE.parent))


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fastar' has no attribute {name!r}")
    from fastar import api

    return getattr(api, name)
