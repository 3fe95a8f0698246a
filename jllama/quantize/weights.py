"""Frozen weights in 8 and 4 bits, as a network multiplies with them."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt

from jllama.config import GROUP, NESTED, Base
from jllama.layers import Matrix
from jllama.model import Llama
from jllama.quantize.formats import LEVELS, codes_of, nested_levels, stretched


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
        return stretched(self.codes[...].astype(dtype), self.scale[...].astype(dtype), GROUP)


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
            absmax = stretched(steps[None], self.nested_absmax[...][None], NESTED)[0]
            absmax = absmax + self.nested_offset[...]
        levels = jnp.asarray(LEVELS)[self.codes[...].astype(jnp.int32)]
        flat = stretched(levels.reshape(1, -1), absmax[None], GROUP)
        return flat.reshape(self.shape).astype(dtype)


CLASSES: Mapping[str, type[Coded]] = {"int8": Int8, "int4": Int4, "nf4": Nf4}


def quantised(matrix: Float[Array, "O I"], base: Base) -> Coded:
    """A matrix in the format of a base; can be traced."""
    return CLASSES[base.format](**codes_of(matrix, base))


def quantise_model(model: Llama, base: Base) -> None:
    """Puts the linears that a base holds in codes into its format."""
    for name, linear in model.linears().items():
        if base.holds(name):
            linear.weight = quantised(linear.weight.matrix(jnp.float32), base)


def in_codes(weights: nnx.State) -> bool:
    """Whether any of a model's weights is: nothing else in them is a whole number."""
    return any(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(weights))
