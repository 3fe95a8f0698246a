"""Tokenizers of some 300 tokens, as files of a Hugging Face folder."""

import json
from string import ascii_lowercase
from typing import Any

from jllama.text.json_tokenizer import LETTERS

WORDS = ("th", "the", "in", "ing", "an", "and")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _added(names: list[str], first: int) -> list[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": first + place, "content": name, **flags, "special": True}
        for place, name in enumerate(names)
    ]


def _merges(words: list[str]) -> list[list[str]]:
    """the  ->  t h, th e: each but the first letter is joined to what is before it."""
    ends = [(word[:cut], word[cut:]) for word in words for cut in range(1, len(word))]
    return [list(pair) for pair in dict.fromkeys(pair for pair in ends if len(pair[1]) == 1)]


def files_of_letters() -> dict[str, str]:
    """Byte-level, with ChatML and its template, and every file beside it."""
    vocab = {token: place for place, token in enumerate([*LETTERS, *WORDS])}
    names = ["<|im_start|>", "<|im_end|>", "<think>"]
    cut = [{"type": "Digits", "individual_digits": True},
           {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
            "use_regex": True}]  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(names, 262),
        "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                    "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": False, "ignore_merges": False, "vocab": vocab,
                  "merges": _merges(list(WORDS))},
    }  # fmt: skip
    return _files(tokenizer, names)


def files_of_pieces() -> dict[str, str]:
    """SentencePiece's, as transformers writes a Llama 2 tokenizer, and every file beside it."""
    fixed = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocab = {token: place for place, token in enumerate([*fixed, *ascii_lowercase, *WORDS])}
    names = ["<|im_start|>", "<|im_end|>", "<think>"]
    normalizers = [{"type": "Prepend", "prepend": "▁"},
                   {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [*_added(fixed[:3], 0), *_added(names, len(vocab))],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": True, "ignore_merges": False, "vocab": vocab,
                  "merges": _merges(list(WORDS))},
    }  # fmt: skip
    return _files(tokenizer, names)


def _files(tokenizer: dict[str, Any], names: list[str]) -> dict[str, str]:
    ids = {added["content"]: added["id"] for added in tokenizer["added_tokens"][-len(names) :]}
    said = {"bos_token": names[0], "eos_token": {"content": names[1]}}
    decoder = {str(added["id"]): added for added in tokenizer["added_tokens"]}
    content = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": said | {"added_tokens_decoder": decoder},
        "special_tokens_map.json": said,
        "added_tokens.json": ids,
        "generation_config.json": {"eos_token_id": [ids[names[1]], 2]},
    }
    return {name: json.dumps(x, ensure_ascii=False) for name, x in content.items()} | {
        "chat_template.jinja": TEMPLATE
    }
