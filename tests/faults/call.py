"""A command called in a forked process or in this one, and what it did: its end, words, orphans."""

import contextlib
import ctypes
import io
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of Linux
FORK = multiprocessing.get_context("fork")  # what is imported need not be imported again
MEMORY = 6 * 2**30  # bytes of addresses for a command that reads; an endless file takes all
_HERE, _REPOSITORY = str(Path(__file__).parent), str(Path(__file__).parents[2])


@dataclass
class Call:
    """How a command ended.

    Args:
        code: its exit code; negative for the signal that killed it.
        words: what it said, its messages after its output.
        errors: its messages, where they are known apart.
        raised: the exception that it ended with, and where that was raised; else empty.
        hung: whether it was still running at its time limit.
        orphans: processes of it that lived on.
    """

    code: int
    words: str
    errors: str = ""
    raised: str = ""
    seconds: float = 0.0
    hung: bool = False
    orphans: int = 0
    result: Any = field(default=None, repr=False)


def adopt_orphans() -> None:
    """Processes whose parent has ended become children of this one, which can then count them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def begin_child() -> None:
    """Has the kernel kill this process when the thread that forked it ends; takes usual signals."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def in_fork(
    function: Callable[[], None],
    place: Path,
    *,
    limit: float,
    kill_after: float | None = None,
) -> Call:
    """Calls a function in a process of its own.

    Args:
        place: an existing folder; what the process says is kept in a file of it for a moment.
        limit: seconds after which it counts as hung.
        kill_after: seconds after which it is killed.
    """
    log = place / ".words"
    process = FORK.Process(target=_child, args=(function, log))
    started = time.monotonic()
    process.start()
    process.join(limit if kill_after is None else kill_after)
    hung = kill_after is None and process.is_alive()
    process.kill()
    process.join()
    seconds = time.monotonic() - started
    words = log.read_text(errors="replace") if log.exists() else ""
    log.unlink(missing_ok=True)
    code = process.exitcode or 0
    process.close()
    return Call(code, words, words, _last_raised(words), seconds, hung, _end_orphans())


def _child(function: Callable[[], None], log: Path) -> None:
    begin_child()
    number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(number, 1)
    os.dup2(number, 2)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    function()


def _end_orphans() -> int:
    """Counts processes that a dead child has left, once they had a second to end; ends them."""
    deadline = time.monotonic() + 1
    while (left := children()) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, os.WNOHANG)
        time.sleep(0.01)
    for process in left:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return len(left)


def children() -> list[int]:
    """The processes that are this one's."""
    lists = Path("/proc/self/task").glob("*/children")
    return [int(number) for each in lists for number in each.read_text().split()]


def in_process(main: Callable[[list[str]], None], argv: list[str], given: bytes = b"") -> Call:
    """Calls a command's `main` here, its output and messages caught.

    Args:
        given: its standard input.
    """
    out, err = io.StringIO(), io.StringIO()
    stdin, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(given))
    code, raised, started = 0, "", time.monotonic()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(argv)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:  # tiktoken's panics are none of Exception
        code, raised = 1, _raised(error)
    finally:
        sys.stdin = stdin
    errors = err.getvalue()
    seconds = time.monotonic() - started
    return Call(code, out.getvalue() + errors, errors, raised or _last_raised(errors), seconds)


def _raised(error: BaseException) -> str:
    """ValueError: what was wrong (jllama/config.py:12)"""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(_REPOSITORY)]
    ours = [frame for frame in ours if not frame.filename.startswith(_HERE)] or frames
    file = ours[-1].filename.removeprefix(f"{_REPOSITORY}/")
    return f"{type(error).__name__}: {str(error)[:150]!r} ({file}:{ours[-1].lineno})"


def _last_raised(words: str) -> str:
    """The last line of a traceback that stands in some words, and the last place in our files."""
    if "Traceback (most recent call last)" not in words:
        return ""
    lines = words.rstrip().splitlines()
    places = [line for line in lines if line.lstrip().startswith(f'File "{_REPOSITORY}/')]
    ours = [line for line in places if _HERE not in line]
    place = (ours or [""])[-1].strip().replace(f"{_REPOSITORY}/", "")
    return f"{lines[-1][:150]} ({place})"


class Watched:
    """A forked process that calls a function for one case after the other, with a limit for each.

    Args:
        function: gives a `Call` for a case.
        good: a case without a fault. Every process begins with it, for it compiles.
        limit: seconds for one case, and ten times of it for the good one.
        lives: cases after which another process takes over; JAX keeps what it has compiled.
    """

    def __init__(self, function: Callable[[Any], Call], good: Any, limit: float, lives: int = 250):
        self._function, self._good, self._limit, self._lives = function, good, limit, lives

    def run(self, cases: Iterable[Any]) -> Iterator[tuple[Any, Call]]:
        """The good case, then each case, and their calls; one that hung or died has no words.

        Raises:
            RuntimeError: if the good case fails.
        """
        first = True
        process, used = None, 0
        try:
            for case in cases:
                if process is None or used >= self._lives:
                    self._end(process)
                    here, there = FORK.Pipe()
                    process, used = FORK.Process(target=self._serve, args=(there,)), 0
                    process.start()
                    there.close()
                    here.send(self._good)
                    good = here.recv() if here.poll(10 * self._limit) else Call(1, "")
                    if good.code or good.raised:
                        raise RuntimeError(f"the command fails by itself: {good}")
                    if first:
                        yield self._good, good
                    first = False
                used += 1
                started = time.monotonic()
                here.send(case)
                try:
                    if here.poll(self._limit):
                        yield case, here.recv()
                        continue
                    call = Call(-signal.SIGKILL, "", hung=True)
                except (EOFError, ConnectionResetError):
                    process.join()
                    call = Call(process.exitcode or 0, "")
                call.seconds = time.monotonic() - started
                self._end(process)
                process, call.orphans = None, _end_orphans()
                yield case, call
        finally:
            self._end(process)

    @staticmethod
    def _end(process: Any) -> None:
        if process is not None:
            process.kill()
            process.join()

    def _serve(self, there: Any) -> None:
        begin_child()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what C++ libraries say
        with contextlib.suppress(EOFError):
            while True:
                there.send(self._function(there.recv()))
