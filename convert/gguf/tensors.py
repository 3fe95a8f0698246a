"""Names, types and bytes of the tensors in a GGUF file.

llama.cpp's architecture `llama` rotates interleaved pairs (x[2i], x[2i+1]), as Meta and jllama do:
no row changes its place. Its converter only undoes what Hugging Face's order did.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    MODEL_TENSOR,
    TENSOR_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    get_tensor_name_map,
)
from gguf.gguf_writer import WriterState

from convert.dtypes import cast
from jllama.folders.json_files import naming
from jllama.folders.tensors import is_finite, refuse_not_finite, write_at

GgufDtype = Literal["f16", "bf16", "f32", "q8_0"]
# What a merged matrix is rounded to; q8_0 makes its 8 bits of that.
BY_NAME: Mapping[str, np.dtype] = {
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
    "q8_0": np.dtype(np.float32),
}
VECTORS = np.dtype(np.float32)  # llama.cpp multiplies by norms in F32 only
ARCHITECTURE = MODEL_ARCH_NAMES[MODEL_ARCH.LLAMA]
ROTARY_FACTORS = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"

_PIECE = 2**19  # numbers rounded and written at a time, while they are in the processor's cache
_Q8_0 = GGMLQuantizationType.Q8_0
_DTYPES = {
    GGMLQuantizationType.F16: BY_NAME["f16"],
    GGMLQuantizationType.BF16: BY_NAME["bf16"],
    GGMLQuantizationType.F32: BY_NAME["f32"],
}
_TYPES = {dtype: ggml_type for ggml_type, dtype in _DTYPES.items()}


def gguf_names(names: Sequence[str], n_layers: int) -> dict[str, str]:
    """Meta's name -> GGUF's: layers.0.attention.wq.weight -> blk.0.attn_q.weight."""
    table = get_tensor_name_map(MODEL_ARCH.LLAMA, n_layers)
    return {name: str(table.get_name(name, try_suffixes=(".weight",))) for name in names}


def ggml_type(shape: Sequence[int], dtype: np.dtype, asked: str | None) -> GGMLQuantizationType:
    """The type of a tensor; of a matrix in q8_0 whose rows are no whole blocks it is F16."""
    if asked == "q8_0" and len(shape) > 1:
        block, _ = GGML_QUANT_SIZES[_Q8_0]
        return GGMLQuantizationType.F16 if shape[-1] % block else _Q8_0
    return _TYPES[dtype]


def stored_bytes(shape: Sequence[int], kind: GGMLQuantizationType) -> int:
    """Of a tensor in a file, without what aligns the next one."""
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size


def in_type(tensor: np.ndarray, kind: GGMLQuantizationType) -> tuple[np.ndarray, bool]:
    """A tensor as a file holds it, and whether all its numbers are finite."""
    if kind is _Q8_0:
        blocks = _in_q8_0(tensor)
        return blocks, is_finite(blocks[:, :2].copy().view(np.float16))
    stored = np.ascontiguousarray(cast(tensor, _DTYPES[kind]))
    return stored, is_finite(stored)


def _in_q8_0(tensor: np.ndarray) -> np.ndarray:
    """A scale in F16 and 32 whole numbers of 8 bits for each 32 weights of a row, uint8 `[N, 34]`.

    Bit for bit those of ggml's quantize_row_q8_0_ref and of `gguf.quantize`, which takes four times
    as long. The largest of 32 is sought in columns; halves are rounded away from zero.
    """
    block, size = GGML_QUANT_SIZES[_Q8_0]
    scaled = tensor.astype(np.float32).reshape(-1, block)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.abs(scaled).T.copy().max(0) / np.float32(127)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        scaled *= inverse[:, None]
        whole = np.trunc(scaled)
        scaled -= whole
        scaled += scaled  # a half or more is one or more now
        whole += np.trunc(scaled, out=scaled)
        found = np.empty((len(scale), size), np.uint8)
        found[:, :2] = scale.astype(np.float16)[:, None].view(np.uint8)
        found[:, 2:] = whole.astype(np.int8).view(np.uint8)
    return found


class TensorFile:
    """A GGUF file: `begin`, the tensors in the order announced, `finish`, `close`.

    What an interrupted export has left in the file stays where it is equal, byte for byte, and is
    written over elsewhere.

    Args:
        file: what to write; it exists.
        writer: with all that the header says, but for the tensors.
        tensors: by GGUF's names, their shapes and types.
    """

    def __init__(
        self,
        file: Path,
        writer: GGUFWriter,
        tensors: Mapping[str, tuple[Sequence[int], GGMLQuantizationType]],
    ):
        self._file, self._alignment = file, writer.data_alignment
        self._types = {name: kind for name, (_, kind) in tensors.items()}
        for name, (shape, kind) in tensors.items():
            writer.add_tensor_info(name, shape, VECTORS, stored_bytes(shape, kind), kind)
        header = io.BytesIO()  # a file, GGUFWriter would empty first
        writer.fout, writer.state = [header], WriterState.EMPTY  # type: ignore[list-item]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        self._header = header.getvalue()
        self._number = os.open(file, os.O_RDWR)
        self._begun = os.fstat(self._number).st_size
        self._place = 0

    def begin(self) -> None:
        """Writes the header."""
        with naming(self._file):
            self._write(np.frombuffer(self._header, np.uint8), 0)
            self._end(len(self._header))

    def put(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Writes the next tensors, each rounded once to its type.

        Raises:
            InputError: naming those that would hold NaN or infinity.
        """
        with naming(self._file), ThreadPoolExecutor() as threads:
            jobs = {}
            for name, tensor in tensors.items():
                kind, rows = self._types[name], tensor.reshape(-1, tensor.shape[-1])
                step = max(1, _PIECE // rows.shape[1])
                size = stored_bytes(rows.shape[1:], kind)
                jobs[name] = [
                    threads.submit(
                        self._round, rows[start : start + step], kind, self._place + start * size
                    )
                    for start in range(0, len(rows), step)
                ]
                self._end(self._place + len(rows) * size)
            found = {name: [job.result() for job in parts] for name, parts in jobs.items()}
        not_finite = [name for name, finite in found.items() if not all(finite)]
        refuse_not_finite(not_finite, self._file.name, wider="bf16 or f32")

    def finish(self) -> None:
        """Ends the file behind the last tensor."""
        with naming(self._file):
            os.ftruncate(self._number, self._place)

    def close(self) -> None:
        os.close(self._number)

    def _round(self, rows: np.ndarray, kind: GGMLQuantizationType, place: int) -> bool:
        """Whether they are finite, and so were written."""
        stored, finite = in_type(rows, kind)
        if finite:
            self._write(stored.view(np.uint8).reshape(-1), place)
        return finite

    def _write(self, content: np.ndarray, place: int) -> None:
        if place + len(content) <= self._begun:
            there = np.frombuffer(os.pread(self._number, len(content), place), np.uint8)
            if np.array_equal(there, content):
                return
        write_at(self._number, content.data, place)

    def _end(self, place: int) -> None:
        """Fills up to where the next tensor may begin."""
        self._place = GGUFWriter.ggml_pad(place, self._alignment)
        if self._place > place:
            self._write(np.zeros(self._place - place, np.uint8), place)
