"""A file of `torch.save` without torch: the weights of adapters from before safetensors.

    NAME/data.pkl   a pickle: {"....lora_A.weight": a tensor of storage 0, its shape and strides}
    NAME/data/0     the storage's bytes, as all entries uncompressed: they can be mapped

Of a pickle's instructions only those that make such a table are followed. Nothing that it names is
imported or called: the few names that it may say stand for functions here.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jllama.errors import InputError
from jllama.folders.inputs import check_readable
from jllama.folders.tensors import DTYPES

_STORAGES: Mapping[str, np.dtype] = {
    "HalfStorage": DTYPES["F16"],
    "BFloat16Storage": DTYPES["BF16"],
    "FloatStorage": DTYPES["F32"],
}
_LOCAL = struct.Struct("<26xHH")  # before an entry's bytes: the lengths of its name and of more


class _Refused(Exception):
    """What a pickle asks for and must not have."""


def map_pickled(file: Path, wanted: str, advice: str) -> dict[str, np.ndarray]:
    """The tensors of a file, mapped: only what is read of them takes memory.

    Args:
        wanted: what the file should be, for messages.
        advice: what to do if it is damaged.

    Raises:
        InputError: if it is missing, unreadable or damaged, or holds anything but tensors in fp16,
            bf16 or fp32.
    """
    check_readable(file, wanted)
    try:
        content = _Reader(file).load()
    except _Refused as refused:
        raise InputError(f"{file}: refused, it {refused}; expected {wanted}") from None
    except Exception as error:  # a damaged archive, or pickle, can fail in any way
        raise InputError(f"{file}: damaged, or not torch.save's ({error}); {advice}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(x, np.ndarray) for name, x in content.items()
    ):
        raise InputError(f"{file}: holds something else than tensors by name; expected {wanted}")
    return {name: np.ascontiguousarray(tensor) for name, tensor in content.items()}


class _Reader(pickle.Unpickler):
    """Reads `data.pkl`, whose storages are parts of the mapped file."""

    def __init__(self, file: Path):
        self._raw = np.memmap(file, np.uint8, "r")
        with zipfile.ZipFile(file) as archive:
            self._entries = {entry.filename: entry for entry in archive.infolist()}
            (self._pickle,) = (name for name in self._entries if name.endswith("/data.pkl"))
            super().__init__(io.BytesIO(archive.read(self._pickle)))

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            if name not in _STORAGES:
                raise _Refused(f"holds a {name}, which is not fp16, bf16 or fp32")
            return _STORAGES[name]
        if (module, name) not in _FUNCTIONS:
            raise _Refused(f"asks for {module}.{name}")
        return _FUNCTIONS[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        """A storage: ("storage", dtype, "0", "cpu", number of elements)."""
        _, dtype, key, _, size = pid
        entry = self._entries[self._pickle.removesuffix("data.pkl") + f"data/{key}"]
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != size * dtype.itemsize:
            raise ValueError(f"storage {key} is not {size} elements of {dtype}")
        header = bytes(self._raw[entry.header_offset :][: _LOCAL.size])
        start = entry.header_offset + _LOCAL.size + sum(_LOCAL.unpack(header))
        found = self._raw[start : start + entry.file_size]
        return np.frombuffer(found, dtype, size)  # a ValueError where the file ends before


def _tensor(
    storage: np.ndarray, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any
) -> np.ndarray:
    """A view of a storage, which it does not leave."""
    if min((offset, *shape, *strides), default=0) < 0 or len(shape) != len(strides):
        raise ValueError(f"a tensor of shape {shape} with strides {strides}")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 in shape or last >= storage.size:
        raise ValueError(f"a tensor of shape {shape}, of a storage of {storage.size} elements")
    steps = [step * storage.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)


_FUNCTIONS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}
