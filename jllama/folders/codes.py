"""Weights in codes as a model folder has them (`jllama.config.Base.parts`), and back.

Two 4-bit codes are a byte there, the first of them in its high half, as bitsandbytes has them.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, UInt

from jllama.config import Base
from jllama.errors import InputError
from jllama.quantize.weights import CLASSES, Coded, quantised


def to_disk(weight: Coded) -> dict[str, np.ndarray]:
    """The arrays of a weight as a model folder has them (`Base.parts`)."""
    arrays = {name: part[...] for name, part in vars(weight).items() if isinstance(part, nnx.Param)}
    if arrays["codes"].dtype != jnp.int8:
        arrays["codes"] = _pack(arrays["codes"], filling=_ZERO[arrays["codes"].dtype.name])
    return {name: np.asarray(array) for name, array in arrays.items()}


def coded_arrays(name: str, matrix: np.ndarray, base: Base) -> dict[str, np.ndarray]:
    """A tensor's arrays in a model folder, by their full names.

    Raises:
        InputError: if the matrix holds NaN or infinity, which have no code.
    """
    given = jnp.asarray(matrix)
    arrays = to_disk(quantised(given, base))
    if not jnp.isfinite(given).all():
        raise InputError(f"{name} holds NaN or infinity, which {base.format} cannot hold")
    return {f"{name}.{part}": array for part, array in arrays.items()}


def matrix_of(name: str, arrays: Mapping[str, np.ndarray], shape: tuple[int, int], base: Base):
    """A tensor's matrix in fp32 from a block of a model folder; errors as for `from_disk`."""
    return np.asarray(from_disk(parts_of(name, arrays), shape, base).matrix(jnp.float32))


def parts_of(name: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of a block's arrays those of one weight in codes: `codes`, `scale`, ..."""
    start = f"{name}."
    return {full.removeprefix(start): x for full, x in arrays.items() if full.startswith(start)}


def from_disk(arrays: Mapping[str, np.ndarray], shape: tuple[int, int], base: Base) -> Coded:
    """The weight `shape` whose arrays a model folder has.

    Raises:
        InputError: if their shapes or dtypes are others.
    """
    found = {name: (array.shape, array.dtype.name) for name, array in arrays.items()}
    if found != base.parts(shape):
        raise InputError(f"expected {base.parts(shape)}, found {found}")
    parts: dict[str, Any] = {name: jnp.asarray(array) for name, array in arrays.items()}
    if base.format != "int8":
        parts["codes"] = _unpack(parts["codes"], shape, base.format == "int4")
    return CLASSES[base.format](**parts)


_ZERO = {"int4": 0, "uint4": 7}  # the code of 0


@functools.partial(jax.jit, static_argnames="filling")
def _pack(codes: Array, filling: int) -> UInt[Array, " N"]:
    """Two 4-bit codes in a byte, the first in its high half; an odd last one beside a zero."""
    halves = codes.astype(jnp.int8).astype(jnp.uint8).reshape(-1) & 15
    halves = jnp.pad(halves, (0, halves.size % 2), constant_values=filling)
    return halves[::2] << 4 | halves[1::2]


@functools.partial(jax.jit, static_argnames=("shape", "signed"))
def _unpack(packed: UInt[Array, " N"], shape: tuple[int, int], signed: bool) -> Array:
    halves = jnp.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
    codes = halves[: shape[0] * shape[1]].reshape(shape)
    if not signed:
        return codes.astype(jnp.uint4)
    return ((codes ^ 8).astype(jnp.int8) - 8).astype(jnp.int4)
