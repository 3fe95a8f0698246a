"""One process that fails, dies or hangs ends all of them, with its reason.

A thread of each process says twice a second that it is there and what it does, and reads what the
others say. What the main thread does meanwhile may be a step that waits for a process that has gone
and never returns.
"""

import atexit
import contextlib
import json
import signal
import threading
import time
from typing import Any, NamedTuple

from jax.errors import JaxRuntimeError

from jllama.cli.command import ending
from jllama.cli.terminal import complain, leave

SILENT_SECONDS = 20  # after which a process that says nothing is taken for dead
_EVERY = 0.5  # seconds between two looks
_TOLD = 5  # seconds that process 0, which keeps the words of all, waits for the others to read them


class _Beat(NamedTuple):
    """What a process says of itself: how often it has, and what it began last."""

    beats: int
    marks: int
    doing: str
    peak_mib: float
    where: str


class _Seen(NamedTuple):
    """What was last heard of a process, and when it last spoke, began something, was not behind."""

    beat: _Beat
    spoke: float
    began: float
    level: float


class Watch:
    """Begins when it is made, ends with `stop`, or with the process.

    Args:
        client: of JAX's coordinator, which keeps texts by keys.
        where: host and process, as people look for it.
        hang: seconds that a process may stay behind the others, or all of them in one step.
    """

    def __init__(self, client: Any, number: int, count: int, where: str, hang: int):
        self._client, self._number, self._count, self._where = client, number, count, where
        self._hang = hang
        self._marks, self._doing, self._peak_mib = 0, "the start", 0.0
        self._in_step, self._marked, self._longest_step = False, time.monotonic(), 0.0
        self._beats, self._looked = 0, time.monotonic()
        self._seen: dict[int, _Seen] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def peak_mib(self) -> float:
        """The largest that a process told."""
        return max((seen.beat.peak_mib for seen in self._seen.values()), default=0.0)

    def mark(self, doing: str, peak_mib: float = 0.0, step: bool = False) -> None:
        """What this process begins, and the peak of its memory until then."""
        now = time.monotonic()
        if self._in_step:
            self._longest_step = max(self._longest_step, now - self._marked)
        self._in_step, self._marked = step, now
        self._doing, self._peak_mib = doing, max(peak_mib, self._peak_mib)
        self._marks += 1

    def exchange(self, room: str, words: str) -> list[str]:
        """What each process gave in a room, by their numbers, when all have."""
        self._give(room, words)
        while len(found := self._given(room)) < self._count:
            time.sleep(0.05)
        return [found[number] for number in range(self._count)]

    def _give(self, room: str, words: str) -> None:
        key = f"jllama/{room}/{self._number}"
        self._client.key_value_set(key, words, allow_overwrite=True)

    def _given(self, room: str) -> dict[int, str]:
        pairs = self._client.key_value_dir_get(f"jllama/{room}/")
        return {int(key.rpartition("/")[2]): words for key, words in pairs}

    def _run(self) -> None:
        while not self._stopped.wait(_EVERY):
            try:
                self._look()
            except JaxRuntimeError:
                if not self._stopped.wait(_EVERY):
                    self._end(2, f"process 0 of {self._count} does not answer any more")
            self._judge()

    def _look(self) -> None:
        """Speaks, and hears what the others say."""
        now = time.monotonic()
        slept, self._looked = now - self._looked > SILENT_SECONDS / 2, now
        self._beats += 1
        mine = _Beat(self._beats, self._marks, self._doing, self._peak_mib, self._where)
        self._give("beats", json.dumps(mine))
        said = {n: _Beat(*json.loads(words)) for n, words in self._given("beats").items()}
        furthest = max(beat.marks for beat in said.values())
        for number, beat in said.items():
            before = self._seen.get(number)
            if before is None or slept:
                self._seen[number] = _Seen(beat, now, now, now)
                continue
            spoke = before.spoke if beat.beats == before.beat.beats else now
            began = before.began if beat.marks == before.beat.marks else now
            level = before.level if beat.marks < furthest else now
            self._seen[number] = _Seen(beat, spoke, began, level)
        for number, words in self._given("ends").items():
            if number != self._number:
                code, reason = json.loads(words)
                self._end(code, reason)

    def _judge(self) -> None:
        """Ends this process if another one has died, or if one hangs."""
        # What is no step may take long: the weights of one may come from a slower disk.
        limit = max(self._hang, 20 * self._longest_step) if self._longest_step else 6 * self._hang
        idle = []
        for number, (beat, spoke, began, level) in self._seen.items():
            if self._looked - spoke > SILENT_SECONDS:
                silent = f"has not been heard of for {SILENT_SECONDS} s: killed, or its machine is"
                self._end(2, f"{self._name(number)} {silent} gone")
            if self._looked - began > limit:
                idle.append(number)
            # One that waited long for the others is not behind as soon as they have come.
            if self._looked - max(began, level) > limit:
                self._end(2, f"{self._name(number)} hangs: {limit:.0f} s in {beat.doing}")
        if self._in_step and len(idle) == self._count:
            self._end(2, f"no process has ended {self._doing} for {limit:.0f} s")

    def _name(self, number: int) -> str:
        where = f" ({self._seen[number].beat.where})" if number in self._seen else ""
        return f"process {number} of {self._count}{where}"

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def failed(self, error: BaseException) -> None:
        """Tells the others why this process ends, and has it end without waiting for them.

        The error may be of a step that another process has left: then that one's reason comes.
        """
        if self._stopped.is_set():
            return
        code, reason = _reason(error)
        if isinstance(error, RuntimeError | ValueError):
            time.sleep(SILENT_SECONDS + 4 * _EVERY)
        self.stop()
        self._tell(code, f"{self._name(self._number)}: {reason}")
        atexit.register(leave, code)  # before JAX's, which waits for the others

    def _tell(self, code: int, reason: str) -> None:
        with contextlib.suppress(JaxRuntimeError):  # nobody is there to be told
            self._give("ends", json.dumps([code, reason]))
            until = time.monotonic() + _TOLD
            while self._number == 0 and time.monotonic() < until:
                if len(self._given("ends")) == self._count:
                    break
                time.sleep(_EVERY / 10)

    def _end(self, code: int, reason: str) -> None:
        """Ends this process, whatever its main thread waits for."""
        if self._stopped.is_set():
            return
        if self._number == 0:
            complain(f"jllama train: {reason}")
        self._tell(code, reason)
        leave(code)

    def stop(self) -> None:
        """From now on this process ends by itself."""
        self._stopped.set()
        self._thread.join()


def _reason(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and its words for others."""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return code, signal.Signals(code - 128).name if code > 128 else f"ended with {code}"
    first = str(error).partition("\n")[0][:500]
    return ending(error) or (1, f"{type(error).__name__}: {first}")
