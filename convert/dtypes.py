"""The dtypes of published weights; torch's tensors as numpy's; mapped ones that are done with."""

import ctypes
import mmap
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
import torch

DTYPES: Mapping[torch.dtype, type] = {
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float32: np.float32,
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
