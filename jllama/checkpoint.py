"""The model folder: one Orbax item per block, and a manifest that certifies every tensor.

    config.json      LlamaConfig
    tokenizer.model  Meta's file, byte for byte
    manifest.json    {"tensors": {"layers.0.attention.wq.weight": {shape, dtype, sha256}, ...}}
    blocks/          embeddings, layers.0, layers.1, ..., head

Tensors keep Meta's names, orientation and dtype. Nothing here holds more than one block on the
host, and a folder has its final name only when it is complete.
"""

import contextlib
import dataclasses
import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
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
from jllama.model import Llama, Remat, map_named, named_arrays

CONFIG, MANIFEST, BLOCKS = "config.json", "manifest.json", "blocks"


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


@contextlib.contextmanager
def _interrupt_waits() -> Iterator[None]:
    """Ctrl-C takes effect after the body.

    Orbax's own threads would go on writing into a folder that is being removed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    received: list[tuple] = []
    handler = signal.signal(signal.SIGINT, lambda *arguments: received.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if received and callable(handler):
        handler(*received[0])


class ModelWriter:
    """Writes a model folder block by block; used inside `whole_folder`."""

    def __init__(self, folder: Path, config: LlamaConfig):
        self._folder = folder
        self._config = config
        self._tensors: dict[str, dict] = {}
        self._orbax = ocp.PyTreeCheckpointer()

    def write_block(self, block: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Stores the tensors of one block in their own dtype and certifies them.

        Raises:
            InputError: if names or shapes are not those of the config.
        """
        expected = tensor_shapes(self._config)[block]
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            raise InputError(f"{block}: expected {expected}, found {found}")
        for name, tensor in tensors.items():
            self._tensors[name] = {
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype),
                "sha256": tensor_sha256(tensor),
            }
        item = (self._folder / BLOCKS / block).absolute()
        with _interrupt_waits():
            self._orbax.save(item, dict(tensors))

    def finish(self, tokenizer: bytes | None, source: str) -> None:
        """Writes the config, the tokenizer and the manifest."""
        missing = set(tensor_shapes(self._config)) - {
            path.name for path in (self._folder / BLOCKS).iterdir()
        }
        if missing:
            raise ValueError(f"blocks never written: {', '.join(sorted(missing))}")
        if tokenizer is not None:
            (self._folder / "tokenizer.model").write_bytes(tokenizer)
        write_json(self._folder / CONFIG, dataclasses.asdict(self._config))
        write_json(self._folder / MANIFEST, {"source": source, "tensors": self._tensors})


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
        writer = ModelWriter(folder, model.config)
        for block, names in tensor_shapes(model.config).items():
            writer.write_block(
                block, {name: np.asarray(arrays[name].astype(dtype)) for name in names}
            )
        writer.finish(tokenizer, source)


def tensor_sha256(tensor: np.ndarray) -> str:
    """sha256 of a tensor's bytes, row by row, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(tensor).view(np.uint8).data).hexdigest()


def manifest_sha256(path: str | Path) -> str:
    """What identifies a base model: the hash of its tensors' hashes, wherever it was made."""
    tensors = read_json(Path(path) / MANIFEST).get("tensors", {})
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


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
    fields = read_json(path / CONFIG)
    try:
        scaling = fields.pop("rope_scaling")
        return LlamaConfig(**fields, rope_scaling=scaling and RopeScaling(**scaling))
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{path / CONFIG}: not a jllama config ({error}); convert the model again"
        ) from error


def read_block(path: str | Path, block: str) -> dict[str, np.ndarray]:
    """The tensors of one block as stored, on the host, checked against the manifest.

    Raises:
        InputError: if the block is missing, unreadable or differs from its certificate.
    """
    path = Path(path)
    item = (path / BLOCKS / block).absolute()
    if not item.is_dir():
        raise InputError(f"{item}: block missing; convert the model again")
    try:
        tensors = ocp.PyTreeCheckpointer().restore(item)
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{item}: damaged ({error}); convert the model again") from error
    certified = read_json(path / MANIFEST)["tensors"]
    damaged = [
        name
        for name, tensor in tensors.items()
        if certified.get(name, {}).get("sha256") != tensor_sha256(tensor)
    ]
    if damaged:
        raise InputError(
            f"{item}: {', '.join(damaged)} differ from {MANIFEST}; the files were damaged after "
            "they were written, convert the model again"
        )
    return tensors


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
    _check_manifest(path, blocks)
    if ffn_bias:
        config = dataclasses.replace(config, ffn_bias=True)
    stored: dict[str, Any] = {}
    for block in blocks:
        for name, tensor in read_block(path, block).items():
            stored[name] = jnp.asarray(tensor).astype(PRECISIONS[precision])
    model = abstract_model(config, precision, remat=remat, platform=jax.default_backend())

    def fill(name, shape):
        if name.endswith(".bias"):
            return jnp.zeros(shape.shape, shape.dtype)
        return stored[name]

    nnx.update(model, map_named(fill, nnx.state(model)))
    return model


def _check_manifest(path: Path, blocks: Mapping[str, Mapping[str, tuple[int, ...]]]) -> None:
    tensors = read_json(path / MANIFEST).get("tensors", {})
    found = {name: tuple(tensor["shape"]) for name, tensor in tensors.items()}
    expected = {name: shape for block in blocks.values() for name, shape in block.items()}
    wrong = [
        f"{name}: {MANIFEST} says {found.get(name, 'nothing')}, {CONFIG} {expected.get(name)}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if wrong:
        raise InputError(f"{path} contradicts itself; convert it again\n  " + "\n  ".join(wrong))
