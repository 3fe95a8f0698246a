"""`python -m train.data.speed`: what many rows cost, from the file to the first window.

    python -m train.data.speed --rows 50000 500000 --output docs/results/rows-cpu.json
    python -m train.data.speed --starts --rows 1000000 --output docs/results/starts-cpu.json

Makes Alpaca-like rows and takes them through what training does before its first step, with the
bundled tokenizer; each number of rows in a process of its own. Seconds are of CPU, all threads
together. Memory is the process's peak beyond what it held when all was imported and the file
written, and beyond the file's size.
"""

import contextlib
import dataclasses
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jllama import bundled
from jllama.cli import children
from jllama.cli.command import run_command
from jllama.cli.terminal import console, show_table
from jllama.errors import AtLeast1, Seed, checked
from jllama.folders.json_files import read_json, write_json
from jllama.machine import measured_here, process_memory_mib
from jllama.text.row_file import read_rows
from jllama.text.rows import make_examples
from jllama.text.tokenizer import load_tokenizer
from train.data.batches import Batches, hold_out
from train.data.starts import measure_starts

# A letter and a sign beyond ASCII: a Python text with such a sign takes 4 bytes a character.
WORDS = "the of a to is in and for that with write list name how café good people water ☕"
PROMPT_WORDS, ANSWER_WORDS = 20, 50  # on average, as in Alpaca


@checked
class RowsSpeed:
    """Measure reading, tokenising and ordering of many made-up rows: CPU seconds and memory."""

    rows: tuple[AtLeast1, ...] = (50_000, 500_000)
    """Numbers of rows to measure."""
    max_seq_len: AtLeast1 = 512
    """Tokens a row may have."""
    epochs: AtLeast1 = 3
    """Passes over the data."""
    seed: Seed = 0
    """Seed of the rows and their order."""
    starts: bool = False
    """Measure a first and a second start of training instead, and the tokenizer alone."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """JSON file for the figures."""


def write_rows(file: Path, rows: int, seed: int) -> None:
    """Rows of words, of lengths that vary as people's do."""
    random, words = np.random.default_rng(seed), np.array(WORDS.split())
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            counts = 1 + random.gamma(2, np.array([PROMPT_WORDS, ANSWER_WORDS]) / 2).astype(int)
            prompt, answer = (" ".join(words[random.integers(len(words), size=n)]) for n in counts)
            row = {"instruction": prompt, "input": "", "output": answer}
            lines.write(json.dumps(row) + "\n")


def measure_rows(config: RowsSpeed, rows: int) -> dict[str, Any]:
    """The figures of one number of rows."""
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def clock(what: str) -> Iterator[None]:
        start = time.process_time()
        yield
        seconds[what] = time.process_time() - start

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "rows.jsonl"
        write_rows(file, rows, config.seed)
        size, tokenizer = file.stat().st_size, load_tokenizer(bundled.SAMPLE)
        before = process_memory_mib("VmRSS")
        with clock("reading"):
            read = read_rows(file)
    with clock("tokenising"):
        examples, _ = make_examples(
            read, tokenizer, "plain", max_seq_len=config.max_seq_len, train_on_prompt=False,
            skip_bad_rows=0, source=file.name,
        )  # fmt: skip
    del read
    for packing, held_out in itertools.product((False, True), (0.0, 0.01)):
        with clock(f"to the first window{', packed' * packing}, {held_out:.0%} held out"):
            training, _ = hold_out(examples, held_out, config.seed)
            batches = Batches(
                training, accumulation=4, batch=4, max_seq_len=config.max_seq_len,
                packing=packing, shuffle=True, seed=config.seed, epochs=config.epochs,
            )  # fmt: skip
            batches.padding_share()
            next(batches.from_step(0))
    beyond = (process_memory_mib() - before) * 2**20 - size
    return {
        "rows": rows,
        "file_bytes": size,
        "tokens": len(examples.ids),
        "cpu_seconds": seconds,
        "peak_bytes_a_token_beyond_the_file": beyond / len(examples.ids),
    }


def measure(config: RowsSpeed) -> None:
    """Measures each number of rows, several in children, and shows and writes the figures."""
    if config.starts:
        figures = [_starts(config, rows) for rows in config.rows]
        for figure in figures:
            show_table(["", ""], [[name, str(value)] for name, value in figure.items()])
        _write(config, figures)
        return
    if len(config.rows) > 1:
        figures = [_in_child(dataclasses.replace(config, rows=(rows,))) for rows in config.rows]
    else:
        figures = [measure_rows(config, *config.rows)]
    rows = [
        [what, *(f"{figure['cpu_seconds'][what]:.2f}" for figure in figures)]
        for what in figures[0]["cpu_seconds"]
    ]
    beyond = (f"{figure['peak_bytes_a_token_beyond_the_file']:.2f}" for figure in figures)
    rows.append(["peak memory beyond the file, bytes a token", *beyond])
    show_table(["CPU seconds", *(f"{figure['rows']:,} rows" for figure in figures)], rows)
    _write(config, figures)


def _starts(config: RowsSpeed, rows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "rows.jsonl"
        write_rows(file, rows, config.seed)
        found = measure_starts(file, Path(place), config.max_seq_len, config.epochs)
        return {"rows": rows, "file_bytes": file.stat().st_size} | found


def _write(config: RowsSpeed, figures: list[dict[str, Any]]) -> None:
    if config.output:
        head = measured_here("speed-rows", ("jllama", "numpy", "grain", "sentencepiece"))
        settings = dataclasses.asdict(config)
        write_json(Path(config.output), {**head, "settings": settings, "figures": figures})
        console.print(f"wrote {config.output}")


def _in_child(config: RowsSpeed) -> dict[str, Any]:
    """The figures of one number of rows, from a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "figures.json"
        settings = dataclasses.asdict(config) | {"rows": config.rows[0], "output": file}
        del settings["starts"]
        flags = [word for name, value in settings.items()
                 for word in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
        children.run("train.data.speed", flags)
        return read_json(file)["figures"][0]


def main(argv: Sequence[str] | None = None) -> None:
    run_command(measure, RowsSpeed, argv, name="speed-rows", gpu=False)


if __name__ == "__main__":
    main()
