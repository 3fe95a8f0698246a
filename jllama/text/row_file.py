"""The rows of a file, recognised by its content, whatever its name ends in. JSON of any shape:

[{...}, {...}]                         a list
{...} {...}                            objects, one a line (JSONL) or over several lines
{"data": [{...}, {...}], "about": 1}   a list in an object

Other formats are turned into objects, one a line (`jllama.text.row_formats`).
"""

import codecs
import json
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Int64

from jllama.errors import InputError
from jllama.folders.json_files import ROW_DECODER, SHOWN, decoded, kind_of, listed
from jllama.text.messages import COLUMNS
from jllama.text.row_formats import arrow_rows, contents, csv_rows, is_csv

LISTS = ("data", "rows", "examples", "train", "prompts", "instances")  # fields that hold the rows
_WANTED = "rows: a JSON list, one JSON object a line, CSV or Parquet"
_OPEN, _OPEN_ROWS, _COMMA, _CLOSE, _BRACE, _COLON, _END, _SPACE = (
    re.compile(rf"[ \t\r\n]*{mark}[ \t\r\n]*")
    for mark in (r"\[", r"\[[ \t\r\n]*[{\]]", ",", r"\]", r"\{", ":", r"\}", "")
)
_NEXT = re.compile(r"\n(?=[ \t]*\{)")  # where the object after a damaged one may begin


class Rows(Sequence[dict]):
    """The rows of a file, each parsed when it is asked for: only the file's own text is held.

    Args:
        content: the file's, in UTF-8.
        spans: where each row begins and ends in it.
        beside: the other fields of an object that holds the rows.
        columns: our names of columns, and the file's.
    """

    def __init__(
        self,
        content: bytes,
        spans: Int64[np.ndarray, "rows 2"],
        beside: Mapping[str, Any],
        columns: Mapping[str, str] = MappingProxyType({}),
    ):
        self.content, self.spans, self.beside = content, spans, beside
        self._columns = columns

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Rows(self.content, self.spans[index], self.beside, self._columns)
        start, stop = self.spans[index]
        try:
            row = ROW_DECODER.decode(self.content[start:stop].decode())
        except RecursionError:  # it was read before from fewer calls
            raise InputError(f"row {index}: nested too deeply") from None
        named = {ours: row.pop(theirs, None) for ours, theirs in self._columns.items()}
        return row | named

    def renamed(self, columns: str, path: str | Path) -> "Rows":
        """With names for columns: "prompt=question,completion=answer".

        Raises:
            InputError: if they are no such names, or no row has a column of them.
        """
        names: dict[str, str] = {}
        for pair in columns.split(","):
            ours, is_pair, theirs = (word.strip() for word in pair.partition("="))
            if (
                ours not in COLUMNS
                or not is_pair
                or not theirs
                or ours in names
                or theirs in names.values()
            ):
                raise InputError(
                    f"columns {columns}: expected NAME=COLUMN,..., each once, and NAME one of "
                    + ", ".join(COLUMNS)
                )
            names[ours] = theirs
        missing = {*names.values()}
        found: set[str] = set()
        for row in self:
            found |= row.keys()
            missing -= row.keys()
            if not missing:
                return Rows(self.content, self.spans, self.beside, names)
        raise InputError(
            f"{path}: no row has the column {', '.join(sorted(missing))}; found: "
            + ", ".join(sorted(found)[:SHOWN])
        )


def read_rows(path: str | Path, columns: str = "") -> Rows:
    """The rows of a file of data or prompts, or of a folder of such files.

    Args:
        columns: what its columns are called, "prompt=question,completion=answer".

    Raises:
        InputError: naming the row and line of all that is wrong, or the format if it is another.
    """
    rows = _joined([_rows_of(*file) for file in contents(Path(path), _WANTED)])
    return rows.renamed(columns, path) if columns else rows


def _rows_of(path: Path, content: bytes) -> Rows:
    table = arrow_rows(content, path)
    if table is not None:
        rows = _as_lines(table)
        if not len(rows):
            raise InputError(f"{path}: no rows")
        return rows
    content = _utf8(content, path)
    found = _Scan(content)
    found.file()
    if not found.problems and found.spans:
        spans = np.array(found.spans, np.int64).reshape(-1, 2)
        return Rows(content, spans, found.beside)
    if not content.strip():
        raise InputError(f"{path}: empty; expected {_WANTED}")
    if is_csv(content, path):
        rows = _as_lines(csv_rows(decoded(content, path), path))
        if len(rows):
            return rows
    raise InputError(f"{path}: {listed(found.problems) or 'no rows'}; expected {_WANTED}")


def _joined(files: Sequence[Rows]) -> Rows:
    """The rows of several files, one after the other."""
    if len(files) == 1:
        return files[0]
    contents, starts = [rows.content for rows in files], [0]
    for content in contents:
        starts.append(starts[-1] + len(content))
    spans = [rows.spans + start for rows, start in zip(files, starts, strict=False)]
    return Rows(b"".join(contents), np.concatenate(spans), {})


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


def _utf8(content: bytes, path: Path) -> bytes:
    """A file's content in UTF-8 without a byte order mark."""
    encoding = json.detect_encoding(content)
    if encoding.startswith("utf-8"):
        return content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode(encoding).encode()
    except UnicodeError:
        raise InputError(
            f"{path}: it begins like {encoding}, but is not; save it as UTF-8"
        ) from None


def _as_lines(rows: Iterable[Mapping[str, Any]]) -> Rows:
    """Rows of a table; a value that JSON has no word for, such as a date, is as if missing."""
    content, spans = bytearray(), array("q")
    for row in rows:
        line = json.dumps(row, ensure_ascii=False, default=lambda _: None)
        spans.append(len(content))
        content += line.encode("utf-8", "replace")
        spans.append(len(content))
    return Rows(bytes(content), np.array(spans, np.int64).reshape(-1, 2), {})
