"""manifest.json, the certificate of a model folder: the sha256 of every tensor and file in it.

{"source": "Hugging Face's files in Llama-2-7b-hf",
 "transformers_name": "meta-llama/Llama-2-7b-hf",
 "files": {"config.json": "d0c5...", "tokenizer.model": "9e55..."},
 "tensors": {"layers.0.attention.wq.weight":
             {"shape": [4096, 4096], "dtype": "bfloat16", "sha256": "41ab..."}, ...},
 "sha256": "of all of the above"}
"""

import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired

import numpy as np
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from jllama.config import Format
from jllama.errors import InputError
from jllama.folders.inputs import check_readable, unreadable
from jllama.folders.json_files import read_json, write_json

MANIFEST = "manifest.json"
_ADVICE = "convert the model again"


class Entry(TypedDict):
    """A tensor's entry in the manifest."""

    shape: list[int]
    dtype: Literal["float16", "bfloat16", "float32", "int8", "uint8"]  # the last two: codes
    sha256: str


class BaseEntry(TypedDict):
    """In what format linears are stored (`jllama.config.Base`)."""

    format: Format
    skip: list[str]
    double: bool


class Manifest(TypedDict):
    """manifest.json, without its own hash."""

    source: str  # in words
    transformers_name: NotRequired[str]  # what transformers opens: a name of the hub or a folder
    base: NotRequired[BaseEntry]  # of a model whose linears are stored in codes
    files: dict[str, str]  # their sha256
    tensors: dict[str, Entry]


_DECLARED: TypeAdapter[Any] = TypeAdapter(Manifest)


def tensor_sha256(tensor: np.ndarray) -> str:
    """sha256 of a tensor's bytes, row by row, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(tensor).view(np.uint8).data).hexdigest()


def certificate(tensor: np.ndarray) -> Entry:
    """A tensor's entry in the manifest, from its bytes."""
    return entry(tensor, tensor_sha256(tensor))


def entry(tensor: np.ndarray, sha256: str) -> Entry:
    """A tensor's entry in the manifest, its hash being known."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": sha256}  # type: ignore[typeddict-item]


def write_manifest(
    folder: Path, tensors: Mapping[str, Entry], origin: Mapping[str, Any], files: Sequence[str]
) -> None:
    """Certifies tensors, and the files of these names; the manifest is replaced as a whole.

    Args:
        origin: the fields that say where the tensors come from, and their format.
    """
    hashes = {name: file_sha256(folder / name) for name in files}
    content = {**origin, "files": hashes, "tensors": tensors}
    write_sealed(folder / MANIFEST, content)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a model folder.

    Raises:
        InputError: if there is none, or it is not as it was written.
    """
    file = Path(folder) / MANIFEST
    content: Any = read_sealed(file, _ADVICE)
    check_fields(content, _DECLARED, file, _ADVICE)
    return content


def write_sealed(file: Path, content: Mapping[str, Any]) -> None:
    """A JSON object with the hash of itself."""
    write_json(file, {**content, "sha256": _json_sha256(content)})


def read_sealed(file: Path, advice: str) -> dict[str, Any]:
    """What `write_sealed` wrote, without the hash.

    Raises:
        InputError: if it is missing or not as it was written.
    """
    content = read_json(file)
    try:
        intact = content.pop("sha256", None) == _json_sha256(content)
    except RecursionError:  # read_json may go deeper than what writes JSON
        intact = False
    if not intact:
        raise InputError(f"{file}: damaged or edited; {advice}")
    return content


def check_fields(content: object, declared: TypeAdapter, file: Path, advice: str) -> None:
    """Holds what stands in a JSON file against a declaration of its fields.

    Raises:
        InputError: names the file, the first field that is wrong, and what is expected there.
    """
    try:
        declared.validate_python(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field, expected = ", ".join(map(str, first["loc"])), first["msg"].lower()
        found = reprlib.repr(first["input"])
        raise InputError(f"{file}: {field} is {found}: {expected}; {advice}") from None


def manifest_sha256(folder: str | Path) -> str:
    """What identifies a base model: the hash of its tensors' hashes, wherever it was made."""
    return _json_sha256(read_manifest(folder)["tensors"])


def check_file(file: Path) -> None:
    """Refuses a file that is not what the manifest beside it certifies.

    It does nothing where there is no manifest.

    Raises:
        InputError: if it differs, or is not in the manifest.
    """
    if not (file.parent / MANIFEST).exists():
        return
    certified = read_manifest(file.parent)["files"].get(file.name)
    if certified != file_sha256(file):
        raise InputError(
            f"{file} differs from {MANIFEST}; it was changed after it was written, {_ADVICE}"
        )


def file_sha256(file: Path) -> str:
    """sha256 of a file, which is not held in memory; errors as for `read_bytes`."""
    wanted = "a file whose hash is known"
    check_readable(file, wanted)
    try:
        with Path(file).open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(file, error, wanted) from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json_sha256(content: object) -> str:
    return _sha256(json.dumps(content, sort_keys=True).encode())
