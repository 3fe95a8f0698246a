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

import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from convert.hf.bpe import in_letters, merges
from convert.hf.llama3 import BYTES, SPLITTING, difference, ranks_of
from jllama.errors import InputError
from jllama.folders.json_files import decoded, parse, read_bytes, write_json, write_whole
from jllama.folders.model import CONFIG
from jllama.text.hf_files import (
    HF_CONFIG,
    HF_FILES,
    TEMPLATE,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
)
from jllama.text.tokenizer import make_tokenizer
from jllama.text.tokenizer_file import FILE_NAME, LLAMA3_SPECIALS, read_ranks

ORIGINAL = Path("original") / FILE_NAME  # where Meta's own Hugging Face repositories keep it

# SentencePiece's remove_extra_whitespaces. (^ and $ would be the borders of lines.)
_JOIN_SPACES = (
    {"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
)


def read_hf_tokenizer(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files of a Hugging Face LLaMA folder, by their names in a model folder.

    All that are there, byte for byte, and Meta's tokenizer.model: of a folder without one, Llama
    3's from tokenizer.json, sorted by rank as Meta wrote it:

        {"!": 0, ..., "in": 258, "Ġa": 264}  ->  IQ== 0 ... aW4= 258 ... IGE= 264

    Raises:
        InputError: if there is no tokenizer, or a file is damaged.
    """
    places = {FILE_NAME: next((p for p in (ORIGINAL, FILE_NAME) if (folder / p).exists()), None)}
    places |= {name: CONFIG if name == HF_CONFIG else Path(name) for name in HF_FILES}
    files = {
        name: read_bytes(folder / place, "a file of the tokenizer")
        for name, place in places.items()
        if place is not None and (folder / place).exists()
    }
    if not files.keys() & {FILE_NAME, TOKENIZER_JSON}:
        raise InputError(
            f"{folder}: no tokenizer; expected {ORIGINAL}, {FILE_NAME} or {TOKENIZER_JSON}; "
            f"copy Meta's {FILE_NAME} into it"
        )
    if FILE_NAME not in files:
        content = parse(decoded(files[TOKENIZER_JSON], folder / TOKENIZER_JSON), str(folder))
        if isinstance(content, dict) and difference(content) is None:
            files = {FILE_NAME: ranks_of(content["model"]["vocab"]), **files}
    return files


def write_tokenizer_files(files: Mapping[str, bytes], folder: Path, max_seq_len: int) -> None:
    """The tokenizer of a model folder as transformers, vLLM and llama.cpp read it.

    What came from Hugging Face leaves as it came; beside a tokenizer.model alone the others are
    written. The source's config.json is not among them: `hf_config` writes one of the weights.

    Args:
        files: by their names in a model folder.
    """
    if files.keys() <= {FILE_NAME, TEMPLATE}:
        write_hf_tokenizer(files[FILE_NAME], folder, max_seq_len)
        files = {name: files[name] for name in files if name == TEMPLATE}
    ranks = FILE_NAME in files and read_ranks(files[FILE_NAME], Path(FILE_NAME))
    for name, content in files.items():
        place = folder / (ORIGINAL if name == FILE_NAME and ranks else name)
        if name != HF_CONFIG:
            place.parent.mkdir(exist_ok=True)
            write_whole(place, content)


def write_hf_tokenizer(content: bytes, folder: Path, max_seq_len: int) -> None:
    """The tokenizer files that transformers, vLLM and llama.cpp want, from Meta's file.

    They give jllama's ids for any text in which no special token is spelled out; jllama takes
    those for text, Hugging Face only with `split_special_tokens=True`.

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
        pre_tokenizer=SPLITTING,
        decoder=BYTES | {"use_regex": False},
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
