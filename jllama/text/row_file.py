"""The rows of a JSON file of any shape, recognised by its content, whatever its name ends in:

[{...}, {...}]                         a list
{...} {...}                            objects, one a line (JSONL) or over several lines
{"data": [{...}, {...}], "about": 1}   a list in an object
"""

import codecs
import json
import re
import shlex
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from jllama.errors import InputError
from jllama.folders.json_files import ROW_DECODER, SHOWN, kind_of, listed, read_bytes

LISTS = ("data", "rows", "examples", "train", "prompts", "instances")  # fields that hold the rows
_WANTED = "rows: a JSON list, or one JSON object a line"
_OPEN, _OPEN_ROWS, _COMMA, _CLOSE, _BRACE, _COLON, _END, _SPACE = (
    re.compile(rf"[ \t\r\n]*{mark}[ \t\r\n]*")
    for mark in (r"\[", r"\[[ \t\r\n]*[{\]]", ",", r"\]", r"\{", ":", r"\}", "")
)
_NEXT = re.compile(r"\n(?=[ \t]*\{)")  # where the object after a damaged one may begin

_PANDAS = "python -c \"import pandas, sys; pandas.read_{}(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)\" {{0}} {{0}}.jsonl"  # noqa: E501
_CSV = 'python -c "import csv, json, sys; [print(json.dumps(row)) for row in csv.DictReader(open(sys.argv[1]))]" {0} > {0}.jsonl'  # noqa: E501
# How files of other formats begin, and what makes rows of them.
_FORMATS = {
    b"\x1f\x8b": ("gzip", "gunzip --keep {0}"),
    b"PAR1": ("Parquet", _PANDAS.format("parquet")),
    b"ARROW1": ("Arrow (Feather)", _PANDAS.format("feather")),
    b"\xff\xff\xff\xff": (
        "Arrow",
        'python -c "import datasets, sys; datasets.Dataset.from_file(sys.argv[1]).to_json(sys.argv[2])" {0} {0}.jsonl',  # noqa: E501
    ),
    b"PK\x03\x04": ("ZIP or Excel", f"unzip {{0}}, or {_PANDAS.format('excel')}"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstd --decompress {0}"),
    b"\xfd7zXZ": ("xz", "unxz --keep {0}"),
    b"BZh": ("bzip2", "bunzip2 --keep {0}"),
}


class Rows(Sequence[dict]):
    """The rows of a file, each parsed when it is asked for: only the file's own text is held.

    Args:
        content: the file's, in UTF-8.
        spans: where each row begins and ends in it.
        beside: the other fields of an object that holds the rows.
    """

    def __init__(
        self, content: bytes, spans: Int64[np.ndarray, "rows 2"], beside: Mapping[str, Any]
    ):
        self._content, self._spans, self.beside = content, spans, beside

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Rows(self._content, self._spans[index], self.beside)
        start, stop = self._spans[index]
        try:
            return ROW_DECODER.decode(self._content[start:stop].decode())
        except RecursionError:  # it was read before from fewer calls
            raise InputError(f"row {index}: nested too deeply") from None


def read_rows(path: str | Path) -> Rows:
    """The rows of a file of data or prompts.

    Raises:
        InputError: naming the row and line of all that is wrong, or the format if it is another.
    """
    content = _utf8(read_bytes(path, _WANTED), path)
    found = _Scan(content)
    found.file()
    if not found.problems and found.spans:
        spans = np.array(found.spans, np.int64).reshape(-1, 2)
        return Rows(content, spans, found.beside)
    if not content.strip():
        raise InputError(f"{path}: empty; expected {_WANTED}")
    _refuse_csv(content, path)
    raise InputError(f"{path}: {listed(found.problems) or 'no rows'}; expected {_WANTED}")


class _Scan:
    """One pass over a file's text, in which every row is parsed once and forgotten."""

    def __init__(self, content: bytes):
        self._content = content
        self._text = content.decode("latin-1")  # a character a byte: places in it are the file's
        self._begin()

    def _begin(self) -> None:
        self._rows = 0
        self._line, self._counted = 1, 0  # of the place to which lines are counted
        self.spans = array("q")
        self.problems: list[str] = []  # at most as many as are shown
        self.beside: dict[str, Any] = {}

    def file(self) -> None:
        """Fills `spans`, `problems` and `beside`."""
        at, size = _skip(self._text, 0), len(self._text)
        if self._text[at : at + 1] == "[":
            after = self._list(at)
            if after is not None and after < size:
                self._wrong(after, "invalid JSON (more behind the end of the list)")
            return
        if self._wrapped(at):
            return
        self._begin()
        while at < size and len(self.problems) < SHOWN:
            stop = self._row(at)
            if stop is None:
                further = _NEXT.search(self._text, at)
                stop = further.end() if further else size
            at = _skip(self._text, stop)

    def _row(self, start: int) -> int | None:
        """Where the row that begins here ends; None where it is damaged."""
        try:
            row, stop = ROW_DECODER.raw_decode(self._text, start)
            self._content[start:stop].decode()
        except json.JSONDecodeError as error:
            self._wrong(start, f"invalid JSON ({error.msg}, line {error.lineno})")
        except UnicodeDecodeError as error:
            self._wrong(start, f"byte {start + error.start} is not UTF-8; save it as UTF-8")
        except RecursionError:
            self._wrong(start, "nested too deeply")
        except ValueError as error:
            self._wrong(start, str(error))
        else:
            if isinstance(row, dict):
                self.spans.extend((start, stop))
                self._rows += 1
            else:
                self._wrong(start, f"{kind_of(row)}, expected an object")
            return stop
        return None

    def _list(self, start: int) -> int | None:
        """Where the list that begins here ends, with the space behind it; None if it is damaged."""
        mark = _OPEN.match(self._text, start)
        end = _CLOSE.match(self._text, mark.end()) if mark else None
        while mark and not end and len(self.problems) < SHOWN:
            stop = self._row(mark.end())
            if stop is None:
                return None
            mark, end = _COMMA.match(self._text, stop), _CLOSE.match(self._text, stop)
            if not mark and not end:
                next_row = _skip(self._text, stop)
                self._wrong(next_row, "invalid JSON (expected a comma or ] before this row)")
        return end.end() if end else None

    def _wrapped(self, start: int) -> bool:
        """Whether the file is one object with a list of rows; finds them, and its other fields."""
        text, held = self._text, False
        mark, end = _BRACE.match(text, start), None
        while mark:
            try:
                name, at = ROW_DECODER.raw_decode(text, mark.end())
                colon = _COLON.match(text, at)
                if not colon:
                    return False
                at = colon.end()
                if name in LISTS and not held and _OPEN_ROWS.match(text, at):
                    held, stop = True, self._list(at)
                    if stop is None:
                        return True
                else:
                    self.beside[name], stop = ROW_DECODER.raw_decode(text, at)
            except (ValueError, RecursionError):
                return False
            mark, end = _COMMA.match(text, stop), _END.match(text, stop)
        return held and end is not None and end.end() == len(text)

    def _wrong(self, at: int, problem: str) -> None:
        self._line += self._text.count("\n", self._counted, at)
        self._counted = at
        self.problems.append(f"row {self._rows} (line {self._line}): {problem}")
        self._rows += 1


def _skip(text: str, at: int) -> int:
    """The next place that is no space."""
    space = _SPACE.match(text, at)
    return space.end() if space else at


def _utf8(content: bytes, path: str | Path) -> bytes:
    """A file's content in UTF-8 without a byte order mark; InputError for other formats."""
    for begin, (name, conversion) in _FORMATS.items():
        if content.startswith(begin):
            raise _other_format(path, name, conversion)
    encoding = json.detect_encoding(content)
    if encoding.startswith("utf-8"):
        return content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode(encoding).encode()
    except UnicodeError:
        raise InputError(
            f"{path}: it begins like {encoding}, but is not; save it as UTF-8"
        ) from None


def _refuse_csv(content: bytes, path: str | Path) -> None:
    first = content.lstrip()[:4096].partition(b"\n")[0]
    if first[:1] not in b"[{" and (re.search(rb"[,;\t]", first) or Path(path).suffix == ".csv"):
        raise _other_format(path, "CSV", _CSV)


def _other_format(path: str | Path, name: str, conversion: str) -> InputError:
    command = conversion.format(shlex.quote(str(path)))
    return InputError(
        f"{path}: this looks like {name}; expected {_WANTED}. To convert it:\n  {command}"
    )
