"""A model folder's tokenizer in llama.cpp's terms.

SentencePiece (LLaMA 1 and 2)   model "llama"   pieces and their scores
tiktoken's ranks (Llama 3)      model "gpt2"    tokens in GPT-2's letters, and merges
tokenizer.json                  either          json_vocabulary.py
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from gguf import TokenType
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from convert.gguf.json_vocabulary import json_vocabulary
from convert.gguf.terms import UNUSED_SCORE, Vocabulary, nameless
from convert.hf.bpe import in_letters, merges
from convert.hf.tokenizer import check_like_llama
from jllama.errors import InputError
from jllama.folders.adapter import style_of
from jllama.text.hf_files import TEMPLATE, TOKENIZER_JSON
from jllama.text.json_tokenizer import JsonTokenizer
from jllama.text.messages import Message
from jllama.text.template import ChatTemplate
from jllama.text.tokenizer import (
    FILE_NAME,
    SentencePieceTokenizer,
    Tokenizer,
    border_names,
    load_tokenizer,
)
from jllama.text.tokenizer_file import LLAMA3_SPECIALS, read_ranks


def read_vocabulary(folder: Path, adapter: Path | None = None) -> Vocabulary:
    """The vocabulary of a model folder, with the chat template of an adapter that is merged in.

    Raises:
        InputError: if there is no tokenizer, it is damaged, or llama.cpp would give other ids.
    """
    file = folder / FILE_NAME
    tokenizer = load_tokenizer(folder)
    if adapter is not None and (source := style_of(adapter, tokenizer)) is not None:
        tokenizer.template = ChatTemplate(
            source, adapter / TEMPLATE, border_names(tokenizer), tokenizer.specials
        )
    if tokenizer.template is not None:
        tokenizer.template.check()  # llama.cpp loads no file with another
    template = tokenizer.template.source if tokenizer.template else None
    if isinstance(tokenizer, JsonTokenizer):
        found = json_vocabulary(tokenizer, folder / TOKENIZER_JSON)
        if not (found.merges or found.scores):
            raise InputError(
                f"{folder}: its tokenizer merges nothing, and llama.cpp loads no such file"
            )
    elif isinstance(tokenizer, SentencePieceTokenizer):
        found = _sentencepiece(file.read_bytes(), file, tokenizer)
    else:
        ranks = read_ranks(file.read_bytes(), file)
        assert ranks is not None
        found = _llama3(ranks, tokenizer.bos_id, tokenizer.stop_ids)
    return dataclasses.replace(found, template=template, begins=_begins(tokenizer))


def _begins(tokenizer: Tokenizer) -> bool:
    """Whether every text begins with BOS.

    Not where a chat does not: llama.cpp would put it there, for it takes one off only where a
    template writes it.
    """
    if tokenizer.template is None:
        return True
    try:
        text = tokenizer.template.prompt([Message("user", "Hi")])
    except InputError:  # of one that wants other turns
        return True
    return text.startswith(tokenizer.piece(tokenizer.bos_id))


def _llama3(ranks: Mapping[bytes, int], bos_id: int, stop_ids: tuple[int, ...]) -> Vocabulary:
    tokens = [in_letters(token) for token in sorted(ranks, key=ranks.__getitem__)]
    return Vocabulary(
        model="gpt2",
        pre="llama-bpe",
        tokens=[*tokens, *LLAMA3_SPECIALS],
        types=[TokenType.NORMAL] * len(tokens) + [TokenType.CONTROL] * len(LLAMA3_SPECIALS),
        scores=(),
        merges=[f"{left} {right}" for left, right in merges(tokens)],
        bos_id=bos_id,
        stop_ids=stop_ids,
        unknown_id=None,
        space_before=False,
    )


def _sentencepiece(content: bytes, file: Path, tokenizer: SentencePieceTokenizer) -> Vocabulary:
    """The pieces, and behind them the tokens that a fine-tune added."""
    proto = ModelProto.FromString(content)
    check_like_llama(file, proto, "llama.cpp")
    if proto.normalizer_spec.remove_extra_whitespaces:
        raise InputError(
            f"{file}: it makes one space of many, which llama.cpp does not, so its ids would "
            "differ; export with convert.to_hf, for transformers and vLLM"
        )
    names = {token: name for name, token in tokenizer.added.items()}
    behind = range(tokenizer.pieces, tokenizer.vocab_size)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=[
            *(piece.piece for piece in proto.pieces),
            *(names.get(token, nameless(token)) for token in behind),
        ],
        types=[
            *(TokenType(piece.type) for piece in proto.pieces),  # the same numbers
            *(TokenType.CONTROL if token in names else TokenType.UNUSED for token in behind),
        ],
        scores=[*(piece.score for piece in proto.pieces), *(UNUSED_SCORE for _ in behind)],
        merges=(),
        bos_id=tokenizer.bos_id,
        stop_ids=tokenizer.stop_ids,
        unknown_id=proto.trainer_spec.unk_id,
        space_before=proto.normalizer_spec.add_dummy_prefix,
    )
