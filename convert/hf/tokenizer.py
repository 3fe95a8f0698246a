"""Meta's tokenizer.model from a Hugging Face folder, and the files of such a folder from it.

    Meta's tokenizer.model                  in a Hugging Face folder
    SentencePiece (LLaMA 1 and 2)    <->    tokenizer.model           the same bytes
                                      ->    tokenizer.json            pieces and merges
    lines `base64 rank` (Llama 3)    <->    original/tokenizer.model  the same bytes
                                     <->    tokenizer.json            tokens, merges, special tokens
    either                            ->    tokenizer_config.json

A Llama 3 tokenizer.model never lies beside tokenizer.json: there llama.cpp takes it for
SentencePiece. The class is PreTrainedTokenizerFast, which reads tokenizer.json as it is;
LlamaTokenizer (transformers 5.23) builds its own, and gives a leading or double space other ids.
"""

import base64
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from convert.hf.bpe import BYTE_OF, LETTERS, in_letters, merges
from jllama.errors import InputError
from jllama.folders.json_files import read_bytes, read_json, write_json, write_whole
from jllama.text.tokenizer import LLAMA3_PATTERN, LLAMA3_SPECIALS, make_tokenizer
from jllama.text.tokenizer_file import FILE_NAME, read_ranks

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
ORIGINAL = Path("original") / FILE_NAME  # where Meta's own Hugging Face repositories keep it

# How Llama 3's tokenizer.json cuts text into words, and words into letters for their bytes.
_WORDS = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated"}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_SPLITTING = {
    "type": "Sequence",
    "pretokenizers": [_WORDS | {"invert": False}, _BYTES | {"use_regex": False}],
}

# Text and header borders and <|eot_id|> have one name in every release of Llama 3, others not.
_FIXED_SPECIALS = {*LLAMA3_SPECIALS[:2], *LLAMA3_SPECIALS[6:8], LLAMA3_SPECIALS[9]}
_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")


# SentencePiece's remove_extra_whitespaces. (^ and $ would be the borders of lines.)
_JOIN_SPACES = (
    {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
)


def read_hf_tokenizer(folder: Path) -> bytes:
    """The content of Meta's tokenizer.model for a Hugging Face LLaMA folder.

    The file itself where it is there; else Llama 3's from tokenizer.json, sorted by rank as Meta
    wrote it:

        {"!": 0, ..., "in": 258, "Ġa": 264}  ->  IQ== 0 ... aW4= 258 ... IGE= 264

    Raises:
        InputError: if there is no tokenizer, or jllama would not give the ids of this one.
    """
    for file in (folder / ORIGINAL, folder / FILE_NAME):
        if file.exists():
            whole = read_bytes(file, f"Meta's {FILE_NAME}")
            make_tokenizer(whole, file)  # refuses what is damaged
            return whole
    file = folder / TOKENIZER_JSON
    if not file.exists():
        raise InputError(
            f"{folder}: no tokenizer; expected {ORIGINAL}, {FILE_NAME} or {TOKENIZER_JSON}; "
            f"copy Meta's {FILE_NAME} into it"
        )
    content = read_json(file)
    problem = _difference(content)
    if problem:
        raise InputError(
            f"{file}: {problem}, so jllama would give other ids; if this is LLaMA, "
            f"copy Meta's {FILE_NAME} to {folder / ORIGINAL}"
        )
    vocab = content["model"]["vocab"]
    return b"".join(
        base64.b64encode(bytes(BYTE_OF[letter] for letter in token)) + b" %d\n" % rank
        for token, rank in sorted(vocab.items(), key=lambda item: item[1])
    )


def _difference(content: Mapping[str, Any]) -> str | None:
    """The first thing in a tokenizer.json that is not Llama 3's, if there is one."""
    model = content.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        return f"the model's type is {reprlib.repr(kind)}, expected BPE"
    if model.get("byte_fallback"):
        return "found the pieces of LLaMA 1's or 2's SentencePiece, expected a byte-level BPE"
    for part, expected in (("pre_tokenizer", _SPLITTING), ("normalizer", None)):
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

    A reserved one may bear any number, since 3.0, 3.1 and Hugging Face count them differently
    and nothing uses them. A name of one's own is refused: tokenizer.model has no names, so
    jllama could neither write that token nor give its name back.
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
        reserved = isinstance(found, str) and _RESERVED.fullmatch(found)
        if found != name and (not reserved or name in _FIXED_SPECIALS):
            return f"special token {token:,} is {reprlib.repr(found)}, expected {name}"
    return None


def write_hf_tokenizer(content: bytes, folder: Path, max_seq_len: int) -> None:
    """The tokenizer files that transformers, vLLM and llama.cpp want, from Meta's file.

    They give jllama's ids for any text in which no special token is spelled out; jllama takes
    those for text, Hugging Face only with `split_special_tokens=True`. There is no chat template:
    a base model has none, and a tuned one follows its prompt style.

    Raises:
        InputError: if the content is no tokenizer, or not built as LLaMA's are.
    """
    ranks = read_ranks(content, Path(FILE_NAME))
    file = folder / (ORIGINAL if ranks else FILE_NAME)
    file.parent.mkdir(exist_ok=True)
    write_whole(file, content)
    tokenizer = _llama3(ranks) if ranks else _sentencepiece(file)
    # In one line: indented, the merges of Llama 3 alone would be a million lines.
    text = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    write_whole(folder / TOKENIZER_JSON, text + "\n")
    begin, end = LLAMA3_SPECIALS[:2] if ranks else ("<s>", "</s>")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "add_bos_token": True,  # llama.cpp reads it here, transformers in tokenizer.json
        "clean_up_tokenization_spaces": False,  # or decoding drops the space of " ," and " 's"
        "model_max_length": max_seq_len,
    }
    write_json(folder / TOKENIZER_CONFIG, config if ranks else config | {"unk_token": "<unk>"})


def _llama3(ranks: Mapping[bytes, int]) -> dict[str, Any]:
    """The tokenizer.json of tiktoken's ranks."""
    vocab = {in_letters(token): rank for token, rank in ranks.items()}
    return _tokenizer_json(
        specials={name: len(vocab) + index for index, name in enumerate(LLAMA3_SPECIALS)},
        begin="<|begin_of_text|>",
        normalizer=None,
        pre_tokenizer=_SPLITTING,
        decoder=_BYTES | {"use_regex": False},
        model={
            "byte_fallback": False,  # by these two words llama.cpp knows a Llama 3
            "ignore_merges": True,  # tiktoken, too, looks a whole word up before it merges
            "vocab": vocab,
            "merges": merges(sorted(vocab, key=vocab.__getitem__)),
        },
    )


def _sentencepiece(file: Path) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece model, as Hugging Face published LLaMA 2's."""
    make_tokenizer(file.read_bytes(), file)
    proto = ModelProto.FromString(file.read_bytes())
    check_like_llama(file, proto, "Hugging Face")
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    joins = proto.normalizer_spec.remove_extra_whitespaces  # LLaMA's do not, other small ones do
    by_score = sorted(normal, key=lambda piece: -piece.score)  # equal ones stay in order of ids
    return _tokenizer_json(
        specials={"<unk>": 0, "<s>": 1, "</s>": 2},
        begin="<s>",
        normalizer={
            "type": "Sequence",
            "normalizers": [
                *(_JOIN_SPACES if joins else ()),
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        model={
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece.piece: index for index, piece in enumerate(proto.pieces)},
            "merges": merges([piece.piece for piece in by_score]),
        },
    )


def check_like_llama(file: Path, proto: ModelProto, reader: str) -> None:
    """Refuses a SentencePiece model to which `reader`, a program, would give other ids.

    Raises:
        InputError: listing what is not as in LLaMA 1 and 2.
    """
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    first = [piece.piece for piece in proto.pieces[:3]]
    user_defined = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED]
    # What it is, what it is here, what it is in every LLaMA: all that the formats written assume.
    rules: Sequence[tuple[str, Any, Any]] = (
        ("model type", trainer.model_type, trainer.BPE),
        ("the first pieces", first, ["<unk>", "<s>", "</s>"]),
        ("byte fallback", trainer.byte_fallback, True),
        ("the normalizer's table", normalizer.precompiled_charsmap, b""),
        ("a space before the text", normalizer.add_dummy_prefix, True),
        ("user-defined pieces", user_defined, []),
    )
    problems = [
        f"{what}: {reprlib.repr(found)}, expected {expected!r}"
        for what, found, expected in rules
        if found != expected
    ]
    if problems:
        raise InputError(
            f"{file}: not built as LLaMA 1's and 2's are, so {reader}'s ids would differ; "
            f"export with convert.to_meta, which copies it\n  " + "\n  ".join(problems)
        )


def _tokenizer_json(
    *, specials: Mapping[str, int], begin: str, model: Mapping[str, Any], **text: Any
) -> dict[str, Any]:
    """The frame of a tokenizer.json: special tokens, and `begin` before every text."""
    start = {"SpecialToken": {"id": begin, "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": token, "content": name, **plain, "special": True}
            for name, token in specials.items()
        ],
        **text,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first],
            "pair": [start, first, start, second],
            "special_tokens": {begin: {"id": begin, "ids": [specials[begin]], "tokens": [begin]}},
        },
        "model": {"type": "BPE", **model},
    }
