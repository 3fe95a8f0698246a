"""Child processes that run this project's own modules, whatever lies in the working directory."""

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
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
        """The last thing it said."""
        return (self.errors.strip().splitlines() or ["no message"])[-1][:500]


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
    ) -> Done:
        """Runs a module to its end.

        Args:
            given: its standard input.
            environment: in place of this process's.

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
            output, errors = child.communicate(given)
        except BaseException:
            child.kill()
            raise
        finally:
            self.running.discard(child)
        return Done(child.returncode, output.decode(), errors.decode(errors="replace"))

    def stop(self) -> None:
        """Kills all of them; theirs end with them."""
        with self.starting:  # no child is between being started and being known
            self.stopped = True
            for child in list(self.running):
                child.kill()


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
