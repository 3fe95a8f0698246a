"""A model folder, alone or with an adapter merged in, as one GGUF file for llama.cpp and Ollama.

    python -m convert.to_gguf models/llama-2-7b tuned.gguf --adapter runs/latest/adapter
    python -m convert.to_gguf models/llama-2-7b small.gguf --dtype q8_0

Beside `tuned.gguf` there is `tuned.Modelfile` for `ollama create`. Without an adapter and `--dtype`
the matrices are bit for bit those of the model folder; norms are always F32.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from tyro.conf import Positional, arg

from convert.blocks import block_progress
from convert.change.merge import show_report
from convert.export import Model, Outgoing
from convert.gguf.metadata import add_origin, add_sizes, add_vocabulary, rotary_factors
from convert.gguf.tensors import (
    ARCHITECTURE,
    BY_NAME,
    ROTARY_FACTORS,
    VECTORS,
    GgufDtype,
    TensorFile,
    ggml_type,
    gguf_names,
    stored_bytes,
)
from convert.gguf.terms import Vocabulary
from convert.gguf.vocabulary import read_vocabulary
from jllama.cli.command import run_command
from jllama.cli.terminal import console, quoted
from jllama.errors import InputError, checked
from jllama.folders.files import bytes_begun, check_new_file, room_for, whole_file
from jllama.folders.json_files import write_whole

Tensors = dict[str, tuple[tuple[int, ...], GGMLQuantizationType]]


@checked
class ToGguf(Outgoing):
    """Writes a model folder, alone or with an adapter merged in, as one GGUF file."""

    dst: Annotated[Positional[Path], arg(metavar="FILE")]
    """The file to make, NAME.gguf; NAME.Modelfile is made beside it."""
    dtype: GgufDtype | None = None
    """Writes every matrix in this type; by default each in its own, and named for one that is
    stored in 8 or 4 bits. q8_0 leaves a matrix whose rows are no multiple of 32 in F16."""


def export(settings: ToGguf) -> None:
    """Writes the file, whole or not at all, and says what it is.

    An interrupted export goes on where it was.

    Raises:
        InputError: if the file exists, the model folder is incomplete or damaged, the adapter does
            not fit, llama.cpp would give other ids, the disk is too small, or what would be written
            is not finite.
    """
    dst, modelfile = settings.dst, settings.dst.with_suffix(".Modelfile")
    if dst.suffix != ".gguf":
        raise InputError(f"{dst}: expected the name of a file that ends in .gguf: {dst.name}.gguf")
    check_new_file(dst)
    check_new_file(modelfile)
    model = Model(settings, settings.dtype, BY_NAME, vectors=VECTORS)
    vocabulary = read_vocabulary(model.src, model.adapter).padded(model.config.vocab_size)
    tensors = _tensors(model, settings.dtype)
    size = sum(stored_bytes(shape, kind) for shape, kind in tensors.values())
    with room_for(size - bytes_begun(dst), dst), whole_file(dst) as partial:
        _write(partial, model, tensors, vocabulary)
    write_whole(modelfile, _modelfile(dst, vocabulary))
    if model.merge is not None:
        show_report(model.merge.report())
    _show(model, tensors, settings.dtype, dst)
    console.print(f"wrote {dst}, {modelfile}")
    console.print("next: " + quoted("ollama", "create", dst.stem, "-f", modelfile))


def _tensors(model: Model, asked: str | None) -> Tensors:
    """What the file will hold, by GGUF's names."""
    found: Tensors = {}
    factors = rotary_factors(model.config)
    if factors is not None:
        found[ROTARY_FACTORS] = factors.shape, GGMLQuantizationType.F32
    for name, theirs in gguf_names(list(model.shapes), model.config.n_layers).items():
        shape = model.shapes[name]
        found[theirs] = shape, ggml_type(shape, model.dtypes[name], asked)
    return found


def _usual(tensors: Tensors) -> GGMLQuantizationType:
    """The type of most weights."""
    weights: Counter[GGMLQuantizationType] = Counter()
    for shape, kind in tensors.values():
        weights[kind] += math.prod(shape)
    return weights.most_common(1)[0][0]


def _write(file: Path, model: Model, tensors: Tensors, vocabulary: Vocabulary) -> None:
    writer = GGUFWriter(None, ARCHITECTURE)
    add_origin(writer, model.src, model.adapter, _usual(tensors))
    add_sizes(writer, model.config)
    add_vocabulary(writer, vocabulary)
    names = gguf_names(list(model.shapes), model.config.n_layers)
    factors = rotary_factors(model.config)
    with contextlib.closing(TensorFile(file, writer, tensors)) as content:
        content.begin()
        if factors is not None:
            content.put({ROTARY_FACTORS: factors})
        with block_progress("exporting", len(model.blocks)) as model.advance:
            for block in model.unrounded():
                content.put({names[name]: block[name] for name in block})
        content.finish()


def _modelfile(dst: Path, vocabulary: Vocabulary) -> str:
    """What `ollama create` reads: the file beside it, and the tokens that end an answer.

    A token that is no special one, or can stand in no quotes, is left to the file's own list.
    """
    ends = [
        vocabulary.tokens[token]
        for token in vocabulary.stop_ids
        if vocabulary.types[token] is TokenType.CONTROL
    ]
    stops = [text for text in ends if not {*text} & {*'"\n'}]
    return "".join([f"FROM ./{dst.name}\n", *(f'PARAMETER stop "{stop}"\n' for stop in stops)])


def _show(model: Model, tensors: Tensors, asked: str | None, dst: Path) -> None:
    counts = Counter(kind.name for _, kind in tensors.values())
    types = ", ".join(f"{count} tensors {kind}" for kind, count in counts.most_common())
    console.print(
        f"{model.config.parameter_count:,} parameters: {types}; {dst.stat().st_size:,} bytes"
    )
    if asked == "q8_0":
        if "F16" in counts:
            console.print(
                f"note: {counts['F16']} matrices are F16, for their rows are no multiple of 32"
            )
        if model.merge is not None:
            console.print("note: merging was compared before the weights were rounded to 8 bits")


def main(argv: Sequence[str] | None = None) -> None:
    run_command(export, ToGguf, argv, name="to-gguf", gpu=False)


if __name__ == "__main__":
    main()
