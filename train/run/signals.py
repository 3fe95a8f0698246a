"""Stopping on request: SIGTERM and Ctrl-C end a run after its step."""

import signal
from types import FrameType


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a flag that the loop reads between two steps.

    A second signal ends the process at once. `number` is the signal received, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.number = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
