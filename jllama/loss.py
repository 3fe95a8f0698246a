"""Cross-entropy that never holds `[B, T, V]` in fp32."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jllama.layers import matmul_precision

CHUNK_BYTES = 64 * 2**20  # of fp32 logits at a time


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    x: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    head_learns: bool,
    chunk: int | None = None,
) -> Float[Array, ""]:
    """Cross-entropy in nats, summed over the supervised positions.

    The supervised positions are gathered and taken `chunk` at a time, as many chunks as the batch
    has of them. The gradient of x is formed in the same pass, so only it, `[B, T, D]`, waits for
    the backward pass: logits are neither kept nor computed twice. `head` gets a gradient, formed
    in fp32 in the same way, only if `head_learns`.
    """
    return _forward(x, head, targets, mask, head_learns, chunk)[0]


@jax.named_scope("loss")
def _forward(x, head, targets, mask, head_learns, chunk):
    D = x.shape[-1]
    stored, head = head, head.astype(x.dtype)
    rows, targets = x.reshape(-1, D), jnp.ravel(targets)
    chunks, positions = supervised_chunks(mask, head.shape[0], chunk)
    precision = matmul_precision(x.dtype)

    def one_chunk(index, carry):
        total, gradient, head_gradient = carry
        at, counts = positions(index)
        wanted = targets[at]
        logits = chunk_logits(rows[at], head)
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        losses = log_sum - jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        slope = jnp.exp(logits - log_sum[:, None]) - jax.nn.one_hot(wanted, head.shape[0])
        slope = jnp.where(counts[:, None], slope, 0).astype(x.dtype)
        pulled = jnp.einsum("CV,VD->CD", slope, head, precision=precision)
        if head_learns:
            head_gradient += jnp.einsum(
                "CV,CD->VD", slope, rows[at], precision=precision,
                preferred_element_type=jnp.float32,
            )  # fmt: skip
        total += jnp.sum(jnp.where(counts, losses, 0))
        return total, gradient.at[at].set(pulled, mode="drop"), head_gradient

    nothing = jnp.zeros(head.shape, jnp.float32) if head_learns else None
    carry = (jnp.zeros((), jnp.float32), jnp.zeros_like(rows), nothing)
    total, gradient, head_gradient = jax.lax.fori_loop(0, chunks, one_chunk, carry)
    if head_learns:
        head_gradient = head_gradient.astype(stored.dtype)
    return total, (gradient.reshape(x.shape), head_gradient)


def supervised_chunks(
    mask: Bool[Array, "B T"], vocab_size: int, chunk: int | None
) -> tuple[Int[Array, ""], Callable]:
    """The supervised positions in chunks: how many, and a function of a chunk's index.

    It gives the chunk's positions in the flat `[B * T]`, and which of them count: the last chunk is
    filled up with positions that are not supervised, or behind the end.

    Args:
        chunk: positions in a chunk; by default `chunk_size`.
    """
    size = chunk or chunk_size(mask.size, vocab_size)
    mask = jnp.ravel(mask)
    supervised = jnp.sum(mask)
    order = jnp.argsort(~mask, stable=True)  # supervised positions first
    order = jnp.pad(order, (0, -order.size % size), constant_values=order.size)

    def positions(index):
        at = jax.lax.dynamic_slice(order, (index * size,), (size,))
        return at, index * size + jnp.arange(size) < supervised

    return (supervised + size - 1) // size, positions


def chunk_size(positions: int, vocab_size: int) -> int:
    """So many positions that `[chunk, V]` in fp32 takes CHUNK_BYTES."""
    return min(positions, max(64, CHUNK_BYTES // (4 * vocab_size)))


def chunk_logits(x: Float[Array, "C D"], head: Float[Array, "V D"]) -> Float[Array, "C V"]:
    """Logits of some positions, in fp32; head in x's dtype."""
    return jnp.einsum(
        "CD,VD->CV", x, head, precision=matmul_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _backward(head_learns, chunk, gradients, slope):
    gradient, head_gradient = gradients
    pulled = None if head_gradient is None else slope * head_gradient
    return (slope * gradient.astype(slope.dtype)).astype(gradient.dtype), pulled, None, None


cross_entropy.defvjp(_forward, _backward)
