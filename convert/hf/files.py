"""Hugging Face's weights: checked against config.json, read one block at a time.

Hugging Face turns the rotary pairs (x[i], x[i + H/2]) where Meta turns (x[2i], x[2i+1]), so the
rows of q and k change their order on the way in. Linears may be in bitsandbytes' nf4
(`convert.hf.bitsandbytes`).
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from convert.blocks import refuse_if
from convert.dtypes import as_numpy, forget, is_finite
from convert.hf import bitsandbytes
from convert.hf.config import config_from_hf
from convert.hf.stored import Stored, stored_tensors
from convert.meta.cuts import is_skipped
from jllama.config import Base, LlamaConfig, tensor_shapes
from jllama.folders.json_files import read_json
from jllama.folders.model import CONFIG
from jllama.folders.tensors import DTYPES
from jllama.layers import to_interleaved
from jllama.names import EMBEDDINGS, OUTPUT, block_of, hf_name


@dataclass(frozen=True)
class HfWeights:
    """A Hugging Face folder, opened and checked (`convert.blocks.Weights`)."""

    folder: Path
    config: LlamaConfig
    stored: Mapping[str, Stored]  # by Hugging Face's names
    base: Base | None = None  # the format of the linears
    _last: list[torch.Tensor] = field(default_factory=list)  # of the block that was read last

    @property
    def source(self) -> str:
        return f"Hugging Face's files in {self.folder.resolve().name}"

    @property
    def transformers_name(self) -> str:
        """The hub's name in its cache (models--NAME/snapshots/REVISION), else the folder.

        `_name_or_path` in config.json does not tell: in a fine-tuned model it names its base.
        """
        path = self.folder.resolve()
        repository = path.parent.parent.name
        if path.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/")
        return str(path)

    @functools.cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        blocks = tensor_shapes(self.config).values()
        return {
            name: DTYPES[self.stored[hf_name(name)].dtype]
            for names in blocks
            for name in names
            if self.base is None or not self.base.holds(name)
        }

    @property
    def files(self) -> list[Path]:
        return sorted({at.file for at in self.stored.values()})

    def read_block(self, names: Iterable[str]) -> tuple[dict[str, np.ndarray], list[str]]:
        """Tensors under Meta's names, in Meta's order of rows, and what is not finite in them."""
        forget(self._last)
        self._last.clear()
        read: dict[str, np.ndarray] = {}
        problems: list[str] = []
        for name in names:
            theirs = hf_name(name)
            if self.base is not None and self.base.holds(name):
                read |= self._read_codes(name, problems)
                continue
            tensor = self.stored[theirs].read()
            if not is_finite(tensor):
                file = self.stored[theirs].file
                problems.append(f"{file.name}: {theirs} holds NaN or infinity, expected finite")
            heads = self.config.rotary_heads(name.removesuffix(".weight"))
            array = as_numpy(tensor)
            self._last.append(tensor)
            read[name] = to_interleaved(array, heads) if heads else array
        return read, problems

    def _read_codes(self, name: str, problems: list[str]) -> dict[str, np.ndarray]:
        """The arrays of a linear in codes, by their names in a model folder."""

        def tensor(theirs: str) -> np.ndarray | None:
            if theirs not in self.stored:
                return None
            found = self.stored[theirs].read()
            self._last.append(found)
            return found.numpy()

        rows, width = tensor_shapes(self.config)[block_of(name)][name]
        heads = self.config.rotary_heads(name.removesuffix(".weight"))
        parts = bitsandbytes.read(hf_name(name), (rows, width), heads, tensor)
        if not np.isfinite(parts["absmax"]).all():
            problems.append(f"{hf_name(name)}.absmax holds NaN or infinity, expected finite")
        return {f"{name}.{part}": array for part, array in parts.items()}


def open_hf(folder: Path) -> HfWeights:
    """A Hugging Face folder's weights, after all checks that its headers and config.json allow.

    Raises:
        InputError: if files are missing, damaged or hostile, or contradict each other.
    """
    config = config_from_hf(folder / CONFIG)
    stored, base = stored_tensors(folder), None
    if read_json(folder / CONFIG).get("quantization_config") is not None:
        base = bitsandbytes.base_of_names(stored, config)
    problems = list(_wrong_tensors(stored, config, base))
    if not problems and config.tied and hf_name(OUTPUT) in stored:
        head, table = (stored[hf_name(name)].read() for name in (OUTPUT, EMBEDDINGS))
        if head.dtype != table.dtype or not torch.equal(head, table):
            problems.append(
                f"{hf_name(OUTPUT)} differs from {hf_name(EMBEDDINGS)}, expected a copy"
            )
    refuse_if(problems, folder, f"the weights do not fit {CONFIG}; copy all from one download")
    return HfWeights(folder, config, stored, base)


def _wrong_tensors(
    stored: Mapping[str, Stored], config: LlamaConfig, base: Base | None
) -> Iterator[str]:
    """Missing, unknown and misshapen tensors, and dtypes that are none of weights."""
    expected: dict[str, tuple[int, ...]] = {}
    codes: set[str] = set()
    for block in tensor_shapes(config).values():
        for name, shape in block.items():
            if base is None or not base.holds(name):
                expected[hf_name(name)] = shape
                continue
            parts = bitsandbytes.expected_parts(hf_name(name), shape, stored)
            expected |= parts
            codes |= {hf_name(name), f"{hf_name(name)}.{bitsandbytes.STATE}"}
            if f"{hf_name(name)}.nested_absmax" in parts:
                codes.add(f"{hf_name(name)}.absmax")
    if config.tied and hf_name(OUTPUT) in stored:
        expected[hf_name(OUTPUT)] = (config.vocab_size, config.dim)
    states = {name for name in codes if name.endswith(bitsandbytes.STATE)}
    found = {name: at for name, at in stored.items() if not is_skipped(name) and name not in states}
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            yield f"{name} is missing, expected {list(expected[name])}"
            continue
        file, shape, dtype = found[name].file.name, found[name].shape, found[name].dtype
        if name not in expected:
            yield f"{file}: {name} {list(shape)} is unknown, expected no such one"
        elif shape != expected[name]:
            yield f"{file}: {name} is {list(shape)}, expected {list(expected[name])}"
        elif name in codes:
            if dtype != "U8":
                yield f"{file}: {name} is {dtype}, expected U8"
        elif dtype not in DTYPES:
            yield f"{file}: {name} is {dtype}, expected {', '.join(DTYPES)}"
