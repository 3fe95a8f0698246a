"""JSON and JSON lines, read and written: the one place that turns their mistakes into messages."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jllama.errors import InputError
from jllama.folders.inputs import check_readable, unreadable

_SHOWN = 20  # problems of one file


class JsonLines(NamedTuple):
    """The objects of a file; `cut` says that a kill cut the last line, whose object is missing."""

    values: list[Any]
    cut: bool


def listed(problems: Sequence[str]) -> str:
    """Problems one a line, and how many more there are."""
    more = len(problems) - _SHOWN
    return "\n  ".join([*problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])])


def read_bytes(path: str | Path, wanted: str) -> bytes:
    """A file's content.

    Args:
        wanted: what the file should be, for messages.

    Raises:
        InputError: if it is missing, no regular file or unreadable.
    """
    check_readable(path, wanted)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error, wanted) from error


def read_text(path: str | Path, wanted: str) -> str:
    """A UTF-8 text, with or without a byte order mark; errors as for `read_bytes` and `decoded`."""
    return decoded(read_bytes(path, wanted), path)


def decoded(content: bytes, path: str | Path) -> str:
    """The text in a file's content; InputError where it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save it as UTF-8") from error


def parse(text: str, source: str) -> Any:
    """The value of a JSON text; `source` is a file, or the "line 3" that the text is.

    Raises:
        InputError: naming the source, and the line in it.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if source.startswith("line ") else f" line {error.lineno}:"
        raise InputError(f"{source}:{line} invalid JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # numbers of 5,000 digits; endless nesting
        raise InputError(f"{source}: not readable as JSON ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError with the file's name if it is missing or broken."""
    content = parse(read_text(path, "a JSON file"), str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_values(path: str | Path, wanted: str) -> Any:
    """What people's JSON files hold: a list, one object, or the values of several lines as a list.

    Raises:
        InputError: if it is missing or empty, or with the numbers of all lines that are wrong.
    """
    return values_in(read_bytes(path, wanted), path, wanted)


def values_in(content: bytes, path: str | Path, wanted: str) -> Any:
    """What `read_values` gives of a file with this content, and its errors."""
    text = decoded(content, path)
    if not text.strip():
        raise InputError(f"{path}: empty; expected {wanted}")
    if text.lstrip().startswith("["):
        return parse(text, str(path))
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    values, problems = [], []
    for number, line in lines:
        try:
            values.append(parse(line, f"line {number}"))
        except InputError as error:
            problems.append(str(error))
            if number == lines[0][0]:
                try:  # one value over many lines
                    return parse(text, str(path))
                except InputError:
                    continue
    if problems:
        raise InputError(f"{path}: {listed(problems)}")
    return values[0] if len(values) == 1 else values


def read_json_lines(path: Path) -> JsonLines:
    """The objects in a file that a command of ours writes line by line; none if it is missing.

    Raises:
        InputError: naming a line that is damaged, but for a last one that a kill has cut.
    """
    if not path.is_file():
        return JsonLines([], False)
    *whole, last = read_text(path, "JSON lines").split("\n")  # each line ends in one
    values = []
    for number, line in enumerate(whole, start=1):
        try:
            values.append(parse(line, f"line {number}"))
            if not isinstance(values[-1], dict):
                raise InputError("not an object")
        except InputError as error:
            raise InputError(f"{path}: line {number} is damaged ({error})") from error
    return JsonLines(values, bool(last))


def as_line(value: Mapping[str, Any]) -> str:
    """One object as a line of a file of JSON lines."""
    return json.dumps(value, ensure_ascii=False) + "\n"


def write_json(path: Path, content: object) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_json_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """One object a line; the file takes its name when it is whole."""
    whole = path.with_name(path.name + ".new")
    whole.write_text("".join(map(as_line, lines)), encoding="utf-8")
    whole.replace(path)
