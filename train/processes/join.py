"""The processes of a run: found by the environment, joined by `jax.distributed`.

    with joined() as processes:
        processes.agree(lambda: facts)    InputError where another one has another value
        processes.common(0, mesh)         the largest number that one of them gave

What they tell each other goes through the key-value store of JAX's coordinator, process 0.
"""

import contextlib
import json
import math
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jllama.cli.terminal import complain, console, leave
from jllama.errors import InputError
from jllama.machine import peak_memory_mib
from train.processes.watch import Watch

COORDINATOR, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
JOIN_SECONDS, HANG_SECONDS = "JLLAMA_JOIN_SECONDS", "JLLAMA_HANG_SECONDS"
DEFAULT_SECONDS = {JOIN_SECONDS: 120, HANG_SECONDS: 600}
# `srun` gives these to each process; JAX reads them.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_NO_PROXY = "no_grpc_proxy"
Result = TypeVar("Result")


class Rank(NamedTuple):
    """One of several processes; the coordinator's HOST:PORT is None where JAX finds it."""

    number: int
    total: int
    coordinator: str | None


def rank_here(environment: Mapping[str, str] = os.environ) -> Rank | None:
    """Which process this is; None if it is the only one.

    Raises:
        InputError: if the environment says it in part only, or what cannot be.
    """
    ours = {name: environment.get(name, "") for name in (COORDINATOR, COUNT, NUMBER)}
    if ours[COUNT] or ours[NUMBER]:
        if missing := [name for name, value in ours.items() if not value]:
            raise InputError(f"{', '.join(missing)} missing beside {COUNT} or {NUMBER}")
        number, count = (_whole(name, ours[name]) for name in (NUMBER, COUNT))
        coordinator: str | None = ours[COORDINATOR]
        _, colon, port = ours[COORDINATOR].rpartition(":")
        if not colon or not port.isdecimal():
            raise InputError(f"{COORDINATOR}={coordinator}, expected HOST:PORT of process 0")
    elif all(map(environment.get, SLURM)):
        number, count = (_whole(name, environment[name]) for name in (SLURM[3], SLURM[2]))
        coordinator = ours[COORDINATOR] or None
    else:
        return None
    if number >= count:
        raise InputError(f"process {number} of {count}: processes are numbered from 0")
    return Rank(number, count, coordinator) if count > 1 else None


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise InputError(f"{name}={text}, expected a whole number")
    return int(text)


def seconds(name: str) -> int:
    """A time-out, which the environment may set.

    Raises:
        InputError: if it is no whole number above 0.
    """
    found = _whole(name, os.environ.get(name) or str(DEFAULT_SECONDS[name]))
    if not found:
        raise InputError(f"{name}=0, expected at least 1")
    return found


@contextlib.contextmanager
def joined() -> "Iterator[Processes]":
    """All processes of the run, until the last one is done.

    An error, or a signal, that ends one of them ends the others with its words and its exit code;
    so does one that is killed, or that hangs. Before JAX has opened a device.

    Raises:
        InputError: if the environment is wrong, or not all of them came in time.
    """
    rank = rank_here()
    if rank is None:
        yield Processes()
        return
    if rank.number:
        console.quiet = True  # process 0 says what all would say
    where = f"{socket.gethostname()}, process {os.getpid()}"
    watch = Watch(_connected(rank), rank.number, rank.total, where, seconds(HANG_SECONDS))
    processes = Processes(rank, watch)
    try:
        yield processes
        processes.finish()
    except BaseException as error:
        watch.failed(error)
        raise


def _connected(rank: Rank) -> Any:
    """The client of the coordinator, once all processes are there.

    JAX would end the process in C++ when its own time is over; ours is over before.
    """
    limit = seconds(JOIN_SECONDS)
    at = rank.coordinator or "the address that SLURM gives"
    late = f"process {rank.number}: not all of {rank.total} processes came to {at} in {limit} s"
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM from us
    jax.config.update("jax_check_proxy_envs", False)
    if rank.coordinator:  # which is no address that a proxy should be asked for
        host = rank.coordinator.rpartition(":")[0]
        os.environ[_NO_PROXY] = ",".join(filter(None, (os.environ.get(_NO_PROXY), host)))

    def give_up() -> None:
        complain(f"jllama train: {late}; see that each was started, and can reach that address")
        leave(2)

    timer = threading.Timer(limit, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            rank.coordinator, rank.total, rank.number, initialization_timeout=limit + 60,
            shutdown_timeout_seconds=10,
        )  # fmt: skip
    except RuntimeError as error:
        raise InputError(
            f"process {rank.number} of {rank.total} could not join at {at}: {error}"
        ) from None
    finally:
        timer.cancel()
    from jax._src import distributed  # there is no public way to the store

    return distributed.global_state.client


class Processes:
    """What the processes of a run tell each other; one alone tells itself.

    Args:
        rank: of this process; None if it is the only one.
        watch: ends all of them when one ends.
    """

    def __init__(self, rank: Rank | None = None, watch: Watch | None = None):
        self.number, self.count = (rank.number, rank.total) if rank else (0, 1)
        self._watch = watch
        self._asked: jax.Array | None = None
        self._meetings = 0

    def mark(self, doing: str, step: bool = False) -> None:
        """Says what this process begins: one that stays behind the others is noticed.

        Args:
            step: whether it takes no much longer than the last of its kind.
        """
        if self._watch:
            self._watch.mark(doing, peak_memory_mib() if step else 0.0, step)

    def peak_memory_mib(self) -> float:
        """Of the fullest device of all processes."""
        return max(peak_memory_mib(), self._watch.peak_mib if self._watch else 0.0)

    def tell(self, words: str) -> list[str]:
        """Gives what each process told at this meeting, by their numbers, when all have told."""
        self._meetings += 1
        if self._watch is None:
            return [words]
        return self._watch.exchange(f"meeting {self._meetings}", words)

    def first_then_others(self, act: Callable[[], Result]) -> Result:
        """Process 0 does it, and then all others do, which find what it made."""
        if self.number == 0:
            done = act()
        self.tell("")
        return done if self.number == 0 else act()

    def agree(self, facts: Callable[[], Mapping[str, object]]) -> None:
        """Goes on when all processes have given the same facts; one alone is not asked for them.

        Raises:
            InputError: with those that differ from process 0's.
        """
        if self.count == 1:
            return
        words = json.dumps(facts(), default=str)
        first = json.loads(self.tell(words)[0])
        mine = json.loads(words)
        differ = [
            f"{name} {mine.get(name)}, but {first.get(name)} for process 0"
            for name in [*mine, *(name for name in first if name not in mine)]
            if mine.get(name) != first.get(name)
        ]
        if differ:
            raise InputError("; ".join(differ))

    def common(self, number: int, mesh: Mesh) -> int:
        """The largest number that a process gave, the same for all of them after the same step.

        With several processes it is of the call before: nothing waits for a step that is running.
        """
        if self.count == 1:
            return number
        self.mark("what follows a step", step=True)  # who is not there yet has not ended it
        everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        given = jax.make_array_from_callback(
            (math.prod(mesh.devices.shape),), everywhere, lambda part: np.full(1, number, np.int32)
        )
        before, self._asked = self._asked, _largest(given)
        return 0 if before is None else int(before)

    def finish(self) -> None:
        """Waits for all processes to come here; from now on each ends by itself."""
        if self._watch and not self._watch.stopped:
            self.mark("the end")
            self.tell("")
            self._watch.stop()


_largest = jax.jit(jnp.max)
