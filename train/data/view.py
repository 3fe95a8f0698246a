"""One row as training sees it."""

import numpy as np
from rich.text import Text

from jllama.cli.terminal import console, visible
from jllama.text.rows import Example
from jllama.text.tokenizer import Tokenizer


def show_row(example: Example, tokenizer: Tokenizer) -> None:
    """A row's tokens on the terminal; what is learned stands in ⟦ ⟧."""
    text, inside = Text(), False
    for token, learned in zip(example.ids, example.learned, strict=True):
        if learned != inside:
            text.append("⟦" if learned else "⟧", "green")
            inside = learned
        text.append(visible(tokenizer.piece(token)), "green" if learned else "dim")
    if inside:
        text.append("⟧", "green")
    tokens, learned_tokens = len(example.ids), np.count_nonzero(example.learned)
    share = f"{100 * learned_tokens / tokens:.0f} %"
    console.print(
        f"row {example.row}: {tokens} tokens, {learned_tokens} ({share}) learned ⟦in brackets⟧"
    )
    console.print(text)
