"""What a caller of `Trainer` gives that no setting names: rows in memory, a loss, windows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jllama.errors import InputError
from jllama.folders.json_files import kind_of

Rows = Sequence[Mapping[str, Any]]


class Given(NamedTuple):
    """All of it; nothing where a command trains.

    Args:
        rows: by their setting (data, val_data), in files that the run folder takes.
        code: the names of a loss and of windows: {"loss": "smoothed"}.
        windows_sha256: of the first window, and of how many there are.
    """

    rows: Mapping[str, Path] = {}
    code: Mapping[str, str] = {}
    windows_sha256: str = ""


NOTHING_GIVEN = Given()


def is_rows(data: Any) -> bool:
    """Whether this is rows, and no names of files."""
    if isinstance(data, str | Path):
        return False
    return all(isinstance(row, Mapping) for row in data[:1]) and len(data) > 0


def name_of(code: Any) -> str:
    """How messages and run.json call a function or an object."""
    return getattr(code, "__qualname__", type(code).__qualname__)


def write_rows(rows: Rows, file: Path) -> Path:
    """A file of rows, one a line: what they are is known by its hash.

    Raises:
        InputError: with the number of a row that JSON has no words for.
    """
    with file.open("w", encoding="utf-8", errors="replace") as lines:
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise InputError(f"data: row {number} is {kind_of(row)}, expected an object")
            try:
                lines.write(json.dumps(dict(row), ensure_ascii=False) + "\n")
            except (TypeError, ValueError) as error:
                raise InputError(f"data: row {number} cannot be kept as JSON: {error}") from None
    return file
