"""Faults at a chosen moment of a command that writes: at its n-th change of the file system.

Python tells an audit hook of every file that is opened and every name that is made, changed or
removed, before it happens. A hook cannot be taken away, so all of this is for forked processes.
What native code writes (Orbax's arrays) is met by `seconds` and by a limit on the size of files.
"""

import contextlib
import errno
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# What may be set off. Where the fault is:
Kind = Literal[
    "kill",  # SIGKILL before the n-th change
    "torn",  # SIGKILL when the n-th file is open to be written, and empty if it is new
    "seconds",  # SIGKILL after n seconds
    "SIGTERM",  # before the n-th change; a run finishes its step
    "SIGINT",
    "full disk",  # from the n-th change on, nothing can be written
    "file size",  # no file can be longer than n bytes
]
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink",
            "os.truncate")  # fmt: skip
_NEEDS_ROOM = ("os.mkdir", "os.link", "os.symlink")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Fault:
    """A fault, and its moment: `at` counts changes from 1, or seconds, or bytes."""

    kind: Kind
    at: float

    @property
    def kills(self) -> bool:
        return self.kind in ("kill", "torn", "seconds")


@dataclass
class Changes:
    """What a command changed: how often in all, and how many files it opened to write."""

    changes: int = 0
    files: int = 0
    largest: int = 0


def with_fault(
    function: Callable[[], None], folder: Path, fault: Fault | None = None, tell: Any = None
) -> Callable[[], None]:
    """The function, with the fault in it, to be called in a forked process.

    Args:
        folder: only what happens in it is counted.
        tell: an end of a pipe; gets the `Changes` when the function has ended.
    """

    def call() -> None:
        seen = Changes()
        if fault and fault.kind == "file size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(fault.at), resource.RLIM_INFINITY))
        sys.addaudithook(_hook(os.fspath(folder) + os.sep, fault, seen))
        try:
            function()
        finally:
            if tell is not None:
                sizes = [x.stat().st_size for x in folder.rglob("*") if x.is_file()]
                seen.largest = max(sizes, default=0)
                tell.send(seen)

    return call


def _hook(inside: str, fault: Fault | None, seen: Changes) -> Callable[[str, Any], None]:
    kind, at = (fault.kind, fault.at) if fault else ("", 0)
    busy = False  # what is done here is no change of the command's

    def hook(event: str, arguments: Any) -> None:
        nonlocal busy
        if busy or not (event in _CHANGES or event == "open"):
            return
        if event == "open" and not (arguments[2] or 0) & _WRITES:
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        busy = True
        try:
            whole = os.path.abspath(os.fsdecode(path))
            if not whole.startswith(inside):
                return
            seen.changes += 1
            seen.files += event == "open"
            if kind == "torn" and event == "open" and seen.files == at:
                with contextlib.suppress(OSError):
                    os.open(whole, arguments[2])
                os.kill(os.getpid(), signal.SIGKILL)
            if seen.changes == at and kind in ("kill", "SIGTERM", "SIGINT"):
                os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.Signals[kind])
            if kind == "full disk" and seen.changes >= at and event in ("open", *_NEEDS_ROOM):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), whole)
        finally:
            busy = False

    return hook
