"""Meta's files as weights to convert: whole tensors, one block in memory at a time."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.dtypes import DTYPES, as_numpy, forget, is_finite
from convert.meta.cuts import REPLICATED, cut_of, embeddings_cut
from convert.meta.shards import Shard, checked_config, open_shards
from jllama.config import LlamaConfig, tensor_shapes
from jllama.names import EMBEDDINGS


@dataclass(frozen=True)
class MetaWeights:
    """Meta's files, opened and checked (`convert.blocks.Weights`)."""

    folder: Path
    shards: Sequence[Shard]
    config: LlamaConfig
    transformers_name: None = None  # it does not read Meta's files
    base: None = None
    _last: list[str] = field(default_factory=list)  # names in the block that was read last

    @property
    def source(self) -> str:
        return f"Meta's files in {self.folder.resolve().name}"

    @functools.cached_property
    def dtypes(self) -> dict[str, np.dtype]:
        first = self.shards[0].tensors
        blocks = tensor_shapes(self.config).values()
        return {name: np.dtype(DTYPES[first[name].dtype]) for names in blocks for name in names}

    @property
    def files(self) -> list[Path]:
        return [self.folder / shard.name for shard in self.shards]

    def read_block(self, names: Iterable[str]) -> tuple[dict[str, np.ndarray], list[str]]:
        """Whole tensors in the dtype stored, and what is not finite in them.

        They live until the next call, which puts its own into the same memory.
        """
        for shard in self.shards:
            forget(shard.tensors[name] for name in self._last)
        names, jobs = list(names), []
        room = self._room
        self._last[:] = names
        with ThreadPoolExecutor() as threads:
            for name in names:
                size = sum(shard.tensors[name].nbytes for shard in self.shards)
                part = room[:size].view(self.dtypes[name])
                jobs.append(threads.submit(self._join, name, part))
                room = room[_aligned(size) :]
        joined = [job.result() for job in jobs]
        return (
            {name: array for name, (array, _) in zip(names, joined, strict=True)},
            [problem for _, problems in joined for problem in problems],
        )

    @functools.cached_property
    def _room(self) -> np.ndarray:
        """Memory for the joined tensors of any one block; untouched where nothing is joined."""
        largest = max(
            sum(
                _aligned(sum(shard.tensors[name].nbytes for shard in self.shards)) for name in names
            )
            for names in tensor_shapes(self.config).values()
        )
        return np.empty(largest, np.uint8)

    def _join(self, name: str, room: np.ndarray) -> tuple[np.ndarray, list[str]]:
        parts = [shard.tensors[name] for shard in self.shards]
        problems = [
            f"{shard.name}: {name} holds NaN or infinity, expected finite"
            for shard, part in zip(self.shards, parts, strict=True)
            if not is_finite(part)
        ]
        columns = parts[0].shape[-1]
        axis = embeddings_cut(columns, self.config.dim) if name == EMBEDDINGS else cut_of(name)
        arrays = [as_numpy(part) for part in parts]
        if axis is REPLICATED or len(arrays) == 1:
            return arrays[0], problems
        shape = list(arrays[0].shape)
        shape[axis] *= len(arrays)
        return np.concatenate(arrays, axis, out=room.reshape(shape)), problems


def _aligned(size: int) -> int:
    """Bytes up to where a number of any dtype may begin."""
    return -(-size // 8) * 8


def open_meta(folder: Path, params: Mapping[str, Any]) -> MetaWeights:
    """Meta's weights, after all checks that shapes and params.json allow.

    Raises:
        InputError: if files are missing or damaged, or contradict each other.
    """
    shards = open_shards(folder)
    config = checked_config(folder, shards, params)
    return MetaWeights(folder, shards, config)
