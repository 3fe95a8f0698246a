"""manifest.json, the certificate of a model folder: the sha256 of every tensor and file in it.

{"source": "Meta's files in llama-2-7b",
 "files": {"config.json": "d0c5...", "tokenizer.model": "9e55..."},
 "tensors": {"layers.0.attention.wq.weight":
             {"shape": [4096, 4096], "dtype": "bfloat16", "sha256": "41ab..."}, ...},
 "sha256": "of all of the above"}
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jllama.errors import InputError
from jllama.folders.json_files import read_json, write_json

MANIFEST = "manifest.json"


def tensor_sha256(tensor: np.ndarray) -> str:
    """sha256 of a tensor's bytes, row by row, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(tensor).view(np.uint8).data).hexdigest()


def certificate(tensor: np.ndarray) -> dict[str, Any]:
    """A tensor's entry in the manifest, from its bytes."""
    return entry(tensor, tensor_sha256(tensor))


def entry(tensor: np.ndarray, sha256: str) -> dict[str, Any]:
    """A tensor's entry in the manifest, its hash being known."""
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": sha256}


def write_manifest(
    folder: Path, tensors: Mapping[str, Mapping], source: str, files: Sequence[str]
) -> None:
    """Certifies tensors, and the files of these names; the manifest is replaced as a whole."""
    hashes = {name: file_sha256(folder / name) for name in files}
    content = {"source": source, "files": hashes, "tensors": tensors}
    new = folder / f"{MANIFEST}.new"
    write_sealed(new, content)
    new.replace(folder / MANIFEST)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a model folder.

    Raises:
        InputError: if there is none, or it is not as it was written.
    """
    return read_sealed(Path(folder) / MANIFEST, "convert the model again")


def write_sealed(file: Path, content: Mapping[str, Any]) -> None:
    """A JSON object with the hash of itself."""
    write_json(file, {**content, "sha256": _json_sha256(content)})


def read_sealed(file: Path, advice: str) -> dict[str, Any]:
    """What `write_sealed` wrote, without the hash.

    Raises:
        InputError: if it is missing or not as it was written.
    """
    content = read_json(file)
    if content.pop("sha256", None) != _json_sha256(content):
        raise InputError(f"{file}: damaged or edited; {advice}")
    return content


def manifest_sha256(folder: str | Path) -> str:
    """What identifies a base model: the hash of its tensors' hashes, wherever it was made."""
    return _json_sha256(read_manifest(folder)["tensors"])


def check_file(file: Path) -> None:
    """Refuses a file that is not what the manifest beside it certifies; none beside it: no word.

    Raises:
        InputError: if it differs, or is not in the manifest.
    """
    if not (file.parent / MANIFEST).is_file():
        return
    certified = read_manifest(file.parent)["files"].get(file.name)
    if certified != file_sha256(file):
        raise InputError(
            f"{file} differs from {MANIFEST}; it was changed after it was written, convert the "
            "model again"
        )


def file_sha256(file: Path) -> str:
    """sha256 of a small file."""
    return _sha256(file.read_bytes())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json_sha256(content: object) -> str:
    return _sha256(json.dumps(content, sort_keys=True).encode())
