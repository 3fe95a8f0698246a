"""Pictures by matplotlib: readable on white and on black, text as outlines."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jllama.folders.json_files import write_whole

GREY = "#767676"  # contrast above 4.5 on white and on black
COLOURS = ("#2f7ed8", "#d9782d", "#2f9e5b", "#a06bd0", "#c9483b", "#8a8f2a", "#4d9aa8", "#b0678a")
FORMATS = (".svg", ".png")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",  # the page needs no font, and no glyph can be missing
    "svg.hashsalt": "jllama",
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.titlecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "font.size": 11,
}


@contextlib.contextmanager
def drawing(x: str, y: str, height: float = 3.8) -> Iterator[tuple[Figure, Axes]]:
    """A figure 8 inches wide and its axes, named `x` and `y`; to be written in the body."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(8, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(color=GREY, alpha=0.25)
        axes.set_axisbelow(True)
        yield figure, axes


def drawn(figure: Figure, suffix: str) -> bytes:
    """The file of a figure, the same for the same figure; `suffix` is one of `FORMATS`."""
    file = io.BytesIO()
    unnamed: dict[str, None] = {"Date": None, "Creator": None} if suffix == ".svg" else {}
    figure.savefig(file, format=suffix[1:], dpi=150, metadata=unnamed)
    return file.getvalue()


def written(figure: Figure, file: Path) -> None:
    """Writes a figure; the name of the file ends in one of `FORMATS`."""
    write_whole(file, drawn(figure, file.suffix.lower()))
