"""SentencePiece (LLaMA 1 and 2), tiktoken (Llama 3) and any tokenizer.json behind one interface."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from jllama.errors import InputError
from jllama.folders.json_files import read_bytes, read_text
from jllama.folders.manifest import MANIFEST, check_file, read_manifest
from jllama.folders.model import rows_of
from jllama.text.hf_files import HF_FILES, NO_WORDS, TOKENIZER_JSON, Words, read_words
from jllama.text.json_tokenizer import JsonTokenizer
from jllama.text.padding import without_padding
from jllama.text.template import ChatTemplate
from jllama.text.tokenizer_file import (
    FILE_NAME,
    LLAMA3_PATTERN,
    LLAMA3_SPECIALS,
    check_sentencepiece,
    is_llama3s,
    read_ranks,
)

LONGEST_TEXT, LONGEST_RUN = 400_000, 25_000  # characters, as in Meta's llama3/tokenizer.py


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
    specials: frozenset[str]  # the texts of special tokens
    template: ChatTemplate | None  # the model's own

    def marked(self, text: str) -> list[int]:
        """As `encode`, but a special token that is spelled out is that token."""
        ...

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

    def __init__(self, model: bytes, words: Words = NO_WORDS):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(model)
        self.pieces = self._model.vocab_size()
        self.added = {name: token for name, token in words.added.items() if token >= self.pieces}
        self._names = {token: name for name, token in self.added.items()}
        self.bos_id = self._named(words.bos, self._model.bos_id())
        self.eos_id = self._named(words.eos, self._model.eos_id())
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((self.eos_id, *words.ends)))
        self.vocab_size = 1 + max(self._names, default=self.pieces - 1)
        self.specials = frozenset({"<s>", "</s>", *self.added})
        self._border = re.compile(
            f"({'|'.join(map(re.escape, sorted(self.specials, key=len)[::-1]))})"
        )
        self.template: ChatTemplate | None = None

    def marked(self, text: str) -> list[int]:
        ids: list[int] = []
        for place, part in enumerate(self._border.split(text)):
            ids += [self._named(part, -1)] if place % 2 else self.encode(part)
        return ids

    def foreign(self, words: Words) -> list[int]:
        """The added tokens that are no pieces of this model, or have other names there."""
        return [
            token
            for name, token in words.added.items()
            if token >= self.pieces or self._model.IdToPiece(token) != name
        ]

    def _named(self, name: str | None, otherwise: int) -> int:
        known = {"<s>": self._model.bos_id(), "</s>": self._model.eos_id(), **self.added}
        return known.get(name, otherwise) if name else otherwise

    def encode(self, text: str) -> list[int]:
        return self._model.EncodeAsIds(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.DecodeIds([int(t) for t in ids if 0 <= t < self.pieces])

    def piece(self, token: int) -> str:
        if not 0 <= token < self.pieces:
            return self._names.get(int(token), f"<id {int(token)}>")
        return self._model.IdToPiece(int(token)).replace("▁", " ").replace("<0x0A>", "⏎\n")

    def special(self, name: str) -> int:
        found = self._named(name, -1)
        if found < 0:
            raise InputError(f"this tokenizer has no {name}; choose a prompt style without it")
        return found


class TiktokenTokenizer:
    """Llama 3: byte-level BPE ranks, then 256 special tokens."""

    def __init__(self, ranks: dict[bytes, int], words: Words = NO_WORDS):
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
        ends = self.eos_id, self._specials["<|eot_id|>"], *words.ends
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        self.vocab_size = self._model.n_vocab
        self.specials = frozenset(self._specials)
        self.template: ChatTemplate | None = None

    def marked(self, text: str) -> list[int]:
        return self._model.encode(text, allowed_special="all")

    def foreign(self, words: Words) -> list[int]:
        """The added tokens that Llama 3 has not, or by other names."""
        return [t for name, t in words.added.items() if not is_llama3s(name, t - self.bos_id)]

    def encode(self, text: str) -> list[int]:
        if len(text) <= LONGEST_RUN:
            return self._model.encode_ordinary(text)
        return [token for part in _parts(text) for token in self._model.encode_ordinary(part)]

    def decode(self, ids: list[int]) -> str:
        # Special tokens mark structure and are no part of an answer.
        return self._model.decode([int(t) for t in ids if 0 <= t < self.bos_id])

    def piece(self, token: int) -> str:
        if not 0 <= token < self.vocab_size:
            return f"<id {int(token)}>"
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


def load_tokenizer(path: str | Path, template: str | Path = "") -> Tokenizer:
    """The tokenizer of a model folder, or of a `tokenizer.model` file itself.

    Args:
        template: a file of Jinja, instead of the model's own chat template.

    Raises:
        InputError: if there is none, it cannot be read, or it is not what the model folder
            certifies.
    """
    path = Path(path)
    if not path.is_dir():
        return make_tokenizer(read_bytes(path, f"Meta's {FILE_NAME}"), path)
    return tokenizer_of(tokenizer_files(path), path, rows_of(path), template)


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """What a model folder has of its tokenizer, by names: nothing, where it has none.

    Raises:
        InputError: if a file is not what the folder certifies.
    """
    certified = read_manifest(folder)["files"] if (folder / MANIFEST).exists() else None
    names = [
        name
        for name in (FILE_NAME, *HF_FILES)
        if ((folder / name).exists() if certified is None else name in certified)
    ]
    found = {name: read_bytes(folder / name, "a file of the tokenizer") for name in names}
    for name in names:
        check_file(folder / name)
    return found


def tokenizer_sha256(folder: str | Path) -> str | None:
    """Identifies a model folder's tokenizer: the certified hash of the file with its tokens."""
    certified = read_manifest(folder)["files"]
    return certified.get(FILE_NAME, certified.get(TOKENIZER_JSON))


def tokenizer_of(
    files: Mapping[str, bytes],
    folder: Path,
    rows: int | None = None,
    template: str | Path = "",
) -> Tokenizer:
    """The tokenizer that a model folder's files describe.

    Meta's own file wherever it has all tokens: it gives the ids that the model was trained with.
    Where a fine-tune has tokens of its own, its tokenizer.json; a SentencePiece model without one
    is given the added tokens' names.

    Args:
        files: by their names in a model folder.
        folder: where they lie, for errors.
        rows: of the embedding; a padding token behind them is no token here.
        template: as for `load_tokenizer`.

    Raises:
        InputError: if there is no tokenizer, or it is damaged.
    """
    words = read_words(files, folder)
    tokenizer = _choose(files, folder, words)
    if rows is not None and tokenizer.vocab_size > rows:
        return tokenizer_of(without_padding(files, words, rows, folder), folder, template=template)
    source, file = words.template, folder / words.template_file
    if template:
        file = Path(template)
        source = read_text(file, "a chat template")
    if source is not None:
        names = border_names(tokenizer)
        tokenizer.template = ChatTemplate(
            source, file, names | dict(words.names), tokenizer.specials
        )
    return tokenizer


def border_names(tokenizer: Tokenizer) -> dict[str, str]:
    """What a chat template calls the tokens that begin and end a text, and their own texts."""
    return {
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
    }


def _choose(files: Mapping[str, bytes], folder: Path, words: Words) -> Tokenizer:
    if FILE_NAME in files:
        tokenizer = make_tokenizer(files[FILE_NAME], folder / FILE_NAME, words)
        foreign = tokenizer.foreign(words)
        if not foreign:
            return tokenizer
        if TOKENIZER_JSON not in files:
            if isinstance(tokenizer, SentencePieceTokenizer) and min(foreign) >= tokenizer.pieces:
                return tokenizer
            raise InputError(
                f"{folder}: token {min(foreign)} has another name than in {FILE_NAME}; copy "
                f"{TOKENIZER_JSON}, which has all of them, into it"
            )
    if TOKENIZER_JSON not in files:
        raise InputError(
            f"{folder / FILE_NAME}: no tokenizer; expected Meta's {FILE_NAME} beside the weights, "
            f"or {TOKENIZER_JSON}"
        )
    return JsonTokenizer(files[TOKENIZER_JSON], folder / TOKENIZER_JSON, words)


def make_tokenizer(
    content: bytes, file: Path, words: Words = NO_WORDS
) -> "SentencePieceTokenizer | TiktokenTokenizer":
    """The tokenizer that a tokenizer.model's content describes; `file` is named in errors.

    Raises:
        InputError: if it is neither SentencePiece nor tiktoken, or is damaged.
    """
    ranks = read_ranks(content, file)
    if ranks is not None:
        return TiktokenTokenizer(ranks, words)
    check_sentencepiece(content, file)
    try:
        return SentencePieceTokenizer(content, words)
    except RuntimeError as error:
        raise InputError(
            f"{file}: no SentencePiece model that can be used ({error}); copy Meta's {FILE_NAME} "
            f"again ({len(content):,} bytes found)"
        ) from error
