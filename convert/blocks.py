"""Another format's weights into a model folder, block by block; what each format must offer.

A conversion that was interrupted leaves its blocks in `.NAME.partial`, and the same command goes
on with them.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from convert.dtypes import BY_NAME, Dtype, Stored, cast
from jllama.cli.terminal import Progress, console
from jllama.config import Base, LlamaConfig, tensor_shapes
from jllama.errors import InputError
from jllama.folders.files import bytes_begun, room_for, whole_folder
from jllama.folders.json_files import SHOWN
from jllama.folders.manifest import manifest_sha256
from jllama.folders.model import ModelWriter
from jllama.text.tokenizer import (
    FILE_NAME,
    TiktokenTokenizer,
    Tokenizer,
    tokenizer_of,
)
from jllama.text.tokenizer_file import LLAMA3_SPECIALS

Arrays = Mapping[str, np.ndarray]
Written = Callable[[str, Arrays, Arrays], None]
LLAMA3_TOKENS = 128_000 + len(LLAMA3_SPECIALS)  # of every release


class Weights(Protocol):
    """A model's weights in some format: opened and checked, but not read."""

    @property
    def config(self) -> LlamaConfig: ...

    @property
    def dtypes(self) -> Mapping[str, np.dtype]:
        """Of every tensor, by Meta's names."""
        ...

    @property
    def base(self) -> Base | None:
        """The format of the linears, where they are in codes already."""
        ...

    @property
    def source(self) -> str:
        """In words."""
        ...

    @property
    def transformers_name(self) -> str | None:
        """What `transformers` opens as this very model, if it is anything."""
        ...

    @property
    def files(self) -> Sequence[Path]: ...

    def read_block(self, names: Iterable[str]) -> tuple[dict[str, np.ndarray], list[str]]:
        """Tensors by Meta's names, in the dtype stored, and what is not finite in them."""
        ...


def refuse_if(problems: Sequence[str], folder: Path, advice: str) -> None:
    """Raises one InputError that lists the problems of a folder, if there are any."""
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        lines = "\n  ".join([*problems[:SHOWN], *more])
        raise InputError(f"{folder}: {advice}\n  {lines}")


def to_model_folder(
    weights: Weights,
    tokenizer: Mapping[str, bytes],
    tokenizer_from: Path,
    dst: Path,
    dtype: Dtype | None,
    base: Base | None = None,
    written: Written | None = None,
) -> None:
    """Makes the model folder, whole or not at all, and says what it is.

    Args:
        tokenizer: its files, by their names in a model folder.
        tokenizer_from: the folder where they were found, for messages.
        dtype: what every tensor is rounded to; by default each stays as it is.
        base: the format in which the linears are stored; the others as `dtype` says.
        written: called with each block, its tensors and its arrays as they are stored.

    Raises:
        InputError: if the tokenizer is damaged or does not fit the rows of the weights, a weight is
            not finite, the folder exists or the disk is too small.
    """
    config, already = weights.config, weights.base
    if already is not None and (base is not None or dtype is not None):
        raise InputError(
            f"{weights.files[0].parent}: its linears are in {already.words}, and stay so; leave "
            "--base and --dtype out"
        )
    base = base or already
    file = tokenizer_from / next(iter(tokenizer), FILE_NAME)
    rows = config.vocab_size
    _check_rows(tokenizer_of(tokenizer, tokenizer_from, rows), rows, file)
    dtypes = dict.fromkeys(weights.dtypes, BY_NAME[dtype]) if dtype else weights.dtypes
    stored = Stored(config, dtypes, base)
    origin = {
        "files": fingerprint(weights.files),
        "tokenizer": {name: sha256(content).hexdigest() for name, content in tokenizer.items()},
        "config": dataclasses.asdict(config),
        "dtype": dtype,
        "base": base and base.words,
    }
    with room_for(stored.bytes - bytes_begun(dst), dst), whole_folder(dst, origin) as folder:
        writer = ModelWriter(folder, config, weights.source, weights.transformers_name, base)
        _copy_blocks(weights, writer, dtypes, base, written)
        writer.finish(tokenizer)
    console.print(stored.words)
    console.print(f"certificate: sha256 {manifest_sha256(dst)}")
    console.print(f"wrote {dst}")


def _check_rows(tokenizer: Tokenizer, rows: int, file: Path) -> None:
    """Holds a tokenizer against the rows of the embedding; there may be more, for padding."""
    known = tokenizer.vocab_size
    if known > rows:
        raise InputError(
            f"{file}: {known} tokens, but the weights have {rows} rows; "
            "copy the tokenizer of this very model"
        )
    if (border := max(tokenizer.bos_id, tokenizer.eos_id)) >= rows:
        raise InputError(
            f"{file.parent}: text begins or ends with token {border}, but the weights have {rows} "
            "rows; name bos_token and eos_token in tokenizer_config.json"
        )
    # Special tokens stand behind the ranks, so a file cut at a line's end moves them all.
    if isinstance(tokenizer, TiktokenTokenizer) and known not in (rows, LLAMA3_TOKENS):
        raise InputError(
            f"{file}: {known} tokens with the special ones, but the weights have {rows} rows: "
            f"lines are missing (only Llama 3's own {LLAMA3_TOKENS:,} tokens may stand beside more "
            f"rows); copy the tokenizer of this very model again"
        )


def fingerprint(files: Iterable[Path]) -> list[list[Any]]:
    """What tells that files are still those of an interrupted command: name, size and time."""
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _copy_blocks(
    weights: Weights,
    writer: ModelWriter,
    dtypes: Mapping[str, np.dtype],
    base: Base | None,
    written: Written | None,
) -> None:
    """Reads and writes block after block; after a bad value it only looks for more of them."""
    problems: list[str] = []
    blocks = tensor_shapes(weights.config)
    with block_progress("converting", len(blocks)) as advance:
        for block, names in blocks.items():
            if written is None and writer.has_block(block):
                advance(0)
                continue
            tensors, bad = weights.read_block(names)
            problems += bad
            if not problems:
                kept = as_stored(tensors, dtypes, base)
                writer.write_block(block, kept)
                if written is not None:
                    written(block, tensors, kept)
            advance(sum(tensor.nbytes for tensor in tensors.values()))
    refuse_if(
        problems,
        weights.files[0].parent,
        "damaged weights, nothing was written; download these files again",
    )


def as_stored(
    tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, np.dtype], base: Base | None
) -> dict[str, np.ndarray]:
    """A block's arrays as a model folder has them."""
    kept: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if base is not None and base.holds(name):
            from jllama.folders.codes import coded_arrays  # here: else nothing needs JAX

            kept |= coded_arrays(name, tensor, base)
        else:  # what came in codes has no dtype of its own
            kept[name] = cast(tensor, dtypes.get(name, tensor.dtype))
    return kept


@contextlib.contextmanager
def block_progress(title: str, blocks: int) -> Iterator[Any]:
    """A progress bar over blocks; yields `advance(bytes)`, which shows their rate."""
    copied, done, started = 0, 0, time.monotonic()
    with Progress(title, blocks, "blocks") as progress:

        def advance(size: int) -> None:
            nonlocal copied, done
            copied, done = copied + size, done + 1
            progress.advance(f"{copied / 1e6 / (time.monotonic() - started):,.0f} MB/s")

        try:
            yield advance
        except KeyboardInterrupt:
            console.print(
                f"{title} stopped after {done} of {blocks} blocks; the same command goes on"
            )
            raise
