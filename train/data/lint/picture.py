"""The lengths of rows as a picture, in SVG or PNG."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from jllama.cli.picture import COLOURS, drawing, written

BARS = 40


def lengths_picture(
    rows: Int[np.ndarray, " rows"],
    learned: Int[np.ndarray, " examples"],
    max_seq_len: int,
    file: Path,
) -> None:
    """Writes it: tokens of rows, of what is learned in them, and where rows are cut.

    Args:
        rows: tokens of whole rows.
        learned: learned tokens of each.
        file: .svg or .png.
    """
    edges = np.linspace(0, int(rows.max()) + 1, BARS + 1).tolist()
    with drawing("tokens", "rows") as (figure, axes):
        axes.hist(rows, bins=edges, color=COLOURS[0], alpha=0.8, label="whole rows")
        axes.hist(learned, bins=edges, color=COLOURS[1], histtype="step", label="learned of them")
        if max_seq_len < rows.max():
            axes.axvline(max_seq_len, color=COLOURS[4], linestyle="--", label="--max-seq-len")
        figure.legend(loc="outside upper left", ncols=3, fontsize="small")
        written(figure, file)
