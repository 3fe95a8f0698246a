"""The model folder: a safetensors file per block, and a manifest that certifies every tensor.

    config.json      LlamaConfig
    tokenizer.model  Meta's file, byte for byte
    manifest.json    the sha256 of each tensor and of the two files above
    blocks/          embeddings.safetensors, layers.0.safetensors, ..., head.safetensors

Tensors keep Meta's names, orientation and dtype. Nothing here holds more than one block on the
host, and a folder has its final name only when it is complete.
"""

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from jllama.attention import choose_implementation
from jllama.config import (
    PRECISIONS,
    LlamaConfig,
    LoraConfig,
    PrecisionName,
    RopeScaling,
    linear_shapes,
)
from jllama.errors import InputError
from jllama.files import read_json, room_for, whole_folder, write_json
from jllama.lora import attach
from jllama.manifest import MANIFEST, certificate, check_file, entry, read_manifest, write_manifest
from jllama.model import Llama, Remat, map_named, named_arrays
from jllama.tensors import map_tensors, save_tensors
from jllama.tokenizer import FILE_NAME

CONFIG, BLOCKS = "config.json", "blocks"


def tensor_shapes(config: LlamaConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """What a model folder holds: block -> tensor -> shape, in Meta's names.

    Biases are not listed: no published file has any.
    """
    linears = linear_shapes(config)
    layer: dict[str, tuple[int, ...]] = {
        **{f"attention.{name}": linears[name] for name in ("wq", "wk", "wv", "wo")},
        **{f"feed_forward.{name}": linears[name] for name in ("w1", "w2", "w3")},
        "attention_norm": (config.dim,),
        "ffn_norm": (config.dim,),
    }
    table = (config.vocab_size, config.dim)
    head: dict[str, tuple[int, ...]] = {"norm.weight": (config.dim,)}
    if not config.tied:
        head["output.weight"] = table
    blocks: dict[str, dict[str, tuple[int, ...]]] = {"embeddings": {"tok_embeddings.weight": table}}
    for index in range(config.n_layers):
        blocks[f"layers.{index}"] = {
            f"layers.{index}.{name}.weight": shape for name, shape in layer.items()
        }
    return blocks | {"head": head}


class ModelWriter:
    """Writes a model folder block by block, inside `whole_folder`; goes on with one begun before.

    Args:
        source: where the tensors come from, for people.
    """

    def __init__(self, folder: Path, config: LlamaConfig, source: str):
        self._folder, self._config, self._source = folder, config, source
        (folder / BLOCKS).mkdir(exist_ok=True)
        begun = (folder / MANIFEST).is_file()
        self._tensors: dict[str, Any] = read_manifest(folder)["tensors"] if begun else {}

    def has_block(self, block: str) -> bool:
        """Whether the block was written before, and is whole."""
        if not tensor_shapes(self._config)[block].keys() <= self._tensors.keys():
            return False
        try:
            read_block(self._folder, block)
        except InputError:
            return False
        return True

    def write_block(self, block: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Stores the tensors of one block in their own dtype and certifies them.

        Raises:
            InputError: if names or shapes are not those of the config.
        """
        expected = tensor_shapes(self._config)[block]
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            raise InputError(f"{block}: expected {expected}, found {found}")
        hashes = save_tensors(block_file(self._folder, block), tensors)
        self._tensors |= {name: entry(tensor, hashes[name]) for name, tensor in tensors.items()}
        write_manifest(self._folder, self._tensors, self._source, files=())

    def finish(self, tokenizer: bytes | None) -> None:
        """Writes the config, the tokenizer and the last manifest."""
        blocks = tensor_shapes(self._config)
        missing = [
            block for block, names in blocks.items() if not names.keys() <= self._tensors.keys()
        ]
        if missing:
            raise ValueError(f"blocks never written: {', '.join(missing)}")
        write_json(self._folder / CONFIG, dataclasses.asdict(self._config))
        if tokenizer is not None:
            (self._folder / FILE_NAME).write_bytes(tokenizer)
        files = (CONFIG,) if tokenizer is None else (CONFIG, FILE_NAME)
        write_manifest(self._folder, self._tensors, self._source, files)


def block_file(folder: Path, block: str) -> Path:
    """Where a model folder keeps a block: `blocks/layers.0.safetensors`."""
    return folder / BLOCKS / f"{block}.safetensors"


def save_model(
    path: str | Path, model: Llama, dtype: Any, tokenizer: bytes | None, source: str
) -> None:
    """Writes a model without adapters as a model folder, its weights rounded once to `dtype`.

    Raises:
        InputError: if the folder exists or the disk is full.
    """
    arrays = named_arrays(nnx.state(model))
    size = model.config.parameter_count * np.dtype(dtype).itemsize
    with room_for(size, Path(path)), whole_folder(path) as folder:
        writer = ModelWriter(folder, model.config, source)
        for block, names in tensor_shapes(model.config).items():
            writer.write_block(
                block, {name: np.asarray(arrays[name].astype(dtype)) for name in names}
            )
        writer.finish(tokenizer)


def read_config(path: str | Path) -> LlamaConfig:
    """The config of a model folder.

    Raises:
        InputError: if it is no model folder; the message says which command makes one.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        advice = "expected a model folder; make one with: python -m convert.from_meta SRC DST"
        if any(path.glob("consolidated.*.pth")):
            advice = f"these are Meta's files; run: python -m convert.from_meta {path} DST"
        raise InputError(f"{path}: no {CONFIG} here; {advice}")
    check_file(path / CONFIG)
    fields = read_json(path / CONFIG)
    if "model_type" in fields:
        raise InputError(
            f"{path}: these are Hugging Face's files; run: python -m convert.from_hf {path} DST"
        )
    try:
        scaling = fields.pop("rope_scaling")
        return LlamaConfig(**fields, rope_scaling=scaling and RopeScaling(**scaling))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path / CONFIG}: not a jllama config ({error}); convert the model again"
        ) from error


def read_block(path: str | Path, block: str) -> dict[str, np.ndarray]:
    """The tensors of one block as stored, mapped from their file, checked against the manifest.

    Raises:
        InputError: if the block is missing, unreadable or differs from its certificate.
    """
    path = Path(path)
    file = block_file(path, block)
    if not file.is_file():
        raise InputError(f"{file}: block missing; convert the model again")
    try:
        tensors = map_tensors(file)
    except (safetensors.SafetensorError, KeyError) as error:  # KeyError: a dtype of no weight
        raise InputError(f"{file}: damaged ({error}); convert the model again") from error
    with ThreadPoolExecutor() as threads:
        found = dict(zip(tensors, threads.map(certificate, tensors.values()), strict=True))
    certified = {
        name: stated
        for name, stated in read_manifest(path)["tensors"].items()
        if _block_of(name) == block
    }
    names = sorted(found.keys() | certified.keys())
    damaged = [name for name in names if found.get(name) != certified.get(name)]
    if damaged:
        raise InputError(
            f"{file}: {', '.join(damaged)} differ from {MANIFEST}; the file was damaged after it "
            "was written, convert the model again"
        )
    return tensors


def _block_of(name: str) -> str:
    """layers.3.ffn_norm.weight  ->  layers.3"""
    if name.startswith("layers."):
        return ".".join(name.split(".")[:2])
    return "embeddings" if name.startswith("tok_embeddings.") else "head"


def abstract_model(
    config: LlamaConfig,
    precision: PrecisionName,
    *,
    remat: Remat = "none",
    platform: str = "cpu",
    lora: LoraConfig | None = None,
) -> Llama:
    """The model, with adapters if asked for, as shapes in place of weights: allocates nothing."""
    dtype = PRECISIONS[precision]
    attention = choose_implementation(platform, dtype, config.head_dim)

    def build() -> Llama:
        model = Llama(config, dtype=dtype, remat=remat, attention=attention, rngs=nnx.Rngs(0))
        if lora is not None:
            attach(model, lora, jax.random.key(0))
        return model

    return nnx.eval_shape(build)


def load_model(
    path: str | Path,
    precision: PrecisionName = "bf16",
    *,
    remat: Remat = "none",
    ffn_bias: bool = False,
) -> Llama:
    """A model folder as a callable: int32 tokens `[B, T]` -> fp32 logits `[B, T, V]`.

    Args:
        path: the model folder.
        precision: dtype of the frozen weights and of the activations.
        remat: what the backward pass recomputes.
        ffn_bias: adds feed-forward biases, all zero, as the original report's model had.

    Raises:
        InputError: if the folder is incomplete or contradicts its config.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    path, config = Path(path), read_config(path)
    blocks = tensor_shapes(config)
    check_manifest(path, blocks)
    if ffn_bias:
        config = dataclasses.replace(config, ffn_bias=True)
    stored: dict[str, Any] = {}
    for block in blocks:
        for name, tensor in read_block(path, block).items():
            stored[name] = jnp.array(tensor).astype(PRECISIONS[precision])
    model = abstract_model(config, precision, remat=remat, platform=jax.default_backend())

    def fill(name, shape):
        if name.endswith(".bias"):
            return jnp.zeros(shape.shape, shape.dtype)
        return stored[name]

    nnx.update(model, map_named(fill, nnx.state(model)))
    return model


def check_manifest(path: Path, blocks: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    """Refuses a model folder whose manifest and config do not name the same tensors and shapes."""
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
