"""How fast weights are converted and in how much memory, beside `cp` of the same bytes.

    python -m convert.speed --output docs/results/convert-cpu.json

Makes a synthetic checkpoint in Meta's format for each number of shards, and converts it in, out,
to Hugging Face's format and in again; and what an export computes: an adapter merged in, other
types in GGUF. Each conversion is a process of its own; its clock and its
memory begin when everything is imported. `cp` of what it reads runs before it. Each finds what it
made the last time removed, what it reads in the page cache, and an idle disk. Times are until all
bytes are on the disk, where a conversion sees to that itself and cp is followed by sync. The ratios
are those of the medians.
"""

import base64
import dataclasses
import itertools
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from pydantic import Field

from convert.dtypes import as_numpy
from convert.meta.archive import Archive
from convert.meta.params import PARAMS, meta_params
from convert.to_meta import cut_axis, even_part
from jllama.cli import children
from jllama.cli.command import run_command
from jllama.cli.terminal import console
from jllama.config import LlamaConfig, LoraConfig, tensor_shapes
from jllama.errors import AtLeast1, Positive, checked
from jllama.folders.adapter import PEFT_CONFIG, WEIGHTS, peft_settings
from jllama.folders.files import room_for
from jllama.folders.json_files import write_json
from jllama.folders.tensors import save_tensors
from jllama.machine import measured_here
from jllama.names import peft_name
from jllama.text.tokenizer import FILE_NAME
from jllama.text.tokenizer_file import LLAMA3_SPECIALS

_LLAMA = LlamaConfig(2048, 1, 16, 16, 5632, 32000)  # the layers are counted to fill the size
_MIB = 2**20


@checked
class ConvertSpeed:
    """Times conversions of a synthetic checkpoint, and `cp` of the same bytes."""

    gigabytes: Positive = 2.0
    """Size of the checkpoint, bf16."""
    shards: Annotated[tuple[AtLeast1, ...], Field(min_length=1)] = (1, 4)
    """In how many files the checkpoint comes; every number is measured."""
    repeats: AtLeast1 = 5
    """Times that each conversion runs."""
    place: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Folder for the files, about five times their size; by default one of the system's."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """JSON file for the figures."""


def measure(settings: ConvertSpeed) -> None:
    """Measures every conversion, and shows and writes the figures."""
    empty = dataclasses.replace(_LLAMA, n_layers=1)
    layer = sum(_bytes(shape) for shape in tensor_shapes(empty)["layers.0"].values())
    rest = 2 * empty.parameter_count - layer
    layers = max(1, round((1e9 * settings.gigabytes - rest) / layer))
    config = dataclasses.replace(_LLAMA, n_layers=layers)
    largest = max(sum(map(_bytes, names.values())) for names in tensor_shapes(config).values())
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=settings.place or None) as name:
        place = Path(name)
        with room_for(5 * 2 * config.parameter_count, place / "files"):
            for shards in settings.shards:
                figures[f"{shards} shards"] = _round_trip(place, config, shards, settings.repeats)
            figures["exports"] = _exports(place / "exports", config, settings.repeats)
    for title, ways in figures.items():
        for way, figure in ways.items():
            figure["peak_beyond_imports_and_two_blocks_mib"] = (
                figure["peak_mib"] - figure["imports_mib"] - 2 * largest / _MIB
            )
            console.print(
                f"{title}, {way}: {figure['seconds']:.2f} s, {figure['ratio_to_cp']:.2f}x cp; peak "
                f"{figure['peak_mib']:,.0f} MiB, of which imports {figure['imports_mib']:,.0f}; "
                f"the largest block has {largest / _MIB:,.0f}"
            )
    if settings.output:
        packages = ("torch", "safetensors", "numpy", "jax", "gguf")
        content = {
            **measured_here("speed-convert", packages),
            "settings": dataclasses.asdict(settings),
            "bytes": 2 * config.parameter_count,
            "largest_block_mib": largest / _MIB,
            "figures": figures,
        }
        write_json(Path(settings.output), content)
        console.print(f"wrote {settings.output}")


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def _round_trip(place: Path, config: LlamaConfig, shards: int, repeats: int) -> dict[str, Any]:
    """Meta -> model -> Meta, model -> Hugging Face -> model; the first files are made here."""
    folder = place / f"{shards}"
    _write_synthetic(folder / "meta", config, shards)
    cut = ["--shards", str(shards)]
    ways: dict[str, tuple[str, str, str, list[str]]] = {
        "in from Meta": ("from_meta", "meta", "model", []),
        "out to Meta": ("to_meta", "model", "meta-again", cut),
        "out to Hugging Face": ("to_hf", "model", "hf", []),
        "in from Hugging Face": ("from_hf", "hf", "model-again", []),
    }
    figures = {}
    for way, (module, source, destination, more) in ways.items():
        figures[way] = _timed(module, folder / source, folder / destination, more, repeats)
    shutil.rmtree(folder)
    return figures


def _exports(folder: Path, config: LlamaConfig, repeats: int) -> dict[str, Any]:
    """Out of a model folder, with what is computed on the way."""
    _write_synthetic(folder / "meta", config, 1)
    children.run("convert.from_meta", [folder / "meta", folder / "model"])
    shutil.rmtree(folder / "meta")
    _write_adapter(folder / "adapter", config)
    merged = ["--adapter", str(folder / "adapter")]
    ways: dict[str, tuple[str, str, list[str]]] = {
        "to GGUF": ("to_gguf", "m.gguf", []),
        "to GGUF in f16": ("to_gguf", "m.gguf", ["--dtype", "f16"]),
        "to GGUF in q8_0": ("to_gguf", "m.gguf", ["--dtype", "q8_0"]),
        "to GGUF, merged": ("to_gguf", "m.gguf", merged),
        "to Hugging Face, merged": ("to_hf", "hf", merged),
    }
    figures = {
        way: _timed(module, folder / "model", folder / "out" / name, more, repeats)
        for way, (module, name, more) in ways.items()
    }
    shutil.rmtree(folder)
    return figures


def _timed(
    module: str, source: Path, destination: Path, more: list[str], repeats: int
) -> dict[str, Any]:
    copy = source.with_name("copy")
    copies, runs = [], []
    destination.parent.mkdir(exist_ok=True)
    for _ in range(repeats):
        _read_all(source)
        started = time.monotonic()
        subprocess.run(["cp", "-r", source, copy], check=True)
        os.sync()
        copies.append(time.monotonic() - started)
        shutil.rmtree(copy)
        _remove(destination)
        _read_all(source)
        arguments = [module, str(source), str(destination), json.dumps(more)]
        runs.append(json.loads(children.run("convert.speed.side", arguments).splitlines()[-1]))
    seconds = statistics.median(run["seconds"] for run in runs)
    return {
        "seconds": seconds,
        "cp_seconds": statistics.median(copies),
        "ratio_to_cp": seconds / statistics.median(copies),
        "peak_mib": max(run["peak_mib"] for run in runs),
        "imports_mib": statistics.median(run["imports_mib"] for run in runs),
        "runs": runs,
        "copies": copies,
    }


def _remove(destination: Path) -> None:
    """A folder, or a GGUF file and what lies beside it."""
    if destination.is_dir():
        shutil.rmtree(destination)
    else:
        for file in (destination, destination.with_suffix(".Modelfile")):
            file.unlink(missing_ok=True)


def _read_all(folder: Path) -> None:
    """Brings a folder's files into the page cache, which a conversion takes them out of again."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as content:
                while content.read(2**24):
                    pass
    os.sync()


def _write_synthetic(folder: Path, config: LlamaConfig, shards: int) -> None:
    """Random bf16 weights in Meta's files, with a tokenizer of one and two bytes a token."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    names = {k: shape for block in tensor_shapes(config).values() for k, shape in block.items()}
    axes = {name: cut_axis(name, config) for name in names}
    parts = {name: even_part(name, shape, axes[name], shards) for name, shape in names.items()}
    dtypes = dict.fromkeys(parts, torch.bfloat16)
    for index in range(shards):
        archive = Archive(folder / f"consolidated.{index:02d}.pth", parts, dtypes, {})
        for name, shape in parts.items():
            values = (
                torch.randn(shape, generator=draw) if axes[name] is not None else torch.ones(shape)
            )
            archive.put(name, as_numpy(values.bfloat16()))
        archive.close()
    write_json(folder / PARAMS, meta_params(config))
    letters = [bytes([byte]) for byte in range(256)]
    tokens = [*letters, *map(b"".join, itertools.product(letters, letters))]
    tokens = tokens[: config.vocab_size - len(LLAMA3_SPECIALS)]
    ranks = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (folder / FILE_NAME).write_bytes(b"".join(ranks))


def _write_adapter(folder: Path, config: LlamaConfig) -> None:
    """A PEFT folder of rank 16 on wq and wv, as another tool would write it."""
    draw, lora = np.random.default_rng(0), LoraConfig()
    folder.mkdir()
    tensors = {
        peft_name(name): np.float32(0.01) * draw.standard_normal(shape, np.float32)
        for name, shape in lora.shapes(config).items()
    }
    save_tensors(folder / WEIGHTS, tensors, {"format": "pt"}, hashed=False)
    write_json(folder / PEFT_CONFIG, peft_settings(lora, "synthetic"))


def main(argv: Sequence[str] | None = None) -> None:
    run_command(measure, ConvertSpeed, argv, name="speed-convert", gpu=False)


if __name__ == "__main__":
    main()
