"""What a Hugging Face folder says of its tokenizer beside the tokens: names, begin, ends.

    added_tokens.json          {"<|im_start|>": 32000, ...}
    tokenizer.json             "added_tokens": [{"id": 32000, "content": "<|im_start|>", ...}]
    tokenizer_config.json      "added_tokens_decoder", "bos_token", "eos_token", "add_bos_token"
    special_tokens_map.json    "bos_token", "eos_token"
    generation_config.json     "eos_token_id": what generation ends on, a number or a list
    config.json                the same, where there is no generation_config.json

A model folder keeps all of them byte for byte, to be read here and to leave again with an export.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jllama.errors import InputError
from jllama.folders.json_files import decoded, json_text, parse

TOKENIZER_JSON, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIALS, ADDED = "special_tokens_map.json", "added_tokens.json"
GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
HF_CONFIG = "hf_config.json"  # the source's config.json, for a model folder has one of its own
HF_FILES = (TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIALS, ADDED, TEMPLATE, GENERATION, HF_CONFIG)


_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Words(NamedTuple):
    """Of the files that are there; nothing of those that are not."""

    added: Mapping[str, int] = {}  # tokens that came after the tokenizer was trained
    bos: str | None = None
    eos: str | None = None
    ends: tuple[int, ...] = ()  # what generation ends on
    names: Mapping[str, str] = {}  # bos_token, pad_token, ...: as templates know them
    template: str | None = None  # of chats, in Jinja
    template_file: str = TEMPLATE  # that has it
    adds_bos: bool = True  # Hugging Face's encode puts it first, unless a tokenizer.json says else


NO_WORDS = Words()  # of a folder that is Meta's


def read_words(files: Mapping[str, bytes], folder: Path) -> Words:
    """Out of the files by their names in a model folder; `folder` is named in errors.

    Raises:
        InputError: if a file is no JSON object, or two ids are given to one token.
    """
    small = [name for name in files if name in HF_FILES and name not in (TEMPLATE, TOKENIZER_JSON)]
    said = {name: _object(files[name], folder / name) for name in small}
    if TOKENIZER_JSON in files and not any(_added(said)):  # large, and mostly repeats the others
        said[TOKENIZER_JSON] = _object(files[TOKENIZER_JSON], folder / TOKENIZER_JSON)
    added: dict[str, int] = {}
    for name, token, file in _added(said):
        if type(token) is not int or not isinstance(name, str) or token < 0:
            raise InputError(f"{folder / file}: token {name!r} has the id {token!r}")
        if added.setdefault(name, token) != token:
            raise InputError(f"{folder / file}: token {name!r} is {token}, elsewhere {added[name]}")
    bos, eos = _name(said, "bos_token"), _name(said, "eos_token")
    ends: tuple[int, ...] = ()
    for file in (HF_CONFIG, GENERATION):  # the second one's word counts where it has one
        found = said.get(file, {}).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if any(type(token) is not int or token < 0 for token in ids):
            raise InputError(f"{folder / file}: eos_token_id is {found!r}, expected ids")
        ends = tuple(ids) or ends
    names = {key: text for key in _NAMES if (text := _name(said, key)) is not None}
    adds_bos = said.get(TOKENIZER_CONFIG, {}).get("add_bos_token") is not False
    return Words(added, bos, eos, ends, names, *_template(files, said, folder), adds_bos)


def with_template(
    files: Mapping[str, bytes], template: str, ends: Sequence[int], folder: Path
) -> dict[str, bytes]:
    """The files for a model that was tuned: its template, and the ids that end its answers.

    A template in tokenizer_config.json goes, and generation_config.json gets the ids that it has
    not; all else stays as it came.
    """
    words = read_words(files, folder)
    found = dict(files)
    if words.template != template:
        found[TEMPLATE] = template.encode()
        if TOKENIZER_CONFIG in files:
            config = _object(files[TOKENIZER_CONFIG], folder / TOKENIZER_CONFIG)
            if config.pop("chat_template", None) is not None:
                found[TOKENIZER_CONFIG] = json_text(config, indent=2).encode()
    if GENERATION in files and not {*ends} <= {*words.ends}:
        config = _object(files[GENERATION], folder / GENERATION)
        every = [*dict.fromkeys((*words.ends, *ends))]
        found[GENERATION] = json_text(config | {"eos_token_id": every}, indent=2).encode()
    return found


def _object(content: bytes, file: Path) -> dict[str, Any]:
    found = parse(decoded(content, file), str(file))
    if not isinstance(found, dict):
        raise InputError(f"{file}: expected a JSON object")
    return found


def _added(said: Mapping[str, Any]) -> Iterator[tuple[Any, Any, str]]:
    """(name, id, file) of every added token."""
    for name, token in said.get(ADDED, {}).items():
        yield name, token, ADDED
    listed = said.get(TOKENIZER_JSON, {}).get("added_tokens")
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, dict):
            yield entry.get("content"), entry.get("id"), TOKENIZER_JSON
    numbered = said.get(TOKENIZER_CONFIG, {}).get("added_tokens_decoder")
    for token, entry in numbered.items() if isinstance(numbered, dict) else ():
        if isinstance(entry, dict) and token.isdecimal():
            yield entry.get("content"), int(token), TOKENIZER_CONFIG


def _name(said: Mapping[str, Any], key: str) -> str | None:
    return _text(said, TOKENIZER_CONFIG, key) or _text(said, SPECIALS, key)


def _template(
    files: Mapping[str, bytes], said: Mapping[str, Any], folder: Path
) -> tuple[str | None, str]:
    """The template and its file: of several by name, the one for chats without tools."""
    if TEMPLATE in files:
        return decoded(files[TEMPLATE], folder / TEMPLATE), TEMPLATE
    found = said.get(TOKENIZER_CONFIG, {}).get("chat_template")
    if isinstance(found, list):
        named = {x.get("name"): x.get("template") for x in found if isinstance(x, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        return None, TOKENIZER_CONFIG
    return found.encode("utf-8", "replace").decode(), TOKENIZER_CONFIG  # halves of a pair are ?


def _text(said: Mapping[str, Any], file: str, key: str) -> str | None:
    """A token's text: as it is, or `{"content": text, ...}`."""
    found = said.get(file, {}).get(key)
    found = found.get("content") if isinstance(found, dict) else found
    return found if isinstance(found, str) else None
