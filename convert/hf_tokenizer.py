"""Meta's tokenizer.model from a Hugging Face folder, and the files of such a folder from it.

    Meta's tokenizer.model                  in a Hugging Face folder
    SentencePiece (LLaMA 1 and 2)    <->    tokenizer.model           the same bytes
                                      ->    tokenizer.json            pieces and merges
    lines `base64 rank` (Llama 3)    <->    original/tokenizer.model  the same bytes
                                     <->    tokenizer.json            tokens, merges, special tokens
    either                            ->    tokenizer_config.json

A Llama 3 tokenizer.model never lies beside tokenizer.json: there llama.cpp takes it for
SentencePiece. Both kinds of tokenizer.json are read as they are by `tokenizers`, under the class
PreTrainedTokenizerFast; LlamaTokenizer would build its own from the pieces, whose ids differ from
SentencePiece's own for a leading or a double space (transformers 5.23).
"""

import base64
import itertools
import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from jllama.errors import InputError
from jllama.files import read_json, write_json
from jllama.tokenizer import FILE_NAME, LLAMA3_PATTERN, LLAMA3_SPECIALS, load_tokenizer, read_ranks

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
ORIGINAL = Path("original") / FILE_NAME  # where Meta's own Hugging Face repositories keep it

_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
_LLAMA3_SPLITTING = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": LLAMA3_PATTERN},
            "behavior": "Isolated",
            "invert": False,
        },
        _BYTE_LEVEL,
    ],
}

# Named alike by every release of Llama 3; the other special tokens are not.
_FIXED_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")

_SPACE = "▁"  # SentencePiece's letter for a space


def _byte_letters() -> str:
    """GPT-2's letter for each byte: itself where it can be seen, else the next one from 256 on.

    b"A" -> "A"    b" " (the 33rd that cannot be seen) -> chr(256 + 32), "Ġ"
    """
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(256)
    return "".join(chr(byte if byte in seen else next(others)) for byte in range(256))


_LETTERS = _byte_letters()
_BYTES: Mapping[str, int] = {letter: byte for byte, letter in enumerate(_LETTERS)}


def read_hf_tokenizer(folder: Path) -> bytes:
    """The content of Meta's tokenizer.model for a Hugging Face LLaMA folder.

    The file itself where it is there; else Llama 3's from tokenizer.json, sorted by rank as Meta
    wrote it:

        {"!": 0, ..., "in": 258, "Ġa": 264}  ->  IQ== 0 ... aW4= 258 ... IGE= 264

    Raises:
        InputError: if there is no tokenizer, or jllama would not give the ids of this one.
    """
    for file in (folder / ORIGINAL, folder / FILE_NAME):
        if file.is_file():
            load_tokenizer(file)  # refuses what is neither SentencePiece nor tiktoken ranks
            return file.read_bytes()
    file = folder / TOKENIZER_JSON
    if not file.is_file():
        raise InputError(
            f"{folder}: no tokenizer; expected {ORIGINAL}, {FILE_NAME} or {TOKENIZER_JSON}; "
            f"copy Meta's {FILE_NAME} into it"
        )
    content = _read_object(file)
    vocab = _llama3_vocab(file, content)
    _check_ranks(file, vocab)
    _check_specials(file, content.get("added_tokens"), first=len(vocab))
    return b"".join(
        base64.b64encode(bytes(_BYTES[letter] for letter in token)) + b" %d\n" % rank
        for token, rank in sorted(vocab.items(), key=lambda item: item[1])
    )


def _read_object(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except InputError:
        raise
    except (RecursionError, ValueError) as error:  # deep nesting, or a number of 5,000 digits
        raise InputError(
            f"{file}: JSON beyond what a tokenizer needs ({error}); download it again"
        ) from error


def _llama3_vocab(file: Path, content: Mapping[str, Any]) -> dict[str, int]:
    """The tokens of a byte-level BPE that splits text as Llama 3 does."""
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise InputError(
            f"{file}: the model is {reprlib.repr(model)}, expected Llama 3's byte-level BPE; "
            f"only LLaMA can be converted"
        )
    if model.get("byte_fallback"):
        raise InputError(
            f"{file}: found the pieces of a SentencePiece model, expected Llama 3's byte-level "
            f"BPE; copy the {FILE_NAME} of LLaMA 1 or 2 into {file.parent}"
        )
    for part, expected in (("pre_tokenizer", _LLAMA3_SPLITTING), ("normalizer", None)):
        if content.get(part) != expected:
            raise InputError(
                f"{file}: {part} is {reprlib.repr(content.get(part))}, expected Llama 3's: "
                f"{json.dumps(expected)}; jllama would give other ids, so this model is refused"
            )
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(rank) is int for rank in vocab.values()):
        raise InputError(
            f"{file}: vocab is not an object of tokens and whole numbers; download it again"
        )
    return vocab


def _check_ranks(file: Path, vocab: Mapping[str, int]) -> None:
    """Tokens in GPT-2's letters: their ids are 0, 1, 2, ... and every byte is one of them."""
    wrong = [place for place, rank in enumerate(sorted(vocab.values())) if place != rank]
    if wrong:
        raise InputError(
            f"{file}: the ids of its {len(vocab):,} tokens are not 0, 1, 2, ...: "
            f"a gap or a duplicate at {wrong[0]:,}; download it again"
        )
    foreign = [token for token in vocab if not token or not _BYTES.keys() >= set(token)]
    if foreign:
        raise InputError(
            f"{file}: {len(foreign):,} tokens are not written in GPT-2's letters for bytes, such "
            f"as {reprlib.repr(foreign[0])}; expected Llama 3's byte-level BPE"
        )
    missing = [byte for byte, letter in enumerate(_LETTERS) if letter not in vocab]
    if missing:
        raise InputError(
            f"{file}: {len(missing)} of the 256 bytes are no token, such as {missing[0]}; "
            f"expected Llama 3's byte-level BPE"
        )


def _check_specials(file: Path, added: Any, *, first: int) -> None:
    """Llama 3's 256 special tokens, right after the ranks.

    A reserved one may bear any number, since 3.0, 3.1 and Hugging Face count them differently
    and nothing uses them. A name of one's own is refused: tokenizer.model has no names, so
    jllama could neither write that token nor give its name back.

    Raises:
        InputError: if there are more or fewer, or an id has another name.
    """
    try:
        names = {token["id"]: token["content"] for token in added}
    except (TypeError, KeyError):
        raise InputError(
            f"{file}: added_tokens is not a list of {{id, content, ...}}; download it again"
        ) from None
    ids = range(first, first + len(LLAMA3_SPECIALS))
    if len(added) != len(ids) or names.keys() != set(ids):
        raise InputError(
            f"{file}: {len(added)} added tokens, expected Llama 3's {len(ids)} special tokens "
            f"with the ids {ids[0]:,} to {ids[-1]:,}; {_remedy(file)}"
        )
    for token, expected in zip(ids, LLAMA3_SPECIALS, strict=True):
        name = names[token]
        reserved = isinstance(name, str) and _RESERVED.fullmatch(name) is not None
        if name != expected and (not reserved or expected in _FIXED_SPECIALS):
            raise InputError(
                f"{file}: special token {token:,} is {reprlib.repr(name)}, expected {expected}; "
                f"{_remedy(file)}"
            )


def _remedy(file: Path) -> str:
    return (
        f"to go on with Llama 3's own special tokens, copy Meta's {FILE_NAME} "
        f"to {file.parent / ORIGINAL}"
    )


def write_hf_tokenizer(content: bytes, folder: Path, max_seq_len: int) -> None:
    """The tokenizer files that transformers, vLLM and llama.cpp want, from Meta's file.

    They give jllama's ids for any text in which no special token is spelled out; jllama takes
    those for text, Hugging Face only with `split_special_tokens=True`. There is no chat template:
    a base model has none, and a tuned one follows its prompt style.

    Raises:
        InputError: if the content is no tokenizer, or not built as LLaMA's are.
    """
    ranks = read_ranks(content)
    file = folder / (ORIGINAL if ranks else FILE_NAME)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    tokenizer = _llama3(file, ranks) if ranks else _sentencepiece(file)
    # In one line: indented, the merges of Llama 3 alone would be a million lines.
    text = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (folder / TOKENIZER_JSON).write_text(text + "\n", encoding="utf-8")
    begin, end = LLAMA3_SPECIALS[:2] if ranks else ("<s>", "</s>")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": end,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,  # or decoding drops the space of " ," and " 's"
        "model_max_length": max_seq_len,
    }
    write_json(folder / TOKENIZER_CONFIG, config if ranks else config | {"unk_token": "<unk>"})


def _llama3(file: Path, ranks: Mapping[bytes, int]) -> dict[str, Any]:
    """The tokenizer.json of tiktoken's ranks."""
    vocab = {"".join(_LETTERS[byte] for byte in token): rank for token, rank in ranks.items()}
    _check_ranks(file, vocab)
    return _tokenizer_json(
        specials={name: len(vocab) + index for index, name in enumerate(LLAMA3_SPECIALS)},
        begin="<|begin_of_text|>",
        normalizer=None,
        pre_tokenizer=_LLAMA3_SPLITTING,
        decoder=_BYTE_LEVEL,
        model={
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # as tiktoken, which looks a whole word up before it merges
            "vocab": vocab,
            "merges": _merges(sorted(vocab, key=vocab.__getitem__)),
        },
    )


def _sentencepiece(file: Path) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece model, as Hugging Face published LLaMA 2's."""
    load_tokenizer(file)
    proto = ModelProto.FromString(file.read_bytes())
    _check_sentencepiece(file, proto)
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    by_score = sorted(normal, key=lambda piece: -piece.score)  # equal ones stay in order of ids
    return _tokenizer_json(
        specials={"<unk>": 0, "<s>": 1, "</s>": 2},
        begin="<s>",
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": _SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        model={
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: index for index, piece in enumerate(proto.pieces)},
            "merges": _merges([piece.piece for piece in by_score]),
        },
    )


def _check_sentencepiece(file: Path, proto: ModelProto) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    first = [piece.piece for piece in proto.pieces[:3]]
    user_defined = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED]
    # What it is, what it is here, what it is in every LLaMA: all that tokenizer.json above assumes.
    rules: Sequence[tuple[str, Any, Any]] = (
        ("model type", trainer.model_type, trainer.BPE),
        ("the first pieces", first, ["<unk>", "<s>", "</s>"]),
        ("byte fallback", trainer.byte_fallback, True),
        ("the normalizer's table", normalizer.precompiled_charsmap, b""),
        ("a space before the text", normalizer.add_dummy_prefix, True),
        ("spaces joined", normalizer.remove_extra_whitespaces, False),
        ("user-defined pieces", user_defined, []),
    )
    problems = [
        f"{what}: {reprlib.repr(found)}, expected {expected!r}"
        for what, found, expected in rules
        if found != expected
    ]
    if problems:
        raise InputError(
            f"{file}: not built as LLaMA 1's and 2's are, so Hugging Face's ids would differ\n  "
            + "\n  ".join(problems)
        )


def _merges(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, from the token that is preferred to the last.

    Both SentencePiece and tiktoken join two neighbours whenever that gives a token, the preferred
    one first; `tokenizers` joins only listed pairs, in the order of the list.

    h i s hi is his  ->  (h i) (i s) (h is) (hi s)
    """
    known = set(tokens)
    return [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


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
        "truncation": None,
        "padding": None,
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
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **model,
        },
    }
