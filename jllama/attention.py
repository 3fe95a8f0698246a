"""Causal, packed and cached attention, and the one place that picks cuDNN or XLA.

Packed documents are moved into rows of their own: what lies between two documents is not masked but
never computed.

A layer's cache is the pair of its keys and its values, in the layout of the implementation: cuDNN
takes `[B, S, K, H]` alone; XLA's is `[B, K, S, H]`, so that what a head reads lies together and a
score is a dot product of rows.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jllama.sharding import with_dealt_rows

Implementation = Literal["xla", "cudnn"]


class Documents(NamedTuple):
    """Rows of one length, each for a document of a batch `[B, T]`, and the way back.

    Of three documents in a sequence of 7, `a a b b b c -`, in rows of 3, with 7 and 9 for "none":

        rows [[2 3 4] [0 1 7] [5 7 7]]    places [[3 4 0 1 2 6 9]]

    Documents of other lengths may lie in other rows; what lies in none is padding. Where rows are
    dealt to several devices, each counts from its own first position, and place.
    """

    rows: Int[Array | np.ndarray, "n L"]  # of each place the position in the batch, or one behind
    places: Int[Array | np.ndarray, "B T"]  # of each position the place, or one behind


LayerCache = tuple[Float[Array, "B ... H"], Float[Array, "B ... H"]]


def choose_implementation(platform: str, dtype: DTypeLike, head_dim: int) -> Implementation:
    """cuDNN's flash attention where it exists, else XLA.

    cuDNN wants a GPU, 16-bit inputs and heads of a multiple of 8 up to 128, which no published
    LLaMA passes: larger ones it takes on some cards only, and a plan cannot ask the card. Below 32
    XLA's fused kernel is the only one that every version accepts.
    """
    sixteen_bit = jnp.dtype(dtype).itemsize == 2
    fits = head_dim % 8 == 0 and 32 <= head_dim <= 128
    return "cudnn" if platform == "gpu" and sixteen_bit and fits else "xla"


def causal_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    documents: Sequence[Documents] | None,
    implementation: Implementation,
) -> Float[Array, "B T N H"]:
    """Each position sees itself and earlier ones; with `documents`, only those of its own.

    Padding on the right needs no mask: nothing before it can see it.
    """
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, implementation=implementation
    )
    if documents is None:
        return attend(query, key, value)
    seen = jnp.zeros_like(query)
    for rows, places in documents:
        seen += _moved(
            attend(*(_moved(x, rows, places) for x in (query, key, value))), places, rows
        )
    return seen


@jax.custom_vjp
@jax.named_scope("packing")
def _moved(
    x: Float[Array, "X Y N H"], to: Int[Array, "Z W"], back: Int[Array, "X Y"]
) -> Float[Array, "Z W N H"]:
    """What lies at the flat positions `to` in x, or 0 behind its end; `back` is the way back.

    As no two places are filled from one, the gradient is a gather, too, where JAX would add up.
    """

    def of_a_device(x, to):
        return x.reshape(-1, *x.shape[2:]).at[to].get(mode="fill", fill_value=0)

    return with_dealt_rows(of_a_device)(x, to)


def _moved_forward(x, to, back):
    return _moved(x, to, back), (to, back)


def _moved_backward(ways, slope):
    to, back = ways
    return _moved(slope, back, to), None, None


_moved.defvjp(_moved_forward, _moved_backward)


def make_cache(
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    slots: int,
    implementation: Implementation,
) -> LayerCache:
    """A cache of `slots` slots, the first T of them filled."""

    def laid_out(filled):
        cache = jnp.pad(filled, ((0, 0), (0, slots - filled.shape[1]), (0, 0), (0, 0)))
        return cache if implementation == "cudnn" else cache.swapaxes(1, 2)

    return laid_out(key), laid_out(value)


def cached_attention(
    query: Float[Array, "B 1 N H"],
    key: Float[Array, "B 1 K H"],
    value: Float[Array, "B 1 K H"],
    positions: Int[Array, "B 1"],
    cache: LayerCache,
    implementation: Implementation,
) -> tuple[Float[Array, "B 1 N H"], LayerCache]:
    """Writes a key and a value into slot p of each row; its query then sees the slots 0 to p.

    What lies behind p has no weight.
    """
    attend = {"xla": _cached_xla, "cudnn": _cached_cudnn}[implementation]
    return attend(query, key, value, positions, cache)


def _cached_xla(query, key, value, positions, cache: LayerCache):
    """Two batched products over `[B, K, S, H]`, fp32 between them."""
    B, K, S, H = cache[0].shape
    dtype = cache[0].dtype  # fp32 also for bf16, where a CPU is to read it
    at = jnp.arange(B)[:, None], jnp.arange(K)[None], positions
    keys, values = (
        slots.at[at].set(new[:, 0].astype(dtype))
        for slots, new in zip(cache, (key, value), strict=True)
    )
    query_BKGH = query.reshape(B, K, -1, H).astype(dtype)
    scores_BKGS = jnp.einsum(
        "BKGH,BKSH->BKGS", query_BKGH, keys, preferred_element_type=jnp.float32
    ) / math.sqrt(H)
    seen = jnp.arange(S)[None] <= positions
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores_BKGS, -jnp.inf))
    out_BKGH = jnp.einsum("BKGS,BKSH->BKGH", weights.astype(dtype), values)
    return out_BKGH.reshape(query.shape).astype(query.dtype), (keys, values)


def _cached_cudnn(query, key, value, positions, cache: LayerCache):
    """Flash attention over the filled slots of `[B, S, K, H]`.

    On a GPU, XLA would write the product of all values and weights to memory before it sums them.
    """
    keys, values = write_slot(cache[0], key, positions), write_slot(cache[1], value, positions)
    filled = positions[:, 0] + 1
    out = jax.nn.dot_product_attention(
        query,
        keys,
        values,
        query_seq_lengths=jnp.ones_like(filled),
        key_value_seq_lengths=filled,
        implementation="cudnn",
    )
    return out, (keys, values)


def write_slot(
    slots: Float[Array, "B S K H"], new: Float[Array, "B 1 K H"], positions: Int[Array, "B 1"]
) -> Float[Array, "B S K H"]:
    """Half of a cache with one slot of every row replaced."""
    if len(slots) == 1:  # a scatter also reads what it replaces, in a kernel of its own
        return jax.lax.dynamic_update_slice_in_dim(slots, new, positions[0, 0], axis=1)
    return slots.at[jnp.arange(len(slots))[:, None], positions].set(new)
