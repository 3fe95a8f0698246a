"""The pictures of a report: SVG by matplotlib, readable on white and on black, text as outlines."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY = "#767676"  # contrast above 4.5 on white and on black
COLOURS = ("#2f7ed8", "#d9782d", "#2f9e5b", "#a06bd0", "#c9483b", "#8a8f2a", "#4d9aa8", "#b0678a")
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

Points = Mapping[float, float]  # x -> y


def losses(
    steps: Points, epochs: Points, held_out: Points, reference: Points, name: str = "loss"
) -> str:
    """Loss by optimizer step: every step, the averages of epochs, held-out rows, a reference."""
    with rc_context(_STYLE):
        figure, axes = _axes("optimizer step", "loss (nats per token)")
        axes.plot(*_xy(steps), color=GREY, linewidth=0.8, alpha=0.7, label="each step")
        for points, title, marker, colour in (
            (epochs, "average of an epoch", "o", COLOURS[0]),
            (held_out, "held-out rows", "s", COLOURS[1]),
            (reference, "the reference's epochs", "^", COLOURS[2]),
        ):
            if points:
                axes.plot(*_xy(points), color=colour, marker=marker, label=title)
        figure.legend(loc="outside upper left", ncols=4, fontsize="small")
        return _svg(figure, name)


def memory_bars(
    bars: Mapping[str, Mapping[str, float]], limit: float | None, name: str = "memory"
) -> str:
    """Stacked bars in MiB, one for each key, by class; `limit` is what a card leaves."""
    with rc_context(_STYLE):
        figure, axes = _axes("MiB", "", height=1.6 + 0.34 * len(bars))
        titles = list(bars)[::-1]
        left = [0.0] * len(titles)
        for number, kind in enumerate(dict.fromkeys(k for bar in bars.values() for k in bar)):
            sizes = [bars[title].get(kind, 0.0) for title in titles]
            colour = COLOURS[number % len(COLOURS)]
            axes.barh(titles, sizes, left=left, label=kind.replace("_", " "), color=colour)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        if limit:
            axes.axvline(limit, color=COLOURS[4], linestyle="--", label="the card, less a margin")
        if limit or len(axes.containers) > 1:
            figure.legend(loc="outside upper left", ncols=3, fontsize="small")
        return _svg(figure, name)


def _axes(x: str, y: str, height: float = 3.8) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=GREY, alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _xy(points: Points) -> tuple[Sequence[float], Sequence[float]]:
    return list(points), list(points.values())


def _svg(figure: Figure, name: str) -> str:
    """The picture alone, its ids made unique: several stand in one page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    return re.sub(r"url\(#", f"url(#{name}-", svg)
