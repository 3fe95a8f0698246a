"""Folders and files that are written whole or not at all, by one process, where there is room."""

import contextlib
import fcntl
import os
import shlex
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
        InputError: as `check_destination`, or if another process is writing the folder.
    """
    check_destination(destination)
    named, destination = Path(destination), _target(destination)
    partial = _partial(destination)
    partial.mkdir(parents=True, exist_ok=True)
    busy = f"{named} is being written by another process; wait for it, or choose another name"
    with held(partial, busy):
        check_destination(named)
        _start_or_continue(partial, origin)
        try:
            yield partial
            (partial / _ORIGIN).unlink(missing_ok=True)
            for path in (*partial.rglob("*"), partial):
                _sync(path)  # else a power cut could leave the final name with empty files
        except BaseException as error:
            if origin is None or isinstance(error, Exception):  # not Ctrl-C
                shutil.rmtree(partial, ignore_errors=True)
            raise
        try:
            partial.replace(destination)
        except OSError as error:
            raise InputError(
                f"{named} cannot take its name ({error.strerror}); it is complete, so give it one: "
                f"mv {shlex.quote(str(partial))} NAME"
            ) from error
        _sync(destination.parent)


@contextlib.contextmanager
def whole_file(destination: str | Path) -> Iterator[Path]:
    """The same for one large file: a temporary name, and nothing left behind by a body that fails.

    An interrupted or killed body leaves the temporary file, and a later call yields it again: to be
    compared with what it should hold, for nothing says what it was made from.

    Raises:
        InputError: as `check_new_file`, or if another process is writing the file.
    """
    check_new_file(destination)
    named, destination = Path(destination), _target(destination)
    partial = _partial(destination)
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.touch()
    busy = f"{named} is being written by another process; wait for it, or choose another name"
    with held(partial, busy):
        try:
            check_new_file(named)
            yield partial
            _sync(partial)
            check_new_file(named)  # another program may have made it meanwhile
            partial.replace(destination)
        except Exception:  # not Ctrl-C
            partial.unlink(missing_ok=True)
            raise
        _sync(destination.parent)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def bytes_begun(destination: Path) -> int:
    """How many bytes an interrupted `whole_folder` or `whole_file` has left for the next call."""
    partial = _partial(_target(destination))
    files = (partial, *partial.rglob("*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def _partial(destination: Path) -> Path:
    return destination.parent / f".{destination.name}.partial"


def _target(destination: str | Path) -> Path:
    """The folder that a name stands for: what it links to, or itself."""
    path = Path(destination)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_destination(path: str | Path) -> None:
    """Refuses a name that a new folder could not take when it is complete.

    A command asks before it reads or writes anything: it may work for hours until then.

    Raises:
        InputError: if something is there that is no empty folder, if what is there cannot be
            replaced (a mount point, the working directory), or nothing can be written beside it.
    """
    named = Path(path)
    if named.name in ("", ".."):
        raise InputError(f"{named} is no new folder; name one in it, such as {named / 'NAME'}")
    target = _followed(named)
    if target.exists():
        if not target.is_dir() or any(target.iterdir()):
            raise InputError(f"{named} exists; remove it or choose another name")
        here = target.samefile(Path.cwd())
        if here or _is_mount_point(target):
            kind = "the working directory" if here else "a mount point"
            raise InputError(
                f"{named} is {kind}, which a new folder cannot replace; name one in it, such as "
                f"{named / 'NAME'}"
            )
    partial = _partial(target)
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()) or partial.is_mount():
        raise InputError(
            f"{partial} is in the way: {named} is made under this name first, and it is no folder "
            "of its own; remove it"
        )
    _check_beside(named, target)


def check_new_file(path: str | Path) -> None:
    """Refuses a name that a new file could not take when it is complete; asked as early.

    Raises:
        InputError: if something is there, or nothing can be written beside it.
    """
    named = Path(path)
    target = _followed(named)
    if target.exists():
        raise InputError(f"{named} exists; remove it or choose another name")
    partial = _partial(target)
    if partial.is_symlink() or (partial.exists() and not partial.is_file()):
        raise InputError(
            f"{partial} is in the way: {named} is made under this name first, and it is no file "
            "of its own; remove it"
        )
    _check_beside(named, target)


def _followed(named: Path) -> Path:
    """What a name stands for; InputError if it links to where nothing can be made."""
    target = _target(named)
    if target.is_symlink():
        raise InputError(f"{named} is a link to itself; remove it or choose another name")
    if target != named and not target.parent.is_dir():
        raise InputError(
            f"{named} links to {target}, but there is no {target.parent}; make that folder (is "
            "its disk there?), or choose another name"
        )
    return target


def _check_beside(named: Path, target: Path) -> None:
    beside = _existing_parent(target)
    if not beside.is_dir() or not os.access(beside, os.W_OK | os.X_OK):
        raise InputError(f"{named} cannot be made: {beside} is no folder that may be written to")


def _is_mount_point(folder: Path) -> bool:
    """Also where a folder of the same disk is mounted, which only Linux's own table tells."""
    if folder.is_mount():
        return True
    path = os.path.realpath(folder)
    for letter in "\\ \t\n":  # written in octal there
        path = path.replace(letter, f"\\{ord(letter):03o}")
    with contextlib.suppress(OSError):
        table = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
        return path in {line.split(" ")[4] for line in table.splitlines()}
    return False


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


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
    """Empties the folder unless it was begun from the same origin, and all of it lies in it."""
    file = partial / _ORIGIN
    with contextlib.suppress(InputError):
        linked = any(path.is_symlink() for path in partial.rglob("*"))
        if origin is not None and not linked and read_json(file) == origin:
            return
    for entry in partial.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    if origin is not None:
        write_json(file, origin)


@contextlib.contextmanager
def room_for(size: int, folder: Path) -> Iterator[None]:
    """Sees that `size` bytes fit where `folder` is to be, before the body writes them and after.

    Raises:
        InputError: if they do not, or no longer did when writing failed; says how many are missing.
    """
    _refuse_if_short(size, folder)
    try:
        yield
    except Exception:  # a full disk has a different face in each library
        _refuse_if_short(size, folder)
        raise


def _refuse_if_short(size: int, folder: Path) -> None:
    needed = size + _OVERHEAD
    free = shutil.disk_usage(_existing_parent(_target(folder))).free
    if free < needed:
        raise InputError(
            f"{folder}: {needed - free:,} bytes are missing on this disk "
            f"({needed:,} needed, {free:,} free); make room or choose another folder"
        )
