"""Linear, embedding, norm and rotary embedding. Shapes use the alphabet of `model.py`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Key

from jllama.config import LinearScaling, LlamaConfig
from jllama.sharding import dealt

INITIAL_STD = 0.02


def matmul_precision(dtype: DTypeLike) -> str:
    """fp32 means fp32: no TF32 on a GPU."""
    return "highest" if dtype == jnp.float32 else "default"


class Matrix:
    """A matrix `[out, in]`, however it is stored: what a network asks of it.

    Whoever uses a weight asks it for products and lengths, and nothing else knows how it is stored:
    as it is (`Weight`), or in 8 or 4 bits (`jllama.quantize`).
    """

    shape: tuple[int, int]

    def matrix(self, dtype: DTypeLike) -> Float[Array, "O I"]:
        """The whole matrix."""
        raise NotImplementedError

    def product(self, x: Float[Array, "... I"], **how: Any) -> Float[Array, "... O"]:
        """x W^T, in x's dtype unless `how`, for `jnp.einsum`, says otherwise."""
        return jnp.einsum("...i,oi->...o", x, self.matrix(x.dtype), **how)

    def squared_lengths(self, dtype: DTypeLike) -> Float[Array, " O"]:
        """|W|^2 of every row, fp32, as the network in `dtype` has W."""
        return jnp.sum(jnp.square(self.matrix(dtype).astype(jnp.float32)), axis=1)


class Weight(Matrix, nnx.Param):
    """A matrix that is stored as it is.

    A weight that learns is fp32 and is cast to the network's dtype here; a frozen one has it.
    """

    def matrix(self, dtype: DTypeLike) -> Float[Array, "O I"]:
        return self[...].astype(dtype)

    def rows(self, ids: Int[Array, "..."]) -> Float[Array, "... I"]:
        """Some rows, as stored."""
        return self[...][ids]


class WidenedWeight(Weight):
    """A matrix of a bf16 network held as fp32: products are as exact, and rounded at the end."""

    def product(self, x: Float[Array, "... I"], **how: Any) -> Float[Array, "... O"]:
        y = super().product(x.astype(self.dtype), **how)
        return y.astype(how.get("preferred_element_type", x.dtype))


class Linear(nnx.Module):
    """y = x W^T, with W `[out, in]` as Meta stores it, plus an adapter where one is attached."""

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        initial = INITIAL_STD * jax.random.normal(rngs.params(), shape)
        self.weight: Matrix = Weight(initial.astype(dtype))
        self.bias = nnx.Param(jnp.zeros(shape[:1], dtype)) if bias else nnx.data(None)
        self.lora: Any = nnx.data(None)

    def __call__(self, x: Float[Array, "B T I"], key: Key[Array, ""] | None = None):
        """`[B, T, in]` -> `[B, T, out]`; with a key, the adapter's input is dropped out."""
        return together((self,), x, key)[0]

    def _with_low_rank(self, x: Float[Array, "B T I"], low: Float[Array, "B T R"] | None):
        """y, where the adapter has made `low` of x."""
        y = dealt(self.weight.product(x))
        if low is not None:
            y = self.lora.added(y, low, self.weight)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)[None, None, :]
        return y


def together(
    linears: Sequence[Linear], x: Float[Array, "B T I"], key: Key[Array, ""] | None = None
) -> list[Float[Array, "B T ..."]]:
    """What several linears make of one input.

    Their adapters read it as one: x, of which all drop the same, is multiplied with all A at once,
    and in the backward pass once with the gradients of all.
    """
    loras = [linear.lora for linear in linears if linear.lora is not None]
    lows = iter(loras[0].low_ranks(loras, x, key) if loras else ())
    return [
        linear._with_low_rank(x, None if linear.lora is None else next(lows)) for linear in linears
    ]


@jax.custom_vjp
def swiglu(gate: Float[Array, "B T F"], up: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
    """silu(gate) * up, whose gradients are made of the inputs in one pass."""
    return _swiglu(gate, up)[0]


@jax.named_scope("swiglu")
def _swiglu(gate, up):
    return jax.nn.silu(gate) * up, (gate, up)


@jax.named_scope("swiglu")
def _swiglu_backward(inputs, slope):
    gate, up, slope = (x.astype(jnp.float32) for x in (*inputs, slope))
    opened = jax.nn.sigmoid(gate)
    let_through = slope * opened
    of_up = (gate * let_through).astype(inputs[1].dtype)
    of_gate = up * (let_through + of_up.astype(jnp.float32) * (1 - opened))
    return of_gate.astype(inputs[0].dtype), of_up


swiglu.defvjp(_swiglu, _swiglu_backward)


class Embedding(nnx.Module):
    """A table `[V, D]`; the dtype of the rows it gives is the dtype of the whole network."""

    def __init__(self, vocab_size: int, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        initial = INITIAL_STD * jax.random.normal(rngs.params(), (vocab_size, dim))
        self.weight = Weight(initial.astype(dtype))
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.weight.rows(tokens).astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x), in fp32 and cast back, then times the weight (Meta's order of rounding)."""

    def __init__(self, dim: int, eps: float, *, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    @jax.named_scope("norms")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        wide = x.astype(jnp.float32)  # the mean of squares needs more than 8 bits
        spread = (wide * wide + self.eps) / x.shape[-1]
        normed = wide * jax.lax.rsqrt(jnp.sum(spread, axis=-1, keepdims=True))
        return normed.astype(x.dtype) * self.weight[...].astype(x.dtype)[None, None, :]


def rotary_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each rotary pair, fp32 `[H/2]`, stretched as the config says."""
    pairs = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.float32(config.rope_theta) ** pairs).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        return frequencies / np.float32(scaling.factor)
    turns = scaling.original_context * frequencies / (2 * np.pi)  # in the original context
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)  # 1: short waves stay, 0: slowed fully
    return (frequencies * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


Rotation = tuple[Float[Array, "B T 1 P"], Float[Array, "B T 1 P"]]


@jax.named_scope("rotary")
def rotation(positions: Int[Array, "B T"], frequencies: np.ndarray) -> Rotation:
    """Cosine and sine of every position's angle, fp32, ready to broadcast over heads."""
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


@jax.named_scope("rotary")
def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Turns the interleaved pairs (x[2i], x[2i+1]) of every head, in fp32."""
    cos, sin = by
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def to_half_rotated(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows `[heads * H, ...]` in Hugging Face's order of rotary pairs: 0 1 2 3 -> 0 2 1 3.

    Its pairs are (x[i], x[i + H/2]) where Meta's, and ours, are (x[2i], x[2i+1]).
    """
    paired = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows.shape)


def to_interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `to_half_rotated`."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
