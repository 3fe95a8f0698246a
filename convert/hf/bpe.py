"""Tokens and merges as Hugging Face's tokenizer.json has them, and GGUF after it."""

from collections.abc import Sequence

from jllama.text.json_tokenizer import LETTERS


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
