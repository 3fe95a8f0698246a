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
from jllama.files import read_json, write_json

MANIFEST = "manifest.json"


def tensor_sha256(tensor: np.ndarray) -> str:
    """sha256 of a tensor's bytes, row by row, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(tensor).view(np.uint8).data).hexdigest()


def certificate(tensor: np.ndarray) -> dict[str, Any]:
    """A tensor's entry in the manifest."""
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype),
        "sha256": tensor_sha256(tensor),
    }


def write_manifest(
    folder: Path, tensors: Mapping[str, Mapping], source: str, files: Sequence[str]
) -> None:
    """Certifies tensors, and the files of these names; the manifest is replaced as a whole."""
    hashes = {name: _sha256((folder / name).read_bytes()) for name in files}
    content = {"source": source, "files": hashes, "tensors": tensors}
    new = folder / f"{MANIFEST}.new"
    write_json(new, content | {"sha256": _json_sha256(content)})
    new.replace(folder / MANIFEST)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a model folder.

    Raises:
        InputError: if there is none, or it is not as it was written.
    """
    file = Path(folder) / MANIFEST
    content = read_json(file)
    stated = content.pop("sha256", None)
    if stated != _json_sha256(content):
        raise InputError(f"{file}: damaged or edited; convert the model again")
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
    if certified != _sha256(file.read_bytes()):
        raise InputError(
            f"{file} differs from {MANIFEST}; it was changed after it was written, convert the "
            "model again"
        )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json_sha256(content: object) -> str:
    return _sha256(json.dumps(content, sort_keys=True).encode())
