"""Where the rows of a text of JSON begin and end, and what is wrong with it."""

import json
import re
from array import array
from typing import Any

from jllama.folders.json_files import ROW_DECODER, SHOWN, kind_of

LISTS = ("data", "rows", "examples", "train", "prompts", "instances")  # fields that hold the rows
_OPEN, _COMMA, _CLOSE, _BRACE, _COLON, _END, _SPACE = (
    re.compile(rf"[ \t\r\n]*{mark}[ \t\r\n]*")
    for mark in (r"\[", ",", r"\]", r"\{", ":", r"\}", "")
)
_NEXT = re.compile(rb"\n(?=[ \t]*\{)")  # where the object after a damaged one may begin
WINDOW = 2**24


class Scan:
    """One pass over a file's text, in which every row is parsed once and forgotten.

    Args:
        content: in UTF-8.
        window: bytes of it that are looked at together, if that is enough for a row.
    """

    def __init__(self, content: bytes | bytearray, window: int = WINDOW):
        self._content, self._window = content, window
        self._look(0)
        self._begin()

    def _begin(self) -> None:
        self._rows = 0
        self._line, self._counted = 1, 0  # of the place to which lines are counted
        self.spans = array("q")
        self.problems: list[str] = []  # at most as many as are shown
        self.beside: dict[str, Any] = {}

    def _look(self, start: int, size: int = 0) -> None:
        """Takes a part of the text: all of it, as Python's, could be as large as the file again."""
        self._start, self._stop = start, min(start + max(size, self._window), len(self._content))
        # A character a byte: places in it are the file's, less `_start`.
        self._text = self._content[start : self._stop].decode("latin-1")

    def _wider(self, at: int) -> bool:
        """Takes more of the text from a place on; False if there is no more."""
        if self._stop == len(self._content):
            return False
        self._look(at, 2 * (self._stop - at))
        return True

    def _mark(self, mark: re.Pattern[str], at: int) -> int | None:
        """The place behind a mark that stands here, and the space around it."""
        found = mark.match(self._text, at - self._start)
        space = found or _SPACE.match(self._text, at - self._start)
        end = space.end() if space else 0
        if self._start + end == self._stop and self._wider(at):
            return self._mark(mark, at)
        return self._start + end if found else None

    def _value(self, at: int) -> tuple[Any, int]:
        """The JSON value that begins here, and the place behind it."""
        try:
            value, end = ROW_DECODER.raw_decode(self._text, at - self._start)
        except json.JSONDecodeError:
            if self._wider(at):
                return self._value(at)
            raise
        if self._start + end == self._stop and self._wider(at):
            return self._value(at)
        return value, self._start + end

    def _skip(self, at: int) -> int:
        """The next place that is no space."""
        end = self._mark(_SPACE, at)
        assert end is not None  # it matches anywhere
        return end

    def file(self) -> None:
        """Fills `spans`, `problems` and `beside`."""
        at, size = self._skip(0), len(self._content)
        if self._content[at : at + 1] == b"[":
            after = self._list(at)
            if after is not None and after < size:
                self._wrong(after, "invalid JSON (more behind the end of the list)")
            return
        if self._wrapped(at):
            return
        self._look(0)
        self._begin()
        while at < size and len(self.problems) < SHOWN:
            stop = self._row(at)
            if stop is None:
                further = _NEXT.search(self._content, at)
                stop = further.end() if further else size
            at = self._skip(stop)

    def _row(self, start: int) -> int | None:
        """Where the row that begins here ends; None where it is damaged."""
        try:
            row, stop = self._value(start)
            self._content[start:stop].decode()
        except json.JSONDecodeError as error:
            line = self._content.count(b"\n", 0, self._start) + error.lineno
            self._wrong(start, f"invalid JSON ({error.msg}, line {line})")
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
        mark = self._mark(_OPEN, start)
        end = None if mark is None else self._mark(_CLOSE, mark)
        while mark is not None and end is None and len(self.problems) < SHOWN:
            stop = self._row(mark)
            if stop is None:
                return None
            mark, end = self._mark(_COMMA, stop), self._mark(_CLOSE, stop)
            if mark is None and end is None:
                next_row = self._skip(stop)
                self._wrong(next_row, "invalid JSON (expected a comma or ] before this row)")
        return end

    def _wrapped(self, start: int) -> bool:
        """Whether the file is one object with a list of rows; finds them, and its other fields."""
        held, end = False, None
        mark = self._mark(_BRACE, start)
        while mark is not None:
            try:
                name, at = self._value(mark)
                colon = self._mark(_COLON, at)
                if colon is None:
                    return False
                if name in LISTS and not held and self._opens_rows(colon):
                    held, stop = True, self._list(colon)
                    if stop is None:
                        return True
                else:
                    self.beside[name], stop = self._value(colon)
            except (ValueError, RecursionError):
                return False
            mark, end = self._mark(_COMMA, stop), self._mark(_END, stop)
        return held and end == len(self._content)

    def _opens_rows(self, at: int) -> bool:
        inside = self._mark(_OPEN, at)
        return inside is not None and self._content[inside : inside + 1] in (b"{", b"]")

    def _wrong(self, at: int, problem: str) -> None:
        self._line += self._content.count(b"\n", self._counted, at)
        self._counted = at
        self.problems.append(f"row {self._rows} (line {self._line}): {problem}")
        self._rows += 1
