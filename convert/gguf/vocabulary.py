"""A model folder's tokenizer in llama.cpp's terms.

SentencePiece (LLaMA 1 and 2)   model "llama"   pieces and their scores
tiktoken's ranks (Llama 3)      model "gpt2"    tokens in GPT-2's letters, and merges
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf import TokenType
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from convert.hf.bpe import in_letters, merges
from convert.hf.tokenizer import check_like_llama
from jllama.errors import InputError
from jllama.text.hf_files import TOKENIZER_JSON
from jllama.text.json_tokenizer import JsonTokenizer
from jllama.text.tokenizer import (
    FILE_NAME,
    LLAMA3_SPECIALS,
    SentencePieceTokenizer,
    load_tokenizer,
)
from jllama.text.tokenizer_file import read_ranks

_UNUSED_SCORE = -1000.0  # below that of any piece


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
    template: str | None = None  # of chats, in Jinja

    def padded(self, rows: int) -> "Vocabulary":
        """With a token for each row of the embedding: llama.cpp wants as many.

        a b c, 5 rows  ->  a b c [PAD3] [PAD4]
        """
        more = rows - len(self.tokens)
        return dataclasses.replace(
            self,
            tokens=[*self.tokens, *(f"[PAD{token}]" for token in range(len(self.tokens), rows))],
            types=[*self.types, *[TokenType.UNUSED] * more],
            scores=[*self.scores, *[_UNUSED_SCORE] * more] if self.scores else (),
        )


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a model folder.

    Raises:
        InputError: if there is no tokenizer, it is damaged, or llama.cpp would give other ids.
    """
    file = folder / FILE_NAME
    tokenizer = load_tokenizer(folder)
    template = tokenizer.template.source if tokenizer.template else None
    if isinstance(tokenizer, JsonTokenizer):
        raise InputError(
            f"{folder / TOKENIZER_JSON}: llama.cpp knows such tokenizers by its own rules, which "
            "to-gguf does not write; export with to-hf, and use llama.cpp's convert_hf_to_gguf.py"
        )
    content = file.read_bytes()
    ranks = read_ranks(content, file)
    if ranks is not None:
        found = _llama3(ranks, tokenizer.bos_id, tokenizer.stop_ids)
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        found = _sentencepiece(content, file, tokenizer)
    return dataclasses.replace(found, template=template)


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
            *(names.get(token, f"[PAD{token}]") for token in behind),
        ],
        types=[
            *(TokenType(piece.type) for piece in proto.pieces),  # the same numbers
            *(TokenType.CONTROL if token in names else TokenType.UNUSED for token in behind),
        ],
        scores=[*(piece.score for piece in proto.pieces), *(_UNUSED_SCORE for _ in behind)],
        merges=(),
        bos_id=tokenizer.bos_id,
        stop_ids=tokenizer.stop_ids,
        unknown_id=proto.trainer_spec.unk_id,
        space_before=proto.normalizer_spec.add_dummy_prefix,
    )
