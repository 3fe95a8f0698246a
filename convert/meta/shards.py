"""Meta's shards: mapped into memory, checked against params.json and each other.

consolidated.00.pth  layers.0.attention.wq.weight [N*H/2, D]  wo [D, N*H/2]  norm [D]  ...
consolidated.01.pth  layers.0.attention.wq.weight [N*H/2, D]  wo [D, N*H/2]  norm [D]  ...
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from convert.blocks import refuse_if
from convert.dtypes import DTYPES
from convert.meta.cuts import ROWS, cut_of, embeddings_cut, is_skipped, part_shape
from convert.meta.params import PARAMS, config_from_meta
from convert.meta.pickled import open_pickled
from jllama.config import LlamaConfig, tensor_shapes
from jllama.errors import InputError
from jllama.names import EMBEDDINGS, OUTPUT


class Shard(NamedTuple):
    """One file of a checkpoint: its name and its tensors, still on disk."""

    name: str
    tensors: Mapping[str, torch.Tensor]


def shard_files(folder: Path) -> list[Path]:
    """Meta's files of weights in their order."""
    return sorted(folder.glob("consolidated.*.pth"))


def open_shards(folder: Path) -> list[Shard]:
    """Maps consolidated.00.pth, consolidated.01.pth, ... without reading them.

    Raises:
        InputError: if a file is missing, unreadable, or holds anything but weights.
    """
    files = shard_files(folder)
    if not files:
        raise InputError(
            f"{folder}: no weights; expected Meta's consolidated.00.pth, ... and {PARAMS} here"
        )
    expected = [f"consolidated.{index:02d}.pth" for index in range(len(files))]
    if [file.name for file in files] != expected:
        found = ", ".join(file.name for file in files)
        raise InputError(
            f"{folder}: found {found}; expected {', '.join(expected)} without a gap; "
            f"copy the missing shards, or remove what is not one"
        )
    shards, problems = [], []
    for file in files:
        try:
            shards.append(Shard(file.name, open_pickled(file, "Meta's weights")))
        except InputError as error:
            problems.append(str(error))
    refuse_if(problems, folder, "not Meta's weights; download these files again")
    return shards


def checked_config(folder: Path, shards: Sequence[Shard], params: Mapping[str, Any]) -> LlamaConfig:
    """The config that tensors and params.json agree on; reads shapes, dtypes and norms only.

    Raises:
        InputError: if they contradict each other, or the shards do not belong together.
    """
    advice = f"the weights do not fit {PARAMS} or each other; copy all from one download"
    problems = list(_wrong_shard_count(shards, params["dim"]))
    refuse_if(problems, folder, advice)
    vocab_size, axis = _vocabulary(shards, params["dim"])
    stated = params.get("vocab_size", -1)
    if stated not in (-1, vocab_size):
        problems.append(f"{EMBEDDINGS} has {vocab_size} rows, expected vocab_size {stated}")
    try:
        config = config_from_meta(params, vocab_size, tied=_is_tied(shards, axis))
    except InputError as error:
        raise InputError(f"{folder / PARAMS}: {error}; copy it again") from error
    problems += _wrong_shapes(shards, config, axis)
    problems += _differing_dtypes(shards)
    problems += _differing_copies(shards)
    if problems:
        problems.insert(
            0,
            f"expected {len(shards)} shards of dim {config.dim}, {config.n_layers} layers, "
            f"{config.n_heads} heads, {config.n_kv_heads} kv heads, hidden {config.hidden_dim}",
        )
    refuse_if(problems, folder, advice)
    return config


def _wrong_shard_count(shards: Sequence[Shard], dim: int) -> Iterator[str]:
    """wq is [D, D] cut by rows, so its part tells how many shards there once were."""
    for shard in shards:
        part = shard.tensors.get("layers.0.attention.wq.weight")
        if part is None or part.ndim != 2 or part.shape[1] != dim or dim % max(1, len(part)):
            continue
        count = dim // len(part)
        if count != len(shards):
            yield f"{shard.name}: one of {count} shards, found {len(shards)} in all"


def _vocabulary(shards: Sequence[Shard], dim: int) -> tuple[int, int]:
    """Rows of the whole tok_embeddings, and the dimension in which it is cut."""
    for shard in shards:
        part = shard.tensors.get(EMBEDDINGS)
        if part is not None and part.ndim == 2:
            axis = embeddings_cut(part.shape[1], dim)
            return part.shape[0] * (len(shards) if axis == ROWS else 1), axis
    raise InputError(f"{shards[0].name}: no {EMBEDDINGS} matrix; these are not a LLaMA's weights")


def _is_tied(shards: Sequence[Shard], axis: int) -> bool:
    """Whether the head is the embedding: absent, or (Llama 3.2) a copy of it."""
    if not any(OUTPUT in shard.tensors for shard in shards):
        return True
    if not all(OUTPUT in shard.tensors and EMBEDDINGS in shard.tensors for shard in shards):
        return False
    heads = [shard.tensors[OUTPUT] for shard in shards]
    tables = [shard.tensors[EMBEDDINGS] for shard in shards]
    if len({part.shape for part in tables}) > 1 or len({x.dtype for x in (*tables, *heads)}) > 1:
        return False

    def equal(index: int, count: int | None) -> bool:
        head = heads[index][:count]
        if axis == ROWS:
            return torch.equal(tables[index][:count], head)
        rows = slice(index * len(heads[index]), index * len(heads[index]) + len(head))
        return torch.equal(torch.cat([table[rows] for table in tables], 1), head)

    # The first rows tell most models apart without reading two whole tables.
    return all(equal(index, count) for count in (1, None) for index in range(len(heads)))


def _wrong_shapes(shards: Sequence[Shard], config: LlamaConfig, axis: int) -> Iterator[str]:
    """Missing, unknown and misshapen tensors, file by file."""
    expected = {
        name: part_shape(shape, axis if name == EMBEDDINGS else cut_of(name), len(shards))
        for block in tensor_shapes(config).values()
        for name, shape in block.items()
    }
    for shard in shards:
        found = {name: tuple(tensor.shape) for name, tensor in shard.tensors.items()}
        if config.tied and OUTPUT in found:
            found.pop(OUTPUT)
        for name in sorted(found.keys() | expected.keys(), key=_natural):
            if name not in found:
                yield f"{shard.name}: {name} is missing, expected {list(expected[name])}"
            elif is_skipped(name):
                if found[name] != (config.head_dim // 2,):
                    yield (
                        f"{shard.name}: {name} is for heads of {2 * found[name][0]}, expected "
                        f"{config.head_dim} (dim {config.dim} / {config.n_heads} heads)"
                    )
            elif name not in expected:
                yield f"{shard.name}: {name} {list(found[name])} is unknown, expected no such one"
            elif found[name] != expected[name]:
                yield (
                    f"{shard.name}: {name} is {list(found[name])}, expected {list(expected[name])}"
                )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(word), "") if word.isdigit() else (0, word) for word in name.split(".")]


def _weights(shards: Iterable[Shard]) -> Iterator[tuple[str, str, torch.Tensor]]:
    for shard in shards:
        for name, tensor in shard.tensors.items():
            if not is_skipped(name):
                yield shard.name, name, tensor


def _differing_dtypes(shards: Sequence[Shard]) -> Iterator[str]:
    """Each tensor may have its own dtype, but one in all shards."""
    first = shards[0]
    for file, name, tensor in _weights(shards[1:]):
        other = first.tensors.get(name)
        if other is not None and tensor.dtype != other.dtype:
            found, expected = (np.dtype(DTYPES[x.dtype]).name for x in (tensor, other))
            yield f"{file}: {name} is {found}, expected {expected} as in {first.name}"


def _differing_copies(shards: Sequence[Shard]) -> Iterator[str]:
    first = shards[0]
    for file, name, tensor in _weights(shards[1:]):
        other = first.tensors.get(name)
        if tensor.ndim != 1 or other is None or tensor.dtype != other.dtype:
            continue
        if not torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)):
            yield f"{file}: {name} differs from {first.name}, expected equal copies"
