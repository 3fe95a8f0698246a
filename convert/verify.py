"""Re-reads a model folder, says what is damaged, and proves that conversion changed nothing.

    python -m convert.verify models/llama-2-7b
    python -m convert.verify models/llama-2-7b --against ~/llama-2-7b

The source may be Meta's files, Hugging Face's, or another model folder. Exit code 2 if anything
differs.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from convert.blocks import Weights, as_stored, block_progress, refuse_if
from convert.hf.files import open_hf
from convert.meta.params import PARAMS, read_params
from convert.meta.weights import open_meta
from jllama.cli.command import run_command
from jllama.cli.terminal import console
from jllama.config import Base, LlamaConfig, tensor_shapes
from jllama.errors import InputError, checked
from jllama.folders.manifest import (
    MANIFEST,
    Entry,
    Manifest,
    certificate,
    check_file,
    read_manifest,
)
from jllama.folders.model import (
    BLOCKS,
    CONFIG,
    block_file,
    check_manifest,
    read_base,
    read_block,
    read_config,
    refuse_other_kinds,
)
from jllama.names import block_of
from jllama.text.tokenizer import load_tokenizer
from jllama.text.tokenizer_file import FILE_NAME


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
    if not (folder / MANIFEST).exists():
        raise InputError(f"{folder}: no {MANIFEST}; expected a model folder")
    manifest = read_manifest(folder)
    refuse_if(_damage(folder, manifest), folder, "damaged")
    console.print(
        f"{len(manifest['tensors'])} tensors and {len(manifest['files'])} files are whole"
    )
    if settings.against is not None:
        base = read_base(folder)
        compare(manifest["tensors"], read_config(folder), settings.against, base)


def _damage(folder: Path, manifest: Manifest) -> list[str]:
    """Everything in a model folder that is not as its manifest says."""
    problems: list[str] = []

    def checked_by(check: Callable[..., Any], *args: Any) -> Any:
        try:
            return check(*args)
        except InputError as error:
            problems.append(str(error))
            return None

    config = checked_by(read_config, folder)
    if config:
        checked_by(check_manifest, folder, config)
    checked_by(load_tokenizer, folder)
    for name in sorted(manifest["files"].keys() - {CONFIG, FILE_NAME}):
        checked_by(check_file, folder / name)
    blocks = list(dict.fromkeys(map(block_of, manifest["tensors"])))
    known = {block_file(folder, block) for block in blocks}
    for file in sorted(set((folder / BLOCKS).glob("*.safetensors")) - known):
        problems.append(f"{file}: not in {MANIFEST}; remove it")
    with block_progress("verifying", len(blocks)) as advance:
        for block in blocks:
            tensors = checked_by(read_block, folder, block) or {}
            advance(sum(tensor.nbytes for tensor in tensors.values()))
    return problems


def compare(
    certified: Mapping[str, Entry], config: LlamaConfig, source: Path, base: Base | None = None
) -> None:
    """Holds the certificates of a model folder against the tensors of its source.

    Where the source has another dtype, it is rounded to the certified one, as `--dtype` does; of a
    model in codes they are made again.

    Raises:
        InputError: the tensors that differ.
    """
    rounded: list[str] = []
    if (source / MANIFEST).exists():
        verify(Verify(source))
        stored, other = (x.words if x else "it came" for x in (base, read_base(source)))
        if stored != other:
            raise InputError(
                f"this folder is stored as {stored}, and {source} as {other}; give what both were "
                "made from, Meta's or Hugging Face's files"
            )
        found, theirs = read_manifest(source)["tensors"], read_config(source)
    else:
        weights = open_weights(source)
        theirs = weights.config
        found, rounded = certificates(weights, certified, base)
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
    if rounded:
        console.print(
            f"every tensor is that of {source}, {len(rounded)} of them rounded to another dtype"
        )
    else:
        console.print(f"every tensor is byte for byte that of {source}")


def open_weights(folder: Path) -> Weights:
    """Meta's or Hugging Face's files, told apart by their config."""
    refuse_other_kinds(folder)
    if (folder / CONFIG).exists() and not (folder / PARAMS).exists():
        return open_hf(folder)
    return open_meta(folder, read_params(folder / PARAMS))


def certificates(
    weights: Weights, certified: Mapping[str, Entry], base: Base | None
) -> tuple[dict[str, Entry], list[str]]:
    """What a model folder made from the weights would certify, and which tensors were rounded."""
    found: dict[str, Entry] = {}
    rounded: list[str] = []
    blocks = tensor_shapes(weights.config)
    with block_progress("comparing", len(blocks)) as advance:
        for names in blocks.values():
            tensors, _ = weights.read_block(names)
            asked = {
                name: np.dtype(certified[name]["dtype"]) if name in certified else tensor.dtype
                for name, tensor in tensors.items()
            }
            for name, kept in as_stored(tensors, asked, base).items():
                found[name] = certificate(kept)
            rounded += [name for name, tensor in tensors.items() if asked[name] != tensor.dtype]
            advance(sum(tensor.nbytes for tensor in tensors.values()))
    return found, rounded


def main(argv: Sequence[str] | None = None) -> None:
    run_command(verify, Verify, argv, name="verify", gpu=False)


if __name__ == "__main__":
    main()
