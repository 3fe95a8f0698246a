"""What people read on a terminal: one console, tables, progress, and commands that can be pasted.

Whatever is printed goes through `console` or `complain`, which make control characters visible:
text of files and models must not command a terminal.
"""

import contextlib
import html
import io
import json
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

_SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar hides
NARROWEST = 25  # characters of a column of text; below that a table becomes records

_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_PICTURES |= dict.fromkeys((0x2028, 0x2029), 0x2424)  # begin a line
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_PICTURES |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)  # turn lines
_NUMBER = re.compile(r"([-+]?\d.*)?")


def visible(text: str) -> str:
    """Foreign text for a terminal: what would control it becomes pictures, but for tabs and lines.

    Control characters, Unicode's other line ends, and the marks that reverse the order of text.
    """
    return text.translate(_PICTURES)


class _Console(Console):
    """Shows all by way of `visible`; lines stay whole, for a file or a program may read them."""

    def __init__(self, *, stderr: bool = False):
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def on_broken_pipe(self) -> None:
        """Leaves it to `to_any_reader`."""
        raise  # rich calls it where it has caught the error

    def render_str(self, text: str, **how: Any) -> Text:
        """Before it is laid out: a picture takes a column, a control character none."""
        return super().render_str(visible(text), **how)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """What was no string; rich's own commands to the terminal are marked as control."""
        for part in super().render(renderable, options):
            yield part if part.control else part._replace(text=visible(part.text))


console = _Console()
_errors = _Console(stderr=True)


def complain(words: object) -> None:
    """A message to stderr; all its lines but the first are indented.

    A line end in the name of a file or a tensor so begins no line that could pass for another
    message.
    """
    _errors.print(re.sub(r"\n(?!  )", "\n  ", str(words)))


def leave(code: int) -> NoReturn:
    """Ends the process at once, whatever its threads do, and leaves the terminal as it was."""
    if sys.stderr.isatty():
        os.write(sys.stderr.fileno(), _SHOW_CURSOR)
    os._exit(code)


def print_json(value: Any) -> None:
    """One JSON value for a program: ASCII, which every terminal and encoding takes."""
    print(json.dumps(value, indent=2))


@contextlib.contextmanager
def quiet_if(only_json: bool) -> Iterator[None]:
    """Where standard output is for a JSON value alone, all else goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if only_json else contextlib.nullcontext():
        yield


def command_line(*words: object) -> str:
    """`jllama train --model 'my model'`: a command of ours as a shell takes it."""
    return quoted("jllama", *words)


def quoted(*words: object) -> str:
    """Words as a shell takes them; those with control characters as bash and zsh take them."""
    return " ".join(_quoted(str(word)) for word in words)


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(map(_escaped, word)) + "'"


def _escaped(character: str) -> str:
    if character in "'\\":
        return "\\" + character
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x80 else f"\\U{code:08x}"


@contextlib.contextmanager
def to_any_reader() -> Iterator[None]:
    """Output that any locale takes, and that ends without a word where its reader has gone.

    A character that the encoding lacks is written as `\\u241b`. (`| head` ends the process.)
    """
    for file in (sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more when it ends
        sys.exit(141)  # as a shell says of SIGPIPE


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table, or a record for each row where text would stand in columns that are too narrow.

        prompt │ base        prompt  Say 3.
        ───────┼─────        base    3, the number
        Say 3. │ 3, the

    Args:
        header: all empty for rows of a name and a value.
    """
    if title:
        console.print(title)
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(_width, column)) for column in columns]
    wide = [width for width in widths if width > NARROWEST]
    left = console.width - 3 * len(header) - 1 - sum(w for w in widths if w <= NARROWEST)
    if left < NARROWEST * len(wide):
        console.print(_records(header, rows))
        return
    table = Table(show_header=any(header), show_lines=len(wide) > 1)
    for name, *cells in columns:
        numbers = all(map(_NUMBER.fullmatch, cells))
        table.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _width(cell: str) -> int:
    return max(map(cell_len, visible(cell).split("\n")))


def _records(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Names left, values right; lines of a value stay in their column."""
    names = header if any(header) else [row[0] for row in rows]
    left = min(max(map(_width, names), default=0), console.width - 12)
    records = Table.grid(padding=(0, 2, 0, 0))
    records.add_column(width=left, overflow="fold")
    records.add_column(width=console.width - left - 2, overflow="fold")
    for row in rows:
        if not any(header):
            records.add_row(*row)
            continue
        for name, cell in zip(header, row, strict=True):
            if cell:
                records.add_row(name.replace("\n", " "), cell)
        records.add_row()
    return records


class Progress:
    """A bar with rate and remaining time on a terminal, a bar in a notebook, lines elsewhere.

    Where the terminal shows both, messages and the bar share `console`: no message tears the bar.

    Args:
        note: what happens before the first unit is done.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0, note: str = ""):
        self._title, self._total, self._unit, self._note = title, total, unit, note
        self._every = max(1, total // 10)
        self._done = done
        self._counting = threading.Lock()
        self._bar: Any = None
        self._cell: Any = None  # of a notebook
        self._told = 0.0

    def __enter__(self) -> "Progress":
        terminals = (x for x in (console, _errors) if x.is_interactive and x.file.isatty())
        shown = next(terminals, None)
        if shown is not None:
            from rich import progress

            roomy = shown.width >= 60
            text: dict[str, Any] = {"markup": False}  # a note may be a foreign message
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}", **text),
                *([progress.BarColumn(bar_width=None)] if roomy else []),
                progress.MofNCompleteColumn(),
                progress.TextColumn(self._unit, **text),
                *([progress.TimeElapsedColumn()] if roomy else []),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}", **text),
                console=shown,
            )
            self._task = self._bar.add_task(
                self._title, total=self._total, completed=self._done, note=self._note
            )
            self._bar.start()
        elif console.is_jupyter:
            from IPython.display import display

            self._cell = display(self._in_html(self._note), raw=True, display_id=True)
        elif self._note:
            self._say(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, note: str = "", units: int = 1) -> None:
        """More units done; `note` stands at the end of the line. Threads may share it."""
        with self._counting:
            before, self._done = self._done, self._done + units
            if self._bar is not None:
                self._bar.update(self._task, advance=units, note=note)
            elif self._cell is not None:
                self._update(note)
            elif before // self._every < self._done // self._every or self._done == self._total:
                self._say(note)

    def _say(self, note: str) -> None:
        console.print(self._words(note))

    def _update(self, note: str) -> None:
        """In place, at most ten times a second: each is a message to the browser."""
        if self._done == self._total or time.monotonic() - self._told > 0.1:
            self._told = time.monotonic()
            self._cell.update(self._in_html(note), raw=True)

    def _in_html(self, note: str) -> dict[str, str]:
        words = visible(self._words(note))
        bar = f'<progress value="{self._done}" max="{self._total}"></progress>'
        return {"text/plain": words, "text/html": f"{bar} <code>{html.escape(words)}</code>"}

    def _words(self, note: str) -> str:
        return f"{self._title} {self._done}/{self._total} {self._unit}  {note}".rstrip()
