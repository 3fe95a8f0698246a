"""`jllama launch -n 4 -- train ...`: starts the processes of a run on this machine.

The screen is that of process 0. Of the others only the message of one that failed is shown.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Annotated

import tyro

from jllama.cli.children import command
from jllama.cli.command import run_command
from jllama.cli.terminal import complain
from jllama.errors import AtLeast0, AtLeast1, InputError, checked
from jllama.machine import visible_gpus
from train.processes.join import (
    COORDINATOR,
    COUNT,
    DEFAULT_SECONDS,
    HANG_SECONDS,
    JOIN_SECONDS,
    NUMBER,
)
from train.processes.watch import SILENT_SECONDS

GRACE_SECONDS = SILENT_SECONDS + 10  # for the others, when one has failed
SOON_SECONDS = 3
COMMANDS = ("train",)


@checked
class LaunchConfig:
    """Run a command as several processes: jllama launch -n 4 -- train --model ...

    On several machines run it on each one, with --hosts, --host and --coordinator. Under SLURM no
    launcher is needed: srun jllama train ...
    """

    processes: Annotated[AtLeast0, tyro.conf.arg(aliases=["-n"])] = 0
    """Processes on this machine; 0: one for each GPU."""
    hosts: AtLeast1 = 1
    """Machines, each with as many processes."""
    host: AtLeast0 = 0
    """Number of this machine, from 0."""
    coordinator: Annotated[str, tyro.conf.arg(metavar="HOST:PORT")] = ""
    """Where process 0 of machine 0 listens; needed with several machines."""
    join_seconds: AtLeast1 = DEFAULT_SECONDS[JOIN_SECONDS]
    """How long the processes wait for each other at the start."""
    hang_seconds: AtLeast1 = DEFAULT_SECONDS[HANG_SECONDS]
    """After how long a process that stays behind the others ends the run (or 20 times the longest
    step, if that is longer)."""

    def __post_init__(self):
        if self.host >= self.hosts:
            raise InputError(f"host {self.host} of {self.hosts}: machines are numbered from 0")
        if self.hosts > 1 and not self.coordinator:
            raise InputError("hosts above 1, but no coordinator HOST:PORT of machine 0")


class Group:
    """The processes on this machine.

    Args:
        environments: what each of them gets beside this process's environment.
    """

    def __init__(self, words: Sequence[str], environments: Sequence[Mapping[str, str]]):
        self._processes: list[subprocess.Popen] = []
        self._said: list[deque[bytes]] = []
        self._readers: list[threading.Thread] = []
        for more in environments:
            shown = more[NUMBER] == "0"
            # A session of its own: what a terminal sends to all would reach it twice.
            process = subprocess.Popen(
                command("jllama", words), env=os.environ | more, start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=None if shown else subprocess.DEVNULL,
                stderr=None if shown else subprocess.PIPE,
            )  # fmt: skip
            said: deque[bytes] = deque(maxlen=100)
            self._processes.append(process)
            self._said.append(said)
            if process.stderr:
                reader = threading.Thread(target=said.extend, args=(process.stderr,), daemon=True)
                reader.start()
                self._readers.append(reader)

    def send(self, number: int, *_: object) -> None:
        """A signal to all of them."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def first_to_fail(self) -> int | None:
        """The place of a process that failed before the others; None if all succeeded."""
        running = set(range(len(self._processes)))
        while running:
            for place in sorted(running):
                code = self._processes[place].poll()
                if code is not None:
                    running.remove(place)
                if code:
                    return place
            time.sleep(0.05)
        return None

    def wait(self, seconds: float) -> list[bool]:
        """Which have ended in time, or soon after the first one; the others are killed."""
        until = time.monotonic() + seconds
        while not all(ended := [process.poll() is not None for process in self._processes]):
            if ended[0]:  # it says why, and goes when the others know it
                until = min(until, time.monotonic() + SOON_SECONDS)
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
                break
            time.sleep(0.05)
        for process in self._processes:
            process.wait()
        return ended

    def code(self, place: int) -> int:
        """As a shell has it: 128 + the number of the signal that ended a process."""
        code = self._processes[place].returncode
        return code if code >= 0 else 128 - code

    def was_killed(self, place: int) -> bool:
        return self._processes[place].returncode < 0

    def last_words(self, place: int) -> str:
        """What a process said at its end, or what ended it."""
        code = self._processes[place].returncode
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        for reader in self._readers:
            reader.join(1)
        said = b"".join(self._said[place]).decode(errors="replace").strip().splitlines()
        return said[-1] if said else f"ended with exit code {code}"


def launch(config: LaunchConfig, words: Sequence[str]) -> None:
    """Starts the processes, and ends when all have ended, as the first that failed."""
    if not words or words[0] not in COMMANDS:
        raise InputError(
            f"expected a command of several processes after --: {', '.join(COMMANDS)}; as in "
            "jllama launch -n 4 -- train ..."
        )
    here = config.processes or visible_gpus()
    if not here:
        raise InputError("this machine has no GPU that could tell how many; give -n")
    group = Group(words, environments(config, here))
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(stop) != signal.SIG_IGN:
            signal.signal(stop, group.send)
    failed = group.first_to_fail()
    if failed is None:
        return
    number = config.host * here + failed
    # One that was killed tells nobody; the others would wait for it in vain.
    ended = group.wait(0 if group.was_killed(failed) else GRACE_SECONDS)
    if config.host == 0 and ended[0] and group.code(0) in (1, 2, 129, 130, 143):
        sys.exit(group.code(0))  # process 0 has said why
    if number or group.was_killed(failed):
        complain(f"jllama launch: process {number}: {group.last_words(failed)}")
    sys.exit(group.code(failed))


def environments(config: LaunchConfig, here: int) -> list[dict[str, str]]:
    """What tells each of `here` processes on this machine who it is."""
    coordinator = config.coordinator or f"127.0.0.1:{free_port()}"
    return [
        {
            COORDINATOR: coordinator,
            COUNT: str(config.hosts * here),
            NUMBER: str(config.host * here + place),
            "JAX_LOCAL_DEVICE_IDS": str(place),
            JOIN_SECONDS: str(config.join_seconds),
            HANG_SECONDS: str(config.hang_seconds),
        }
        for place in range(here)
    ]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    run_command(
        lambda config: launch(config, words[split + 1 :]), LaunchConfig, words[:split],
        name="launch", gpu=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
