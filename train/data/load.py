"""The examples of a run's data files. Those of large files are kept in a cache, by content."""

import dataclasses
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jllama.cli.terminal import Progress, command_line, console
from jllama.folders.json_files import read_bytes
from jllama.folders.manifest import file_sha256
from jllama.machine import available_cores, versions
from jllama.text import rows as text_rows
from jllama.text.row_file import Rows, read_sources
from jllama.text.row_formats import files_of, source_of
from jllama.text.rows import Examples, Part, Rendering, check_usable, make_part
from jllama.text.tokenizer import Tokenizer, tokenizer_files
from train.config import TrainConfig
from train.data.batches import hold_out
from train.data.large import cache
from train.data.large.cache import Tokenised, cached, gathered, write_head
from train.data.large.pool import CHUNK, parts_of

# Bytes of files from which on several processes tokenise them: theirs take a second to start.
LARGE = 2 * 2**20
_PACKAGES = ("jllama", "sentencepiece", "tiktoken", "tokenizers", "jinja2")


def load_examples(config: TrainConfig, tokenizer: Tokenizer) -> tuple[Examples, Examples]:
    """(training, held-out) examples of the data files."""
    examples = _examples_of(config, config.data, tokenizer, config.max_rows)
    if not config.val_data:
        return hold_out(examples, config.val_size, config.seed)
    return examples, _examples_of(config, (config.val_data,), tokenizer)


def load_held_out(config: TrainConfig, tokenizer: Tokenizer) -> tuple[Examples, Examples]:
    """(none, held-out) examples, where the steps take given windows."""
    none = Examples.of(())
    if not config.val_data:
        return none, none
    return none, _examples_of(config, (config.val_data,), tokenizer)


def _examples_of(
    config: TrainConfig, sources: tuple[str, ...], tokenizer: Tokenizer, max_rows: int = 0
) -> Examples:
    """Of some files; says what becomes of rows that are not learned as they are."""
    made = _tokenised(config, sources, tokenizer, max_rows)
    examples, skipped, rows = made.examples, made.problems, sum(made.counts)
    check_usable(
        examples, skipped, rows, config.max_seq_len, config.skip_bad_rows, ", ".join(sources)
    )
    if cut := np.count_nonzero(examples.cut):
        console.print(
            f"{cut} rows are longer than {config.max_seq_len} tokens and lose "
            "their end; --max-seq-len keeps more"
        )
    for problem in skipped:
        console.print(f"left out: {problem}")
    if examples.notes:
        noted = [f"{len(rows):,} rows {note}" for note, rows in examples.notes.items()]
        chosen = {"model": config.model, "prompt-style": config.prompt_style}
        chosen |= {"prompt-template": config.prompt_template, "columns": config.columns}
        flags = [word for name, x in chosen.items() if x for word in (f"--{name}", x)]
        console.print(f"{'; '.join(noted)}; {command_line('lint', *sources, *flags)} lists them")
    return weighted(examples, sources, made.counts)


def weighted(examples: Examples, sources: Sequence[str], counts: Sequence[int]) -> Examples:
    """With the weights of the files that they are from, which have so many rows each."""
    weights = np.array([source_of(source).weight for source in sources], np.float32)
    return dataclasses.replace(examples, weights=np.repeat(weights, counts)[examples.rows])


def _tokenised(
    config: TrainConfig, sources: tuple[str, ...], tokenizer: Tokenizer, max_rows: int
) -> Tokenised:
    rendering = Rendering(
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(Rendering)}
    )
    before = _states(sources)
    if sum(size for _, size, _ in before) < LARGE:
        rows, counts = read_sources(sources, config.columns, max_rows)
        parts = iter([make_part(rows, tokenizer, rendering)])
        return _gathered(rows, counts, parts, tokenizer)

    def make(folder: Path | None) -> Tokenised:
        rows, counts = read_sources(sources, config.columns, max_rows)
        parts = parts_of(rows, config.model, config.prompt_template, rendering, available_cores())
        made = _gathered(rows, counts, _with_progress(parts, len(rows)), tokenizer, folder)
        if folder is not None and _states(sources) == before:  # the same files all the while
            write_head(folder, made)
        return made

    key = {
        "files": [(file.name, file_sha256(file)) for file in _files(sources)],
        "sources": [len(files_of(source_of(source).path)) for source in sources],
        "columns": config.columns,
        "max_rows": max_rows,
        "rendering": dataclasses.asdict(rendering),
        "tokenizer": _tokenizer_hashes(config),
        "vocab_size": tokenizer.vocab_size,
        "code": _code(),
    }
    return cached(key, make)


def _gathered(
    rows: Rows,
    counts: list[int],
    parts: Iterator[Part],
    tokenizer: Tokenizer,
    folder: Path | None = None,
) -> Tokenised:
    examples, problems = gathered(folder, parts, tokenizer.vocab_size)
    return Tokenised(examples, [f"{rows.place(row)}: {why}" for row, why in problems], counts)


def _with_progress(parts: Iterator[Part], rows: int) -> Iterator[Part]:
    """Shows how many rows are done, and how many a second."""
    start, done = time.monotonic(), 0
    with Progress("tokenising", rows, "rows", note="starting") as progress:
        for part in parts:
            units = min(CHUNK, rows - done)
            done += units
            rate = done / (time.monotonic() - start)
            progress.advance(f"{rate:,.0f} rows/s", units)
            yield part


def _files(sources: tuple[str, ...]) -> list[Path]:
    return [file for source in sources for file in files_of(source_of(source).path)]


def _states(sources: tuple[str, ...]) -> list[tuple[int, int, int]]:
    """What changes when a file does; nothing of a file that is missing, which its reader tells."""
    return [
        (state.st_ino, state.st_size, state.st_mtime_ns)
        for file in _files(sources)
        if file.is_file()
        for state in (file.stat(),)
    ]


def _tokenizer_hashes(config: TrainConfig) -> dict[str, str]:
    found = tokenizer_files(Path(config.model))
    if config.prompt_template:
        found["--prompt-template"] = read_bytes(config.prompt_template, "a chat template")
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def _code() -> dict[str, str]:
    """Of what makes ids of rows: this project's own modules, and the packages that they use."""
    text, here = Path(text_rows.__file__).parent, Path(cache.__file__)
    return versions(_PACKAGES) | {f.name: file_sha256(f) for f in (*text.rglob("*.py"), here)}
