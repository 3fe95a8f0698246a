"""A tokenizer as llama.cpp wants it told."""

import dataclasses
from collections.abc import Sequence

from gguf import TokenType

UNUSED_SCORE = -1000.0  # of what is never made by joining two others


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer; lists are in the order of ids.

    Args:
        model: llama.cpp's name of the algorithm.
        pre: its name of the rule that cuts text into words.
        scores: of SentencePiece; the highest is joined first.
        merges: of byte-level BPE, `"h i"`, the first is joined first.
        stop_ids: generation ends on any of these; the first ends a text, the next a turn.
        unknown_id: the token for what has no other, if there is one.
        space_before: whether text begins with a space that is not in it.
        template: of chats, in Jinja.
        begins: whether text begins with BOS.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    types: Sequence[TokenType]
    scores: Sequence[float]
    merges: Sequence[str]
    bos_id: int
    stop_ids: tuple[int, ...]
    unknown_id: int | None
    space_before: bool
    template: str | None = None
    begins: bool = True

    def padded(self, rows: int) -> "Vocabulary":
        """With a token for each row of the embedding: llama.cpp wants as many.

        a b c, 5 rows  ->  a b c [PAD3] [PAD4]
        """
        more = rows - len(self.tokens)
        return dataclasses.replace(
            self,
            tokens=[*self.tokens, *map(nameless, range(len(self.tokens), rows))],
            types=[*self.types, *[TokenType.UNUSED] * more],
            scores=[*self.scores, *[UNUSED_SCORE] * more] if self.scores else (),
            stop_ids=tuple(token for token in self.stop_ids if token < rows),
        )


def nameless(token: int) -> str:
    """What an id without a token is called."""
    return f"[PAD{token}]"
