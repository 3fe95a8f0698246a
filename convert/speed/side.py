"""One conversion, alone in its process: what it took after its imports, as JSON.

python -m convert.speed.side from_meta SRC DST '["--more", "flags"]'
"""

import importlib
import json
import sys
import time

import jax  # noqa: F401  # with what a command imports when it needs it
import tiktoken  # noqa: F401
import tyro  # noqa: F401

from jllama.machine import process_memory_mib

if __name__ == "__main__":
    module, source, destination, more = sys.argv[1:]
    command = importlib.import_module(f"convert.{module}")
    before, started = process_memory_mib("VmRSS"), time.monotonic()
    command.main([source, destination, *json.loads(more)])
    figures = {
        "seconds": time.monotonic() - started,
        "peak_mib": process_memory_mib("VmHWM"),
        "imports_mib": before,
    }
    print(json.dumps(figures))
