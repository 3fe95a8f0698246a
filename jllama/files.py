"""Files: written whole or not at all, JSON with the file's name in errors, and room on the disk."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from jllama.errors import InputError

# Orbax's index, config and tokenizer: small beside any model.
_OVERHEAD = 16 * 2**20


@contextlib.contextmanager
def whole_folder(destination: str | Path) -> Iterator[Path]:
    """A temporary folder that takes its final name when the body succeeds, else vanishes.

    Raises:
        InputError: if the destination exists and is not an empty folder.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"{destination} exists; remove it or choose another name")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.parent / f".{destination.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        yield partial
        if destination.exists():
            destination.rmdir()
        os.replace(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, content: object) -> None:
    """Indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_json_lines(path: Path, lines: Iterable[object]) -> None:
    """One JSON value a line; the file takes its name when it is whole."""
    whole = path.with_name(path.name + ".new")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    whole.write_text(text, encoding="utf-8")
    whole.replace(path)


def read_json(path: Path) -> dict:
    """The object in a JSON file; InputError with the file's name if it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


@contextlib.contextmanager
def room_for(size: int, folder: Path) -> Iterator[None]:
    """Sees that `size` bytes fit where `folder` is to be, before the body writes them and after.

    Raises:
        InputError: if they do not, or no longer did when writing failed; says how many are missing.
    """
    _refuse_if_short(size, folder)
    with shortage_named(size, folder):
        yield


@contextlib.contextmanager
def shortage_named(size: int, folder: Path) -> Iterator[None]:
    """Where the body fails to write `size` bytes and there is no room for them: says so.

    Raises:
        InputError: in that case; says how many bytes are missing.
    """
    try:
        yield
    except Exception:  # a full disk has a different face in each library
        _refuse_if_short(size, folder)
        raise


def _refuse_if_short(size: int, folder: Path) -> None:
    needed = size + _OVERHEAD
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{folder}: {needed - free:,} bytes are missing on this disk "
            f"({needed:,} needed, {free:,} free); make room or choose another folder"
        )
