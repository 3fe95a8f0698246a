"""From a matrix to its codes: the rule of each format, in arrays.

    int8   codes int8 `[O, I]`    scale fp32 `[O]`                w = code * scale
    int4   codes int4 `[O, I]`    scale bf16 `[O, ceil(I / 64)]`  w = code * scale
    nf4    codes uint4 `[O, I]`   absmax `[ceil(O * I / 64)]`     w = LEVELS[code] * absmax

int8 has a scale for every row, its largest magnitude / 127. int4 has one for 64 inputs of a row, of
either sign (`_int4`). nf4 is that of bitsandbytes (QLoRA, Dettmers et al., 2023): its blocks of 64
run on over the ends of rows, and its absmax are fp32 or, doubly quantised, 8-bit codes with a mean,
and an absmax for 256 of them. The last group of a row, and the last block, may be shorter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt

from jllama.config import GROUP, NESTED, Base

# The 16 numbers of nf4, and the 256 of which bitsandbytes chooses those of double quantisation.
LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_TINY = float(jnp.finfo(jnp.float32).tiny)  # an absmax below it is taken for it
_LARGEST = float(jnp.finfo(jnp.bfloat16).max) / 8  # a scale whose -8-fold is finite


@functools.partial(jax.jit, static_argnames="base")
def codes_of(matrix: Float[Array, "O I"], base: Base) -> dict[str, Array]:
    """The arrays of a matrix in the format of a base, by their names."""
    wide = matrix.astype(jnp.float32)
    if base.format == "int8":
        return _int8(wide)
    return _int4(wide) if base.format == "int4" else _nf4(wide, base.double)


def _int8(matrix: Float[Array, "O I"]) -> dict[str, Array]:
    scale = _not_zero(jnp.max(jnp.abs(matrix), axis=1) / 127)
    return {"codes": jnp.round(matrix / scale[:, None]).astype(jnp.int8), "scale": scale}


def _int4(matrix: Float[Array, "O I"]) -> dict[str, Array]:
    """A group's element of largest magnitude becomes -8: int4 reaches further below 0."""
    groups = _cut(matrix, GROUP)
    at = jnp.argmax(jnp.abs(groups), axis=-1, keepdims=True)
    largest = jnp.take_along_axis(groups, at, axis=-1)[..., 0]
    scale = jnp.clip(largest / -8, -_LARGEST, _LARGEST).astype(jnp.bfloat16)
    scale = _not_zero(scale)
    codes = jnp.clip(jnp.round(groups / scale.astype(jnp.float32)[..., None]), -8, 7)
    codes = codes.reshape(len(matrix), -1)[:, : matrix.shape[1]]
    return {"codes": codes.astype(jnp.int4), "scale": scale}


def _nf4(matrix: Float[Array, "O I"], double: bool) -> dict[str, Array]:
    blocks = _cut(matrix.reshape(1, -1), GROUP)[0]
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    bounds = (LEVELS[1:] + LEVELS[:-1]) / np.float32(2)
    inside = jnp.clip(blocks * (1 / jnp.maximum(absmax, _TINY))[:, None], -1, 1)
    codes = sum((inside > bound).astype(jnp.uint8) for bound in bounds)
    codes = codes.reshape(-1)[: matrix.size].reshape(matrix.shape).astype(jnp.uint4)
    if not double:
        return {"codes": codes, "absmax": absmax}
    offset = jnp.mean(absmax)
    nested = _cut((absmax - offset)[None], NESTED)[0]
    largest = jnp.max(jnp.abs(nested), axis=-1)
    inside = nested * (1 / jnp.where(largest > 0, largest, 1))[:, None]
    return {
        "codes": codes,
        "absmax": _nearest(inside).reshape(-1)[: absmax.size],
        "nested_absmax": largest,
        "nested_offset": offset,
    }


def _nearest(x: Float[Array, "N M"]) -> UInt[Array, "N M"]:
    """The 8-bit codes of numbers from -1 to 1."""
    levels = jnp.asarray(nested_levels())
    above = jnp.searchsorted(levels, x).clip(1, len(levels) - 1)
    nearer = levels[above] - x < x - levels[above - 1]
    return jnp.where(nearer, above, above - 1).astype(jnp.uint8)


@functools.cache
def nested_levels() -> np.ndarray:
    """The 256 numbers that 8-bit codes stand for, fp32 `[256]`: bitsandbytes' dynamic map.

    Between 10^-7 and 1, of either sign, the more of each power of ten the larger it is (8-bit
    optimizers, Dettmers et al., 2022). bitsandbytes rounds on the way: its numbers are these to
    1e-7.
    """
    positive: list[float] = []
    for power in range(7):
        edges = np.linspace(0.1, 1, 2**power + 1)
        positive += (10.0 ** (power - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
    return np.array(sorted([*positive, *(-x for x in positive), 0, 1]), np.float32)


def _cut(rows: Float[Array, "O I"], size: int) -> Float[Array, "O J G"]:
    """Rows in groups, the last of each filled up with zeros."""
    padded = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % size)))
    return padded.reshape(len(rows), -1, size)


def stretched(x: Float[Array, "O I"], by: Float[Array, "O J"], size: int) -> Float[Array, "O I"]:
    """Each group of a row times its factor."""
    rows, width = x.shape
    if width % size == 0:
        return (x.reshape(rows, -1, size) * by[:, :, None]).reshape(rows, width)
    return x * jnp.repeat(by, size, axis=1)[:, :width]


def _not_zero(scale: Array) -> Array:
    """Scales, with 1 for those of nothing but zeros, or of numbers that are as good as that."""
    least = jnp.asarray(jnp.finfo(jnp.float32).tiny, scale.dtype)
    return jnp.where(jnp.abs(scale) < least, jnp.ones_like(scale), scale)
