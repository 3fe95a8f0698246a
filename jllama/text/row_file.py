"""The rows of a file, recognised by its content, whatever its name ends in. JSON of any shape:

[{...}, {...}]                         a list
{...} {...}                            objects, one a line (JSONL) or over several lines
{"data": [{...}, {...}], "about": 1}   a list in an object

Other formats are turned into objects, one a line (`jllama.text.row_formats`).
"""

import bisect
import codecs
import dataclasses
import json
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from jllama.errors import InputError
from jllama.folders.json_files import ROW_DECODER, SHOWN, decoded, kind_of, listed
from jllama.text.messages import COLUMNS
from jllama.text.row_formats import arrow_rows, contents, csv_rows, is_csv, source_of

LISTS = ("data", "rows", "examples", "train", "prompts", "instances")  # fields that hold the rows
_WANTED = "rows: a JSON list, or one JSON object a line; or CSV, Parquet or Arrow"
_OPEN, _OPEN_ROWS, _COMMA, _CLOSE, _BRACE, _COLON, _END, _SPACE = (
    re.compile(rf"[ \t\r\n]*{mark}[ \t\r\n]*")
    for mark in (r"\[", r"\[[ \t\r\n]*[{\]]", ",", r"\]", r"\{", ":", r"\}", "")
)
_NEXT = re.compile(r"\n(?=[ \t]*\{)")  # where the object after a damaged one may begin


@dataclass(frozen=True, eq=False)
class Rows(Sequence[dict]):
    """The rows of files, each parsed when it is asked for: only the files' own text is held.

    Args:
        content: the files', in UTF-8.
        spans: where each row begins and ends in it.
        beside: the other fields of an object that holds the rows.
        columns: our names of columns, and the file's.
        files: of several, the number of each one's first row, and its name.
        first: number of the first row.
    """

    content: bytes
    spans: Int64[np.ndarray, "rows 2"]
    beside: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    files: tuple[tuple[int, str], ...] = ()
    first: int = 0

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            files = self.files if not index.start else ()
            return dataclasses.replace(self, spans=self.spans[index], files=files)
        start, stop = self.spans[index]
        try:
            row = ROW_DECODER.decode(self.content[start:stop].decode())
        except RecursionError:  # it was read before from fewer calls
            raise InputError(f"row {self.first + index}: nested too deeply") from None
        named = {ours: row.pop(theirs, None) for ours, theirs in self.columns.items()}
        return row | named

    def part(self, start: int, stop: int) -> "Rows":
        """Some of them, with no more of the text than is theirs: for another process."""
        spans = self.spans[start:stop]
        begin, end = int(spans[0, 0]), int(spans[-1, 1])
        content = bytes(self.content[begin:end])
        return Rows(content, spans - begin, columns=self.columns, first=start)

    def place(self, index: int) -> str:
        """A row for a message: `row 3`, or `b.json: row 3`."""
        if not self.files:
            return f"row {index}"
        first, name = self.files[bisect.bisect_right(self.files, (index, chr(0x10FFFF))) - 1]
        return f"{name}: row {index - first}"

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
                return dataclasses.replace(self, columns=names)
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
    found = {file: _rows_of(file, content) for file, content in contents(Path(path), _WANTED)}
    rows = _joined([*found.values()], [file.name for file in found])
    return rows.renamed(columns, path) if columns else rows


def read_sources(
    sources: Sequence[str], columns: str = "", max_rows: int = 0
) -> tuple[Rows, list[int]]:
    """The rows of several files or folders, and how many each of them has.

    Args:
        sources: `a.json`, or `a.json:0.5`.
        columns: as for `read_rows`.
        max_rows: the first so many of each; 0 takes all.

    Raises:
        InputError: as `read_rows` and `source_of`.
    """
    found = [source_of(source).path for source in sources]
    parts = [read_rows(path, columns)[: max_rows or None] for path in found]
    return _joined(parts, [path.name for path in found]), [*map(len, parts)]


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


def _joined(parts: Sequence[Rows], names: Sequence[str]) -> Rows:
    """The rows of several files with the same columns, one after the other."""
    if len(parts) == 1:
        return parts[0]
    places = np.cumsum([0, *(len(rows.content) for rows in parts)])
    firsts = np.cumsum([0, *map(len, parts)]).tolist()
    files: list[tuple[int, str]] = []
    for first, name, rows in zip(firsts, names, parts, strict=False):
        inner = ((first + at, f"{name}/{file}") for at, file in rows.files)
        files += inner if rows.files else [(first, name)]
    return Rows(
        b"".join(rows.content for rows in parts),
        np.concatenate([rows.spans + at for rows, at in zip(parts, places, strict=False)]),
        columns=parts[0].columns,
        files=tuple(files),
    )


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
    return Rows(bytes(content), np.array(spans, np.int64).reshape(-1, 2))
