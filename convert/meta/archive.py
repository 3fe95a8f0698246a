"""consolidated.NN.pth in pieces: torch lays out the archive, and each tensor is put in its place.

`torch.save` wants every tensor at once. Here it writes the archive without their bytes, as a sparse
file; the bytes follow block by block, and at the end the checksums that a zip has of them.
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from jllama.errors import InputError
from jllama.folders.json_files import NEW, naming
from jllama.folders.tensors import is_finite, refuse_not_finite, write_at

_LOCAL, _CENTRAL = struct.Struct("<26xHH"), struct.Struct("<28xHHH12x")


class Archive:
    """A .pth of tensors in the given order; goes on with a file that was begun before.

    Args:
        aliases: further names of tensors, which share their bytes.
    """

    def __init__(
        self,
        file: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        aliases: Mapping[str, str],
    ):
        self._begun, self._path = file.exists(), file
        if not self._begun:
            new = file.with_suffix(NEW)
            _lay_out(new, shapes, dtypes, aliases)
            new.replace(file)
        self._file = os.open(file, os.O_RDWR)
        with zipfile.ZipFile(file) as archive:
            self._entries = archive.infolist()
            self._directory = archive.start_dir
        data = [entry for entry in self._entries if "/data/" in entry.filename]
        # torch numbers the storages as it meets them.
        self._places = dict(zip(shapes, data, strict=True))

    def put(self, name: str, array: np.ndarray) -> None:
        """Writes a tensor's bytes to their place; safe to call from several threads.

        Raises:
            InputError: if the tensor holds NaN or infinity.
        """
        array = np.ascontiguousarray(array)
        refuse_not_finite([] if is_finite(array) else [name], self._path.name)
        content = array.view(np.uint8).reshape(-1).data
        entry = self._places[name]
        start = self._start(entry)
        if not (self._begun and os.pread(self._file, len(content), start) == content):
            self._write(content, start)
        entry.CRC = zlib.crc32(content)

    def close(self) -> None:
        """Writes the checksums."""
        position = self._directory
        for entry in self._entries:
            checksum = struct.pack("<I", entry.CRC)
            if "/data/" in entry.filename:
                descriptor = self._start(entry) + entry.file_size + 4  # behind its signature
                self._write(checksum, descriptor)
                self._write(checksum, position + 16)
            lengths = _CENTRAL.unpack(os.pread(self._file, _CENTRAL.size, position))
            position += _CENTRAL.size + sum(lengths)
        os.close(self._file)

    def _write(self, content: bytes | memoryview, start: int) -> None:
        with naming(self._path):
            write_at(self._file, content, start)

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Where an entry's bytes begin: behind its header, its name and torch's padding."""
        header = os.pread(self._file, _LOCAL.size, entry.header_offset)
        return entry.header_offset + _LOCAL.size + sum(_LOCAL.unpack(header))


def _lay_out(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    aliases: Mapping[str, str],
) -> None:
    # Never touched, so they take address space and no memory.
    tensors = {name: torch.empty(shape, dtype=dtypes[name]) for name, shape in shapes.items()}
    tensors |= {alias: tensors[name] for alias, name in aliases.items()}
    try:
        with torch.serialization.skip_data():
            torch.save(tensors, file)
    except RuntimeError as error:  # torch's only one, whatever stopped it from writing
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{file}: torch could not write it ({reason}); is there room, and no limit on the size "
            "of a file?"
        ) from error
