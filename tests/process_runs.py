"""`jllama launch ...` whose processes have a fault: run as a program of its own.

    FAULT=KIND:PROCESS:STEP python tests/process_runs.py -n 2 -- train ...

When that process has recorded that step it does as KIND says.
"""

import os
import resource
import signal
import sys
import time

from jllama.errors import InputError
from train import lora
from train.processes import launch
from train.processes.join import NUMBER
from train.run.metrics import Metrics

MORE = "--learning-rate 0.3"  # of one whose KIND is "flags"


def happen(kind):
    if kind == "refuse":
        raise InputError("a reason that only this process has")
    if kind == "raise":
        raise KeyError("a fault of the program")
    if kind == "full":  # every file that it writes from now on
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return
    if kind != "hang":
        os.kill(os.getpid(), getattr(signal, kind))
    if kind in ("hang", "SIGKILL"):
        time.sleep(1000)


def with_fault(kind, step):
    record = Metrics.step

    def wrapped(self, number, *args, **more):
        line = record(self, number, *args, **more)
        if number == step:
            happen(kind)
        return line

    Metrics.step = wrapped


if __name__ == "__main__":
    kind, process, step = os.environ["FAULT"].split(":")
    words = sys.argv[1:]
    if NUMBER not in os.environ:
        launch.command = lambda module, words: [sys.executable, __file__, *words]
        launch.main(words)
        sys.exit()
    if process == os.environ[NUMBER]:
        if kind == "absent":
            time.sleep(1000)
        elif kind == "flags":
            words += MORE.split()
        else:
            with_fault(kind, int(step))
    lora.main(words[1:])
