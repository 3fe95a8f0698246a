"""Child processes that run this project's own modules, whatever lies in the working directory."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from jllama.errors import InputError

_CHILD = Path(__file__).with_name("child.py")


class Done(NamedTuple):
    """An ended process: its code (negative: the signal that killed it) and its words."""

    code: int
    output: str
    errors: str

    @property
    def reason(self) -> str:
        """Its error, the first line of it, else the last thing that it said."""
        said = self.errors.strip().splitlines() or ["no message"]
        traces = [n for n, line in enumerate(said) if line.startswith("Traceback (most recent")]
        frames = said[traces[-1] + 1 :] if traces else []
        return next((line for line in frames if not line.startswith(" ")), said[-1])[:500]


def command(module: str, arguments: Sequence[object]) -> list[str]:
    """How to run `python -m module arguments` in a child that ends when the caller's thread does.

    Elsewhere than on Linux a child outlives a parent that is killed by SIGKILL.
    """
    words = [sys.executable, "-P", _CHILD, os.getpid(), module, *arguments]
    return [str(word) for word in words]


@dataclass
class Children:
    """Silent child processes, which can be ended together."""

    running: set[subprocess.Popen] = field(default_factory=set)
    stopped: bool = False
    starting: threading.Lock = field(default_factory=threading.Lock)

    def run(
        self,
        module: str,
        arguments: Sequence[object],
        *,
        given: bytes = b"",
        environment: Mapping[str, str] | None = None,
        heard: Callable[[str], None] | None = None,
    ) -> Done:
        """Runs a module to its end.

        Args:
            given: its standard input, read before it says anything.
            environment: in place of this process's.
            heard: called with each line of its output as it comes.

        Raises:
            InputError: if `stop` was called.
        """
        pipe = subprocess.PIPE
        with self.starting:
            if self.stopped:
                raise InputError("stopped")
            child = subprocess.Popen(
                command(module, arguments), stdin=pipe, stdout=pipe, stderr=pipe, env=environment
            )
            self.running.add(child)
        try:
            output, errors = _communicate(child, given, heard)
        finally:
            self.running.discard(child)
        return Done(child.returncode, output, errors)

    def stop(self) -> None:
        """Kills all of them; theirs end with them."""
        with self.starting:  # no child is between being started and being known
            self.stopped = True
            for child in list(self.running):
                child.kill()


def _communicate(
    child: subprocess.Popen, given: bytes, heard: Callable[[str], None] | None
) -> tuple[str, str]:
    """`Popen.communicate`, which tells each line as it comes, and kills the child if it fails."""
    assert child.stdin
    assert child.stdout
    assert child.stderr
    lines = []
    with child, ThreadPoolExecutor(1) as pool:
        try:
            errors = pool.submit(child.stderr.read)
            with contextlib.suppress(BrokenPipeError):  # it ended before it had read
                child.stdin.write(given)
                child.stdin.close()
            for line in child.stdout:
                lines.append(line.decode(errors="replace"))  # of any locale
                if heard:
                    heard(lines[-1])
            return "".join(lines), errors.result().decode(errors="replace")
        except BaseException:
            child.kill()
            raise


def run(module: str, arguments: Sequence[object]) -> str:
    """Runs a module to its end, in silence; gives its output.

    Raises:
        InputError: with its last words, if it fails.
    """
    done = Children().run(module, arguments)
    if done.code:
        words = " ".join(map(str, arguments))
        raise InputError(f"{module} {words} failed:\n{done.errors.strip()[-2000:]}")
    return done.output
