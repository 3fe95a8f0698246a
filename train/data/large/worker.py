"""A child process of pool.py: reads rows from its standard input, writes what becomes of them.

It imports no JAX, which takes seconds and memory, and could take a GPU.
"""

import contextlib
import pickle
import signal
import sys

from jllama.text.rows import make_part
from jllama.text.tokenizer import load_tokenizer


def main() -> None:
    """Answers until there are no more rows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    asked, answers, sys.stdout = sys.stdin.buffer, sys.stdout.buffer, sys.stderr
    model, template, rendering = pickle.load(asked)
    tokenizer = load_tokenizer(model, template)
    with contextlib.suppress(EOFError):
        while True:
            rows = pickle.load(asked)
            part = make_part(rows, tokenizer, rendering, rows.first)
            pickle.dump(part, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()


if __name__ == "__main__":
    main()
