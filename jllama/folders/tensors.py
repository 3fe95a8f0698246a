"""safetensors files: written by several threads, which hash as they write, and mapped to be read.

    [length of the header, 8 bytes, little-endian] [header, JSON] [tensors]
    header  {"layers.0.attention.wq.weight":
             {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [0, 33554432]}, ...}

The library writes one tensor after the other, waits for the disk after each file and lets nobody
but the owner read it; on two cores a conversion took twice the time.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

_DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_PIECE = 2**22  # bytes hashed and written at a time, while they are in the processor's cache


def save_tensors(
    file: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    hashed: bool = True,
) -> dict[str, str]:
    """Writes a file that takes its name when it is whole; gives the sha256 of every tensor.

    Args:
        tensors: fp16, bf16 or fp32.
        metadata: texts for the header; readers of Hugging Face's want {"format": "pt"}.
        hashed: False for no hashes.
    """
    header: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):  # keeps all aligned
        tensor = tensors[name]
        offsets = [end, end + tensor.nbytes]
        code, shape = _CODES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    new = file.with_name(file.name + ".new")
    with new.open("wb") as content, ThreadPoolExecutor() as threads:
        number = content.fileno()
        write_at(number, len(text).to_bytes(8, "little") + text, 0)
        jobs = {
            name: threads.submit(
                _write, number, tensor, start + header[name]["data_offsets"][0], hashed
            )
            for name, tensor in tensors.items()
        }
        hashes = {name: job.result() for name, job in jobs.items()}
    new.replace(file)
    return hashes


def _write(file: int, tensor: np.ndarray, offset: int, hashed: bool) -> str:
    content = np.ascontiguousarray(tensor).view(np.uint8).reshape(-1).data
    digest = hashlib.sha256()
    for start in range(0, len(content), _PIECE):
        piece = content[start : start + _PIECE]
        if hashed:
            digest.update(piece)
        write_at(file, piece, offset + start)
    return digest.hexdigest() if hashed else ""


def write_at(file: int, content: bytes | memoryview, offset: int) -> None:
    """Writes all of it at a place of an open file, and has the kernel begin to put it on the disk.

    Else gigabytes wait in memory until somebody asks for them to be on the disk.
    """
    rest, place = memoryview(content), offset
    while rest:  # one call may write a part
        written = os.pwrite(file, rest, place)
        rest, place = rest[written:], place + written
    if hasattr(os, "posix_fadvise"):  # not on macOS; pages on their way to the disk stay in memory
        os.posix_fadvise(file, offset, len(content), os.POSIX_FADV_DONTNEED)


def map_tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, mapped: only what is read of them takes memory.

    Raises:
        safetensors.SafetensorError: if the header lies.
        KeyError: if a dtype is none of weights.
    """
    with safetensors.safe_open(file, "numpy"):
        pass  # checks the header
    raw = np.memmap(file, np.uint8, "r")
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, stored in header.items():
        begin, end = (start + offset for offset in stored["data_offsets"])
        tensors[name] = raw[begin:end].view(_DTYPES[stored["dtype"]]).reshape(stored["shape"])
    return tensors
