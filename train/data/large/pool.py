"""Rows of a large file, tokenised by several processes and given in their order."""

import contextlib
import pickle
import queue
import subprocess
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from jllama.cli import children
from jllama.errors import InputError
from jllama.text.row_file import Rows
from jllama.text.rows import Part, Rendering

CHUNK = 2_000  # rows that a process is given at a time


class _Worker:
    """A child that runs `train.data.large.worker`."""

    def __init__(self, setup: tuple[str | Path, str, Rendering]):
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(
            children.command("train.data.large.worker", ()), stdin=pipe, stdout=pipe
        )
        self._say(setup)

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        with self._child, contextlib.suppress(BrokenPipeError):
            assert self._child.stdin
            self._child.stdin.close()

    def _say(self, value: object) -> None:
        assert self._child.stdin
        with contextlib.suppress(BrokenPipeError):  # it ended; its answer will be missing
            pickle.dump(value, self._child.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._child.stdin.flush()

    def part(self, rows: Rows) -> Part:
        """What becomes of some rows; InputError if the process ended."""
        self._say(rows)
        assert self._child.stdout
        try:
            return pickle.load(self._child.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise InputError(
                f"a process that tokenised rows from {rows.first} on ended with code "
                f"{self._child.wait()}; its words, if any, are above. Is there memory left?"
            ) from None


def parts_of(
    rows: Rows, model: str | Path, template: str, rendering: Rendering, processes: int
) -> Iterator[Part]:
    """Parts of `CHUNK` rows, one after the other.

    Args:
        model: folder with the tokenizer.
        template: as for `load_tokenizer`.

    Raises:
        InputError: if a process ends before its time.
    """
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def part(start: int) -> Part:
        worker = idle.get()
        try:
            return worker.part(rows.part(start, start + CHUNK))
        finally:
            idle.put(worker)

    with contextlib.ExitStack() as stack:
        pool = ThreadPoolExecutor(processes)
        stack.callback(pool.shutdown, cancel_futures=True)
        for _ in range(processes):  # they end before the threads that wait for them
            idle.put(stack.enter_context(_Worker((model, template, rendering))))
        asked: deque[Future[Part]] = deque()
        for start in range(0, len(rows), CHUNK):
            asked.append(pool.submit(part, start))
            if len(asked) > 2 * processes:
                yield asked.popleft().result()
        while asked:
            yield asked.popleft().result()
