"""Runs one of this project's modules in a child process, and ends with the parent.

    python -P child.py PARENT MODULE [ARGUMENT ...]

`-P` keeps the working directory out of the search for modules, so a `train.py` that lies there is
not taken for ours. This file is run, never imported, and so knows nothing of the project.
"""

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # of Linux


def end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, also by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the line above
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    root = str(Path(__file__).parents[2])
    if root not in sys.path:  # a checkout that is not installed, or by way of a link
        sys.path.insert(0, root)
    module, sys.argv = sys.argv[2], sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
