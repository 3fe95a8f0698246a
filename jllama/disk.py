"""Room on the disk: asked for before writing, and named when it runs out on the way."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from jllama.errors import InputError

# Orbax's index, config and tokenizer: small beside any model.
_OVERHEAD = 16 * 2**20


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
