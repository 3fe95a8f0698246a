"""Settings from a YAML file: the same declarations that check flags check its fields."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jllama.errors import InputError

Settings = TypeVar("Settings")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        InputError: if it is missing or holds anything else.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected lines of `field: value`, found {str(content)[:80]!r}")
    return content


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
        return settings(**{str(name): value for name, value in content.items()})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


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
