"""Tokens and merges as Hugging Face's tokenizer.json has them, and GGUF after it."""

import itertools
from collections.abc import Mapping, Sequence


def _byte_letters() -> str:
    """GPT-2's letter for each byte: itself where it can be seen, else the next one from 256 on.

    b"A" -> "A"    b" " (the 33rd that cannot be seen) -> chr(256 + 32), "Ġ"
    """
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(256)
    return "".join(chr(byte if byte in seen else next(others)) for byte in range(256))


LETTERS = _byte_letters()
BYTE_OF: Mapping[str, int] = {letter: byte for byte, letter in enumerate(LETTERS)}


def in_letters(token: bytes) -> str:
    """A token in GPT-2's letters: b" a" -> "Ġa"."""
    return "".join(LETTERS[byte] for byte in token)


def merges(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, from the token that is preferred to the last.

    Both SentencePiece and tiktoken join two neighbours whenever that gives a token, the preferred
    one first; `tokenizers` and llama.cpp join only listed pairs, in the order of the list.

    h i s hi is his  ->  (h i) (i s) (h is) (hi s)
    """
    known = set(tokens)
    return [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]
