"""Llama 3's tokenizer.json: what makes one, and back to Meta's ranks."""

import base64
import json
import reprlib
from collections.abc import Mapping
from typing import Any

from jllama.text.json_tokenizer import BYTE_OF, LETTERS
from jllama.text.tokenizer_file import LLAMA3_PATTERN, LLAMA3_SPECIALS, is_llama3s

# How Llama 3's tokenizer.json cuts text into words, and words into letters for their bytes.
_WORDS = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLITTING = {
    "type": "Sequence",
    "pretokenizers": [_WORDS | {"invert": False}, BYTES | {"use_regex": False}],
}


def ranks_of(vocab: Mapping[str, int]) -> bytes:
    """Meta's tokenizer.model of tokens in GPT-2's letters."""
    return b"".join(
        base64.b64encode(bytes(BYTE_OF[letter] for letter in token)) + b" %d\n" % rank
        for token, rank in sorted(vocab.items(), key=lambda item: item[1])
    )


def difference(content: Mapping[str, Any]) -> str | None:
    """The first thing in a tokenizer.json that is not Llama 3's, if there is one."""
    model = content.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        return f"the model's type is {reprlib.repr(kind)}, expected BPE"
    if model.get("byte_fallback"):
        return "found the pieces of LLaMA 1's or 2's SentencePiece, expected a byte-level BPE"
    for part, expected in (("pre_tokenizer", SPLITTING), ("normalizer", None)):
        found = content.get(part)
        if found != expected:
            return f"{part} is {reprlib.repr(found)}, expected {json.dumps(expected)}"
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(rank) is int for rank in vocab.values()):
        return "vocab is not an object of tokens and whole numbers"
    return _rank_difference(vocab) or _special_difference(content.get("added_tokens"), len(vocab))


def _rank_difference(vocab: Mapping[str, int]) -> str | None:
    """Tokens in GPT-2's letters: their ids are 0, 1, 2, ... and every byte is one of them."""
    wrong = [place for place, rank in enumerate(sorted(vocab.values())) if place != rank]
    foreign = [token for token in vocab if not token or not BYTE_OF.keys() >= set(token)]
    missing = [byte for byte, letter in enumerate(LETTERS) if letter not in vocab]
    for cases, what in (
        (wrong, "ids out of the order 0, 1, 2, ... (a gap or a duplicate)"),
        (foreign, "tokens not written in GPT-2's letters for bytes"),
        (missing, "of the 256 bytes without a token"),
    ):
        if cases:
            return f"{len(cases):,} {what}, the first {reprlib.repr(cases[0])}"
    return None


def _special_difference(added: Any, first: int) -> str | None:
    """Llama 3's 256 special tokens, right after the ranks.

    A name of one's own makes it another tokenizer: tokenizer.model has no names.
    """
    expected = dict(enumerate(LLAMA3_SPECIALS, first))
    try:
        names = {token["id"]: token["content"] for token in added}
    except (TypeError, KeyError):
        return "added_tokens is not a list of {id, content, ...}"
    if len(added) != len(expected) or names.keys() != expected.keys():
        return (
            f"{len(added)} added tokens, expected {len(expected)} with the ids "
            f"{first:,} to {max(expected):,}"
        )
    for token, name in expected.items():
        found = names[token]
        if not is_llama3s(found, token - first):
            return f"special token {token:,} is {reprlib.repr(found)}, expected {name}"
    return None
