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
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from jllama.errors import InputError
from jllama.folders.json_files import AGAIN, SHOWN, decoded, listed
from jllama.text.messages import COLUMNS
from jllama.text.row_formats import arrow_rows, contents, csv_rows, is_csv, is_named_csv, source_of
from jllama.text.scan.json_rows import Scan

_WANTED = "rows: a JSON list, or one JSON object a line; or CSV, Parquet or Arrow"
_TOGETHER = 4096  # rows whose places are taken out of their array at a time


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

    content: bytes | bytearray
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
        return self._row(index, *self.spans[index])

    def __iter__(self) -> Iterator[dict]:
        for first in range(0, len(self), _TOGETHER):
            spans = self.spans[first : first + _TOGETHER].tolist()
            for index, (start, stop) in enumerate(spans, first):
                yield self._row(index, start, stop)

    def _row(self, index: int, start: int, stop: int) -> dict:
        try:
            row, _ = AGAIN.raw_decode(self.content[start:stop].decode())
        except RecursionError:  # it was read before from fewer calls
            raise InputError(f"row {self.first + index}: nested too deeply") from None
        if not self.columns:
            return row
        return row | {ours: row.pop(theirs, None) for ours, theirs in self.columns.items()}

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


def _rows_of(path: Path, content: bytes | bytearray) -> Rows:
    table = arrow_rows(content, path)
    if table is not None:
        rows = _as_lines(table)
        if not len(rows):
            raise InputError(f"{path}: no rows")
        return rows
    content = _utf8(content, path)
    found = Scan(content)
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
        if is_named_csv(path):
            raise InputError(f"{path}: read as CSV: no rows below the names of its columns")
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


def _utf8(content: bytes | bytearray, path: Path) -> bytes | bytearray:
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
    return Rows(content, np.array(spans, np.int64).reshape(-1, 2))
