"""A model folder back to Meta's files: consolidated.00.pth, params.json, tokenizer.model.

    python -m convert.to_meta models/llama-2-7b llama-2-7b-meta

The tensors are byte for byte those that were converted, and the same folder always gives the
same bytes. Adapters are not written: they are PEFT folders of their own.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import torch
from tyro.conf import Positional, arg

from convert.dtypes import DTYPES
from convert.names import EMBEDDINGS, OUTPUT
from convert.params import PARAMS, meta_params
from jllama.checkpoint import read_block, read_config, tensor_shapes
from jllama.cli import Progress, run_command
from jllama.errors import InputError
from jllama.files import room_for, whole_folder, write_json
from jllama.manifest import MANIFEST, read_manifest
from jllama.tokenizer import FILE_NAME

PROG = "python -m convert.to_meta"


@dataclass(frozen=True)
class ToMeta:
    """Writes a model folder in Meta's own format, as one shard."""

    src: Annotated[Positional[Path], arg(metavar="SRC")]
    """The model folder."""
    dst: Annotated[Positional[Path], arg(metavar="DST")]
    """The folder to make."""


def export(settings: ToMeta) -> None:
    """Writes the folder, whole or not at all.

    Raises:
        InputError: if the model folder is incomplete or damaged, or the disk too small.
    """
    config = read_config(settings.src)
    params = meta_params(config)
    blocks = tensor_shapes(config)
    manifest = _manifest(settings.src, [name for names in blocks.values() for name in names])
    size = sum(
        math.prod(tensor["shape"]) * np.dtype(tensor["dtype"]).itemsize
        for tensor in manifest.values()
    )
    # Twice the size: for a while the tensors lie beside the archive.
    with room_for(2 * size, settings.dst), whole_folder(settings.dst) as folder:
        raw = folder / "raw"
        raw.mkdir()
        tensors: dict[str, torch.Tensor] = {}
        with Progress("exporting", len(blocks), "blocks") as progress:
            for block in blocks:
                for name, tensor in read_block(settings.src, block).items():
                    tensors[name] = _mapped(tensor, raw / name)
                progress.advance()
        if config.tied:
            tensors[OUTPUT] = tensors[EMBEDDINGS]  # one storage under two names
        torch.save(tensors, folder / "consolidated.00.pth")
        shutil.rmtree(raw)
        write_json(folder / PARAMS, params)
        tokenizer = settings.src / FILE_NAME
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, folder / FILE_NAME)
        written = sorted(path.name for path in folder.iterdir())
    print(f"{config.parameter_count:,} parameters, {size:,} bytes")
    print(f"wrote {settings.dst}: {', '.join(written)}")
    print(f"next: python -m convert.from_meta {settings.dst} DST")


def _manifest(src: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the folder certifies about every tensor."""
    manifest = read_manifest(src)["tensors"]
    if missing := [name for name in names if name not in manifest]:
        raise InputError(
            f"{src / MANIFEST}: {len(missing)} tensors are missing, the first {missing[0]}; "
            f"convert the model again"
        )
    return manifest


def _mapped(tensor: np.ndarray, file: Path) -> torch.Tensor:
    """The tensor written to a file and mapped from there.

    `torch.save` wants all tensors at once; mapped ones cost address space, not memory.
    """
    tensor.tofile(file)
    dtype = next(torch_dtype for torch_dtype, known in DTYPES.items() if known == tensor.dtype)
    return torch.from_file(str(file), shared=False, size=tensor.size, dtype=dtype).view(
        tensor.shape
    )


def main(argv: Sequence[str] | None = None) -> None:
    jax.config.update("jax_platforms", "cpu")  # copying needs no GPU, and takes none
    run_command(export, ToMeta, argv, prog=PROG)


if __name__ == "__main__":
    main()
