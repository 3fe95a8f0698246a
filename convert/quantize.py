"""A model folder's linears stored in 8 or 4 bits, and what that costs each layer.

    python -m convert.quantize models/llama-2-7b models/llama-2-7b-int4 --base int4

The same folder is made by `from-meta` and `from-hf` with `--base`, without the report: two streams
of probe prompts go through the blocks in fp32, one through the weights as they were and one
through those that are stored, and each layer is shown with the errors of its weights and of what
comes out of it.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
from tyro.conf import Positional, arg

from convert.blocks import to_model_folder
from convert.change.probe import Probe
from jllama.cli.command import run_command
from jllama.cli.terminal import command_line, console, print_json, quiet_if, show_table
from jllama.config import Base, BaseSkip, Format, LlamaConfig, asked_base, tensor_shapes
from jllama.errors import InputError, checked
from jllama.folders.codes import matrix_of
from jllama.folders.files import check_destination
from jllama.folders.manifest import read_manifest
from jllama.folders.model import block_file, check_manifest, read_base, read_block, read_config
from jllama.names import block_of
from jllama.text.tokenizer import tokenizer_files


@checked
class Quantize:
    """Stores the linears of a model folder in 8 or 4 bits, and reports what that costs."""

    src: Annotated[Positional[Path], arg(metavar="DIR")]
    """The model folder."""
    dst: Annotated[Positional[Path], arg(metavar="DST")]
    """The model folder to make."""
    base: Format = "int4"
    """The format: int8, int4, or nf4 (bitsandbytes')."""
    base_skip: BaseSkip = "none"
    """Linears that stay as they are."""
    json: bool = False
    """Print the report as one JSON object."""


@dataclass(frozen=True)
class FolderWeights:
    """A model folder as a source (`convert.blocks.Weights`): what it has is certified."""

    folder: Path
    config: LlamaConfig
    base: None = None

    @functools.cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        tensors = read_manifest(self.folder)["tensors"]
        return {name: np.dtype(entry["dtype"]) for name, entry in tensors.items()}

    @property
    def source(self) -> str:
        return read_manifest(self.folder)["source"]

    @property
    def transformers_name(self) -> str | None:
        return read_manifest(self.folder).get("transformers_name")

    @functools.cached_property
    def files(self) -> list[Path]:
        return [block_file(self.folder, block) for block in tensor_shapes(self.config)]

    def read_block(self, names: Iterable[str]) -> tuple[dict[str, np.ndarray], list[str]]:
        (block,) = {block_of(name) for name in names}
        return read_block(self.folder, block), []


class Report:
    """Errors of every layer, from the blocks that pass in their order."""

    def __init__(self, model: Path, base: Base):
        self._probe, self._base = Probe(model), base
        self.layers: list[dict[str, Any]] = []

    def __call__(
        self, block: str, tensors: Mapping[str, np.ndarray], stored: Mapping[str, np.ndarray]
    ) -> None:
        if block == "embeddings":
            rows = jnp.asarray(tensors["tok_embeddings.weight"][self._probe.tokens], jnp.float32)
            self._probe.streams = {"original": rows, "stored": rows}
            return
        if block == "head":
            return
        before = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
        after = dict(before)
        for name in filter(self._base.holds, before):
            rows, width = before[name].shape
            after[name] = matrix_of(name, stored, (rows, width), self._base)
        self._probe.run("original", self._probe.layer(block, before))
        self._probe.run("stored", self._probe.layer(block, after))
        changed = list(filter(self._base.holds, before))
        self.layers.append({
            "layer": block,
            "weights": relative_error(*(np.concatenate([x[n].ravel() for n in changed])
                                        for x in (after, before))),
            "outputs": relative_error(*(np.asarray(self._probe.streams[who])
                                        for who in ("stored", "original"))),
        })  # fmt: skip


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected|."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def quantize(settings: Quantize) -> None:
    """Makes the model folder, whole or not at all, and shows the report.

    Raises:
        InputError: if the source is damaged, in codes already, or the disk is too small.
    """
    check_destination(settings.dst)
    src, config = settings.src, read_config(settings.src)
    check_manifest(src, config)
    if (stored := read_base(src)) is not None:
        raise InputError(f"{src} is stored as {stored.words} already; give the original")
    base = asked_base(settings.base, settings.base_skip)
    assert base is not None
    tokenizer = tokenizer_files(src)
    report = Report(src, base)
    with quiet_if(settings.json):
        to_model_folder(
            FolderWeights(src, config), tokenizer, src, settings.dst, None, base, report
        )
    if settings.json:
        print_json({"base": base.entry, "layers": report.layers})
        return
    show_table(
        ("", "error of the weights", "of the outputs"),
        [
            (row["layer"], f"{100 * row['weights']:.2f} %", f"{100 * row['outputs']:.2f} %")
            for row in report.layers
        ],
        f"{base.words}, against the weights as they were: relative errors, the outputs after "
        "each layer for probe text",
    )
    console.print("next: " + command_line("train", "--model", settings.dst, "--data", "FILE"))


def main(argv: Sequence[str] | None = None) -> None:
    run_command(quantize, Quantize, argv, name="quantize", gpu=False)


if __name__ == "__main__":
    main()
