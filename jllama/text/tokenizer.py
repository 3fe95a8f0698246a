"""SentencePiece (LLaMA 1 and 2) and tiktoken (Llama 3) behind one small interface."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from jllama.errors import InputError
from jllama.folders.json_files import read_bytes
from jllama.folders.manifest import check_file
from jllama.text.tokenizer_file import FILE_NAME, check_sentencepiece, read_ranks

# Llama 3's splitting rule and 256 special tokens, in the order of their ids (from 128,000 on).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONGEST_TEXT, LONGEST_RUN = 400_000, 25_000  # characters, as in Meta's llama3/tokenizer.py
LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{2 + i}|>" for i in range(245)),
)


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back. `encode` adds no special token and reads none out of the text.

    A model may have more rows than its tokenizer has tokens, and generate such an id: it is decoded
    to nothing, and its piece is `<id 32003>`.
    """

    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]  # generation ends on any of these
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def piece(self, token: int) -> str:
        """One token as a person would want to see it."""
        ...

    def special(self, name: str) -> int:
        """The id of a special token such as `<|eot_id|>`; InputError if there is none."""
        ...


class SentencePieceTokenizer:
    """LLaMA 1 and 2: bos 1, eos 2, no padding token."""

    def __init__(self, model: bytes):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(model)
        self.bos_id = self._model.bos_id()
        self.eos_id = self._model.eos_id()
        self.stop_ids: tuple[int, ...] = (self.eos_id,)
        self.vocab_size = self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._model.EncodeAsIds(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.DecodeIds([int(t) for t in ids if 0 <= t < self.vocab_size])

    def piece(self, token: int) -> str:
        if not 0 <= token < self.vocab_size:
            return _nameless(token)
        return self._model.IdToPiece(int(token)).replace("▁", " ").replace("<0x0A>", "⏎\n")

    def special(self, name: str) -> int:
        found = {"<s>": self.bos_id, "</s>": self.eos_id}.get(name)
        if found is None:
            raise InputError(
                f"a LLaMA 1/2 tokenizer has no {name}; choose a prompt style without it"
            )
        return found


class TiktokenTokenizer:
    """Llama 3: byte-level BPE ranks, then 256 special tokens."""

    def __init__(self, ranks: dict[bytes, int]):
        import tiktoken

        first = len(ranks)
        self._specials = {name: first + i for i, name in enumerate(LLAMA3_SPECIALS)}
        self._model = tiktoken.Encoding(
            name="llama3",
            pat_str=LLAMA3_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self._specials,
        )
        self.bos_id = self._specials["<|begin_of_text|>"]
        self.eos_id = self._specials["<|end_of_text|>"]
        self.stop_ids: tuple[int, ...] = (self.eos_id, self._specials["<|eot_id|>"])
        self.vocab_size = self._model.n_vocab

    def encode(self, text: str) -> list[int]:
        if len(text) <= LONGEST_RUN:
            return self._model.encode_ordinary(text)
        return [token for part in _parts(text) for token in self._model.encode_ordinary(part)]

    def decode(self, ids: list[int]) -> str:
        # Special tokens mark structure and are no part of an answer.
        return self._model.decode([int(t) for t in ids if 0 <= t < self.bos_id])

    def piece(self, token: int) -> str:
        if not 0 <= token < self.vocab_size:
            return _nameless(token)
        text = self._model.decode_single_token_bytes(int(token)).decode("utf-8", "replace")
        return text.replace("\n", "⏎\n")

    def special(self, name: str) -> int:
        if name not in self._specials:
            raise InputError(
                f"the Llama 3 tokenizer has no {name}; choose a prompt style without it"
            )
        return self._specials[name]


def _parts(text: str) -> Iterator[str]:
    """A text as Meta's code gives it to tiktoken, which panics at a million spaces in a row.

    At most LONGEST_TEXT characters at a time, with no more than LONGEST_RUN spaces, or characters
    without a space, in a row.
    """
    for part in (text[at : at + LONGEST_TEXT] for at in range(0, len(text), LONGEST_TEXT)):
        start = 0
        for run in re.finditer(r"\s+|\S+", part):
            for end in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
                yield part[start:end]
                start = end
        yield part[start:]


def _nameless(token: int) -> str:
    return f"<id {int(token)}>"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model folder, or of a `tokenizer.model` file itself.

    Raises:
        InputError: if there is none, it is neither SentencePiece nor tiktoken, or it is not what
            the model folder certifies.
    """
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.exists():
        raise InputError(f"{file}: no tokenizer; expected Meta's {FILE_NAME} beside the weights")
    content = read_bytes(file, f"Meta's {FILE_NAME}")
    check_file(file)
    return make_tokenizer(content, file)


def make_tokenizer(content: bytes, file: Path) -> Tokenizer:
    """The tokenizer that a file's content describes; `file` is named in errors.

    Raises:
        InputError: if it is neither SentencePiece nor tiktoken, or is damaged.
    """
    ranks = read_ranks(content, file)
    if ranks is not None:
        return TiktokenTokenizer(ranks)
    check_sentencepiece(content, file)
    try:
        return SentencePieceTokenizer(content)
    except RuntimeError as error:
        raise InputError(
            f"{file}: no SentencePiece model that can be used ({error}); copy Meta's {FILE_NAME} "
            f"again ({len(content):,} bytes found)"
        ) from error
