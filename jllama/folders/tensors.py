"""safetensors files: written by several threads, which hash as they write, and mapped to be read.

    [length of the header, 8 bytes, little-endian] [header, JSON] [tensors]
    header  {"layers.0.attention.wq.weight":
             {"dtype": "BF16", "shape": [4096, 4096], "data_offsets": [0, 33554432]}, ...}

The library writes one tensor after the other, waits for the disk after each file and lets nobody
but the owner read it; on two cores a conversion took twice the time. Here a file holds finite
numbers only: NaN and infinity are refused while they are written.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from jllama.errors import InputError
from jllama.folders.inputs import check_readable, unreadable
from jllama.folders.json_files import NEW, SHOWN, naming

DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F32": np.dtype(np.float32),
    }
)
# A block may also hold weights in 8 and 4 bits.
WITH_CODES: Mapping[str, np.dtype] = MappingProxyType(
    {**DTYPES, "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8)}
)
_NAMES = {dtype: name for name, dtype in WITH_CODES.items()}
# Of a number that is not finite all bits of the exponent are set.
_EXPONENTS: Mapping[np.dtype, int] = {
    DTYPES["F16"]: 0x7C00,
    DTYPES["BF16"]: 0x7F80,
    DTYPES["F32"]: 0x7F800000,
}
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
        tensors: fp16, bf16 or fp32; int8 or uint8.
        metadata: texts for the header; readers of Hugging Face's want {"format": "pt"}.
        hashed: False for no hashes.

    Raises:
        InputError: naming the tensors that hold NaN or infinity.
    """
    header: dict[str, dict] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in sorted(tensors, key=lambda name: -tensors[name].itemsize):  # keeps all aligned
        tensor = tensors[name]
        offsets = [end, end + tensor.nbytes]
        code, shape = _NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    new = file.with_name(file.name + NEW)
    with naming(file), new.open("wb") as content, ThreadPoolExecutor() as threads:
        number = content.fileno()
        write_at(number, len(text).to_bytes(8, "little") + text, 0)
        jobs = {
            name: threads.submit(
                _write, number, tensor, start + header[name]["data_offsets"][0], hashed
            )
            for name, tensor in tensors.items()
        }
        hashes = {name: job.result() for name, job in jobs.items()}
    refuse_not_finite([name for name, digest in hashes.items() if digest is None], file.name)
    new.replace(file)
    return {name: digest or "" for name, digest in hashes.items()}


def _write(file: int, tensor: np.ndarray, offset: int, hashed: bool) -> str | None:
    """The sha256 of what was written, "" where none is asked for, None if it is not finite."""
    content = np.ascontiguousarray(tensor).view(np.uint8).reshape(-1)
    digest = hashlib.sha256()
    for start in range(0, len(content), _PIECE):
        piece = content[start : start + _PIECE]
        if tensor.dtype in _EXPONENTS and not is_finite(piece.view(tensor.dtype)):
            return None
        if hashed:
            digest.update(piece.data)
        write_at(file, piece.data, offset + start)
    return digest.hexdigest() if hashed else ""


def is_finite(array: np.ndarray) -> bool:
    """Whether a contiguous array of fp16, bf16 or fp32 holds no NaN and no infinity."""
    size, exponent = array.dtype.itemsize, _EXPONENTS[array.dtype]
    unsigned, signed = array.view(f"u{size}"), array.view(f"i{size}")
    sign = 1 << (8 * size - 1)
    # The largest bits are those of positive numbers in one view, of negative ones in the other.
    return bool(signed.max(initial=0) < exponent and unsigned.max(initial=0) < sign + exponent)


def refuse_not_finite(names: Sequence[str], place: object, wider: str = "bf16 or fp32") -> None:
    """Raises an InputError that names the tensors with NaN or infinity, if there are any.

    Args:
        wider: the dtypes that hold larger numbers, as the user names them.
    """
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise InputError(
            f"{place}: {', '.join(names[:SHOWN])}{more} would hold NaN or infinity; nothing was "
            f"written. If the weights are finite, they overflow in this dtype: choose {wider}"
        )


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


def map_tensors(
    file: Path, wanted: str, advice: str, dtypes: Mapping[str, np.dtype] = DTYPES
) -> dict[str, np.ndarray]:
    """The tensors of a file, mapped: only what is read of them takes memory.

    Args:
        wanted: what the file should be, for messages.
        advice: what to do if it is damaged.
        dtypes: those that are expected.

    Raises:
        InputError: if it is missing or unreadable, its header does not match the file, or a dtype
            is none of these.
    """
    check_readable(file, wanted)
    try:
        with safetensors.safe_open(file, "numpy"):
            pass  # checks the header
        raw = np.memmap(file, np.uint8, "r")
    except safetensors.SafetensorError as error:
        raise InputError(f"{file}: damaged ({error}); {advice}") from error
    except (OSError, ValueError) as error:
        raise unreadable(file, error, wanted) from error
    header, start = _header(raw)
    odd = [f"{name} is {at['dtype']}" for name, at in header.items() if at["dtype"] not in dtypes]
    if odd:
        more = f" ({len(odd)} in all)" if len(odd) > 3 else ""
        raise InputError(
            f"{file}: {', '.join(odd[:3])}{more}, expected {', '.join(dtypes)}; {advice}"
        )
    tensors = {}
    for name, stored in header.items():
        begin, end = (start + offset for offset in stored["data_offsets"])
        tensors[name] = raw[begin:end].view(dtypes[stored["dtype"]]).reshape(stored["shape"])
    return tensors


def _header(raw: np.ndarray) -> tuple[dict[str, Any], int]:
    """What a file that was checked says of its tensors, and where they begin."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start].tobytes())
    header.pop("__metadata__", None)
    return header, start


def stored_hashes(file: Path) -> dict[str, str]:
    """The sha256 of every tensor of a file that `map_tensors` has checked.

    Tensors are read for it, and not mapped: where a disk fails, a read is an error and a mapping
    the end of the process.

    Raises:
        OSError: where the disk fails.
    """
    header, start = _header(np.memmap(file, np.uint8, "r"))
    with file.open("rb") as content, ThreadPoolExecutor() as threads:

        def digest(stored: Mapping[str, Any]) -> str:
            found = hashlib.sha256()
            begin, end = stored["data_offsets"]
            for place in range(begin, end, _PIECE):
                size = min(_PIECE, end - place)
                found.update(os.pread(content.fileno(), size, start + place))
            return found.hexdigest()

        return dict(zip(header, threads.map(digest, header.values()), strict=True))
