"""A model folder back to Meta's files: consolidated.NN.pth, params.json, tokenizer.model.

    python -m convert.to_meta models/llama-2-7b llama-2-7b-meta
    python -m convert.to_meta models/llama-2-7b tuned-meta --adapter runs/latest/adapter

Without an adapter the tensors are byte for byte those that were converted, unless `--dtype` asks
for another dtype, and the same folder always gives the same bytes.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from convert.dtypes import as_torch_dtype
from convert.export import Export, exporting
from convert.meta.archive import Archive
from convert.meta.cuts import COLUMNS, REPLICATED, ROWS, cut_of, part_shape
from convert.meta.params import PARAMS, meta_params
from jllama.cli.command import run_command
from jllama.cli.terminal import command_line, console
from jllama.config import LlamaConfig
from jllama.errors import AtLeast1, InputError, checked
from jllama.folders.json_files import write_json, write_whole
from jllama.names import EMBEDDINGS, OUTPUT
from jllama.text.hf_files import TOKENIZER_JSON
from jllama.text.tokenizer import FILE_NAME, tokenizer_files, tokenizer_of


@checked
class ToMeta(Export):
    """Writes a model folder, alone or with an adapter merged in, in Meta's own format."""

    shards: AtLeast1 = 1
    """Files to cut the weights into; Meta's code wants a GPU for each."""


def export(settings: ToMeta) -> None:
    """Writes the folder, whole or not at all.

    Raises:
        InputError: if the model folder is incomplete or damaged, the adapter does not fit, the
            weights cannot be cut into so many shards, or the disk is too small.
    """
    with exporting(settings) as (folder, model):
        params = meta_params(model.config)
        tokenizer = tokenizer_files(settings.src)
        if tokenizer and FILE_NAME not in tokenizer:
            raise InputError(
                f"{settings.src}: its tokenizer is a {TOKENIZER_JSON}, and Meta's format has "
                f"{FILE_NAME} alone; export it with to-hf"
            )
        if tokenizer:
            tokenizer_of(tokenizer, settings.src)  # refuses one that is damaged
        axes = {name: cut_axis(name, model.config) for name in model.shapes}
        parts = {
            name: even_part(name, shape, axes[name], settings.shards)
            for name, shape in model.shapes.items()
        }
        tied = {OUTPUT: EMBEDDINGS} if model.config.tied else {}  # one storage under two names
        dtypes = {name: as_torch_dtype(dtype) for name, dtype in model.dtypes.items()}
        archives = [
            Archive(folder / f"consolidated.{index:02d}.pth", parts, dtypes, tied)
            for index in range(settings.shards)
        ]

        def put(name: str, tensor: np.ndarray, shard: int) -> None:
            axis = axes[name]
            if axis is not REPLICATED:
                tensor = np.split(tensor, settings.shards, axis)[shard]
            archives[shard].put(name, tensor)

        with ThreadPoolExecutor() as threads:  # checksums take about as long as writing
            for tensors in model:
                jobs = [
                    threads.submit(put, name, tensor, shard)
                    for name, tensor in tensors.items()
                    for shard in range(settings.shards)
                ]
                for job in jobs:
                    job.result()
        for archive in archives:
            archive.close()
        write_json(folder / PARAMS, params)
        if tokenizer:
            write_whole(folder / FILE_NAME, tokenizer.pop(FILE_NAME))
        if tokenizer:
            console.print(
                f"left out, for Meta's format has no place for it: {', '.join(tokenizer)}"
            )
    console.print("next: " + command_line("from-meta", settings.dst, "DST"))


def cut_axis(name: str, config: LlamaConfig) -> int | None:
    """In which dimension Meta's code of the model's family expects a tensor to be cut."""
    if name != EMBEDDINGS:
        return cut_of(name)
    return ROWS if config.rope_theta > 10000 else COLUMNS  # Llama 3 cuts the vocabulary


def even_part(name: str, shape: tuple[int, ...], axis: int | None, shards: int) -> tuple[int, ...]:
    """The shape of one shard's part of a tensor; InputError if it cannot be cut evenly."""
    if axis is not REPLICATED and shape[axis] % shards:
        raise InputError(f"--shards {shards}: {name} {list(shape)} cannot be cut evenly")
    return part_shape(shape, axis, shards)


def main(argv: Sequence[str] | None = None) -> None:
    run_command(export, ToMeta, argv, name="to-meta", gpu=False)


if __name__ == "__main__":
    main()
