"""Stopping on request: SIGTERM, SIGHUP and Ctrl-C end a run after its step."""

import contextlib
import os
import signal
import threading
from types import FrameType

from jllama.cli.terminal import console, leave


class Stopped(KeyboardInterrupt):
    """A signal has ended a run after a step, whose state is saved.

    Args:
        number: the signal.
    """

    def __init__(self, words: str, number: int):
        super().__init__(words)
        self.number = number


class StopSignal:
    """Turns the first such signal into a flag that the loop reads between two steps.

    A second signal ends the process at once; one that is ignored (nohup) stays ignored. `number` is
    the signal received, or 0. In a thread that is not the main one it receives none.

    Python runs handlers between its own instructions, and a step is one of them, which may take
    minutes. So a thread answers, which is told by the system when a signal comes.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> "StopSignal":
        self._receives = threading.current_thread() is threading.main_thread()
        if not self._receives:  # Python gives signals to the main thread alone
            return self
        told, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        self._told_before = signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
        self._terminals = [number for number in (1, 2) if os.isatty(number)]
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        self._answering = threading.Thread(target=self._answer, args=(told,), daemon=True)
        self._answering.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._receives:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._told_before)
        os.close(self._tell)
        self._answering.join()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number
        if number == signal.SIGHUP:  # the terminal has gone, and writing to it would be an error
            nobody = os.open(os.devnull, os.O_WRONLY)
            for terminal in self._terminals:
                os.dup2(nobody, terminal)
            os.close(nobody)

    def _answer(self, told: int) -> None:
        received = 0
        with open(told, "rb", buffering=0) as numbers:
            while number := int.from_bytes(numbers.read(1)):
                if number not in self._before:
                    continue
                if received:
                    leave(128 + number)
                received = number
                name = signal.Signals(number).name
                with contextlib.suppress(OSError):
                    console.print(f"{name}: stopping after this step; again to abort")
