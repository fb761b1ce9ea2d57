"""Pictures as files: figures without a window, written as PNG."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from fastar.errors import FastarError
from fastar.runs import write_atomically


def check_picture(path: Path) -> None:
    """Raise FastarError unless `path` is named as what will be in it."""
    if path.suffix.lower() != ".png":
        raise FastarError(f"{path}: the picture is written as .png; name it so")


@contextmanager
def figure_of(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A matplotlib figure of so many inches, written to `path` when the block ends, atomically.

    Raises:
        FastarError: it is not called .png, or cannot be written.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    write_atomically(path, buffer.getvalue())


def legend_below(figure: Any, *panels: Any, ncols: int = 4, fontsize: int = 9) -> None:
    """A legend of what these panels have, below all of them, where it hides nothing."""
    handles = [one for panel in panels for one in panel.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False, fontsize=fontsize)


def plain(panel: Any) -> None:
    """Give a panel a faint grid, and lines below and to the left alone."""
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
