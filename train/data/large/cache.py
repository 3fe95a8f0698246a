"""Tokenised rows on disk: a folder for each set of files and settings, in the user's cache.

    ~/.cache/jllama/rows/3f9a.../
        ids, learned, each     the arrays of `Part`, mapped into memory
        head.json              their types, sizes and check sums; problems, notes, rows of each file

A folder has its name only when it is whole. Any of them may be deleted at any time.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike

from jllama.cli.terminal import console
from jllama.errors import InputError
from jllama.folders.manifest import read_sealed, write_sealed
from jllama.machine import user_cache
from jllama.text.rows import Examples, Part

LIMIT = 20 * 2**30  # bytes that are kept; what was not used for longest goes first
_HEAD = "head.json"
_BLOCK = 2**22
_SMALL_IDS = 2**16


@dataclass(frozen=True)
class Tokenised:
    """What becomes of the rows of some files.

    Args:
        problems: of unusable rows, with their places.
        counts: of the rows of each file or folder that was named.
    """

    examples: Examples
    problems: list[str]
    counts: list[int]


def cached(key: Mapping[str, Any], make: Callable[[Path | None], Tokenised]) -> Tokenised:
    """What is stored for a key, or what `make` makes, in a folder that is stored then.

    Where nothing can be stored, `make` is called without a folder, and a note says why.

    Args:
        key: all that the rows' ids depend on.
        make: takes an empty folder for `gathered`, or None.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    try:
        home = user_cache("rows")
        if (stored := _read(home / name)) is not None:
            return stored
        with _alone(home / f".{name}.partial") as partial:
            if (stored := _read(home / name)) is not None:  # another process made it meanwhile
                return stored
            made = make(partial)
            if (partial / _HEAD).exists():
                shutil.rmtree(home / name, ignore_errors=True)  # a damaged one
                partial.replace(home / name)
                with contextlib.suppress(OSError):  # another process tidies, too
                    _tidy(home, name)
            return made
    except OSError as error:
        console.print(f"note: tokenised rows are not kept for the next start ({error})")
    return make(None)


def gathered(
    folder: Path | None, parts: Iterable[Part], vocab_size: int
) -> tuple[Examples, list[tuple[int, str]]]:
    """Joins parts as they come, in files that are then mapped into memory, or in memory."""
    dtypes = _dtypes(np.uint16 if vocab_size <= _SMALL_IDS else np.int32)
    problems: list[tuple[int, str]] = []
    notes: dict[str, array[int]] = {}
    with contextlib.ExitStack() as stack:
        files: dict[str, IO[bytes]] = {
            name: BytesIO() if folder is None else stack.enter_context((folder / name).open("wb"))
            for name in dtypes
        }
        for part in parts:
            for name, file in files.items():
                file.write(getattr(part, name).astype(dtypes[name], copy=False).data)
            problems += part.problems
            for note, rows in part.notes.items():
                notes.setdefault(note, array("i")).extend(rows)
        memory = {n: f.getbuffer() for n, f in files.items() if isinstance(f, BytesIO)}
    arrays = {
        name: np.frombuffer(memory[name], dtype)
        if folder is None
        else _mapped(folder / name, dtype)
        for name, dtype in dtypes.items()
    }
    return dataclasses.replace(_examples(arrays), notes=notes), problems


def write_head(folder: Path, made: Tokenised) -> None:
    """Certifies what `gathered` has put into a folder: without it nothing is stored."""
    files = {
        file.name: {"bytes": file.stat().st_size, "crc32": _crc32(file)}
        for file in sorted(folder.iterdir())
    }
    notes = {note: list(rows) for note, rows in made.examples.notes.items()}
    write_sealed(folder / _HEAD, {
        "ids": made.examples.ids.dtype.name, "files": files, "notes": notes,
        "problems": made.problems, "counts": made.counts,
    })  # fmt: skip


def _read(folder: Path) -> Tokenised | None:
    """What a folder holds; None if it is not there, or damaged."""
    try:
        head = read_sealed(folder / _HEAD, "")
        for name, facts in head["files"].items():
            file = folder / name
            if file.stat().st_size != facts["bytes"] or _crc32(file) != facts["crc32"]:
                return None
        os.utime(folder)  # it was used
        dtypes = _dtypes(head["ids"])
        arrays = {name: _mapped(folder / name, dtype) for name, dtype in dtypes.items()}
    except (OSError, InputError):
        return None
    examples = dataclasses.replace(_examples(arrays), notes=head["notes"])
    return Tokenised(examples, head["problems"], head["counts"])


def _dtypes(ids: DTypeLike) -> dict[str, np.dtype]:
    """Of the arrays, by the name of their file."""
    return {"ids": np.dtype(ids), "learned": np.dtype(bool), "each": np.dtype(np.int32)}


def _examples(arrays: Mapping[str, np.ndarray]) -> Examples:
    return Examples.flat(arrays["ids"], arrays["learned"], arrays["each"].reshape(-1, 5))


def _mapped(file: Path, dtype: np.dtype) -> np.ndarray:
    if not file.stat().st_size:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(file, dtype, mode="r"))


def _crc32(file: Path) -> str:
    found = 0
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            found = zlib.crc32(block, found)
    return f"{found:08x}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """An empty folder that no other process writes into; it waits for one that does.

    The kernel drops the lock of a process that dies. What is left in it at the end is removed.
    """
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        number = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(number), folder.stat()):  # not renamed meanwhile
                break
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(number)
            raise
        os.close(number)
    try:
        for file in folder.iterdir():
            file.unlink()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(number)


def _tidy(home: Path, kept: str) -> None:
    """Removes what ended processes left, and then the oldest folders beyond the limit."""
    total = 0
    newest = sorted(home.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in newest:
        if folder.name.startswith("."):
            number = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(BlockingIOError):  # it is being written
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            os.close(number)
            continue
        total += sum(file.stat().st_size for file in folder.iterdir())
        if total > LIMIT and folder.name != kept:
            shutil.rmtree(folder, ignore_errors=True)
