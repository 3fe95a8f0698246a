"""Figures and where they come from: every number of a report names a file and a place in it.

    0.5022   metrics.jsonl, line 12, epoch_loss
    0.12     percent of (run.json, parameters, trainable) and (run.json, parameters, total)

Nothing here computes a figure from anything but such places, by one of `OPERATIONS`.
"""

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.ablate.store import ADVICE, DESCRIPTION
from jllama.cli.settings import read_yaml
from jllama.folders.json_files import read_json, read_json_lines
from jllama.folders.manifest import read_sealed
from jllama.folders.run import GENERATIONS, HARNESS, RECORD, SCORES, read_generations

# Files that carry their own hash, and what to do about a damaged one.
SEALED = {
    RECORD: "its run cannot be vouched for",
    SCORES: "make it again with: jllama score",
    HARNESS: "make it again with: jllama harness",
    DESCRIPTION: ADVICE,
}
Tone = Literal["", "better", "worse"]
EVERY = "*"  # in a path: all lines of a file that have the field


def repetition(ids: Sequence[int], length: int = 4) -> float:
    """Percent of the runs of `length` tokens that stood in the text before.

    1 2 3 4 1 2 3 4  ->  1 of 5 runs, 20 %
    """
    runs = [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]
    return 100 * (1 - len(set(runs)) / len(runs)) if runs else 0.0


OPERATIONS: Mapping[str, Callable[..., float]] = {
    "percent": lambda part, whole: 100 * part / whole,
    "difference": lambda a, *others: a - sum(others),
    "change in percent": lambda before, after: 100 * (after - before) / before,
    "hundredfold": lambda share: 100 * share,
    "MiB": lambda size: size / 2**20,
    "sum": sum,
    "total": lambda *parts: sum(parts),
    "max": max,
    "mean": lambda *parts: statistics.mean(parts),
    "range": lambda *parts: max(parts) - min(parts),
    "median": statistics.median,
    "length": len,
    "repetition": repetition,
    "feed-forward biases": lambda layers, hidden, dim: layers * (2 * hidden + dim),
    "exact answers": lambda given, expected, stopped: sum(
        stop and a == b.strip() for a, b, stop in zip(given, expected, stopped, strict=True)
    ),
}


class Missing(Exception):  # it is no error: a report says what it lacks
    """Something that a report would show is not there; the text says what."""


@dataclass(frozen=True)
class Figure:
    """A number, how it is written, and where it stands or what it is computed from."""

    value: float
    text: str
    source: Mapping[str, Any]  # {"file", "path"} or {"operation", "of": [sources]}
    tone: Tone = ""  # its colour, beside a sign that says the same

    @property
    def origin(self) -> str:
        """In words: `percent of (run.json: parameters, trainable), (run.json: ...)`."""
        return _words(self.source)


def _words(source: Mapping[str, Any]) -> str:
    if "operation" in source:
        return f"{source['operation']} of {', '.join(f'({_words(x)})' for x in source['of'])}"
    file, path = source["file"], [str(step) for step in source["path"]]
    if file.endswith(".jsonl") and isinstance(source["path"][0], int):
        path[0] = f"line {source['path'][0] + 1}"
    return f"{file}: {', '.join(path)}"


class Evidence:
    """The files of a folder, read once; whatever is not there or no number is `Missing`.

    Args:
        folder: of a run, or of an ablation.
        shown_from: the folder that the files' names are relative to; by default the same.
    """

    def __init__(self, folder: Path, shown_from: Path | None = None):
        self.folder = folder
        self._shown_from = shown_from or folder
        self._read: dict[str, Any] = {}
        self.cut: list[str] = []  # files whose last line a kill has cut

    def content(self, file: str) -> Any:
        """A file's JSON or YAML, or the lines of a JSONL up to one that a kill has cut.

        Raises:
            Missing: if it is not there.
            InputError: if it is damaged.
        """
        if file not in self._read:
            path = self.folder / file
            if not path.is_file():
                raise Missing(f"{file} is not there")
            self._read[file], cut = _load(path)
            self.cut += [file] if cut else []
        return self._read[file]

    def has(self, file: str) -> bool:
        return (self.folder / file).is_file()

    def value(self, file: str, *path: Any) -> Any:
        """What stands at a place: path steps are keys and indices, or `EVERY`."""
        found, steps = self.content(file), list(path)
        if steps and steps[0] == EVERY:
            found = [line[steps[1]] for line in found if line.get(steps[1]) is not None]
            if not found:
                raise Missing(f"{file} has no {steps[1]}")
            return found
        for step in steps:
            try:
                found = found[step]
            except (KeyError, IndexError, TypeError):
                raise Missing(f"{file} has no {', '.join(map(str, path))}") from None
        return found

    def figure(self, file: str, *path: Any, form: str = ",.4g") -> Figure:
        """The number at a place."""
        return _figure(self.value(file, *path), self._source(file, path), form)

    def compute(self, operation: str, *places: tuple[Any, ...], form: str = ",.4g") -> Figure:
        """A number computed from places, each (file, *path)."""
        values = [self.value(*place) for place in places]
        result = _apply(operation, values)
        sources = [self._source(file, path) for file, *path in places]
        return _figure(result, {"operation": operation, "of": sources}, form)

    def _source(self, file: str, path: Sequence[Any]) -> dict[str, Any]:
        shown = os.path.relpath(self.folder / file, self._shown_from)
        return {"file": shown, "path": list(path)}


def combine(operation: str, *figures: Figure, form: str = ",.4g") -> Figure:
    """A number computed from other figures."""
    result = _apply(operation, [figure.value for figure in figures])
    sources = [figure.source for figure in figures]
    return _figure(result, {"operation": operation, "of": sources}, form)


def _apply(operation: str, values: Sequence[Any]) -> float:
    try:
        return OPERATIONS[operation](*values)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise Missing(f"no {operation} of {str(values)[:80]} ({error})") from None


def _figure(value: Any, source: Mapping[str, Any], form: str) -> Figure:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    if not usable or not math.isfinite(value):
        raise Missing(f"{_words(source)} is {str(value)[:40]!r}, which is no number")
    return Figure(value, format(value, form), source)


def _load(path: Path) -> tuple[Any, bool]:
    """A file's content, and whether its last line is cut."""
    if path.name in SEALED:
        return read_sealed(path, SEALED[path.name]), False
    if path.suffix == ".json":
        return read_json(path), False
    if path.name == GENERATIONS:
        return read_generations(path)
    if path.suffix == ".jsonl":
        return read_json_lines(path)
    return read_yaml(path), False
