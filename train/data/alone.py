"""A child process of starts.py: what the tokenizer alone takes for a share of a file's texts."""

import itertools
import json
import sys
import time

from jllama.text.tokenizer import load_tokenizer


def main() -> None:
    """Arguments: the file, the model folder, the number of this process, and of all processes."""
    file, model, number, processes = sys.argv[1:]
    with open(file, encoding="utf-8") as lines:
        rows = [
            json.loads(line) for line in itertools.islice(lines, int(number), None, int(processes))
        ]
    texts = [text for row in rows for text in (row["instruction"] + "\n", row["output"])]
    tokenizer = load_tokenizer(model)
    wall, cpu = time.monotonic(), time.process_time()
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    seconds = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
    sys.stdout.write(json.dumps(seconds | {"tokens": tokens}))


if __name__ == "__main__":
    main()
