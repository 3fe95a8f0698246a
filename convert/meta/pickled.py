"""Files of `torch.save`, Meta's and Hugging Face's, mapped into memory.

They are opened with `weights_only=True` and never otherwise: they are pickles, and a pickle may
hold a program.
"""

import pickle
import re
from pathlib import Path
from typing import Any

import torch

from convert.dtypes import DTYPES
from jllama.errors import InputError
from jllama.folders.inputs import check_readable


def open_pickled(file: Path, wanted: str) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped: only what is read of them takes memory.

    Args:
        wanted: what the file should be, for messages.

    Raises:
        InputError: if it is missing, unreadable, or holds anything but weights.
    """
    check_readable(file, wanted)
    size = f"{file.stat().st_size:,} bytes"
    try:
        content = torch.load(file, mmap=True, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL:? (\S+)", str(error))
        wants = f"asks for {named[1]}" if named else "is no plain table of weights"
        raise InputError(
            f"{file.name}: refused, it {wants}; a file of weights holds no program"
        ) from None
    except Exception as error:  # a damaged archive can fail in any way
        reason = "truncated or damaged" if zipped(file) else "not a PyTorch archive"
        raise InputError(f"{file.name}: {reason} ({size} found)") from error
    if not isinstance(content, dict):
        raise InputError(f"{file.name}: holds a {type(content).__name__}, expected tensors by name")
    wrong = [
        str(name)
        for name, tensor in content.items()
        if not isinstance(name, str) or not _is_plain(tensor)
    ]
    if wrong:
        names = ", ".join(wrong[:3])
        raise InputError(
            f"{file.name}: {names} ({len(wrong)} in all) not plain fp16, bf16 or fp32 tensors"
        )
    return content


def zipped(file: Path) -> bool:
    """Whether a file begins as every PyTorch archive does."""
    with file.open("rb") as content:
        return content.read(4) == b"PK\x03\x04"


def _is_plain(tensor: Any) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.dtype in DTYPES
    )
