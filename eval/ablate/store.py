"""The folder of an ablation: what it is, its cells and its trials, written one by one.

ablation.json    {"kind": "measured", "date": ..., "device": ..., "settings": {...}, ...}
cells.jsonl      one cell a line; the last line may be cut by a kill
accuracy.jsonl   likewise, one training of a method a line
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jllama.errors import InputError
from jllama.folders.files import held
from jllama.folders.json_files import NEW, as_line, naming, read_json_lines, write_json_lines
from jllama.folders.manifest import read_sealed, write_sealed

DESCRIPTION, CELLS, TRIALS = "ablation.json", "cells.jsonl", "accuracy.jsonl"
ADVICE = "restore it, or make the ablation anew"
# What may differ between the calls that fill a folder.
OF_A_CALL = ("date", "command")


@contextlib.contextmanager
def opened(
    folder: Path, description: Mapping[str, Any]
) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Holds a new or begun folder for this process, and yields the lines of its two files.

    Of a folder without cells and trials only the description is replaced.

    Raises:
        InputError: if it holds another ablation or something else, or another process fills it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"{folder} is being filled by another process; wait for it, or choose another --output"
    with held(folder, busy):
        described = (folder / DESCRIPTION).is_file()
        begun = folder / (DESCRIPTION + NEW)  # which a kill may leave
        if not described and any(path != begun for path in folder.iterdir()):
            raise InputError(f"{folder} holds something else; choose another --output")
        # What a kill has cut is measured again.
        lines = {name: read_json_lines(folder / name).values for name in (CELLS, TRIALS)}
        if described and any(lines.values()):
            refuse_another(folder, read_sealed(folder / DESCRIPTION, ADVICE), description)
        else:
            write_sealed(folder / DESCRIPTION, description)
        for name, values in lines.items():
            if values:
                write_json_lines(folder / name, values)  # without a line that was cut
        yield lines


def append(path: Path, figures: Mapping[str, Any]) -> None:
    """Adds a whole line."""
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(as_line(figures))


def refuse_another(folder: Path, found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuses to mix two ablations, and says in what they differ."""
    old, new = _flat(found), _flat(asked)
    differences = [
        f"{name} {old.get(name)} there, {new.get(name)} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differences:
        raise InputError(
            f"{folder} holds another ablation: {'; '.join(differences)}. "
            "Choose another --output, or remove it"
        )


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in description.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": x for inner, x in value.items()}
        elif name not in OF_A_CALL:
            flat[name] = value
    return flat
