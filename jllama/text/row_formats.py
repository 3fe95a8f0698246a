"""Rows in other formats than JSON: packed files, CSV, and Arrow's (Parquet, Feather, datasets)."""

import bz2
import csv
import gzip
import hashlib
import io
import lzma
import math
import re
import shlex
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from pydantic import BeforeValidator

from jllama.errors import InputError
from jllama.folders.json_files import SHOWN, listed, read_bytes, read_json
from jllama.folders.manifest import file_sha256

_PANDAS = "python -c \"import pandas, sys; pandas.read_{}(sys.argv[1]).to_json(sys.argv[2], orient='records', lines=True)\" {{0}} {{0}}.jsonl"  # noqa: E501
# How files that are not read begin, and what makes rows of them.
_FOREIGN = {
    b"PK\x03\x04": ("ZIP or Excel", f"unzip {{0}}, or {_PANDAS.format('excel')}"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "zstd --decompress {0}"),
}
_PACKED: Mapping[bytes, tuple[str, Callable[..., Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.open),
    b"\xfd7zXZ": ("xz", lzma.open),
    b"BZh": ("bzip2", bz2.open),
}
_SMALL, _RATIO = 2**30, 200  # bytes, and times smaller: no text is packed so well
_ARROW = {b"PAR1": "Parquet", b"ARROW1": "Arrow (Feather)", b"\xff\xff\xff\xff": "Arrow"}
_DELIMITERS = ",\t;"

# In a folder as the `datasets` package saves it.
STATE, SPLITS = "state.json", "dataset_dict.json"


def unpacked(content: bytes, path: Path) -> bytes | bytearray:
    """A file's content, decompressed where it is packed.

    Raises:
        InputError: if it is damaged, or of a format that is not read, with what converts it.
    """
    for begin, (name, conversion) in _FOREIGN.items():
        if content.startswith(begin):
            raise InputError(
                f"{path}: this looks like {name}, which is not read. To convert it:\n  "
                + conversion.format(shlex.quote(str(path)))
            )
    for begin, (name, opened) in _PACKED.items():
        if content.startswith(begin):
            found = bytearray()
            try:
                with opened(io.BytesIO(content)) as file:
                    while part := file.read(2**24):
                        found += part
                        if len(found) > max(_SMALL, _RATIO * len(content)):
                            raise InputError(f"{path}: this {name} holds no text; do not use it")
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise InputError(f"{path}: damaged {name} ({error}); copy it again") from error
            return found
    return content


def is_csv(content: bytes | bytearray, path: Path) -> bool:
    """Whether a text that is no JSON begins as a table does, or is named so."""
    first = content.lstrip()[:4096].partition(b"\n")[0]
    return first[:1] not in b"[{" and bool(is_named_csv(path) or re.search(rb"[,;\t]", first))


def is_named_csv(path: Path) -> bool:
    """rows.csv, ROWS.TSV, rows.csv.gz"""
    return bool({".csv", ".tsv"} & {*map(str.lower, path.suffixes)})


def csv_rows(text: str, path: Path) -> Iterator[dict[str, str]]:
    """The rows of a table with a line of names; a field that is not there is as if it were null.

    Raises:
        InputError: if its lines do not fit the names, with their numbers.
    """
    first = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=first.count)
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    problems: list[str] = []
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        if doubled := {name for name in names if names.count(name) > 1}:
            raise InputError(f"{path}: several columns are named {', '.join(sorted(doubled))}")
        reader.fieldnames = names
        for row in reader:
            if None in row:
                problems.append(f"line {reader.line_num}: more fields than the {len(names)} names")
                if len(problems) == SHOWN:
                    break
            yield {name: value for name, value in row.items() if value is not None}
    except csv.Error as error:
        problems.append(f"line {reader.reader.line_num}: {error}")
    if problems:
        raise InputError(f"{path}: read as CSV:\n  {listed(problems)}")


def arrow_rows(content: bytes | bytearray, path: Path) -> Iterator[dict[str, Any]] | None:
    """The rows of a file of Arrow's; None where it is none.

    Raises:
        InputError: if it is damaged, or `pyarrow` is not installed.
    """
    name = next((name for begin, name in _ARROW.items() if content.startswith(begin)), None)
    return None if name is None else _tables(content, path, name)


def _tables(content: bytes | bytearray, path: Path, name: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: {name} is read by pyarrow; run: pip install pyarrow") from None
    source = pyarrow.BufferReader(content)
    try:
        if name == "Parquet":
            batches = pyarrow.parquet.ParquetFile(source).iter_batches()
        elif name == "Arrow":
            batches = pyarrow.ipc.open_stream(source)
        else:
            reader = pyarrow.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        for batch in batches:
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged {name} ({error}); copy it again") from error


_DATA = re.compile(r"\.(?:jsonl?|ndjson|csv|tsv|parquet|arrow|feather)(?:\.(?:gz|xz|bz2))?$", re.I)
_PART = re.compile(r"(?:^|[^a-z])(train|test|valid|validation|val|dev|eval)(?:[^a-z]|$)", re.I)


def files_of(path: Path) -> list[Path]:
    """The files of rows that a path names: itself, or those of a folder, in order of their names.

    Raises:
        InputError: if a folder has none, or has parts that are for different uses.
    """
    if not path.is_dir():
        return [path]
    if (path / SPLITS).exists():
        splits = read_json(path / SPLITS).get("splits")
        raise InputError(f"{path}: a folder of several splits; name one of them: {splits}")
    if (path / STATE).exists():
        entries = read_json(path / STATE).get("_data_files")
        names = [x.get("filename") for x in entries or () if isinstance(x, dict)]
        if not names or any(not isinstance(x, str) or Path(x).name != x for x in names):
            raise InputError(f"{path / STATE}: it names no files of rows in its folder")
        return [path / str(name) for name in names]
    # What begins with a dot is some program's own, as macOS's ._rows.json is.
    named = (x for x in path.iterdir() if _DATA.search(x.name) and not x.name.startswith("."))
    files = sorted(file for file in named if file.is_file())
    parts = {found[1].lower() for file in files if (found := _PART.search(file.name))}
    if len(parts) > 1:
        raise InputError(
            f"{path}: a folder with files for {' and '.join(sorted(parts))}; name a file, or put "
            "those to learn from in a folder of their own"
        )
    if not files:
        raise InputError(f"{path}: a folder without a file of rows (.jsonl, .csv, .parquet, ...)")
    return files


def several(value: Any) -> Any:
    """One file's name stands for itself."""
    return ((value,) if value else ()) if isinstance(value, str) else value


# What a user names, and settings hold.
Sources = Annotated[
    tuple[str, ...], BeforeValidator(several), tyro.conf.arg(metavar="FILE[:WEIGHT]")
]


class Source(NamedTuple):
    """A file or folder of rows, and how often an epoch has each of them: 0.5 is every second."""

    path: Path
    weight: float = 1.0

    def __str__(self) -> str:
        return str(self.path) + (f":{self.weight:g}" if self.weight != 1 else "")


def source_of(text: str) -> Source:
    """`rows.json`, or `rows.json:0.5` where no file has that name.

    Raises:
        InputError: if the weight is no positive number.
    """
    name, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists() or not Path(name).exists():
        return Source(Path(text))
    try:
        found = float(weight)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise InputError(f"{text}: the weight of {name} is {weight}, expected a number above 0")
    return Source(Path(name), found)


def rows_sha256(sources: Sequence[str]) -> str:
    """Of one file; else of a list of the hashes and weights of all files."""
    found = [(source, files_of(source.path)) for source in map(source_of, sources)]
    first = found[0][0].path
    if found == [(Source(first), [first])]:
        return file_sha256(first)
    lines = [f"{file_sha256(file)} {source.weight}\n" for source, files in found for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def contents(path: Path, wanted: str) -> Iterator[tuple[Path, bytes | bytearray]]:
    """Each file that a path names, and its content, unpacked."""
    for file in files_of(path):
        yield file, unpacked(read_bytes(file, wanted), file)
