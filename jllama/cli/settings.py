"""Settings from a YAML file: the same declarations that check flags check its fields."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from jllama.errors import InputError
from jllama.folders.json_files import read_text

Settings = TypeVar("Settings")
_LONGEST = 100_000  # characters of a settings file; PyYAML reads some 50,000 a second


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        InputError: if it is missing or holds anything else.
    """
    wanted = "lines of `field: value`"
    text = read_text(path, wanted)
    if len(text) > _LONGEST:
        raise InputError(f"{path}: {len(text):,} characters; expected {wanted}")
    try:
        content = yaml.load(text, _PlainLoader)
    except RecursionError:
        raise InputError(f"{path}: nested too deeply; expected {wanted}") from None
    except (
        yaml.YAMLError,
        ValueError,
    ) as error:  # ValueError: 2001-99-99, a number of 5,000 digits
        raise InputError(f"{path}: not YAML ({error})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected {wanted}, found {str(content)[:80]!r}")
    return {str(name): value for name, value in content.items()}


class _PlainLoader(yaml.SafeLoader):
    """Without what settings never need: tags, and aliases, of which a few lines make gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.composer.ComposerError(None, None, "an alias or anchor", event.start_mark)
        if getattr(event, "tag", None):
            raise yaml.composer.ComposerError(None, None, f"a tag {event.tag}", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for name, _ in node.value:
            if str(name.value) in names:
                twice = f"the field {str(name.value)[:40]} twice"
                raise yaml.constructor.ConstructorError(None, None, twice, name.start_mark)
            names.add(str(name.value))
        return super().construct_mapping(node, deep)


def settings_from_yaml(settings: type[Settings], path: str | Path) -> Settings:
    """Checked settings from a file of `field: value` lines.

    Raises:
        InputError: everything that is wrong with the file, together.
    """
    return checked_settings(settings, read_yaml(path), path)


def checked_settings(
    settings: type[Settings], content: Mapping[str, Any], path: str | Path
) -> Settings:
    """Settings of these fields, which came from a file; errors as for `settings_from_yaml`."""
    try:
        return settings(**content)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def take_words(flag: str, argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The arguments without a flag of several values, and its values; none where it is not given.

    Raises:
        InputError: if it has no value.
    """
    rest, first = take_flag(flag, argv)
    if first is None:
        return rest, ()
    at = next(i for i, word in enumerate(argv) if word.partition("=")[0] == flag)
    more = list(itertools.takewhile(lambda word: not word.startswith("--"), rest[at:]))
    return rest[:at] + rest[at + len(more) :], (first, *more)


def take_flag(flag: str, argv: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without a flag, and the flag's value; None where it was not given.

    Raises:
        InputError: if it has no value.
    """
    for index, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name == flag:
            end = index + 1 if equals else index + 2
            value = value if equals else "".join(argv[index + 1 : end])
            if not value or value.startswith("--"):
                raise InputError(f"{flag} wants a value")
            return [*argv[:index], *argv[end:]], value
    return list(argv), None
