"""Folders that are written whole or not at all, by one process, where there is room."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from jllama.errors import InputError
from jllama.folders.json_files import read_json, write_json

# Config, tokenizer and Orbax's index: small beside any model.
_OVERHEAD = 16 * 2**20
_ORIGIN = ".origin.json"


@contextlib.contextmanager
def whole_folder(destination: str | Path, origin: Mapping | None = None) -> Iterator[Path]:
    """A temporary folder that takes its final name when the body succeeds, else vanishes.

    All of it is on the disk before it has its name.

    Args:
        origin: JSON that says what the folder is made from. An interrupted or killed body then
            leaves the temporary folder, and a later call with the same origin yields it again,
            with all that was written.

    Raises:
        InputError: if the destination exists and is not an empty folder, or another process is
            writing it.
    """
    destination = Path(destination)
    _refuse_existing(destination)
    partial = _partial(destination)
    partial.mkdir(parents=True, exist_ok=True)
    busy = f"{destination} is being written by another process; wait for it, or choose another name"
    with held(partial, busy):
        _refuse_existing(destination)
        _start_or_continue(partial, origin)
        try:
            yield partial
            (partial / _ORIGIN).unlink(missing_ok=True)
            for path in (*partial.rglob("*"), partial):
                _sync(path)  # else a power cut could leave the final name with empty files
            partial.replace(destination)
            _sync(destination.parent)
        except BaseException as error:
            if origin is None or isinstance(error, Exception):  # not Ctrl-C
                shutil.rmtree(partial, ignore_errors=True)
            raise


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def bytes_begun(destination: Path) -> int:
    """How many bytes an interrupted `whole_folder` has left for the next call."""
    partial = _partial(destination)
    return sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())


def _partial(destination: Path) -> Path:
    return destination.parent / f".{destination.name}.partial"


def _refuse_existing(destination: Path) -> None:
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"{destination} exists; remove it or choose another name")


@contextlib.contextmanager
def held(path: Path, refusal: str) -> Iterator[None]:
    """Holds a file or folder for one process. The kernel drops the lock of a process that dies.

    Raises:
        InputError: `refusal`, if another process holds it, or it is no longer there.
    """
    number = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The last holder may have renamed it between our opening and locking it.
            ours = os.path.samestat(os.fstat(number), path.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise InputError(refusal)
        yield
    finally:
        os.close(number)


def _start_or_continue(partial: Path, origin: Mapping | None) -> None:
    """Empties the folder unless it was begun from the same origin."""
    file = partial / _ORIGIN
    with contextlib.suppress(InputError):
        if origin is not None and read_json(file) == origin:
            return
    for entry in partial.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if origin is not None:
        write_json(file, origin)


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
