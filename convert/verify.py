"""Re-reads a model folder, says what is damaged, and proves that conversion changed nothing.

    python -m convert.verify models/llama-2-7b
    python -m convert.verify models/llama-2-7b --against ~/llama-2-7b

The source may be Meta's files, Hugging Face's, or another model folder. Exit code 2 if anything
differs.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from convert.blocks import Weights, block_progress, refuse_if
from convert.hf.files import open_hf
from convert.meta.params import PARAMS, read_params
from convert.meta.weights import open_meta
from jllama.cli.command import run_command
from jllama.cli.terminal import console
from jllama.config import LlamaConfig, tensor_shapes
from jllama.errors import InputError, checked
from jllama.folders.manifest import MANIFEST, certificate, read_manifest
from jllama.folders.model import CONFIG, check_manifest, read_block, read_config
from jllama.text.tokenizer import load_tokenizer


@checked
class Verify:
    """Checks every byte of a model folder against its certificate."""

    model: Annotated[Positional[Path], arg(metavar="DIR")]
    """The model folder."""
    against: Annotated[Path | None, arg(metavar="SRC")] = None
    """What it was made from: Meta's files, Hugging Face's, or a model folder."""


def verify(settings: Verify) -> None:
    """Reads everything and reports.

    Raises:
        InputError: all that is damaged or differs, together.
    """
    folder = settings.model
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: no {MANIFEST}; expected a model folder")
    manifest = read_manifest(folder)
    config = read_config(folder)
    blocks = tensor_shapes(config)
    check_manifest(folder, blocks)
    problems: list[str] = []
    try:
        load_tokenizer(folder)
    except InputError as error:
        problems.append(str(error))
    with block_progress("verifying", len(blocks)) as advance:
        for block in blocks:
            size = 0
            try:
                size = sum(tensor.nbytes for tensor in read_block(folder, block).values())
            except InputError as error:
                problems.append(str(error))
            advance(size)
    refuse_if(problems, folder, "damaged")
    console.print(
        f"{len(manifest['tensors'])} tensors and {len(manifest['files'])} files are whole"
    )
    if settings.against is not None:
        compare(manifest["tensors"], config, settings.against)


def compare(certified: dict[str, Any], config: LlamaConfig, source: Path) -> None:
    """Holds the certificates of a model folder against the tensors of its source.

    Raises:
        InputError: the tensors that differ.
    """
    if (source / MANIFEST).is_file():
        verify(Verify(source))
        found, theirs = read_manifest(source)["tensors"], read_config(source)
    else:
        weights = open_weights(source)
        found, theirs = certificates(weights), weights.config
    problems = [
        f"{name}: {certified.get(name)}, the source has {found.get(name)}"
        for name in sorted(certified.keys() | found.keys())
        if certified.get(name) != found.get(name)
    ]
    refuse_if(problems, source, "these tensors differ from the model folder's")
    stated = dataclasses.asdict(theirs)
    for field, value in dataclasses.asdict(config).items():
        if value != stated[field]:
            console.print(f"note: {field} is {value}; {source} says {stated[field]}")
    console.print(f"every tensor is byte for byte that of {source}")


def open_weights(folder: Path) -> Weights:
    """Meta's or Hugging Face's files, told apart by their config."""
    if (folder / CONFIG).is_file() and not (folder / PARAMS).is_file():
        return open_hf(folder)
    return open_meta(folder, read_params(folder / PARAMS))


def certificates(weights: Weights) -> dict[str, Any]:
    """What a model folder made from the weights would certify."""
    found: dict[str, Any] = {}
    blocks = tensor_shapes(weights.config)
    with block_progress("comparing", len(blocks)) as advance:
        for names in blocks.values():
            tensors, _ = weights.read_block(names)
            found |= {name: certificate(tensor) for name, tensor in tensors.items()}
            advance(sum(tensor.nbytes for tensor in tensors.values()))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    run_command(verify, Verify, argv, name="verify", gpu=False)


if __name__ == "__main__":
    main()
