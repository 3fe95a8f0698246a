"""Causal, packed and cached attention, and the one place that picks cuDNN or XLA."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Implementation = Literal["xla", "cudnn"]


def choose_implementation(platform: str, dtype: jnp.dtype, head_dim: int) -> Implementation:
    """cuDNN's flash attention where it exists, else XLA.

    cuDNN wants a GPU, 16-bit inputs and heads of a multiple of 8 up to 256; below 32 XLA's
    fused kernel is the only one that every version accepts.
    """
    sixteen_bit = jnp.dtype(dtype).itemsize == 2
    fits = head_dim % 8 == 0 and 32 <= head_dim <= 256
    return "cudnn" if platform == "gpu" and sixteen_bit and fits else "xla"


def causal_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: Int[Array, "B T"] | None,
    implementation: Implementation,
) -> Float[Array, "B T N H"]:
    """Each position sees itself and earlier ones; with `segments`, only those of its own segment.

    Padding on the right needs no mask: nothing before it can see it.
    """
    mask = None
    if segments is not None:
        mask = (segments[:, :, None] == segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=True, implementation=implementation
    )


def cached_attention(
    query: Float[Array, "B 1 N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    positions: Int[Array, "B 1"],
    implementation: Implementation,
) -> Float[Array, "B 1 N H"]:
    """A query at position p sees the cache's slots 0 to p; what lies behind is never read.

    On a GPU, XLA would write the product of all values and weights to memory before it sums them.
    """
    seen = positions[:, 0] + 1
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=jnp.ones_like(seen),
        key_value_seq_lengths=seen,
        implementation=implementation,
    )
