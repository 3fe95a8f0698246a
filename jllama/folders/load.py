"""From a model folder to a `Llama`, and back."""

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jllama.attention import choose_implementation
from jllama.config import (
    PRECISIONS,
    Base,
    LlamaConfig,
    LoraConfig,
    Precision,
    Remat,
    tensor_shapes,
    weight_bytes,
)
from jllama.errors import InputError
from jllama.folders.codes import from_disk, parts_of
from jllama.folders.files import room_for, whole_folder
from jllama.folders.model import (
    ModelWriter,
    base_of,
    check_manifest,
    read_base,
    read_block,
    read_config,
)
from jllama.lora import attach
from jllama.machine import host_memory_mib
from jllama.model import Llama, map_named, named_arrays
from jllama.quantize.weights import Coded, quantise_model, quantised
from jllama.sharding import Place, is_half_bytes, of_the_base, on_host, put


def abstract_model(
    config: LlamaConfig,
    precision: Precision,
    *,
    remat: Remat = "none",
    platform: str = "cpu",
    lora: LoraConfig | None = None,
    base: Base | None = None,
) -> Llama:
    """The model, with adapters if asked for, as shapes in place of weights: allocates nothing."""
    dtype = PRECISIONS[precision]
    attention = choose_implementation(platform, dtype, config.head_dim)

    def build() -> Llama:
        model = Llama(config, dtype=dtype, remat=remat, attention=attention, rngs=nnx.Rngs(0))
        if base is not None:
            quantise_model(model, base)
        if lora is not None:
            attach(model, lora, jax.random.key(0))
        return model

    return nnx.eval_shape(build)


def random_model(
    config: LlamaConfig,
    precision: Precision,
    *,
    remat: Remat = "none",
    seed: int = 0,
    base: Base | None = None,
    mesh: Mesh | None = None,
) -> Llama:
    """A model of random weights with logits of order one, made on the device, tensor by tensor.

    For measuring: a model of any size is there in seconds, and never on the disk.

    Args:
        mesh: devices to cut the weights over; the first one makes each of them.
    """
    place = of_the_base(mesh) if mesh is not None and mesh.size > 1 else None
    model = abstract_model(config, precision, remat=remat, platform=jax.default_backend())
    key, draws = jax.random.key(seed), iter(range(len(jax.tree.leaves(nnx.state(model)))))
    coded: dict[str, Coded] = {}

    def fill(name, shape):
        there = place(name, shape.shape) if place else None
        if len(shape.shape) == 1:
            return jnp.full(shape.shape, not name.endswith(".bias"), shape.dtype, device=there)
        matrix = _random_matrix(jax.random.fold_in(key, next(draws)), shape.shape, shape.dtype)
        if base is None or not base.holds(name):
            return jax.device_put(matrix, there, donate=True) if there else matrix
        coded[name] = jax.block_until_ready(_cut(quantised(matrix, base), name, place))
        return shape

    state = map_named(fill, nnx.state(model))
    nnx.update(model, state)
    _put(model, coded)
    return model


def _put(model: Llama, coded: Mapping[str, Coded]) -> None:
    """Gives a model the weights in codes, by the names of tensors."""
    for name, linear in model.linears().items():
        if f"{name}.weight" in coded:
            linear.weight = coded[f"{name}.weight"]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_matrix(key, shape: tuple[int, int], dtype: Any):
    """`[out, in]`; one fused kernel, which needs no memory but for its result."""
    return jax.random.normal(key, shape, dtype) / jnp.asarray(math.sqrt(shape[1]), dtype)


def load_model(
    path: str | Path,
    precision: Precision = "bf16",
    *,
    remat: Remat = "none",
    ffn_bias: bool = False,
    base: Base | None = None,
    mesh: Mesh | None = None,
) -> Llama:
    """A model folder as a callable: int32 tokens `[B, T]` -> fp32 logits `[B, T, V]`.

    Args:
        path: the model folder.
        precision: dtype of the frozen weights and of the activations.
        remat: what the backward pass recomputes.
        ffn_bias: adds feed-forward biases, all zero, as the original report's model had.
        base: the format that the linears are held in; by default that of the folder.
        mesh: devices to cut the weights over; by default the first one has all. Of a weight each
            device reads its own part, or, where it is put into codes, its own rows.

    Raises:
        InputError: if the folder is incomplete or contradicts its config, or is in another format.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}; choose from {', '.join(PRECISIONS)}")
    path, config = Path(path), read_config(path)
    stored, base = read_base(path), base_of(path, base)
    _refuse_beyond_memory(path, weight_bytes(config, precision, base))
    check_manifest(path, config)
    if ffn_bias:
        config = dataclasses.replace(config, ffn_bias=True)
    place = of_the_base(mesh) if mesh is not None and mesh.size > 1 else None
    arrays: dict[str, Any] = {}
    coded: dict[str, Coded] = {}
    for block, shapes in tensor_shapes(config).items():
        tensors = read_block(path, block)
        for name, shape in shapes.items():
            if base is None or not base.holds(name):
                arrays[name] = _read(name, tensors[name], PRECISIONS[precision], place)
            elif stored is None:
                coded[name] = _in_codes(tensors[name], name, base, place)
            else:
                weight = from_disk(parts_of(name, tensors), (shape[0], shape[1]), base)
                coded[name] = _cut(weight, name, place)
    model = abstract_model(config, precision, remat=remat, platform=jax.default_backend())

    def fill(name, shape):
        if name.endswith(".bias"):
            there = place(name, shape.shape) if place else None
            return jnp.zeros(shape.shape, shape.dtype, device=there)
        return arrays.get(name, shape)

    nnx.update(model, map_named(fill, nnx.state(model)))
    _put(model, coded)
    return model


def _read(name: str, tensor: np.ndarray, dtype: Any, place: Place | None) -> jax.Array:
    """A tensor of a file, rounded once, where its place is."""
    if place is None:
        return jnp.array(tensor).astype(dtype)
    return jax.make_array_from_callback(
        tensor.shape, place(name, tensor.shape), lambda part: tensor[part].astype(dtype)
    )


def _in_codes(tensor: np.ndarray, name: str, base: Base, place: Place | None) -> Coded:
    """A tensor of a file in codes: each device has its own rows of it put into codes.

    The rows of nf4 are not independent of each other: it passes the first device whole.
    """

    @functools.cache
    def of_rows(first: int, last: int) -> Coded:
        # One at a time: what is not in codes yet is the largest that is held.
        return jax.block_until_ready(quantised(jnp.array(tensor[first:last]), base))

    if place is None or base.format == "nf4":
        return _cut(of_rows(0, len(tensor)), name, place)
    whole = nnx.eval_shape(lambda: quantised(jnp.zeros(tensor.shape, tensor.dtype), base))
    graphdef, shapes = nnx.split(whole)
    _refuse_half_bytes(shapes)
    leaves, structure = jax.tree.flatten(shapes)

    def read(number: int) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(len(tensor))
            mine = jax.tree.leaves(nnx.state(of_rows(first, last)))[number]
            return np.asarray(mine)[(slice(None), *index[1:])]

        shape = leaves[number].shape
        return jax.make_array_from_callback(shape, place(name, shape), part)

    parts = [read(number) for number in range(len(leaves))]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, parts))


def _refuse_half_bytes(parts: nnx.State) -> None:
    """Before 0.11, JAX gives such arrays a layout that no compiled program takes."""
    if jax.__version_info__ < (0, 11) and any(map(is_half_bytes, jax.tree.leaves(parts))):
        raise InputError(
            f"jax {jax.__version__} cannot cut weights in 4 bits over several devices; install "
            "jax 0.11, which needs Python 3.12, or use --base int8"
        )


def _cut(weight: Coded, name: str, place: Place | None) -> Coded:
    """A weight in codes, each of its parts where its place is."""
    if place is None:
        return weight
    graphdef, parts = nnx.split(weight)
    _refuse_half_bytes(parts)
    return nnx.merge(graphdef, put(parts, jax.tree.map(lambda x: place(name, x.shape), parts)))


def _refuse_beyond_memory(path: Path, size: int) -> None:
    """On a CPU the system would end the process without a word; a GPU refuses by itself."""
    limit = host_memory_mib() * 2**20
    if jax.default_backend() == "cpu" and 0 < limit < size:
        raise InputError(
            f"{path}: its weights take {size / 2**20:,.0f} MiB, and this machine has "
            f"{limit / 2**20:,.0f}; use a smaller model, or --precision bf16"
        )


def save_model(
    path: str | Path, model: Llama, dtype: Any, tokenizer: Mapping[str, bytes], source: str
) -> None:
    """Writes a model without adapters as a model folder, its weights rounded once to `dtype`.

    Of several processes the first one does, and gets the parts that lie with the others.

    Raises:
        InputError: if a weight is not finite, the folder exists or the disk is full.
    """
    if jax.process_index():
        deque(_weights_of_blocks(model, dtype), maxlen=0)
        return
    size = model.config.parameter_count * np.dtype(dtype).itemsize
    with room_for(size, Path(path)), whole_folder(path) as folder:
        writer = ModelWriter(folder, model.config, source)
        for block, weights in _weights_of_blocks(model, dtype):
            writer.write_block(block, weights)
        writer.finish(tokenizer)


def _weights_of_blocks(model: Llama, dtype: Any) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The name and the tensors of each block, one after the other, in `dtype` on the host."""
    arrays = named_arrays(nnx.state(model))
    for block, names in tensor_shapes(model.config).items():
        yield block, {name: on_host(arrays[name].astype(dtype)) for name in names}
