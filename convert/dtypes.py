"""Dtypes of published weights, and casts; torch's tensors as numpy's; mapped ones done with."""

import ctypes
import math
import mmap
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

import ml_dtypes
import numpy as np
import torch

from jllama.config import Base, LlamaConfig, tensor_shapes

DTYPES: Mapping[torch.dtype, type] = {
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float32: np.float32,
}
Dtype = Literal["bf16", "fp16", "fp32"]
BY_NAME: Mapping[str, np.dtype] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}
_MADV_PAGEOUT = 21  # of Linux 5.4; Python's mmap has no name for it


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same bytes as numpy, which has no bf16 of its own; a view where that is possible."""
    dtype = DTYPES[tensor.dtype]
    raw = tensor.contiguous()
    return raw.view(torch.int16).numpy().view(dtype) if dtype != np.float32 else raw.numpy()


def as_torch_dtype(dtype: np.dtype) -> torch.dtype:
    """numpy's dtype as torch's."""
    return next(theirs for theirs, ours in DTYPES.items() if np.dtype(ours) == dtype)


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """An array rounded once to a dtype, where too large numbers become infinite."""
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


class Stored:
    """A model's tensors as they are stored, in numbers and words.

    Args:
        dtypes: of every tensor, by Meta's names.
        base: the format of the linears, if they are stored in codes.
    """

    def __init__(
        self, config: LlamaConfig, dtypes: Mapping[str, np.dtype], base: Base | None = None
    ):
        shapes = {
            name: shape for block in tensor_shapes(config).values() for name, shape in block.items()
        }
        self.bytes = 0
        weights: Counter[str] = Counter()
        tensors: Counter[str] = Counter()
        for name, shape in shapes.items():
            kind: str
            if base is not None and base.holds(name):
                kind, size = base.format, base.bytes(shape)
            else:
                kind, size = dtypes[name].name, math.prod(shape) * dtypes[name].itemsize
            self.bytes += size
            weights[kind] += math.prod(shape)
            tensors[kind] += 1
        self.usual = weights.most_common(1)[0][0]
        others = [f"{tensors[kind]} tensors {kind}" for kind in weights if kind != self.usual]
        self.words = ", ".join(
            [f"{config.parameter_count:,} parameters", self.usual, *others,
             f"{self.bytes:,} bytes"]
        )  # fmt: skip


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity."""
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())  # both carry a NaN on


def forget(tensors: Iterable[torch.Tensor | np.ndarray]) -> None:
    """Takes tensors that are mapped from a file out of memory; they can be read again.

    On Linux also out of the page cache: what is written next finds their memory free, and other
    programs keep theirs.
    """
    libc = ctypes.CDLL(None)
    for tensor in tensors:
        first = tensor.data_ptr() if isinstance(tensor, torch.Tensor) else tensor.ctypes.data
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        place = ctypes.c_void_p(start), ctypes.c_size_t(first + tensor.nbytes - start)
        if libc.madvise(*place, _MADV_PAGEOUT):
            libc.madvise(*place, mmap.MADV_DONTNEED)
