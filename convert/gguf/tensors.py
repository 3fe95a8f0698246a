"""Names, types and bytes of the tensors in a GGUF file.

llama.cpp's architecture `llama` rotates interleaved pairs (x[2i], x[2i+1]), as Meta and jllama do:
no row changes its place. Its converter only undoes what Hugging Face's order did.
"""

import math
import os
from collections.abc import Mapping, Sequence
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
from gguf.quants import quantize

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
    """A tensor as a file holds it, and whether all its numbers are finite.

    Q8_0 is a scale in F16 and 32 whole numbers of 8 bits for each 32 weights of a row.
    """
    if kind is _Q8_0:
        with np.errstate(over="ignore", invalid="ignore"):
            stored = quantize(tensor, kind)
        scales = stored.reshape(-1, GGML_QUANT_SIZES[kind][1])[:, :2].copy()
        return stored, is_finite(scales.view(np.float16))
    stored = np.ascontiguousarray(cast(tensor, _DTYPES[kind]))
    return stored, is_finite(stored)


class TensorFile:
    """A GGUF file whose header is written; its tensors follow one by one, in the order announced.

    Args:
        file: what to write.
        writer: with all that the header says, but for the tensors.
        tensors: by GGUF's names, their shapes and types.
    """

    def __init__(
        self,
        file: Path,
        writer: GGUFWriter,
        tensors: Mapping[str, tuple[Sequence[int], GGMLQuantizationType]],
    ):
        self._file, self._writer = file, writer
        self._types = {name: kind for name, (_, kind) in tensors.items()}
        for name, (shape, kind) in tensors.items():
            writer.add_tensor_info(name, shape, VECTORS, stored_bytes(shape, kind), kind)
        with naming(file):
            writer.write_header_to_file(file)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        assert writer.fout is not None
        self._number = writer.fout[0].fileno()
        self._place = self._aligned(writer.fout[0].tell())

    def put(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Writes the next tensors.

        Raises:
            InputError: naming those that would hold NaN or infinity.
        """
        not_finite = []
        for name, tensor in tensors.items():
            stored, finite = in_type(tensor, self._types[name])
            if not finite:
                not_finite.append(name)
                continue
            # GGUFWriter.write_tensor_data would lose the reason why the system refuses to write.
            with naming(self._file):
                write_at(self._number, stored.view(np.uint8).reshape(-1).data, self._place)
            self._place = self._aligned(self._place + stored.nbytes)
        refuse_not_finite(not_finite, self._file.name, wider="bf16 or f32")

    def close(self) -> None:
        """Ends the file, whose last tensor is padded as the others are."""
        with naming(self._file):
            os.ftruncate(self._number, self._place)
            self._writer.close()

    def _aligned(self, place: int) -> int:
        return GGUFWriter.ggml_pad(place, self._writer.data_alignment)
