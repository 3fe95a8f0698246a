"""Where a part of the suite runs its child processes: one folder, one device, one time limit."""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.speed.torch_models import Device
from jllama.cli.children import Children
from jllama.errors import InputError
from jllama.folders.json_files import read_json, write_json


class OutOfMemory(InputError):
    """The device has no room for what was asked: a result, and no mistake."""


class NotHere(InputError):
    """What a part measures is not on this machine."""


@dataclass
class Bench:
    """Children of one part.

    Attributes:
        place: an empty folder for their files.
        device: that they run on.
        gpu: the card to plan for, as `train.plan` knows it.
        environment: what they get beside this process's.
        limit: seconds after which they are ended.
    """

    place: Path
    device: Device
    gpu: str
    environment: Mapping[str, str]
    limit: float
    _children: Children = field(default_factory=Children)

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Ends the children where the body takes longer than the limit."""
        timer = threading.Timer(self.limit, self._children.stop)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._children.stop()

    def child(
        self,
        module: str,
        arguments: Sequence[object],
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """What a module says on standard output.

        Raises:
            OutOfMemory: if the device has too little.
            InputError: with its last words if it fails, or if it is ended.
        """
        done = self._children.run(
            module, arguments, environment={**os.environ, **self.environment, **(environment or {})}
        )
        if not done.code:
            return done.output
        if self._children.stopped:
            raise InputError(f"{module} was ended: the part took longer than {self.limit:.0f} s")
        words = done.errors.strip()[-2000:] or f"exit code {done.code} without a word"
        if "out of memory" in words.lower() or "RESOURCE_EXHAUSTED" in words:
            raise OutOfMemory(words)
        raise InputError(f"{module}: {words}")

    def figures(
        self,
        module: str,
        flags: Sequence[object],
        environment: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The figures that a command of ours writes to its --output."""
        file = self.place / "figures.json"
        self.child(module, [*flags, "--output", file], environment)
        return read_json(file)["figures"]

    def answer(self, module: str, job: Mapping[str, Any]) -> dict[str, Any]:
        """What a module that reads a job from a file writes to the job's `output`."""
        task, file = self.place / "job.json", self.place / "answer.json"
        write_json(task, {**job, "output": str(file)})
        self.child(module, [task])
        return read_json(file)
