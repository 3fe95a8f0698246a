"""A tokenizer.json in llama.cpp's terms, where llama.cpp gives the same ids; else a reason.

letters for bytes (SmolLM, Llama 3)     model "gpt2"    merges, and a rule that cuts text into words
SentencePiece's pieces (Llama 2)        model "llama"   scores, out of the order of the merges

llama.cpp has its rules built in, under names of models. A rule is known here by what the
tokenizer.json says it does, and so is that of a model that llama.cpp has never seen.
"""

import itertools
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType

from convert.gguf.terms import UNUSED_SCORE, Vocabulary, nameless
from convert.hf.bpe import merges
from jllama.errors import InputError
from jllama.text.json_tokenizer import LETTERS, JsonTokenizer
from jllama.text.tokenizer_file import LLAMA3_PATTERN

_DIGITS, _GPT2 = "each digit by itself", "words as GPT-2 cuts them"
_QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# How text is cut, and whether a word that is a token is taken whole -> llama.cpp's name. (It has
# tekken and gpt-4o, too, but cuts at capitals of ASCII only.)
_RULES: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((LLAMA3_PATTERN,), True): "llama-bpe",
    ((LLAMA3_PATTERN,), False): "dbrx",
    ((_QWEN2_PATTERN,), False): "qwen2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_GPT2,), False): "gpt-2",
}
_KEPT = {"behavior": "Isolated", "invert": False}  # what is found is a word, and what lies between
_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
_FOR_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_BEFORE_TEXT = {"type": "Prepend", "prepend": "▁"}


class _OtherIds(Exception):
    """What a tokenizer.json does and llama.cpp does not."""


def json_vocabulary(tokenizer: JsonTokenizer, file: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json.

    Raises:
        InputError: if llama.cpp would give other ids, with the reason.
    """
    content = tokenizer.content()
    model = content["model"]
    try:
        _check(content)
        pieces = model["byte_fallback"]
        pre = "default" if pieces else _rule(content)
        space_before = pieces and _space_before(content)
        scores = _scores(content, tokenizer.vocab_size) if pieces else ()
    except _OtherIds as reason:
        raise InputError(
            f"{file}: {reason}, so llama.cpp's ids would differ; export with to-hf, for "
            "transformers and vLLM"
        ) from None
    tokens, types = zip(*_tokens(content, tokenizer.vocab_size), strict=True)
    return Vocabulary(
        model="llama" if pieces else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=() if pieces else [" ".join(pair) for pair in model["merges"]],
        bos_id=tokenizer.bos_id,
        stop_ids=tokenizer.stop_ids,
        unknown_id=model["vocab"].get(model["unk_token"]),
        space_before=space_before,
    )


def _check(content: Mapping[str, Any]) -> None:
    """What must hold of letters and of pieces."""
    model = content["model"]
    if model["type"] != "BPE":
        raise _OtherIds(f"its model is {model['type']}, not BPE")
    for part in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[part]:
            raise _OtherIds(f"it has {part} {model[part]!r}")
    for added in content["added_tokens"]:
        odd = [flag for flag in ("single_word", "lstrip", "rstrip") if added[flag]]
        if added["normalized"] and not added["special"] and content["normalizer"] is not None:
            odd.append("normalized")  # looked for in the text with its ▁
        if odd:
            raise _OtherIds(f"token {added['content']!r} is {odd[0]}")


def _rule(content: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rule by which text becomes words, and words letters."""
    model, normalizer = content["model"], content["normalizer"]
    if normalizer not in (None, {"type": "Sequence", "normalizers": []}):
        raise _OtherIds(f"its normalizer {reprlib.repr(normalizer)} changes text first")
    if missing := [letter for letter in LETTERS if letter not in model["vocab"]]:
        raise _OtherIds(f"it has no token for byte {LETTERS.index(missing[0])}")
    cuts = tuple(_cuts(content["pre_tokenizer"]))
    rule = _RULES.get((cuts, model["ignore_merges"]))
    if rule is None:
        whole = ", and takes words that are tokens whole" if model["ignore_merges"] else ""
        raise _OtherIds(f"it cuts text by {reprlib.repr(cuts)}{whole}")
    return rule


def _cuts(part: Any) -> Iterator[str]:
    """What a pre_tokenizer does, one after the other; an expression, or words for what has none."""
    match part:
        case {"type": "Sequence", "pretokenizers": parts}:
            for inner in parts:
                yield from _cuts(inner)
        case {
            "type": "Split",
            "pattern": {"Regex": found},
            "behavior": "Isolated",
            "invert": False,
        }:
            yield found
        case {"type": "Digits", "individual_digits": True}:
            yield _DIGITS
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            yield _GPT2
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
            pass  # letters for bytes, as all of these write them
        case _:
            yield repr(part)


def _space_before(content: Mapping[str, Any]) -> bool:
    """Whether a text, and what follows a special token, begins with a ▁ that is not in it."""
    match content["normalizer"], content["pre_tokenizer"]:
        case {"type": "Sequence", "normalizers": [first, second]}, None:
            if (first, second) == (_BEFORE_TEXT, _FOR_SPACES):
                return True
        case normalizer, None:
            if normalizer == _FOR_SPACES:
                return False
        case None, {"type": "Metaspace", "replacement": "▁", "split": False} as space:
            if space["prepend_scheme"] == "never":
                return False
            raise _OtherIds("its Metaspace puts no ▁ before a text that begins with a space")
    raise _OtherIds(
        f"it prepares text by {reprlib.repr(content['normalizer'])} and "
        f"{reprlib.repr(content['pre_tokenizer'])}"
    )


def _scores(content: Mapping[str, Any], size: int) -> Sequence[float]:
    """A score for each token: what is merged first has the highest.

    llama.cpp joins any two neighbours that make a token, so every way to make one must be listed.
    """
    model = content["model"]
    vocab: Mapping[str, int] = model["vocab"]
    if missing := sorted(_BYTES - vocab.keys()):
        raise _OtherIds(f"it has no token {missing[0]}")
    listed = [(left, right) for left, right in model["merges"]]
    names = [*vocab, *(added["content"] for added in content["added_tokens"])]
    if unlisted := set(merges(names)).difference(listed):
        left, right = min(unlisted)
        raise _OtherIds(f"it never joins {left!r} and {right!r}")
    made = [left + right for left, right in listed]
    scores = [UNUSED_SCORE] * size
    for place, (token, _) in enumerate(groups := list(itertools.groupby(made))):
        scores[vocab[token]] = -float(place)
    if len(groups) > len(set(made)):
        raise _OtherIds("it prefers one way to make a token, and another token to the other way")
    return scores


def _tokens(content: Mapping[str, Any], size: int) -> Iterator[tuple[str, TokenType]]:
    """Text and type of each token, in the order of ids."""
    model = content["model"]
    spelled = _BYTES if model["byte_fallback"] else ()
    named: dict[int, tuple[str, TokenType]] = {
        token: (text, TokenType.BYTE if text in spelled else TokenType.NORMAL)
        for text, token in model["vocab"].items()
    }
    for added in content["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        named[added["id"]] = added["content"], kind
    if (unknown := model["unk_token"]) in model["vocab"]:
        named[model["vocab"][unknown]] = unknown, TokenType.UNKNOWN
    for token in range(size):
        yield named.get(token, (nameless(token), TokenType.UNUSED))
