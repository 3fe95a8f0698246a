"""Files that others made: one that cannot be read ends in a message, whatever library reads it."""

import os
import stat
from pathlib import Path

from jllama.errors import InputError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_readable(path: str | Path, wanted: str) -> None:
    """Refuses what is no regular file, or cannot be opened.

    Reading a pipe waits for whoever writes it, perhaps for ever; and some libraries call every
    file that they cannot open missing.

    Args:
        wanted: what the file should be, for messages.

    Raises:
        InputError: says what is there instead, or why it cannot be read.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
        if kind == stat.S_IFREG:
            os.close(os.open(path, os.O_RDONLY))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected {wanted}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise unreadable(path, error, wanted) from error
    if kind != stat.S_IFREG:
        found = _KINDS.get(kind, "no file")
        raise InputError(f"{path}: is {found}; expected {wanted}, in a regular file")


def unreadable(path: str | Path, error: Exception, wanted: str) -> InputError:
    """The message for a file that is there and cannot be read."""
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{path}: {reason}; expected {wanted}")
