"""JSON and JSON lines, read and written: the one place that turns their mistakes into messages."""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jllama.errors import InputError
from jllama.folders.inputs import check_readable, unreadable

NEW = ".new"  # ends the name of a file that is being written
SHOWN = 20  # problems of one file


class JsonLines(NamedTuple):
    """The objects of a file; `cut` says that a kill cut the last line, whose object is missing."""

    values: list[Any]
    cut: bool


def listed(problems: Sequence[str]) -> str:
    """Problems one a line, and how many more there are."""
    more = len(problems) - SHOWN
    return "\n  ".join([*problems[:SHOWN], *([f"and {more} more"] if more > 0 else [])])


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


def decoded(content: bytes | bytearray, path: str | Path) -> str:
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
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = "" if source.startswith("line ") else f" line {error.lineno}:"
        raise InputError(f"{source}:{line} invalid JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # numbers of 5,000 digits; endless nesting
        raise InputError(f"{source}: not readable as JSON ({error})") from error


def kind_of(value: Any) -> str:
    """What a value of JSON is, in words."""
    kinds = {str: "text", list: "a list", dict: "an object", bool: "true or false", int: "a number",
             float: "a number", type(None): "null"}  # fmt: skip
    return kinds.get(type(value), type(value).__name__)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:40]!r} twice in one object")
    return found


def _integer(digits: str) -> int | float:
    """A whole number; one of more digits than Python reads is infinite."""
    return int(digits) if len(digits) <= 4300 else float(digits)


# Of one row among others: what is wrong with a number in it is the matter of who reads the row.
ROW_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
# Of a row that was read before: no key comes twice.
AGAIN = json.JSONDecoder(parse_int=_integer)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError with the file's name if it is missing or broken."""
    content = parse(read_text(path, "a JSON file"), str(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_json_lines(path: Path) -> JsonLines:
    """The objects in a file of `as_line`'s lines, without their check sums; none if it is missing.

    Raises:
        InputError: naming a line that is not as it was written, but for a last one that a kill has
            cut.
    """
    if not path.is_file():
        return JsonLines([], False)
    *lines, last = read_text(path, "JSON lines").split("\n")  # each line ends in one
    if _SEAL.search(last):  # only its newline is missing, or something else stands there
        lines, last = [*lines, last], ""
    values = []
    for number, line in enumerate(lines, start=1):
        content = line[:-_SEAL_LENGTH] + "}"
        if line != _sealed(content):
            raise InputError(f"{path}: line {number} is damaged or was edited")
        values.append(parse(content, f"{path} line {number}"))
    return JsonLines(values, bool(last))


def as_line(value: Mapping[str, Any]) -> str:
    """One object as a line of a file of JSON lines, sealed by the check sum of its text.

    {"step": 7, "loss": 2.1}  ->  {"step": 7, "loss": 2.1, "crc32": "b1efc2a0"}
    """
    return _sealed(json_text(value)) + "\n"


def _sealed(line: str) -> str:
    return f'{line[:-1]}, "crc32": "{zlib.crc32(line.encode()):08x}"}}'


_SEAL = re.compile(r', "crc32": "[0-9a-f]{8}"}')
_SEAL_LENGTH = len(_sealed("{}")) - 1


def json_text(value: object, indent: int | None = None) -> str:
    """JSON as text that UTF-8 can hold; a byte of a file's name that is no UTF-8 is `\\udcff`."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def write_json(path: Path, content: object) -> None:
    """Indented JSON with a final newline; whole or not at all."""
    write_whole(path, json_text(content, indent=2) + "\n")


def write_json_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Lines of `as_line`; whole or not at all."""
    write_whole(path, "".join(map(as_line, lines)))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What is written in the body is this file, and so says an error: the system's names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes bytes, or a text as UTF-8, that take their name when all is on the disk."""
    new = path.with_name(path.name + NEW)
    with naming(path), new.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
