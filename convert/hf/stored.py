"""Which tensors a Hugging Face folder has, and where: by the headers of its files, and their index.

    model.safetensors, or model-00001-of-00002.safetensors, ... and model.safetensors.index.json:
    {"weight_map": {"model.layers.0.self_attn.q_proj.weight": "model-00001-of-00002.safetensors"}}

Older folders have pytorch_model.bin, ..., which are pickles (`convert.meta.pickled`). Where both
are, safetensors count.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch

from convert.blocks import refuse_if
from convert.meta.pickled import open_pickled
from jllama.errors import InputError
from jllama.folders.inputs import check_readable
from jllama.folders.json_files import read_json


class Kind(NamedTuple):
    """What files of one kind are called: the only one, the index of many, and the end of any."""

    whole: str
    table: str
    suffix: str

    def is_in(self, folder: Path) -> bool:
        return (folder / self.whole).exists() or (folder / self.table).exists()


SAFETENSORS = Kind("model.safetensors", "model.safetensors.index.json", ".safetensors")
PICKLED = Kind("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin")
_DTYPES: Mapping[torch.dtype, str] = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor is, and what its file's header says of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors call it
    mapped: torch.Tensor | None = None  # of a pickle, whose header is its pickle

    def read(self) -> torch.Tensor:
        """Mapped from its file; what was read of it stays resident as long as it lives."""
        if self.mapped is not None:
            return self.mapped
        with safetensors.safe_open(self.file, "pt") as content:
            return content.get_tensor(self.name)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's files, by Hugging Face's names.

    Raises:
        InputError: if files are missing, damaged or hostile, or contradict their index.
    """
    kind = next((kind for kind in (SAFETENSORS, PICKLED) if kind.is_in(folder)), None)
    if kind is None:
        raise InputError(
            f"{folder}: no weights; expected {SAFETENSORS.whole} or {SAFETENSORS.table}, or "
            f"{PICKLED.whole} or {PICKLED.table}"
        )
    placed = _weight_map(folder, kind)
    stored: dict[str, Stored] = {}
    problems = []
    for file in sorted(set(placed.values())) if placed else [kind.whole]:
        try:
            for found in _tensors(folder / file, kind):
                if found.name in stored:
                    there = stored[found.name].file.name
                    problems.append(f"{file}: {found.name} is also in {there}")
                stored[found.name] = found
        except InputError as error:
            problems.append(str(error).removeprefix(f"{folder}/"))
        except (safetensors.SafetensorError, OSError) as error:
            problems.append(f"{file}: damaged ({error})")
    if placed is not None:
        for name in sorted(placed.keys() | stored.keys()):
            where = stored[name].file.name if name in stored else "no file"
            if placed.get(name) != where and not problems:
                problems.append(f"{name}: {kind.table} says {placed.get(name)}, but {where} has it")
    refuse_if(problems, folder, "not Hugging Face's weights; download these files again")
    return stored


def _tensors(file: Path, kind: Kind) -> Iterator[Stored]:
    """What a file holds, and that it can be read."""
    wanted = "a file of weights"
    if kind is PICKLED:
        for name, tensor in open_pickled(file, wanted).items():
            dtype = _DTYPES[tensor.dtype]
            yield Stored(file, name, tuple(tensor.shape), dtype, tensor)
        return
    check_readable(file, wanted)
    with safetensors.safe_open(file, "pt") as content:
        for name in content.keys():  # noqa: SIM118  # it is no mapping
            part = content.get_slice(name)
            yield Stored(file, name, tuple(part.get_shape()), part.get_dtype())


def _weight_map(folder: Path, kind: Kind) -> dict[str, str] | None:
    """Tensor -> file, by the index; None where one file holds all."""
    index = folder / kind.table
    if not index.exists():
        return None
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise InputError(f"{index}: no weight_map of tensors and their files")
    outside = {str(file) for file in placed.values() if not _is_plain_name(file, kind.suffix)}
    problems = [f"{file!r} is no name of a {kind.suffix} file here" for file in sorted(outside)]
    refuse_if(problems, index, "hostile or damaged; do not use these files")
    return placed


def _is_plain_name(file: object, suffix: str) -> bool:
    """No path out of the folder, and no other kind of file."""
    return (
        isinstance(file, str)
        and Path(file).name == file
        and "\\" not in file
        and file.endswith(suffix)
    )
