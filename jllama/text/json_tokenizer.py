"""Any `tokenizer.json`, through the `tokenizers` package: SmolLM's, DeepSeek's, a fine-tune's."""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jllama.errors import InputError
from jllama.text.hf_files import TOKENIZER_JSON, Words, read_words
from jllama.text.template import ChatTemplate


def _byte_letters() -> str:
    """GPT-2's letter for each byte: itself where it can be seen, else the next one from 256 on.

    b"A" -> "A"    b" " (the 33rd that cannot be seen) -> chr(256 + 32), "Ġ"
    """
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others: Iterator[int] = iter(range(256, 512))
    return "".join(chr(byte if byte in seen else next(others)) for byte in range(256))


LETTERS = _byte_letters()
BYTE_OF: Mapping[str, int] = {letter: byte for byte, letter in enumerate(LETTERS)}


class JsonTokenizer:
    """A `tokenizer.json` as it came, with the names that the files beside it give.

    Raises:
        InputError: if it cannot be read, or names no token that ends a text.
    """

    def __init__(self, content: bytes, file: Path, words: Words):
        self._file, self._model = file, _read(content, file)
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # a text's "<|im_end|>" is text
        self._add(words.added)
        named = self._model.get_added_tokens_decoder()
        self._specials = {token for token, added in named.items() if added.special}
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        spelled = getattr(self._model.model, "byte_fallback", False)  # <0x0A>, not in letters
        self._letters: Mapping[str, int] = {} if spelled else BYTE_OF
        begin = self._model.encode("", add_special_tokens=True).ids
        self.eos_id = self._named(words.eos, words.ends)
        self.bos_id = self._named(words.bos, (*begin[:1], self.eos_id))
        self._specials |= {self.bos_id, self.eos_id}
        names = map(self._model.id_to_token, self._specials)  # None: an end id without a token
        self.specials: frozenset[str] = frozenset(filter(None, names))
        self.template: ChatTemplate | None = None
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((self.eos_id, *words.ends)))

    def _add(self, added: Mapping[str, int]) -> None:
        """Tokens that only the files beside it have."""
        unknown = [name for name in added if self._model.token_to_id(name) is None]
        self._model.add_special_tokens(sorted(unknown, key=added.__getitem__))
        for name, token in added.items():
            if (found := self._model.token_to_id(name)) != token:
                raise InputError(f"{self._file}: token {name!r} is {found}, elsewhere {token}")

    def _named(self, name: str | None, otherwise: tuple[int, ...]) -> int:
        """A token's id by its name, else the first of other ids."""
        token = None if name is None else self._model.token_to_id(name)
        if token is None and not otherwise:
            raise InputError(
                f"{self._file}: nothing says which token ends a text; expected eos_token in "
                "tokenizer_config.json, or eos_token_id in generation_config.json"
            )
        return otherwise[0] if token is None else token

    def content(self) -> dict[str, Any]:
        """What a `tokenizer.json` says, with the tokens that only the files beside it have."""
        return json.loads(self._model.to_str())

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _marked(self) -> Any:
        """The same, which reads special tokens out of a text; only chat templates need it."""
        return _read(self._model.to_str().encode(), self._file)

    def marked(self, text: str) -> list[int]:
        return self._marked.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        kept = [int(t) for t in ids if 0 <= t < self.vocab_size and t not in self._specials]
        return self._model.decode(kept, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        text = self._model.id_to_token(int(token)) if 0 <= token < self.vocab_size else None
        if text is None:
            return f"<id {int(token)}>"
        if self._letters.keys() >= set(text):
            text = bytes(self._letters[letter] for letter in text).decode("utf-8", "replace")
        return text.replace("▁", " ").replace("<0x0A>", "\n").replace("\n", "⏎\n")

    def special(self, name: str) -> int:
        token = self._model.token_to_id(name)
        if token is None or token not in self._specials:
            raise InputError(f"{self._file} has no {name}; choose a prompt style without it")
        return token


def adds_bos(files: Mapping[str, bytes], folder: Path) -> bool:
    """Whether Hugging Face's tokenizer of these files puts BOS before every text, as LLaMA's do.

    A tokenizer.json decides it where there is one, else `add_bos_token` of tokenizer_config.json.

    Args:
        files: by their names in a model folder.
        folder: where they lie, for errors.
    """
    if TOKENIZER_JSON in files:
        model = _read(files[TOKENIZER_JSON], folder / TOKENIZER_JSON)
        return bool(model.encode("", add_special_tokens=True).ids)
    return read_words(files, folder).adds_bos


def _read(content: bytes, file: Path):  # `tokenizers` has no types
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of its Rust is no Exception
        raise InputError(
            f"{file}: no tokenizer that `tokenizers` {tokenizers.__version__} reads ({error}); "
            f"copy {TOKENIZER_JSON} again"
        ) from error
