"""The pictures of a report, as SVG that stands in a page."""

import re
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from jllama.cli.picture import COLOURS, GREY, drawing, drawn

Points = Mapping[float, float]  # x -> y


def losses(
    steps: Points, epochs: Points, held_out: Points, reference: Points, name: str = "loss"
) -> str:
    """Loss by optimizer step: every step, the averages of epochs, held-out rows, a reference."""
    with drawing("optimizer step", "loss (nats per token)") as (figure, axes):
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
    with drawing("MiB", "", height=1.6 + 0.34 * len(bars)) as (figure, axes):
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


def _xy(points: Points) -> tuple[Sequence[float], Sequence[float]]:
    return list(points), list(points.values())


def _svg(figure: Figure, name: str) -> str:
    """The picture alone, its ids made unique: several stand in one page."""
    svg = drawn(figure, ".svg").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    return re.sub(r"url\(#", f"url(#{name}-", svg)
