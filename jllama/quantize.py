"""Frozen weights in 8 and 4 bits: three formats, and the weights that hold them.

    int8   codes int8 `[O, I]`    scale fp32 `[O]`                w = code * scale
    int4   codes int4 `[O, I]`    scale bf16 `[O, ceil(I / 64)]`  w = code * scale
    nf4    codes uint4 `[O, I]`   absmax `[ceil(O * I / 64)]`     w = LEVELS[code] * absmax

int8 has a scale for every row, its largest magnitude / 127. int4 has one for 64 inputs of a row, of
either sign (`_int4`). nf4 is that of bitsandbytes (QLoRA, Dettmers et al., 2023): its blocks of 64
run on over the ends of rows, and its absmax are fp32 or, doubly quantised, 8-bit codes with a mean,
and an absmax for 256 of them. The last group of a row, and the last block, may be shorter.

`jllama.folders.codes` has them on disk.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt

from jllama.config import GROUP, NESTED, Base
from jllama.layers import Matrix
from jllama.model import Llama

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


class Coded(Matrix, nnx.Module):
    """A matrix in codes, made again for every product.

    It is not differentiated, so only the codes wait for the backward pass. XLA fuses making it into
    the product where it is no more than a conversion and a multiplication.
    """

    codes: nnx.Param
    fuses = True

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]  # nothing writes it
        rows, width = self.codes.shape
        return rows, width

    def product(self, x: Float[Array, "... I"], **how: Any) -> Float[Array, "... O"]:
        graphdef, state = nnx.split(self)
        return _product(graphdef, tuple(sorted(how.items())), state, x)

    def forward(self, x: Float[Array, "... I"], **how: Any) -> Float[Array, "... O"]:
        """x W^T, as `product`."""
        return super().product(x, **how)

    def backward(self, slope: Float[Array, "... O"]) -> Float[Array, "... I"]:
        """The gradient of x, given that of its product."""
        return jnp.einsum("...o,oi->...i", slope, self.matrix(slope.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(graphdef: nnx.GraphDef, how: tuple, state: nnx.State, x: Array) -> Array:
    return _product_forward(graphdef, how, state, x)[0]


def _product_forward(graphdef, how, state, x):
    kept, dtype = state, jnp.zeros((), x.dtype)
    if not nnx.merge(graphdef, state).fuses:  # no matrix is made before it is wanted
        state, x = jax.lax.optimization_barrier((state, x))
    return nnx.merge(graphdef, state).forward(x, **dict(how)), (kept, dtype)


def _product_backward(graphdef, how, kept, slope):
    # The barrier keeps XLA from using one matrix for both passes.
    state, slope = jax.lax.optimization_barrier((kept[0], slope))
    return None, nnx.merge(graphdef, state).backward(slope).astype(kept[1].dtype)


_product.defvjp(_product_forward, _product_backward)


class Int8(Coded):
    """A matrix in int8, with a scale for each row."""

    def __init__(self, codes: Int[Array, "O I"], scale: Float[Array, " O"]):
        self.codes, self.scale = nnx.Param(codes), nnx.Param(scale)

    def matrix(self, dtype: DTypeLike) -> Float[Array, "O I"]:
        return (self.codes[...].astype(jnp.float32) * self.scale[...][:, None]).astype(dtype)

    def forward(self, x: Float[Array, "... I"], **how: Any) -> Float[Array, "... O"]:
        """With the codes, which bf16 holds exactly, and then by the scales."""
        return self._scaled(jnp.einsum("...i,oi->...o", x, self.codes[...].astype(x.dtype), **how))

    def backward(self, slope: Float[Array, "... O"]) -> Float[Array, "... I"]:
        codes = self.codes[...].astype(slope.dtype)
        return jnp.einsum("...o,oi->...i", self._scaled(slope), codes)

    def _scaled(self, y: Float[Array, "... O"]) -> Float[Array, "... O"]:
        scale = self.scale[...].reshape((1,) * (y.ndim - 1) + self.scale.shape)
        return (y.astype(jnp.float32) * scale).astype(y.dtype)


class Int4(Coded):
    """A matrix in int4, with a scale for each group of 64 inputs of a row."""

    def __init__(self, codes: Int[Array, "O I"], scale: Float[Array, "O J"]):
        self.codes, self.scale = nnx.Param(codes), nnx.Param(scale)

    def matrix(self, dtype: DTypeLike) -> Float[Array, "O I"]:
        return _stretched(self.codes[...].astype(dtype), self.scale[...].astype(dtype), GROUP)


class Nf4(Coded):
    """A matrix in bitsandbytes' nf4, its absmax as they are or doubly quantised."""

    fuses = False  # a table is more than XLA makes inside a product

    def __init__(
        self,
        codes: UInt[Array, "O I"],
        absmax: Array,
        nested_absmax: Float[Array, " K"] | None = None,
        nested_offset: Float[Array, ""] | None = None,
    ):
        self.codes, self.absmax = nnx.Param(codes), nnx.Param(absmax)
        double = nested_absmax is not None
        self.nested_absmax: Any = nnx.Param(nested_absmax) if double else nnx.data(None)
        self.nested_offset: Any = nnx.Param(nested_offset) if double else nnx.data(None)

    def matrix(self, dtype: DTypeLike) -> Float[Array, "O I"]:
        absmax = self.absmax[...]
        if self.nested_absmax is not None:
            steps = jnp.asarray(nested_levels())[absmax.astype(jnp.int32)]
            absmax = _stretched(steps[None], self.nested_absmax[...][None], NESTED)[0]
            absmax = absmax + self.nested_offset[...]
        levels = jnp.asarray(LEVELS)[self.codes[...].astype(jnp.int32)]
        flat = _stretched(levels.reshape(1, -1), absmax[None], GROUP)
        return flat.reshape(self.shape).astype(dtype)


CLASSES: Mapping[str, type[Coded]] = {"int8": Int8, "int4": Int4, "nf4": Nf4}


def quantised(matrix: Float[Array, "O I"], base: Base) -> Coded:
    """A matrix in the format of a base; can be traced."""
    return CLASSES[base.format](**_codes(matrix, base))


def quantise_model(model: Llama, base: Base) -> None:
    """Puts the linears that a base holds in codes into its format."""
    for name, linear in model.linears().items():
        if base.holds(name):
            linear.weight = quantised(linear.weight.matrix(jnp.float32), base)


def in_codes(weights: nnx.State) -> bool:
    """Whether any of a model's weights is: nothing else in them is a whole number."""
    return any(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(weights))


@functools.partial(jax.jit, static_argnames="base")
def _codes(matrix: Float[Array, "O I"], base: Base) -> dict[str, Array]:
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


def _stretched(x: Float[Array, "O I"], by: Float[Array, "O J"], size: int) -> Float[Array, "O I"]:
    """Each group of a row times its factor."""
    rows, width = x.shape
    if width % size == 0:
        return (x.reshape(rows, -1, size) * by[:, :, None]).reshape(rows, width)
    return x * jnp.repeat(by, size, axis=1)[:, :width]


def _not_zero(scale: Array) -> Array:
    """Scales, with 1 for those of nothing but zeros, or of numbers that are as good as that."""
    least = jnp.asarray(jnp.finfo(jnp.float32).tiny, scale.dtype)
    return jnp.where(jnp.abs(scale) < least, jnp.ones_like(scale), scale)
