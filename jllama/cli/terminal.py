"""What people read on a terminal: one console, progress, and commands that can be pasted."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

# Where commands print. Its lines stay whole: what reads them may be a file or a program.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

# A terminal obeys control characters; text from files and models is shown with pictures of them.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
_PICTURES |= dict.fromkeys(range(128, 160), 0xFFFD)


def visible(text: str) -> str:
    """Foreign text for a terminal: control characters become pictures, but for tabs and lines."""
    return text.translate(_PICTURES)


def command_line(*words: object) -> str:
    """`jllama train --model 'my model'`: a command of ours as a shell takes it."""
    return shlex.join(["jllama", *map(str, words)])


@contextlib.contextmanager
def silent_if_nobody_reads() -> Iterator[None]:
    """Ends the process without a word where the reader of its output has gone (`| head`)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more when it ends
        sys.exit(141)  # as a shell says of SIGPIPE


class Progress:
    """A bar with rate and remaining time on a terminal, a plain line now and then elsewhere."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0):
        self._title, self._total, self._unit = title, total, unit
        self._every = max(1, total // 10)
        self._done = done
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=None),
                progress.MofNCompleteColumn(),
                progress.TextColumn(self._unit),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self._title, total=self._total, completed=self._done, note=""
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, note: str = "") -> None:
        """One unit done; `note` stands at the end of the line."""
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, note=note)
        elif self._done % self._every == 0 or self._done == self._total:
            print(f"{self._title} {self._done}/{self._total} {self._unit}  {note}".rstrip())
