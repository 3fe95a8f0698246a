"""The model folder: a safetensors file per block, and a manifest that certifies every tensor.

    config.json      LlamaConfig
    tokenizer.model  Meta's file, byte for byte
    manifest.json    the sha256 of each tensor and of the two files above
    blocks/          embeddings.safetensors, layers.0.safetensors, ..., head.safetensors

Tensors keep Meta's names, orientation and dtype. Where the linears are stored in codes
(`jllama.config.Base`), a weight is several tensors: ....wq.weight.codes, ....wq.weight.scale.
Nothing here holds more than one block on the host, and a folder has its final name only when it is
complete.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jllama import bundled
from jllama.cli.terminal import command_line
from jllama.config import PRESETS, Base, LlamaConfig, rope_scaling_of, stored_shapes
from jllama.errors import InputError
from jllama.folders.inputs import unreadable
from jllama.folders.json_files import read_json, write_json, write_whole
from jllama.folders.manifest import (
    MANIFEST,
    check_file,
    entry,
    read_manifest,
    write_manifest,
)
from jllama.folders.peft_config import PEFT_CONFIG
from jllama.folders.tensors import WITH_CODES, map_tensors, save_tensors, stored_hashes
from jllama.names import block_of

CONFIG, BLOCKS = "config.json", "blocks"


class ModelWriter:
    """Writes a model folder block by block, inside `whole_folder`; goes on with one begun before.

    Args:
        source: where the tensors come from, for people.
        transformers_name: the same model as `transformers` opens it, where that is known.
        base: the format of its linears, where they are not stored as they are.
    """

    def __init__(
        self,
        folder: Path,
        config: LlamaConfig,
        source: str,
        transformers_name: str | None = None,
        base: Base | None = None,
    ):
        self._folder, self._blocks, self._config = folder, stored_shapes(config, base), config
        self._origin: dict[str, Any] = {"source": source}
        if transformers_name is not None:
            self._origin["transformers_name"] = transformers_name
        if base is not None:
            self._origin["base"] = base.entry
        (folder / BLOCKS).mkdir(exist_ok=True)
        begun = (folder / MANIFEST).is_file()
        self._tensors: dict[str, Any] = read_manifest(folder)["tensors"] if begun else {}

    def has_block(self, block: str) -> bool:
        """Whether the block was written before, and is whole."""
        if not self._blocks[block].keys() <= self._tensors.keys():
            return False
        try:
            read_block(self._folder, block)
        except InputError:
            return False
        return True

    def write_block(self, block: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Stores the tensors of one block in their own dtype and certifies them.

        Raises:
            InputError: if names or shapes are not those of the config, or a value is not finite.
        """
        expected = self._blocks[block]
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            raise InputError(f"{block}: expected {expected}, found {found}")
        hashes = save_tensors(block_file(self._folder, block), tensors)
        self._tensors |= {name: entry(tensor, hashes[name]) for name, tensor in tensors.items()}
        write_manifest(self._folder, self._tensors, self._origin, files=())

    def finish(self, tokenizer: Mapping[str, bytes]) -> None:
        """Writes the config, the files of the tokenizer and the last manifest."""
        missing = [
            block
            for block, names in self._blocks.items()
            if not names.keys() <= self._tensors.keys()
        ]
        if missing:
            raise ValueError(f"blocks never written: {', '.join(missing)}")
        config = dataclasses.asdict(self._config)
        if self._config.query_dim == self._config.dim:
            del config["head_dim"]  # it follows from the others
        write_json(self._folder / CONFIG, config)
        for name, content in tokenizer.items():
            write_whole(self._folder / name, content)
        write_manifest(self._folder, self._tensors, self._origin, (CONFIG, *tokenizer))


def block_file(folder: Path, block: str) -> Path:
    """Where a model folder keeps a block: `blocks/layers.0.safetensors`."""
    return folder / BLOCKS / f"{block}.safetensors"


def refuse_other_kinds(path: Path) -> None:
    """Refuses what people take for the folder of a model: a file, an adapter, GGUF files.

    Raises:
        InputError: what it is, in one line.
    """
    made_of = (
        "jllama writes such files and reads none; give the folder of the model that it was made "
        "of, in Hugging Face's or Meta's format"
    )
    if path.is_file():
        if path.suffix == ".gguf":
            raise InputError(f"{path}: a GGUF file; {made_of}")
        raise InputError(f"{path}: a file; expected the folder of a model, with all its files")
    if (path / CONFIG).exists():
        return
    if (path / PEFT_CONFIG).exists():
        raise InputError(
            f"{path}: an adapter; give the base model that it belongs to, and this folder to "
            "--adapter, or to --init-adapter for training"
        )
    if named := sorted(path.glob("*.gguf")):
        raise InputError(f"{path}: has {named[0].name}, a GGUF file; {made_of}")


def read_config(path: str | Path) -> LlamaConfig:
    """The config of a model folder.

    Raises:
        InputError: if it is no model folder; the message says which command makes one.
    """
    path = Path(path)
    file = path / CONFIG
    refuse_other_kinds(path)
    if not file.exists():
        advice = (
            f"expected a model folder; make one with: {command_line('from-meta', 'SRC', 'DST')}"
        )
        if any(path.glob("consolidated.*.pth")):
            advice = f"these are Meta's files; run: {command_line('from-meta', path, 'DST')}"
        raise InputError(f"{path}: no {CONFIG} here; {advice}")
    check_file(file)
    fields = read_json(file)
    if "model_type" in fields:
        raise InputError(
            f"{path}: these are Hugging Face's files; run: {command_line('from-hf', path, 'DST')}"
        )
    try:
        scaling = rope_scaling_of(fields.pop("rope_scaling"))
        return LlamaConfig(**fields, rope_scaling=scaling)
    except (AttributeError, KeyError, TypeError, InputError) as error:
        raise InputError(
            f"{file}: not a jllama config ({error}); convert the model again"
        ) from error


def rows_of(path: str | Path) -> int | None:
    """Rows of the embedding, ours or Hugging Face's; None where no config says it."""
    file = Path(path) / CONFIG
    rows = read_json(file).get("vocab_size") if file.exists() else None
    return rows if isinstance(rows, int) else None


def read_base(path: str | Path) -> Base | None:
    """In what format a model folder's linears are stored; None if as they are."""
    return Base.of(read_manifest(path).get("base"))


def base_of(model: str | Path, asked: Base | None) -> Base | None:
    """In what format the linears of a model are held once it is loaded.

    Args:
        model: a model folder, or the name of what has none yet.
        asked: by the user; None takes them as they are stored.

    Raises:
        InputError: if another format is asked for than they are stored in.
    """
    stored = read_base(model) if (Path(model) / MANIFEST).is_file() else None
    if stored is not None and asked is not None and stored != asked:
        raise InputError(
            f"{model} is stored as {stored.words}, and {asked.words} was asked for; leave --base "
            "out, or convert the original again"
        )
    return asked or stored


def transformers_name(path: str | Path) -> str:
    """What `transformers` opens as the model of a folder; the folder itself where none is known."""
    name = read_manifest(path).get("transformers_name", "")
    known = Path(name).is_dir() if Path(name).is_absolute() else name
    return name if known else str(path)


def model_sizes(model: str) -> LlamaConfig:
    """Of a preset, the bundled sample (converted or not) or a model folder.

    Raises:
        InputError: if it is none of them.
    """
    if bundled.is_missing(model):
        return PRESETS["sample"]
    if model in PRESETS:
        return PRESETS[model]
    if not Path(model).exists() and "/" not in model:
        raise InputError(
            f"{model!r} is neither a model folder nor a preset; presets: {', '.join(PRESETS)}"
        )
    return read_config(model)


def read_block(path: str | Path, block: str) -> dict[str, np.ndarray]:
    """The tensors of one block as stored, mapped from their file, checked against the manifest.

    Raises:
        InputError: if the block is missing, unreadable or differs from its certificate.
    """
    path = Path(path)
    file, advice = block_file(path, block), "convert the model again"
    if not file.exists():
        raise InputError(f"{file}: block missing; {advice}")
    wanted = "a block of the model"
    tensors = map_tensors(file, wanted, advice, WITH_CODES)
    try:
        hashes = stored_hashes(file)
    except OSError as error:
        raise unreadable(file, error, wanted) from error
    found = {name: entry(tensor, hashes[name]) for name, tensor in tensors.items()}
    certified = {
        name: stated
        for name, stated in read_manifest(path)["tensors"].items()
        if block_of(name) == block
    }
    names = sorted(found.keys() | certified.keys())
    damaged = [name for name in names if found.get(name) != certified.get(name)]
    if damaged:
        raise InputError(
            f"{file}: {', '.join(damaged)} differ from {MANIFEST}; the file was damaged after it "
            f"was written, {advice}"
        )
    return tensors


def check_manifest(path: Path, config: LlamaConfig) -> None:
    """Refuses a model folder whose manifest and config do not name the same tensors and shapes."""
    blocks = stored_shapes(config, read_base(path))
    tensors = read_manifest(path)["tensors"]
    found = {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}
    expected = {name: shape for block in blocks.values() for name, shape in block.items()}
    wrong = [
        f"{name}: {MANIFEST} says {found.get(name, 'nothing')}, {CONFIG} {expected.get(name)}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        raise InputError(f"{path} contradicts itself; convert it again\n  " + "\n  ".join(wrong))
