"""A model folder, alone or with an adapter merged in, as transformers, vLLM and llama.cpp read it.

    python -m convert.to_hf models/llama-2-7b tuned-hf --adapter runs/latest/adapter

Writes safetensors with an index (a file per block), config.json, generation_config.json and the
tokenizer. Without an adapter the tensors are byte for byte those of the Hugging Face files that
were converted, or would have been, unless `--dtype` asks for another dtype.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from convert.export import Export, Model, exporting
from convert.hf.config import hf_config
from convert.hf.stored import SAFETENSORS
from convert.hf.tokenizer import write_tokenizer_files
from jllama.cli.command import run_command
from jllama.cli.terminal import console
from jllama.config import LlamaConfig
from jllama.errors import InputError, checked
from jllama.folders.adapter import style_of
from jllama.folders.json_files import write_json
from jllama.folders.model import CONFIG
from jllama.folders.tensors import map_tensors, save_tensors
from jllama.layers import to_half_rotated
from jllama.names import hf_name
from jllama.text.hf_files import GENERATION, with_template
from jllama.text.tokenizer import tokenizer_files, tokenizer_of


@checked
class ToHf(Export):
    """Writes a model folder, alone or with an adapter merged in, in Hugging Face's format."""


def export(settings: ToHf) -> None:
    """Writes the folder, whole or not at all.

    Raises:
        InputError: if the model folder is incomplete or damaged, the adapter does not fit, or the
            disk is too small.
    """
    with exporting(settings) as (folder, model):
        _write_small_files(settings, folder, model)  # first: they are refused at once or never
        placed: dict[str, str] = {}
        for number, tensors in enumerate(model, 1):
            file = f"model-{number:05d}-of-{len(model.blocks):05d}.safetensors"
            theirs = {
                hf_name(name): hf_rows(name, tensor, model.config)
                for name, tensor in tensors.items()
            }
            _save(folder / file, theirs)
            placed |= dict.fromkeys(theirs, file)
        index = {"metadata": {"total_size": model.stored.bytes}, "weight_map": placed}
        write_json(folder / SAFETENSORS.table, index)
    console.print(f'next: transformers.AutoModelForCausalLM.from_pretrained("{settings.dst}")')


def _write_small_files(settings: ToHf, folder: Path, model: Model) -> None:
    """The tokenizer with its chat template, config.json and generation_config.json."""
    src = settings.src
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    if files := tokenizer_files(src):
        tokenizer = tokenizer_of(files, src)
        bos_id, eos_ids = tokenizer.bos_id, tokenizer.stop_ids
        if settings.adapter and (template := style_of(settings.adapter, tokenizer)) is not None:
            files = with_template(files, template, eos_ids, src)
        write_tokenizer_files(files, folder, model.config.max_seq_len)
    config = hf_config(model.config, model.stored.usual, bos_id, eos_ids)
    write_json(folder / CONFIG, config)
    if GENERATION not in files:
        ends = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
        write_json(folder / GENERATION, ends)


def hf_rows(name: str, tensor: np.ndarray, config: LlamaConfig) -> np.ndarray:
    """A tensor with its rows in Hugging Face's order, which is another one for q and k."""
    heads = config.rotary_heads(name.removesuffix(".weight"))
    return to_half_rotated(tensor, heads) if heads else tensor


def _save(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a file under its name once it is whole; one that is there and equal stays."""
    if file.is_file():
        with contextlib.suppress(InputError):  # a damaged one is written again
            there = map_tensors(file, "weights", "")
            same = there.keys() == tensors.keys()
            if same and all(there[name].tobytes() == tensors[name].tobytes() for name in tensors):
                return
    save_tensors(file, tensors, {"format": "pt"}, hashed=False)


def main(argv: Sequence[str] | None = None) -> None:
    run_command(export, ToHf, argv, name="to-hf", gpu=False)


if __name__ == "__main__":
    main()
